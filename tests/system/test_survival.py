"""What the daemon survives, and what its models survive of it: restarts, files that change, servers that hang."""

import asyncio
import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import openai
import pytest

from llmstudiod.demo.tiny_gguf import write_tiny_gguf

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .chaos_load import Load, Outcome  # noqa: TID252
from .daemon import MODELS, RECIPES, SERVICE, SOCKETS, Daemon, unit_of, wait_until  # noqa: TID252
from .failures import TALKATIVE  # noqa: TID252

NAMES = ("ada", "bob", "cyd")
KINDS = {"chat": 6, "stream": 4, "tokenize": 10, "health": 2}
LAUNCHER = "llmstudio-launcher.service"
LAUNCHER_STATE = "/var/lib/llmstudio-launcher"
FOLLOWER = "journalctl --quiet --follow"


def recipe(model: str, **changes: object) -> dict[str, object]:
    """Return the recipe of a small model."""
    return {"id": model, "model_path": f"{MODELS}/tiny.gguf", "max_model_len": 1024, "threads": 1} | changes


def error_of(daemon: Daemon, model: str) -> dict[str, str]:
    """Ask a model that cannot answer, and return the error."""
    with pytest.raises(openai.APIStatusError) as caught:
        daemon.chat(model)
    body = caught.value.body
    assert isinstance(body, dict)
    return body


class Asking:
    """Clients that ask three models and the daemon, in a thread, while the block lasts."""

    def __init__(self, daemon: Daemon, kinds: Mapping[str, int] = KINDS, *, pause_s: float = 0.01) -> None:
        self._daemon = daemon
        self.load = Load(1, clients=4, steady=0, pause_s=pause_s, models=NAMES, kinds=kinds)
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with self._daemon.host.network():
            asyncio.run(self.load.run())

    def __enter__(self) -> Load:
        self._thread.start()
        return self.load

    def __exit__(self, *_: object) -> None:
        self.load.is_over = True
        self._thread.join(60)


@contextlib.contextmanager
def drop_in(daemon: Daemon, model: str, *lines: str) -> Iterator[None]:
    """What an administrator adds to a model's unit, for as long as the block lasts."""
    directory = f"/etc/systemd/system/{unit_of(model)}.d"
    daemon.host.run("mkdir", "-p", directory)
    daemon.host.write(f"{directory}/test.conf", "\n".join(["[Service]", *lines, ""]))
    try:
        yield
    finally:
        daemon.host.run("rm", "-r", directory)
        daemon.systemctl("daemon-reload")


@pytest.fixture
def three(daemon: Daemon) -> Daemon:
    """The daemon with three models that are loaded."""
    for name in NAMES:
        daemon.put_recipe(recipe(name))
    daemon.use_settings(auto_recipes=False, drain_timeout="10s", wait_comment_interval="1s")
    daemon.listen()
    for name in NAMES:
        daemon.chat(name)
    return daemon


@pytest.mark.slow
def test_restarts_under_load_lose_nothing(three: Daemon) -> None:
    """Five restarts: every request is answered, every model keeps its process, and the gap is below a second."""
    pids = {name: three.pid(unit_of(name)) for name in NAMES}
    gaps = []
    with Asking(three) as load:
        for _ in range(5):
            count = len(load.outcomes)
            wait_until(lambda count=count: len(load.outcomes) > count + 50)  # type: ignore[misc]
            began = time.monotonic()
            three.systemctl("restart", SERVICE)
            wait_until(lambda began=began: _answered_after(load, began + 0.5))  # type: ignore[misc]
            ends = sorted(each.ended for each in load.outcomes if began - 1 < each.ended)
            gaps.append(max(later - earlier for earlier, later in itertools.pairwise(ends)))
    assert [each for each in load.outcomes if each.word not in {"ok", "retried"}] == []
    assert {name: three.pid(unit_of(name)) for name in NAMES} == pids
    assert min(gaps) < 1.0, gaps  # all of them, on a machine that has nothing else to do


def _answered_after(load: Load, moment: float) -> list[Outcome]:
    return [each for each in load.outcomes if each.began > moment and each.word == "ok"]


