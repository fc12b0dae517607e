"""llmstudioctl as administrators type it, against a daemon with the embedded engine; the basics: `test_daemon.py`."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmstudiod.core.errors import DaemonUnreachableError
from llmstudiod.ctl.client import Client
from llmstudiod.ctl.progress import bar_line, load_progress
from tests.integration.ctl_programs import ctl, daemon_with_recipe, on_terminal
from tests.integration.running_daemon import RunningDaemon, running_daemon, wait_until

pytestmark = pytest.mark.engine


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    """A daemon with one GGUF without a recipe (`tiny`) and a recipe that a person wrote (`hand`)."""
    with daemon_with_recipe(tmp_path) as running:
        yield running


# Steering


def test_pin_restart_and_reload(daemon: RunningDaemon) -> None:
    """Each says what it did; a pin lasts until it is taken back."""
    daemon.ctl("load", "tiny")
    before = daemon.admin.get("instances", "tiny")["pid"]
    assert "pinned" in daemon.ctl("pin", "tiny").stdout
    assert daemon.admin.get("instances", "tiny")["is_pinned"] is True
    assert daemon.ctl("restart", "tiny").returncode == 0
    after = daemon.admin.get("instances", "tiny")
    assert (after["state"], after["pid"] != before, after["is_pinned"]) == ("ready", True, True)
    assert daemon.ctl("unpin", "tiny").returncode == 0
    assert daemon.admin.get("instances", "tiny")["is_pinned"] is False
    daemon.put_recipe({"id": "more", "model_path": str(daemon.home / "models" / "other.gguf")})
    assert daemon.ctl("reload").returncode == 0
    assert daemon.state("more") == "stopped"
    (daemon.home / "recipes.d" / "bad.yaml").write_text("id: [")
    faulty = daemon.ctl("reload")
    assert (faulty.returncode, "`llmstudioctl check` tells them" in faulty.stderr) == (3, True)
    for words in (["pin", "nobody"], ["unpin", "nobody"], ["restart", "nobody"]):
        assert daemon.ctl(*words).returncode == 4


def test_what_was_not_so_is_not_told(daemon: RunningDaemon) -> None:
    """Unpin and reset say whether there was anything to do."""
    daemon.ctl("load", "tiny")
    assert daemon.ctl("unpin", "tiny").stdout == "'tiny' was not pinned\n"
    assert daemon.ctl("reset", "tiny").stdout == "'tiny' has not failed: there is nothing to forget\n"
    daemon.ctl("pin", "tiny")
    assert daemon.ctl("unpin", "tiny").stdout == "'tiny' is not pinned any more\n"


def test_load_that_nobody_waits_for_goes_on(daemon: RunningDaemon) -> None:
    """And it is said, with what gives it up."""
    daemon.put_recipe({"id": "slow", "model_path": str(daemon.home / "models" / "other.gguf")})
    daemon.ctl("reload")
    with in_the_background(daemon, "load", "slow") as process:
        wait_until(lambda: daemon.state("slow") != "stopped")
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=10)
    if process.returncode:  # it is a small model, and may be ready before anybody can interrupt
        assert process.returncode == 130
        assert "the load of 'slow' goes on; `llmstudioctl cancel slow` gives it up" in told
    wait_until(lambda: daemon.state("slow") == "ready")


def test_log_that_is_not_there_is_told(daemon: RunningDaemon) -> None:
    """On the standard error: the output is the log alone."""
    done = daemon.ctl("logs", "tiny")
    assert (done.returncode, done.stdout) == (0, "")
    assert "'tiny' has no log" in done.stderr


def test_output_that_cannot_be_written_is_told(daemon: RunningDaemon) -> None:
    """In one line, without a traceback; and in a pipe what is said stands in its order."""
    argv = f"{sys.executable} -m llmstudiod.ctl.main --socket {daemon.admin.socket_path}"
    full = subprocess.run(f"{argv} list > /dev/full", shell=True, capture_output=True, text=True, check=False)
    assert (full.returncode, full.stderr) == (
        1,
        "llmstudioctl: the output cannot be written: No space left on device\n",
    )
    (daemon.home / "recipes.d" / "bad.yaml").write_text("id: [")
    daemon.ctl("reload")
    both = subprocess.run(f"{argv} list 2>&1", shell=True, capture_output=True, text=True, check=False).stdout
    assert both.startswith("MODEL")
    assert both.endswith("\n1 fault; `llmstudioctl check` tells them\n")


def test_keys_are_listed_with_their_last_use(tmp_path: Path) -> None:
    """So that one can see which are not needed any more."""
    with running_daemon(tmp_path, keys_file=str(tmp_path / "keys")) as daemon:
        daemon.ctl("key", "add", "one")
        assert re.search(r"^NAME +MAY +CREATED +LAST MODEL USE ", daemon.ctl("key", "list").stdout)
        assert re.search(r"^one .* never +never +all$", daemon.ctl("key", "list").stdout, re.MULTILINE)


def test_keys_file_that_somebody_edits_is_noticed(tmp_path: Path) -> None:
    """Without a reload; and what it holds now is neither lost nor replaced when a key is made."""
    file = tmp_path / "keys"
    with running_daemon(tmp_path, keys_file=str(file)) as daemon:
        assert daemon.ctl("key", "add", "one").returncode == 0
        good = file.read_text()
        file.write_text(good.replace('"one"', '"other"').replace("one", "other"))
        assert daemon.ctl("key", "add", "two").returncode == 0
        assert [key["name"] for key in json.loads(daemon.ctl("key", "list", "--json").stdout)] == ["other", "two"]
        file.write_text("{damaged")
        refused = daemon.ctl("key", "add", "three")
        assert (refused.returncode, file.read_text()) == (3, "{damaged")
        assert "hint: mend it, or take it away" in refused.stderr
        assert daemon.ctl("key", "list").returncode == 3
        file.write_text(good)
        wait_until(lambda: daemon.ctl("key", "list").returncode == 0)
        file.write_text("{damaged")
        wait_until(lambda: daemon.ctl("key", "list").returncode == 3)
        file.unlink()
        assert daemon.ctl("key", "add", "four").returncode == 0


# Looking


@contextmanager
def in_the_background(daemon: RunningDaemon, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Run llmstudioctl while something else happens; its output is a pipe."""
    argv = [sys.executable, "-m", "llmstudiod.ctl.main", "--socket", daemon.admin.socket_path, *words]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("words", [["logs", "-f", "nobody"], ["watch"], ["top"]])
