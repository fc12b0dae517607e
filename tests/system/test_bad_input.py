"""Whatever is put in, the answer is a clear error, soon, and nothing else is disturbed."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from llmstudiod.demo.tiny_gguf import TinyModel, write_tiny_gguf

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .daemon import BASE_URL, MODELS, SERVICE, SETTINGS, Daemon, unit_of, wait_until  # noqa: TID252

SOON_S = 3.0  # a second, and what a slow machine adds
GOOD = unit_of("tiny")


@pytest.fixture
def good(daemon: Daemon) -> Iterator[Daemon]:
    """The daemon with a good model loaded, which still runs and answers when the test is over."""
    daemon.put_recipe({"id": "tiny", "model_path": f"{MODELS}/tiny.gguf"})
    daemon.listen()
    daemon.chat()
    before = (daemon.pid(), daemon.show(GOOD, "MainPID", "InvocationID"))
    yield daemon
    assert daemon.chat()
    assert (daemon.pid(), daemon.show(GOOD, "MainPID", "InvocationID")) == before


def refused(daemon: Daemon, model: str) -> openai.APIStatusError:
    """Ask a faulty model, and return the error, which must come soon."""
    began = time.monotonic()
    with pytest.raises(openai.APIStatusError) as caught:
        daemon.chat(model)
    assert time.monotonic() - began < SOON_S
    return caught.value


def post(daemon: Daemon, body: bytes, *, path: str = "/v1/chat/completions") -> tuple[int, str]:
    """Send a body as it is; return status and answer."""
    request = urllib.request.Request(BASE_URL + path, data=body, headers={"Content-Type": "application/json"})
    with daemon.host.network():
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@dataclass(frozen=True)
class Faulty:
    """A recipe's fields and what the error must say, message and hint."""

    fields: dict[str, object]
    says: str
    hints: str = ""


MODEL = f"{MODELS}/bad.gguf"


@pytest.mark.parametrize(
    "faulty",
    [
        pytest.param(Faulty({"model_path": "/nowhere/m.gguf"}, "'/nowhere/m.gguf' does not exist"), id="no file"),
        pytest.param(Faulty({"model_path": f"{MODELS}/cut.gguf"}, "the download is incomplete"), id="truncated"),
        pytest.param(Faulty({"model_path": "/etc/passwd"}, "/etc/passwd"), id="no GGUF"),
        pytest.param(Faulty({"extra_args": {"no_such_flag": 1}}, "does not accept --no-such-flag"), id="wrong flag"),
        pytest.param(
            Faulty({"extra_args": {"rope_scaling": "sideways"}}, "llama-server refuses its command line"), id="value"
        ),
        pytest.param(Faulty({"model_path": f"{MODELS}/own.gguf"}, "has mode 0600", "chmod o+r"), id="unreadable"),
    ],
)
def test_faulty_model_is_told(good: Daemon, gguf_dir: Path, faulty: Faulty) -> None:
    """A model that cannot be loaded is answered with what is wrong, and leaves no unit behind."""
    good.host.put(gguf_dir / "tiny.gguf", MODEL)
    good.host.put(gguf_dir / "cut.gguf", f"{MODELS}/cut.gguf")
    good.host.run("install", "-m", "600", MODEL, f"{MODELS}/own.gguf")
    good.put_recipe({"id": "bad", "model_path": MODEL, **faulty.fields})
    good.systemctl("reload", SERVICE)
    error = refused(good, "bad")
    assert error.status_code == 503
    assert faulty.says in error.message
    assert isinstance(error.body, dict)
    assert faulty.hints in str(error.body["hint"])
    assert good.ctl("load", "bad", check=False).startswith("llmstudioctl: cannot load 'bad': ")
    assert [unit for unit in good.model_units() if "active running" in unit] == [f"{GOOD} loaded active running"]


def test_full_disk_is_told(good: Daemon, gguf_dir: Path) -> None:
    """When the unit's directories cannot be made, systemd's reason reaches the client."""
    good.host.put(gguf_dir / "tiny.gguf", MODEL)
    good.systemctl("reload", SERVICE)
    good.host.run("mount", "-t", "tmpfs", "-o", "nr_inodes=1,mode=700", "full", "/var/cache/private")
    try:
        error = refused(good, "bad")
    finally:
        good.host.run("umount", "/var/cache/private")
    assert error.status_code == 503
    assert "No space left on device" in error.message
    good.ctl("load", "bad")
    assert good.chat("bad")


def test_missing_llama_server_is_told(good: Daemon, gguf_dir: Path) -> None:
    """A setting that names no program fails the models that are to be started, not those that run."""
    good.host.put(gguf_dir / "tiny.gguf", MODEL)
    good.use_settings(llama_server="/opt/none/llama-server")
    good.systemctl("reload", SERVICE)
    error = refused(good, "bad")
    assert "/opt/none/llama-server" in error.message
    good.host.run("rm", SETTINGS)
    good.systemctl("reload", SERVICE)
    good.ctl("load", "bad")
    assert good.chat("bad")