def test_idle_daemon_ends_and_comes_back(daemon: Daemon) -> None:
    """With exit_idle it leaves when nothing runs and nobody is connected; whoever comes next notices nothing."""
    daemon.use_settings(exit_idle="1s", idle_timeout="1s", drain_timeout="5s")
    daemon.listen()
    for _ in range(3):
        assert daemon.chat()
        assert daemon.state(SERVICE) == "active"
        wait_until(lambda: daemon.state(SERVICE) == "inactive", timeout_s=20)
        assert daemon.show(SERVICE, "Result")["Result"] == "success"
    # Requests that come at just the moment when it leaves.
    with Asking(daemon, {"health": 1}, pause_s=1.2) as load:
        time.sleep(15)
    assert [each for each in load.outcomes if each.word not in {"ok", "retried"}] == []
    assert len(load.outcomes) > 20


def test_running_model_keeps_the_daemon(daemon: Daemon) -> None:
    """Somebody has to look after it."""
    daemon.use_settings(exit_idle="1s", idle_timeout="10m")
    daemon.listen()
    daemon.chat()
    pid = daemon.pid()
    time.sleep(4)
    assert daemon.pid() == pid


def test_changed_files_count_by_themselves(three: Daemon) -> None:
    """A changed recipe replaces its model, an unchanged one goes on, a removed one goes, a new one is served."""
    before = {name: three.pid(unit_of(name)) for name in NAMES}
    three.put_recipe(recipe("ada", max_model_len=512))
    three.host.run("rm", f"{RECIPES}/bob.yaml")
    three.put_recipe(recipe("new"))
    wait_until(lambda: three.state(unit_of("ada")) == "inactive")
    wait_until(lambda: three.state(unit_of("bob")) == "inactive")
    assert three.chat("ada")
    assert three.chat("new")
    assert three.status("ada")["n_ctx"] == 512
    assert three.pid(unit_of("cyd")) == before["cyd"]
    assert error_of(three, "bob")["kind"] == "model_not_found"


def test_model_file_that_is_put_there_is_served(daemon: Daemon) -> None:
    """A GGUF that is copied into a model directory needs no reload."""
    daemon.listen()
    daemon.chat()
    daemon.host.run("cp", f"{MODELS}/tiny.gguf", f"{MODELS}/fresh.gguf")
    wait_until(lambda: "fresh" in daemon.ctl("list"), timeout_s=40)
    assert daemon.chat("fresh")


@pytest.mark.parametrize("how", ["reload", "restart", "nothing"])
def test_faulty_change_keeps_the_last_good_recipe(three: Daemon, how: str) -> None:
    """It is told, and the model serves on, also after an unload; the mended file counts again."""
    pid = three.pid(unit_of("ada"))
    path = three.put_recipe("id: ada\nmodel_path: [", file="ada.yaml")
    if how != "nothing":
        three.systemctl(how, SERVICE)
    wait_until(lambda: "last good version stays in force" in " ".join(three.status("ada")["warnings"]))
    assert three.chat("ada")
    assert three.pid(unit_of("ada")) == pid
    assert path in three.ctl("check", check=False)
    three.ctl("unload", "ada")
    assert three.chat("ada")
    three.put_recipe(recipe("ada"))
    wait_until(lambda: three.status("ada")["warnings"] == [])
    assert three.chat("ada")


def test_frozen_model_is_noticed_and_replaced(three: Daemon) -> None:
    """It accepts connections and answers nothing: the client is told why, and the next one gets a fresh process."""
    pid = three.pid(unit_of("ada"))
    three.systemctl("kill", "--signal=STOP", "--kill-whom=main", unit_of("ada"))
    error = error_of(three, "ada")
    assert error["kind"] == "upstream_crashed"
    assert "does not answer any more" in error["message"]
    assert "stopped by a signal" in error["message"]
    assert three.chat("ada")
    assert three.pid(unit_of("ada")) != pid
    causes = [step["cause"] for step in three.status("ada")["story"]]
    assert "it does not answer any more" in causes
    assert three.status("bob")["state"] == "ready"