def test_refusal_of_a_stream_is_told(daemon: RunningDaemon, words: list[str]) -> None:
    """What the daemon refuses does not look like a stream without events."""
    if words == ["logs", "-f", "nobody"]:
        done = daemon.ctl(*words)
        assert (done.returncode, done.stdout) == (4, "")
        assert "there is no model 'nobody'" in done.stderr
    daemon.process.kill()
    daemon.process.wait()
    assert daemon.ctl(*words).returncode == 8


def test_watch_goes_on_with_the_next_daemon(daemon: RunningDaemon, tmp_path: Path) -> None:
    """One that was killed and started again; nothing has to be typed again."""
    with in_the_background(daemon, "watch", "--json") as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        assert first["event"] == "snapshot"
        assert first["id"].endswith("-0")
        daemon.process.kill()
        daemon.process.wait()
        again = started_again(daemon)
        try:
            later = json.loads(process.stdout.readline())
            while later["event"] != "snapshot":
                later = json.loads(process.stdout.readline())
            assert later["id"] != first["id"]
        finally:
            again.terminate()
            again.wait(20)


def started_again(daemon: RunningDaemon) -> subprocess.Popen[bytes]:
    """Start a daemon in the place of one that was killed."""
    Path(daemon.admin.socket_path).unlink(missing_ok=True)
    argv = [sys.executable, "-m", "llmstudiod.daemon.main", "--config", str(daemon.home / "llmstudiod.yaml")]
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_logs_go_on_with_the_next_daemon(daemon: RunningDaemon) -> None:
    """What the model writes later is shown by the same command."""
    daemon.ctl("load", "tiny")
    with in_the_background(daemon, "logs", "-f", "-n", "1", "tiny") as process:
        assert process.stdout is not None
        process.stdout.readline()
        daemon.process.terminate()
        daemon.process.wait(20)
        again = started_again(daemon)
        try:
            wait_until(lambda: Path(daemon.admin.socket_path).exists())
            assert daemon.ctl("load", "tiny").returncode == 0
            assert process.stdout.readline()
        finally:
            again.terminate()
            again.wait(20)


