"""From a listening socket to a reply and back: what an administrator and an unmodified client see."""

import http.client
import json
import re
import shlex
import threading
import time
from pathlib import Path

import openai
import pytest

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .daemon import MODELS, RECIPES, SERVICE, SOCKETS, Daemon, unit_of, wait_until  # noqa: TID252

UNIT = unit_of("tiny")
EMBED = {"id": "embed", "model_path": f"{MODELS}/embed.gguf", "embedding": True, "max_model_len": 512}


# Coming up


def test_socket_alone_serves_the_first_request(daemon: Daemon) -> None:
    """With nothing but the sockets started, a chat starts the daemon and the model and is answered."""
    daemon.listen()
    assert daemon.state(SERVICE) == "inactive"
    assert daemon.chat()
    assert daemon.state(SERVICE) == "active"
    assert daemon.state(UNIT) == "active"
    assert daemon.systemctl("--failed", "--no-legend") == ""


def test_starting_the_service_brings_up_the_sockets(daemon: Daemon) -> None:
    """`systemctl start llmstudiod` is enough: all sockets listen, and no model is started yet."""
    daemon.systemctl("start", "llmstudiod")
    assert {daemon.state(unit) for unit in SOCKETS} == {"active"}
    assert daemon.model_units() == []
    assert daemon.chat()
    assert "tiny" in daemon.ctl("list")


def test_both_addresses_are_served(daemon: Daemon) -> None:
    """`localhost` may mean either."""
    daemon.listen()
    for address in ("127.0.0.1", "[::1]"):
        with daemon.host.network(), openai.OpenAI(base_url=f"http://{address}:8080/v1", api_key="none") as client:
            assert [model.id for model in client.models.list()] == ["tiny"]


def test_openai_client_works_unmodified(daemon: Daemon, gguf_dir: Path) -> None:
    """Models, chat, stream, embeddings and an unknown model's error, through OpenAI's own client."""
    daemon.host.put(gguf_dir / "embed.gguf", f"{MODELS}/embed.gguf")
    daemon.put_recipe(EMBED)
    daemon.listen()
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "a bird"}]
    with daemon.client() as client:
        assert {model.id for model in client.models.list()} == {"tiny", "embed"}
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, temperature=0, seed=1)
        assert answer.choices[0].message.content
        assert answer.usage is not None
        chunks = list(
            client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=4, temperature=0, seed=1, stream=True
            )
        )
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert streamed == answer.choices[0].message.content
        vectors = client.embeddings.create(model="embed", input=["a bird", "a stone"])
        assert [len(item.embedding) for item in vectors.data] == [64, 64]
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
            client.chat.completions.create(model="gpt", messages=messages)


# The unit


def test_model_is_an_ordinary_service(daemon: Daemon) -> None:
    """status, journal and slice are where an administrator looks for them."""
    daemon.listen()
    daemon.chat()
    status = daemon.systemctl("status", UNIT)
    assert "LLM Studio model tiny" in status
    assert "active (running)" in status
    assert "llmstudio-models.slice" in status
    assert "--alias tiny --host /run/llmstudio-models/tiny/llama.sock" in status
    assert "listening on unix:///run/llmstudio-models/tiny/llama.sock" in daemon.host.journal(UNIT)
    identified = daemon.host.run("journalctl", "-q", "-o", "cat", "-t", "llmstudio-model-tiny").stdout
    assert "listening on unix:///run/llmstudio-models/tiny/llama.sock" in identified
    assert daemon.host.run("stat", "-c", "%a %G", "/run/llmstudio-models/tiny").stdout == "750 llmstudio-model\n"


# What systemd shows otherwise than it is given, and where it is looked at instead.
SHOWN_OTHERWISE = {
    "Before", "BindReadOnlyPaths", "Documentation", "Environment", "InaccessiblePaths", "IPAddressDeny",
    "LogExtraFields", "SystemCallFilter", "TemporaryFileSystem",
}  # fmt: skip
SHOWN_AS = {
    "TimeoutStartSec": ("TimeoutStartUSec", "30s"),
    "TimeoutStopSec": ("TimeoutStopUSec", "10s"),
    "LogRateLimitIntervalSec": ("LogRateLimitIntervalUSec", "0"),
    "SystemCallErrorNumber": ("SystemCallErrorNumber", "1"),  # EPERM
    "CapabilityBoundingSet": ("CapabilityBoundingSet", ""),
}