def test_what_died_while_nobody_looked_is_told(three: Daemon) -> None:
    """A model that crashed while the daemon was down says so, with its last lines, and comes at the next request."""
    three.systemctl("stop", *SOCKETS, SERVICE)
    three.systemctl("kill", "--signal=SEGV", "--kill-whom=main", unit_of("ada"))
    wait_until(lambda: three.state(unit_of("ada")) == "failed")
    three.listen()
    wait_until(lambda: three.status("ada")["state"] == "failed")
    shown = three.status("ada")
    assert shown["kind"] == "crash"
    assert any("listening on" in line for line in shown["last_lines"])
    assert three.status("bob")["state"] == "ready"
    assert three.chat("ada")


def test_killed_daemon_is_followed_by_one_that_knows_them_all(three: Daemon, tmp_path: Path) -> None:
    """An unchanged model serves on in its process, a changed one is replaced when it is idle, each once."""
    write_tiny_gguf(tmp_path / "talkative.gguf", TALKATIVE)  # no pause of ours outlasts its reply
    three.host.put(tmp_path / "talkative.gguf", f"{MODELS}/talkative.gguf")
    three.put_recipe(recipe("cyd", model_path=f"{MODELS}/talkative.gguf", max_model_len=8192))
    three.systemctl("reload", SERVICE)
    wait_until(lambda: three.chat("cyd", max_tokens=1) and three.status("cyd")["n_ctx"] == 8192)
    pids = {name: three.pid(unit_of(name)) for name in NAMES}
    starts = {name: three.starts_of(name) for name in NAMES}
    with three.client() as client:
        stream = client.chat.completions.create(
            model="cyd", messages=[{"role": "user", "content": "a"}], max_tokens=6000, stream=True
        )
        next(iter(stream))
        three.put_recipe(recipe("ada", max_model_len=512))
        three.systemctl("kill", "--signal=KILL", SERVICE)
        with pytest.raises(openai.APIConnectionError):
            list(stream)
    assert three.chat("bob")
    assert three.pid(unit_of("bob")) == pids["bob"]
    wait_until(lambda: three.pid(unit_of("ada")) != pids["ada"])
    assert three.chat("ada")
    assert three.status("ada")["n_ctx"] == 512
    assert three.chat("cyd", max_tokens=1)
    assert three.pid(unit_of("cyd")) == pids["cyd"]
    assert {name: three.starts_of(name) for name in NAMES} == starts | {"ada": starts["ada"] + 1}


def test_unit_of_nobody_is_cleaned_up(three: Daemon) -> None:
    """A model whose recipe went away while the daemon was down is stopped after a while, and no other."""
    three.systemctl("stop", *SOCKETS, SERVICE)
    three.host.run("rm", f"{RECIPES}/ada.yaml")
    three.listen()
    assert three.chat("bob")
    assert three.state(unit_of("ada")) == "active"  # its recipe may come back
    wait_until(lambda: three.state(unit_of("ada")) == "inactive", timeout_s=60)
    assert [three.state(unit_of(name)) for name in ("bob", "cyd")] == ["active", "active"]


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_recipes_that_were_moved_away_for_a_moment(three: Daemon, how: str) -> None:
    """While the daemon was down, and whether or not it remembers them: each model serves on in its process."""
    pids = {name: three.pid(unit_of(name)) for name in NAMES}
    time.sleep(1.5)  # what was changed in the very moment of its reading is not remembered
    three.systemctl("reload", SERVICE)
    three.systemctl("stop", *SOCKETS, SERVICE)
    three.host.run("mv", RECIPES, f"{RECIPES}.away")
    if how == "empty":
        three.host.run("mkdir", RECIPES)
    three.listen()
    assert ("ada" in three.ctl("list")) == (how == "gone")
    if how == "gone":
        assert three.chat("ada")
    else:
        three.host.run("rmdir", RECIPES)
    three.host.run("mv", f"{RECIPES}.away", RECIPES)
    wait_until(lambda: "ada" in three.ctl("list"))
    wait_until(lambda: all(three.status(name)["state"] == "ready" for name in NAMES))
    assert all(three.chat(name) for name in NAMES)
    assert {name: three.pid(unit_of(name)) for name in NAMES} == pids