def test_top_once(daemon: RunningDaemon) -> None:
    """Where nobody looks at a terminal it prints one picture, without control codes."""
    daemon.ctl("load", "tiny")
    done = daemon.ctl("top")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert re.search(r"^llmstudiod: 2 models, 1 loaded, 0 requests$", done.stdout, re.MULTILINE)
    assert re.search(r"^RAM +▕.*▏ .* of ", done.stdout, re.MULTILINE)
    rows = [line.split()[:2] for line in done.stdout.splitlines() if line.startswith(("tiny", "hand"))]
    assert rows == [["tiny", "ready"], ["hand", "stopped"]]
    as_json = json.loads(daemon.ctl("top", "--json").stdout)
    assert sorted(as_json) == ["gpus", "instances"]


def test_top_is_live(daemon: RunningDaemon) -> None:
    """A model that is loaded meanwhile is seen; ^C gives the terminal back."""
    with on_terminal(daemon, "top") as terminal:
        wait_until(lambda: terminal.has("\x1b[?1049h"))
        wait_until(lambda: terminal.has("2 models, 0 loaded"))
        daemon.ctl("load", "tiny")
        wait_until(lambda: terminal.has("2 models, 1 loaded"))
        widths = [len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)) for line in terminal.text.splitlines()]
        assert max(widths) <= 100
        terminal.process.send_signal(signal.SIGINT)
        wait_until(lambda: terminal.has("\x1b[?1049l"))
        assert terminal.process.wait(10) == 130


def test_top_ends_at_q_and_follows_the_terminal(daemon: RunningDaemon) -> None:
    """What is typed is not shown, and the terminal is as it was; a new size is drawn at once."""
    with on_terminal(daemon, "top", COLUMNS="", LINES="") as terminal:
        before = termios.tcgetattr(terminal.descriptor)[3]
        wait_until(lambda: terminal.has("2 models"))
        assert termios.tcgetattr(terminal.descriptor)[3] & (termios.ECHO | termios.ICANON) == 0
        termios.tcsetwinsize(terminal.descriptor, (5, 30))
        wait_until(lambda: terminal.has("and 1 more"))
        os.write(terminal.descriptor, b"q")
        assert terminal.process.wait(10) == 0
        assert terminal.has("\x1b[?1049l")
        assert termios.tcgetattr(terminal.descriptor)[3] == before


@pytest.mark.parametrize("words", [["list"], ["top", "--once"], ["status"]])
def test_pictures_fit_a_narrow_terminal(daemon: RunningDaemon, words: list[str]) -> None:
    """Of 40 columns: what matters less is left out."""
    daemon.put_recipe({"id": "a-" + "very-" * 5 + "long", "model_path": str(daemon.home / "models" / "gone.gguf")})
    daemon.ctl("reload")
    daemon.ctl("load", "tiny")
    with on_terminal(daemon, *words, COLUMNS="40") as terminal:
        wait_until(lambda: terminal.process.poll() is not None and terminal.has("ready"))
        while terminal.has("\0 nothing") or (before := len(terminal.text)) != len(terminal.text) + terminal.has("\0"):
            assert before
        lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in terminal.text.splitlines()]
    table = lines[next(number for number, line in enumerate(lines) if line.startswith("MODEL")) :]
    assert max(map(len, table if words == ["status"] else lines)) <= 40, lines