def test_unit_has_the_properties_that_were_asked_for(daemon: Daemon) -> None:
    """What `explain` shows is what systemd has made of it, property by property."""
    daemon.listen()
    daemon.chat()
    argv = json.loads(daemon.ctl("explain", "--json", "tiny"))["systemd_run"]
    assert "--slice=llmstudio-models.slice" in argv
    asked = [argv[index + 1].partition("=") for index, word in enumerate(argv) if word == "-p"]
    differing = {}
    for name, _, value in asked:
        if name in SHOWN_OTHERWISE:
            continue
        shown_name, expected = SHOWN_AS.get(name, (name, value))
        shown = daemon.show(UNIT, shown_name).get(shown_name)
        if shown is None or shlex.split(shown.strip("{}")) != shlex.split(expected):
            differing[name] = (expected, shown)
    # What was learned from this very run may have moved the limit of the next one a little.
    limit, limit_shown = differing.pop("MemoryMax", ("1", "1"))
    assert int(limit_shown or 0) == pytest.approx(int(limit), rel=0.01)
    assert differing == {}
    assert daemon.show(UNIT, "Slice") == {"Slice": "llmstudio-models.slice"}
    assert "llmstudiod.service" in daemon.show(UNIT, "Before")["Before"].split()
    made = daemon.show(UNIT, "Environment", "SystemCallFilter", "IPAddressDeny", "InaccessiblePaths")
    assert "LLMSTUDIO_RECIPE_HASH=sha256:" in made["Environment"]
    assert "connect" in made["SystemCallFilter"].split()
    assert "mount" not in made["SystemCallFilter"].split()
    assert set(made["IPAddressDeny"].split()) == {"::/0", "0.0.0.0/0"}
    assert "/etc/llmstudio" in made["InaccessiblePaths"]


# Going away


def test_idle_model_is_unloaded(daemon: Daemon) -> None:
    """After idle_timeout the unit is gone without a trace of failure; the next request brings it back."""
    daemon.put_recipe({"id": "tiny", "model_path": f"{MODELS}/tiny.gguf", "idle_timeout": "1s"})
    daemon.listen()
    daemon.chat()
    began = time.monotonic()
    wait_until(lambda: daemon.model_units() == [], timeout_s=8)
    assert time.monotonic() - began > 0.5
    assert daemon.systemctl("--failed", "--no-legend") == ""
    assert daemon.status("tiny")["state"] == "stopped"
    assert daemon.chat()


def test_unload_by_command(daemon: Daemon) -> None:
    """`llmstudioctl unload` returns when the unit is gone."""
    daemon.listen()
    daemon.chat()
    assert "unloaded: tiny" in daemon.ctl("unload", "tiny")
    assert daemon.model_units() == []


def test_unit_stopped_by_hand_is_started_again(daemon: Daemon) -> None:
    """`systemctl stop` on the model's unit is no failure: the daemon sees it and serves the next request afresh."""
    daemon.listen()
    daemon.chat()
    first = daemon.show(UNIT, "InvocationID")
    daemon.systemctl("stop", UNIT)
    wait_until(lambda: daemon.status("tiny")["state"] not in {"ready", "draining"})
    daemon.ctl("load", "tiny")
    assert daemon.chat()
    assert daemon.show(UNIT, "InvocationID") != first


def test_stopping_the_service_keeps_sockets_and_models(daemon: Daemon) -> None:
    """`systemctl stop llmstudiod` leaves the models and the sockets; the next connection starts it, and it goes on."""
    daemon.listen()
    daemon.chat()
    pid, starts = daemon.pid(UNIT), daemon.starts_of("tiny")
    began = time.monotonic()
    daemon.systemctl("stop", "llmstudiod")
    assert time.monotonic() - began < 5
    assert {daemon.state(unit) for unit in SOCKETS} == {"active"}
    assert daemon.state(SERVICE) == "inactive"
    assert daemon.pid(UNIT) == pid
    assert daemon.chat()
    assert daemon.state(SERVICE) == "active"
    assert (daemon.pid(UNIT), daemon.starts_of("tiny")) == (pid, starts)


@pytest.mark.parametrize("how", ["restart", "SIGKILL"])
def test_model_outlives_the_daemon(daemon: Daemon, how: str) -> None:
    """However the daemon ends, the next one finds the model, knows it, and serves it on."""
    daemon.listen()
    daemon.chat()
    shown = daemon.show(UNIT, "MainPID", "InvocationID")
    if how == "restart":
        daemon.systemctl("restart", SERVICE)
    else:
        daemon.host.run("kill", "-KILL", str(daemon.pid()))
    assert daemon.chat()
    assert daemon.show(UNIT, "MainPID", "InvocationID") == shown
    status = daemon.status("tiny")
    assert (status["state"], status["pid"]) == ("ready", int(shown["MainPID"]))
    causes = [step["cause"] for step in status["story"]]
    assert "it was running already" in causes
    if how == "restart":  # what it had written down is not lost; a moment of it is, where it was killed
        assert causes[0] == "wanted by a request"
    daemon.ctl("unload", "tiny")
    assert daemon.model_units() == []