def test_model_without_its_socket_is_started_afresh(three: Daemon) -> None:
    """Found by a daemon that comes later: who asks waits some seconds, and it counts as no failure."""
    pid = three.pid(unit_of("ada"))
    three.systemctl("stop", *SOCKETS, SERVICE)
    three.host.run("sh", "-c", "rm /run/llmstudio-models/ada/llama.sock")
    three.listen()
    began = time.monotonic()
    assert three.chat("ada")
    assert time.monotonic() - began < 20
    assert three.pid(unit_of("ada")) != pid
    assert three.status("ada")["failures"] == 0
    assert "nobody listens at its socket" in [step["cause"] for step in three.status("ada")["story"]]
    assert three.status("bob")["state"] == "ready"


def test_full_disk_of_the_launcher_stops_no_start(daemon: Daemon) -> None:
    """A recipe that it has never seen is started, and one over HTTP is refused with the next step."""
    daemon.host.run("mkdir", "-p", LAUNCHER_STATE)
    daemon.host.run("mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", LAUNCHER_STATE)
    try:
        daemon.host.run("sh", "-c", f"dd if=/dev/zero of={LAUNCHER_STATE}/filler bs=4k 2>/dev/null || true")
        daemon.put_recipe(recipe("ada"))
        daemon.listen()
        assert daemon.chat("ada")
        assert "No space left on device" in daemon.host.journal(LAUNCHER)
    finally:
        daemon.systemctl("stop", LAUNCHER)
        daemon.host.run("umount", LAUNCHER_STATE)


def test_state_that_is_removed_is_written_again(daemon: Daemon) -> None:
    """What was kept, and what is kept from now on, is there after a restart."""
    daemon.put_recipe(recipe("ada"))
    daemon.put_recipe(recipe("bob"))
    daemon.listen()
    daemon.ctl("pin", "ada")
    daemon.host.run("sh", "-c", "rm /var/lib/llmstudio/state.db*")
    time.sleep(1.5)  # it looks once a second
    daemon.ctl("pin", "bob")
    daemon.systemctl("restart", SERVICE)
    wait_until(lambda: all(daemon.status(name)["is_pinned"] for name in ("ada", "bob")))
    assert "was removed while it was in use" in daemon.host.journal(SERVICE)


def test_crash_loop_is_ended_by_its_budget(daemon: Daemon) -> None:
    """Three failures within the window leave it down, until when is told, and reset lets it come back."""
    daemon.put_recipe(recipe("ada"))
    daemon.listen()
    for number in range(3):
        daemon.ctl("load", "ada")
        daemon.systemctl("kill", "--signal=SEGV", "--kill-whom=main", unit_of("ada"))
        wait_until(lambda number=number: daemon.status("ada")["failures"] == number + 1)  # type: ignore[misc]
    error = error_of(daemon, "ada")
    assert error["kind"] == "backing_off"
    assert "failed 3 times within 10m" in error["message"]
    assert "llmstudioctl reset ada" in error["hint"]
    assert 500 < daemon.status("ada")["retry_at"] - time.time() < 600
    assert "reset ada" in daemon.ctl("status", "ada")
    before = daemon.status("ada")
    daemon.systemctl("restart", SERVICE)
    wait_until(lambda: daemon.status("ada")["failures"] == 3)
    after = daemon.status("ada")
    names = ("state", "kind", "reason", "is_exhausted", "last_lines")
    assert [after[name] for name in names] == [before[name] for name in names]
    assert abs(after["retry_at"] - before["retry_at"]) < 2
    daemon.ctl("reset", "ada")
    assert daemon.model_units() == []  # systemd has forgotten the failed unit as well
    assert daemon.chat("ada")