@pytest.mark.parametrize("text", ["id: [", "id: other\nmodel_path: 5", "- 3", "\0", "id: faulty\nmodel_pth: /x"])
def test_faulty_recipe_is_told_and_the_good_are_served(good: Daemon, text: str) -> None:
    """A recipe that cannot be read is told with its file; the model that it names is unknown."""
    path = good.put_recipe(text, file="faulty.yaml")
    good.put_recipe({"id": "second", "model_path": f"{MODELS}/tiny.gguf"})
    good.systemctl("reload", SERVICE)
    assert path in good.ctl("check", check=False)
    assert refused(good, "faulty").status_code == 404
    assert good.chat("second")


def test_second_recipe_of_one_id_is_told(good: Daemon) -> None:
    """The first file keeps the id, and the fault names both."""
    first = good.put_recipe({"id": "twin", "model_path": f"{MODELS}/tiny.gguf", "max_model_len": 256}, file="a.yaml")
    second = good.put_recipe({"id": "twin", "model_path": "/nowhere.gguf"}, file="b.yaml")
    good.systemctl("reload", SERVICE)
    told = good.ctl("check", check=False)
    assert "'twin'" in told
    assert first in told
    assert second in told
    assert good.chat("twin")


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "not valid JSON"),
        (b"", 400, "not valid JSON"),
        (b"[1]", 400, "expected a JSON object"),
        (b"\xff\xfe", 400, "not valid JSON"),
        (b'{"model": 5}', 400, "expected the name of a model"),
        (b'{"model": "nobody"}', 404, "there is no model 'nobody'"),
        (b'{"model": "tiny"}', 400, "messages"),
        (b'{"model": "tiny", "messages": [], "x": "' + b"y" * 70_000 + b'"}', 413, "the body is over 64.0 KiB"),
    ],
)
def test_faulty_request_is_told(good: Daemon, body: bytes, status: int, says: str) -> None:
    """Each gets its status and a sentence, from us or from the model."""
    good.use_settings(max_body="64KiB")
    good.systemctl("reload", SERVICE)
    began = time.monotonic()
    got, answer = post(good, body)
    assert time.monotonic() - began < SOON_S
    assert (got, says in json.loads(answer)["error"]["message"]) == (status, True), answer


# Crashes


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that goes on for some seconds: time enough to kill it."""
    path = tmp_path_factory.mktemp("talkative") / "talkative.gguf"
    write_tiny_gguf(path, TinyModel(name="talkative", n_layers=8, n_embd=512, context_length=8192, eos_bias=-40))
    path.parent.chmod(0o755)
    return path


def test_crash_reaches_the_client_and_is_overcome(good: Daemon, talkative: Path) -> None:
    """Killed in the middle of a stream: the client reads why, systemd shows it, the next start clears it away."""
    good.host.put(talkative, f"{MODELS}/talkative.gguf")
    good.systemctl("reload", SERVICE)
    good.chat("talkative")
    unit = unit_of("talkative")
    first = good.show(unit, "InvocationID")

    def crash(stream: openai.Stream[openai.types.chat.ChatCompletionChunk]) -> None:
        for number, _ in enumerate(stream):
            if number == 1:
                good.host.run("systemctl", "kill", "--signal=SEGV", unit)

    with good.client() as client:
        stream = client.chat.completions.create(
            model="talkative", messages=[{"role": "user", "content": "a"}], max_tokens=6000, stream=True
        )
        with pytest.raises(openai.APIError, match=r"'talkative' ended: llama-server crashed \(signal 11\)"):
            crash(stream)
    assert good.state(unit) == "failed"
    assert unit in good.systemctl("--failed", "--no-legend", "--plain")
    assert good.status("talkative")["state"] == "failed"
    wait_until(lambda: _answers(good, "talkative"))  # after the back-off of the first failure
    assert good.systemctl("--failed", "--no-legend") == ""
    assert good.show(unit, "InvocationID") != first


def test_crash_of_an_idle_model_is_overcome(daemon: Daemon) -> None:
    """Killed while it idles: the state says so, and the next requests find a fresh unit."""
    daemon.listen()
    daemon.chat()
    first = daemon.show(GOOD, "InvocationID")
    daemon.systemctl("kill", "--signal=SEGV", GOOD)
    wait_until(lambda: daemon.status("tiny")["state"] == "failed")
    assert "signal 11" in daemon.ctl("status", "tiny")
    wait_until(lambda: _answers(daemon, "tiny"))
    assert daemon.show(GOOD, "InvocationID") != first


def _answers(daemon: Daemon, model: str) -> bool:
    try:
        return bool(daemon.chat(model))
    except openai.APIStatusError as error:
        if error.status_code == 503 and "Retry-After" in error.response.headers:
            return False
        raise