def test_model_of_a_removed_recipe_is_stopped_by_the_next_daemon(daemon: Daemon) -> None:
    """Nobody could ask for it any more; one whose recipe has changed serves until it is idle, and is replaced."""
    for name in ("gone", "changed"):
        daemon.put_recipe({"id": name, "model_path": f"{MODELS}/tiny.gguf", "max_num_seqs": 1})
    daemon.listen()
    daemon.chat("gone")
    daemon.chat("changed")
    daemon.systemctl("stop", SERVICE)
    daemon.host.run("rm", f"{RECIPES}/gone.yaml")
    daemon.put_recipe({"id": "changed", "model_path": f"{MODELS}/tiny.gguf", "max_num_seqs": 2})
    first = daemon.pid(unit_of("changed"))
    assert daemon.chat("changed")
    wait_until(lambda: daemon.pid(unit_of("gone")) == 0, timeout_s=90)  # nobody is stopped at first sight
    wait_until(lambda: daemon.pid(unit_of("changed")) != first)
    assert daemon.chat("changed")
    assert daemon.starts_of("changed") == 2


# While it runs


@pytest.mark.parametrize("how", ["reload", "SIGHUP"])
def test_reload_takes_a_new_recipe(daemon: Daemon, how: str) -> None:
    """A recipe that was added is served after a reload; the model that runs already is left alone."""
    daemon.listen()
    daemon.chat()
    before = (daemon.pid(), daemon.pid(UNIT))
    daemon.put_recipe({"id": "second", "model_path": f"{MODELS}/tiny.gguf", "max_model_len": 256})
    daemon.put_recipe({"id": "tiny", "model_path": f"{MODELS}/tiny.gguf"})
    if how == "reload":
        daemon.systemctl("reload", "llmstudiod")
    else:
        daemon.systemctl("kill", "--kill-whom=main", "--signal=HUP", SERVICE)
        wait_until(lambda: "second" in daemon.ctl("list"))
    assert daemon.chat("second")
    assert (daemon.pid(), daemon.pid(UNIT)) == before


def test_status_text_tells_what_is_ready(daemon: Daemon) -> None:
    """`systemctl status llmstudiod` has one line on the models."""

    def text() -> str:
        return daemon.show(SERVICE, "StatusText")["StatusText"]

    daemon.systemctl("start", "llmstudiod")
    wait_until(lambda: text() == "1 model; ready: none")
    daemon.chat()
    wait_until(lambda: text() == "1 model; ready: tiny")
    daemon.put_recipe("id: [", file="faulty.yaml")
    daemon.systemctl("reload", "llmstudiod")
    wait_until(lambda: text() == "1 model; ready: tiny; 1 fault")


def test_port_answers_throughout_a_restart(daemon: Daemon) -> None:
    """During `systemctl restart` no connection is refused or reset: the socket waits for the new daemon."""
    daemon.listen()
    daemon.chat()
    answers: list[object] = []
    is_over = threading.Event()

    def ask() -> None:
        with daemon.host.network():
            while not is_over.is_set():
                connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=20)
                try:
                    connection.request("GET", "/v1/models")
                    answers.append(connection.getresponse().status)
                except OSError as error:
                    answers.append(error)
                finally:
                    connection.close()

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    first = daemon.pid()
    for _ in range(2):
        daemon.systemctl("restart", "llmstudiod")
    wait_until(lambda: len(answers) > 100)
    is_over.set()
    for asker in askers:
        asker.join(timeout=30)
    assert set(map(str, answers)) == {"200"}
    assert daemon.pid() != first


def test_daemon_says_what_it_does(daemon: Daemon) -> None:
    """A model's start and stop are a few lines in the daemon's journal, and none of them an error."""
    daemon.listen()
    daemon.chat()
    daemon.ctl("unload", "tiny")
    daemon.host.run("journalctl", "--sync")
    told = daemon.host.run("journalctl", "-q", "-o", "json", f"_PID={daemon.pid()}").stdout
    lines = [json.loads(line) for line in told.splitlines()]
    about_model = [line["MESSAGE"] for line in lines if re.match(r"tiny: ", line["MESSAGE"])]
    assert len(about_model) >= 4
    assert [line["MESSAGE"] for line in lines if int(line["PRIORITY"]) <= 4] == []


def test_administration_survives_a_restart(daemon: Daemon) -> None:
    """The admin socket's file is systemd's: neither a restart nor a stop of the service takes it away."""
    daemon.listen()
    assert "tiny" in daemon.ctl("list")
    daemon.systemctl("restart", "llmstudiod")
    assert "tiny" in daemon.ctl("list")
    daemon.systemctl("stop", "llmstudiod")
    assert "tiny" in daemon.ctl("list"), "the connection starts the service again"