def test_load_can_be_cancelled(daemon: Daemon) -> None:
    """Whoever waits is told, the process goes, and it is no failure."""
    daemon.put_recipe(recipe("ada"))
    daemon.listen()
    with drop_in(daemon, "ada", "ExecStartPost=+/usr/bin/kill -STOP $MAINPID"):
        waiting = daemon.host.popen("llmstudioctl", "load", "ada", stderr=-1)
        wait_until(lambda: daemon.status("ada")["state"] == "loading")
        assert "was cancelled" in daemon.ctl("cancel", "ada")
        _, said = waiting.communicate(timeout=30)
        assert "was cancelled" in said
        assert (daemon.status("ada")["state"], daemon.status("ada")["failures"]) == ("stopped", 0)
        assert daemon.model_units() == []
    assert daemon.chat("ada")


def test_launcher_that_dies_in_the_middle_of_a_start(daemon: Daemon) -> None:
    """It is asked again, finds the unit running as asked, and leaves it as it is."""
    daemon.put_recipe(recipe("ada"))
    daemon.listen()
    starts = daemon.starts_of("ada")
    with drop_in(daemon, "ada", "ExecStartPost=-+/usr/bin/pkill -KILL -f llmstudio-launcher"):
        assert daemon.chat("ada")
    assert daemon.starts_of("ada") == starts + 1
    assert daemon.status("ada")["failures"] == 0
    assert "status=9/KILL" in daemon.host.journal(LAUNCHER)


def test_what_is_not_as_asked_for_is_a_warning(daemon: Daemon) -> None:
    """A draft model of another vocabulary is ignored by llama-server, which says 200: it is told, now and later."""
    foreign = daemon.host.path(f"{MODELS}/tiny.gguf").read_bytes().replace(b"about", b"obaut")
    daemon.host.path(f"{MODELS}/draft.gguf").write_bytes(foreign)
    daemon.put_recipe(recipe("ada", draft_model=f"{MODELS}/draft.gguf"))
    daemon.put_recipe(recipe("bob", draft_model=f"{MODELS}/tiny.gguf"))
    daemon.listen()
    daemon.chat("bob")
    daemon.chat("ada")
    wait_until(lambda: daemon.status("ada")["alerts"])
    (alert,) = daemon.status("ada")["alerts"]
    assert alert.startswith("the draft model is not used")
    assert "the draft model is not used" in daemon.ctl("list")
    assert daemon.status("bob")["alerts"] == []
    daemon.systemctl("restart", SERVICE)
    wait_until(lambda: daemon.status("ada")["alerts"] == [alert])


def test_events_tell_what_happens(daemon: Daemon) -> None:
    """A snapshot, the steps of a load, a failure with its reason."""
    daemon.put_recipe(recipe("ada"))
    daemon.listen()
    daemon.ctl("list")
    watching = daemon.host.popen("llmstudioctl", "watch", "--json", stdout=-1)
    try:
        assert watching.stdout is not None
        events = (json.loads(line) for line in watching.stdout)
        assert [item["id"] for item in next(events)["data"]["instances"]] == ["ada"]
        daemon.chat("ada")
        daemon.systemctl("kill", "--signal=KILL", "--kill-whom=main", unit_of("ada"))
        steps = [step["data"] for step in _until_failed(events) if "from" in step["data"]]
        assert [step["to"] for step in steps] == ["starting", "loading", "ready", "failed"]
        assert steps[-1]["failure"]["kind"] == "killed"
    finally:
        watching.kill()


def _until_failed(events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for event in events:
        yield event
        if event["data"].get("to") == "failed":
            return


def test_followers_death_costs_nothing(three: Daemon) -> None:
    """The daemon's journalctl is killed, and journald: reasons and logs are there all the same."""
    for _ in range(2):
        wait_until(lambda: three.host.run("pkill", "-KILL", "-f", FOLLOWER, check=False).returncode == 0)
        three.systemctl("kill", "--signal=KILL", "systemd-journald.service")
    three.systemctl("kill", "--signal=SEGV", "--kill-whom=main", unit_of("ada"))
    wait_until(lambda: three.status("ada")["state"] == "failed")
    assert three.status("ada")["kind"] == "crash"
    three.ctl("load", "ada")
    assert "listening on" in three.ctl("logs", "ada")
    wait_until(lambda: three.host.run("pgrep", "-f", FOLLOWER, check=False).stdout)