def test_dumb_terminal_gets_text_alone(daemon: RunningDaemon) -> None:
    """No colours, and one picture instead of a screen."""
    daemon.ctl("load", "tiny")
    for words in (["list"], ["top"], ["doctor"], ["load", "hand"]):
        with on_terminal(daemon, *words, TERM="dumb") as terminal:
            wait_until(lambda: terminal.process.poll() is not None)
            terminal.has("")
        assert terminal.text
        assert "\x1b" not in terminal.text


def test_pinned_is_seen(daemon: RunningDaemon) -> None:
    """In each list, and in a model's status."""
    assert "pinned" not in daemon.ctl("list").stdout
    daemon.ctl("load", "tiny")
    daemon.ctl("pin", "tiny")
    for words in (["list"], ["top"], ["status"]):
        assert re.search(r"^tiny .*\bpinned\b", daemon.ctl(*words).stdout, re.MULTILINE), words
    assert re.search(r"^ +pinned: yes", daemon.ctl("status", "tiny").stdout, re.MULTILINE)


@pytest.fixture
def mute(tmp_path: Path) -> Iterator[RunningDaemon]:
    """A socket that systemd holds for a daemon that does not come up: it takes connections and nobody answers."""
    with socket.socket(socket.AF_UNIX) as listener, tempfile.TemporaryDirectory() as directory:
        listener.bind(f"{directory}/admin.sock")
        listener.listen()
        yield RunningDaemon(subprocess.Popen("true"), tmp_path, 0, Client(f"{directory}/admin.sock", patience_s=0.2))


@pytest.mark.parametrize("words", [["list"], ["load", "tiny"], ["watch"]])
def test_what_is_waited_for_is_told(mute: RunningDaemon, words: list[str]) -> None:
    """Not a minute of silence; and not for ever, even where the answer may take as long as it likes."""
    with on_terminal(mute, *words) as terminal:
        wait_until(lambda: terminal.has("waiting for the daemon to start and answer"))
    with pytest.raises(DaemonUnreachableError, match="did not answer within 0 s") as refused:
        mute.admin.get("status")
    assert "journalctl -u llmstudiod -n 30" in str(refused.value.hint)
    with pytest.raises(DaemonUnreachableError, match="did not answer within 0 s"):
        mute.admin.post("launch", "tiny")


def test_top_ends_with_the_daemon(daemon: RunningDaemon) -> None:
    """It does not hang on what is not there any more."""
    with on_terminal(daemon, "top") as terminal:
        wait_until(lambda: terminal.has("2 models"))
        daemon.process.terminate()
        assert terminal.process.wait(15) == 8
        assert terminal.has("\x1b[?1049l")


def test_load_shows_progress_on_a_terminal_alone(daemon: RunningDaemon) -> None:
    """A bar while it lasts, nothing of it afterwards; none where the output goes to a file."""
    assert "▕" not in daemon.ctl("load", "hand").stderr
    with on_terminal(daemon, "load", "tiny") as terminal:
        wait_until(lambda: terminal.has("'tiny' is ready"))
        assert terminal.process.wait(10) == 0
        assert terminal.has("is ready")  # and what came after it
        assert terminal.text.rstrip().endswith("\x1b[K'tiny' is ready")


def test_bar_is_never_drawn_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is being drawn while the load ends is cleared too: what is printed next stands alone."""
    written: list[str] = []
    is_drawing = threading.Event()

    class SlowTerminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            if "▕" in text:
                is_drawing.set()
                time.sleep(0.2)
            written.append(text)
            return len(text)

    class OneModel(Client):
        def events(self, *parts: str, query: str = "", last_id: str | None = None) -> Iterator[dict[str, Any]]:
            for share in (0.5, 0.6, 0.7):
                yield {"data": {"recipe_id": "tiny", "stage": "loading", "message": "", "progress": share}}

    monkeypatch.setattr("sys.stderr", SlowTerminal())
    before = set(threading.enumerate())
    with load_progress(OneModel("nowhere"), "tiny"):
        assert is_drawing.wait(10)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert "▕" in written[0]
    assert "".join(written).endswith("\r\x1b[K")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"progress": 0.5, "message": "tensors", "stage": "loading"}, f"a ▕{'█' * 12}{' ' * 12}▏  50% tensors"),
        ({"progress": None, "message": "", "stage": "waiting"}, f"a ▕{' ' * 24}▏      waiting"),
        ({"progress": 1.0, "message": "x" * 99, "stage": "loading"}, f"a ▕{'█' * 24}▏ 100% {'x' * 25}"),
    ],
)
def test_bar_fits_the_line(data: dict[str, Any], expected: str) -> None:
    """One line of the terminal, or its end would scroll."""
    assert bar_line({"recipe_id": "a", **data}, 60) == expected


def test_doctor_examines_everything(daemon: RunningDaemon) -> None:
    """Each topic once at least; what is wrong comes with what to do."""
    done = daemon.ctl("doctor", "--json")
    findings = json.loads(done.stdout)
    topics = {finding["topic"] for finding in findings}
    assert topics >= {"units", "daemon", "llama-server", "devices", "endpoint", "keys", "disk", "recipes"}
    assert [finding for finding in findings if finding["level"] == "fault"] == []
    assert done.returncode == 0
    (engine,) = (finding for finding in findings if finding["topic"] == "llama-server")
    assert (engine["level"], "apt install" in engine["hint"]) == ("warning", True)
    shown = daemon.ctl("doctor")
    assert "\x1b" not in shown.stdout
    assert f"✓ endpoint      http://localhost:{daemon.port}/v1 answers (200)" in shown.stdout


def test_doctor_finds_faults(daemon: RunningDaemon) -> None:
    """A faulty recipe, a model that has failed, a daemon that is gone."""
    (daemon.home / "recipes.d" / "bad.yaml").write_text("id: [")
    (daemon.home / "models" / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    daemon.put_recipe({"id": "broken", "model_path": str(daemon.home / "models" / "broken.gguf")})
    daemon.ctl("reload")
    assert daemon.ctl("load", "broken").returncode == 7
    done = daemon.ctl("doctor")
    assert done.returncode == 1
    assert re.search(
        r"^✗ recipes +\d faults? in recipes or settings\n +`llmstudioctl check`", done.stdout, re.MULTILINE
    )
    assert re.search(r"^! models +broken has failed: ", done.stdout, re.MULTILINE)
    daemon.process.terminate()
    daemon.process.wait(20)
    gone = daemon.ctl("doctor")
    assert gone.returncode == 1
    assert re.search(r"^✗ daemon +cannot reach the daemon", gone.stdout, re.MULTILINE)


def test_web_prints_an_address_that_signs_in(daemon: RunningDaemon) -> None:
    """Also for somebody who came over SSH, who needs a tunnel."""
    done = ctl(daemon, "web", "--no-open", env={**os.environ, "SSH_CONNECTION": "10.0.0.2 1 10.0.0.1 22"})
    url = done.stdout.strip()
    assert url.startswith(f"http://localhost:{daemon.port}/")
    assert f"ssh -L {daemon.port}:localhost:{daemon.port}" in done.stderr
    with urllib.request.urlopen(url) as page:
        assert page.status == 200
    assert daemon.ctl("web", "--sign-out").stdout == "everybody is signed out of the page\n"
    as_json = json.loads(daemon.ctl("web", "--json").stdout)
    assert as_json["urls"][0].startswith(f"http://localhost:{daemon.port}/")


def test_tables_fit_the_terminal(daemon: RunningDaemon) -> None:
    """A long name or a long reason does not break the lines; colours only there."""
    daemon.put_recipe({"id": "a-" + "very-" * 11 + "long", "model_path": str(daemon.home / "models" / "gone.gguf")})
    daemon.ctl("reload")
    daemon.ctl("load", "a-" + "very-" * 11 + "long")
    with on_terminal(daemon, "list") as terminal:
        wait_until(lambda: terminal.has("MODEL") and terminal.process.poll() is not None)
        assert "\x1b[" in terminal.text
        lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in terminal.text.splitlines()]
        assert lines
        assert max(map(len, lines)) <= 100, lines
    assert "\x1b" not in daemon.ctl("list").stdout
