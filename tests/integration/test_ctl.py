"""llmstudioctl as administrators type it, against a daemon with the embedded engine; the basics: `test_daemon.py`."""

import io
import json
import os
import pty
import re
import shutil
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llmstudiod.adapters.recipe_writer import MARK
from llmstudiod.core.errors import DaemonUnreachableError
from llmstudiod.core.strict import digest
from llmstudiod.ctl.client import Client
from llmstudiod.ctl.progress import bar_line, load_progress
from llmstudiod.demo.tiny_gguf import write_tiny_gguf
from tests.integration.running_daemon import RunningDaemon, running_daemon, wait_until

pytestmark = pytest.mark.engine

BY_HAND = "# the small one, for tests\nid: hand\nmodel_path: {path}\nmax_model_len: 512  # enough\n"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    """A daemon with one GGUF without a recipe (`tiny`) and a recipe that a person wrote (`hand`)."""
    for name in ("models", "recipes.d", "state"):
        (tmp_path / name).mkdir()
    write_tiny_gguf(tmp_path / "models" / "tiny.gguf")
    write_tiny_gguf(tmp_path / "models" / "other.gguf")  # a GGUF with a recipe is not listed a second time
    (tmp_path / "recipes.d" / "hand.yaml").write_text(BY_HAND.format(path=tmp_path / "models" / "other.gguf"))
    with running_daemon(tmp_path, state_directory=tmp_path / "state") as running:
        yield running


@dataclass(slots=True)
class Terminal:
    """A program on a terminal of its own."""

    process: subprocess.Popen[bytes]
    descriptor: int
    text: str = field(default="")

    def has(self, words: str) -> bool:
        """Read what is there, and tell whether the words were among all that was shown."""
        try:
            self.text += os.read(self.descriptor, 65536).decode(errors="replace")
        except (BlockingIOError, OSError):  # EIO: the program has ended
            pass
        return words in self.text


@contextmanager
def on_terminal(daemon: RunningDaemon, *words: str, **variables: str) -> Iterator[Terminal]:
    """Run llmstudioctl on a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    argv = [sys.executable, "-m", "llmstudiod.ctl.main", "--socket", daemon.admin.socket_path, *words]
    environment = {**os.environ, "COLUMNS": "100", "LINES": "30", "TERM": "xterm", **variables}
    environment = {name: value for name, value in environment.items() if value}
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def editor(tmp_path: Path, script: str) -> dict[str, str]:
    """Return an environment whose editor is a shell script that gets the file as $1."""
    path = tmp_path / "editor"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {**os.environ, "EDITOR": str(path), "VISUAL": "", "TMPDIR": str(tmp_path)}


@contextmanager
def unwritable(file: Path) -> Iterator[bool]:
    """Make a file such that root cannot write it either, where the file system can do that."""
    is_possible = (
        shutil.which("chattr") is not None and not subprocess.run(["chattr", "+i", file], check=False).returncode
    )
    try:
        yield is_possible
    finally:
        if is_possible:
            subprocess.run(["chattr", "-i", file], check=True)


def ctl(
    daemon: RunningDaemon, *words: str, env: dict[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run llmstudioctl with an environment or something on its standard input."""
    argv = [sys.executable, "-m", "llmstudiod.ctl.main", "--socket", daemon.admin.socket_path, *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, env=env, input=stdin)


# Recipes


def test_recipe_is_made_shown_and_deleted(daemon: RunningDaemon) -> None:
    """`new` takes a file and fields, `show` prints what is stored, `delete` leaves the model's file."""
    gguf = daemon.home / "models" / "other.gguf"
    made = daemon.ctl("recipe", "new", str(gguf), "--id", "short", "--set", "max_model_len=256", "--set", "name=Short")
    assert (made.returncode, made.stderr) == (0, "")
    assert "`llmstudioctl load short`" in made.stdout
    shown = daemon.ctl("recipe", "show", "short").stdout
    assert "max_model_len: 256" in shown
    as_json = json.loads(daemon.ctl("recipe", "show", "short", "--json").stdout)
    assert (as_json["name"], as_json["max_model_len"], as_json["model_path"]) == ("Short", 256, str(gguf))
    again = daemon.ctl("recipe", "new", str(gguf), "--id", "short")
    assert again.returncode == 2
    assert "there is a recipe 'short' already" in again.stderr
    assert json.loads(daemon.ctl("recipe", "new", str(gguf), "--id", "short", "--json").stdout)["kind"] == "conflict"
    assert "recipe edit short" in again.stderr
    assert daemon.ctl("recipe", "delete", "short").stdout == "the recipe of 'short' is removed\n"
    assert daemon.ctl("recipe", "show", "short").returncode == 4
    assert gguf.exists()


def test_recipe_of_a_gguf_without_one_takes_its_id(daemon: RunningDaemon) -> None:
    """What the daemon serves already under a name gets its settings under that name."""
    made = daemon.ctl("recipe", "new", str(daemon.home / "models" / "tiny.gguf"), "--set", "max_num_seqs=2")
    assert made.returncode == 0, made.stderr
    assert json.loads(daemon.ctl("recipe", "show", "tiny", "--json").stdout)["max_num_seqs"] == 2


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--set", "max_model_len"], 2, "expected NAME=VALUE, found 'max_model_len'"),
        (["--id", "new", "--set", "max_model_len=-1"], 3, "max_model_len"),
        (["--id", "new", "--set", "tokenizer_mode=slow", "--set", "n_gpu_layers=many"], 3, "n_gpu_layers"),
        (["--id", "Bad Name"], 3, "id"),
    ],
)
def test_bad_recipe_is_told_and_not_stored(daemon: RunningDaemon, words: list[str], code: int, message: str) -> None:
    """With the field, and what was expected."""
    done = daemon.ctl("recipe", "new", str(daemon.home / "models" / "tiny.gguf"), *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert sorted(path.name for path in (daemon.home / "recipes.d").rglob("*") if path.is_file()) == ["hand.yaml"]


def test_path_that_is_no_gguf_is_refused(daemon: RunningDaemon) -> None:
    """A recipe may be there before its file, where that is meant; and it is said."""
    (daemon.home / "models" / "damaged.gguf").write_bytes(b"GGUF" + bytes(20))
    for name in ("gone.gguf", "damaged.gguf"):
        refused = daemon.ctl("recipe", "new", str(daemon.home / "models" / name), "--id", "new")
        assert (refused.returncode, refused.stdout) == (3, "")
        assert name in refused.stderr
        assert "hint: --force" in refused.stderr
        done = daemon.ctl("recipe", "new", "--force", str(daemon.home / "models" / name), "--id", name.split(".")[0])
        assert done.returncode == 0
        assert done.stderr.startswith("warning: it cannot be loaded now: ")
        assert name in done.stderr


def test_field_that_is_not_there_is_named(daemon: RunningDaemon) -> None:
    """With the one that was meant."""
    gguf = str(daemon.home / "models" / "other.gguf")
    done = daemon.ctl("recipe", "new", gguf, "--id", "new", "--set", "n_gpu_layer=3")
    assert done.returncode == 0
    assert (
        done.stderr
        == "warning: n_gpu_layer: there is no such field, it has no effect\n    hint: did you mean n_gpu_layers?\n"
    )
    faulty = daemon.ctl("recipe", "new", gguf, "--id", "bad", "--set", "max_model_len=-1", "--json")
    assert faulty.returncode == 3
    assert json.loads(faulty.stdout)["faults"][0]["key"] == "max_model_len"
    assert "max_model_len: expected a whole number" in faulty.stderr
    assert "line " not in faulty.stderr


def test_shown_recipe_says_what_the_recipe_says(daemon: RunningDaemon) -> None:
    """What old clients find in every recipe is not in it."""
    shown = json.loads(daemon.ctl("recipe", "show", "hand", "--json").stdout)
    assert shown.keys().isdisjoint({"old", "python_path", "host", "tool_call_parser"})
    assert (shown["id"], shown["max_model_len"]) == ("hand", 512)


def test_edit_keeps_what_people_wrote(daemon: RunningDaemon, tmp_path: Path) -> None:
    """The file itself is opened: comments stay, its mode too, and the change is in force."""
    file = daemon.home / "recipes.d" / "hand.yaml"
    file.chmod(0o640)
    done = ctl(daemon, "recipe", "edit", "hand", env=editor(tmp_path, "sed -i s/512/384/ $1"))
    assert (done.returncode, done.stderr) == (0, "")
    assert file.read_text() == BY_HAND.format(path=daemon.home / "models" / "other.gguf").replace("512", "384")
    assert file.stat().st_mode & 0o777 == 0o640
    assert json.loads(daemon.ctl("recipe", "show", "hand", "--json").stdout)["max_model_len"] == 384


@pytest.mark.parametrize("change", ["echo '# by another' >> {file}", "rm {file}"])
def test_edit_does_not_write_over_what_others_wrote(daemon: RunningDaemon, tmp_path: Path, change: str) -> None:
    """A file that was changed while the editor was open stays; so does what was written there."""
    file = daemon.home / "recipes.d" / "hand.yaml"
    env = editor(tmp_path, f"sed -i s/512/384/ $1; {change.format(file=file)}")
    done = ctl(daemon, "recipe", "edit", "hand", env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"llmstudioctl: '{file}' was changed meanwhile\nhint: `llmstudioctl recipe edit hand`" in done.stderr
    kept = Path(re.search(r"what you wrote is kept in (\S+)", done.stderr)[1])  # type: ignore[index]
    assert "max_model_len: 384" in kept.read_text()
    kept.unlink()
    assert not file.exists() or "# by another" in file.read_text()
    assert not file.exists() or "max_model_len: 384" not in file.read_text()


def test_text_that_is_no_text_is_told(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Before the editor opens, and after; a file that an editor removed too."""
    file = daemon.home / "recipes.d" / "hand.yaml"
    written = ctl(daemon, "recipe", "edit", "hand", env=editor(tmp_path, r"printf '# \374\n' >> $1"))
    assert (written.returncode, "Traceback" in written.stderr) == (1, False)
    assert re.search(r"hand\.yaml': expected text in UTF-8, found 0xfc at byte \d+\n", written.stderr)
    Path(re.search(r"kept in (\S+)", written.stderr)[1]).unlink()  # type: ignore[index]
    removed = ctl(daemon, "recipe", "edit", "hand", env=editor(tmp_path, "rm $1"))
    assert (removed.returncode, "cannot be read: No such file" in removed.stderr) == (1, True)
    file.write_bytes(b"# \xfc\n" + file.read_bytes())
    shown = ctl(daemon, "recipe", "edit", "hand", env=editor(tmp_path, "true"))
    assert (shown.returncode, shown.stderr) == (
        1,
        f"llmstudioctl: '{file}': expected text in UTF-8, found 0xfc at byte 2\n",
    )


def test_edit_of_a_fault_is_refused_at_its_line(daemon: RunningDaemon, tmp_path: Path) -> None:
    """The old recipe stays, and so does the file."""
    before = (daemon.home / "recipes.d" / "hand.yaml").read_text()
    done = ctl(daemon, "recipe", "edit", "hand", env=editor(tmp_path, "sed -i 's/512/many/' $1"))
    assert done.returncode == 3
    assert "line 4: " in done.stderr
    assert "max_model_len" in done.stderr
    assert "the recipe was not stored" in done.stderr
    assert (daemon.home / "recipes.d" / "hand.yaml").read_text() == before


def test_edit_that_changes_nothing_stores_nothing(daemon: RunningDaemon, tmp_path: Path) -> None:
    """And an editor that fails, or is not there, says so."""
    done = ctl(daemon, "recipe", "edit", "hand", env=editor(tmp_path, "true"))
    assert (done.returncode, done.stderr) == (0, "nothing was changed\n")
    failed = ctl(daemon, "recipe", "edit", "hand", env=editor(tmp_path, "exit 9"))
    assert (failed.returncode, "the editor ended with 9" in failed.stderr) == (1, True)
    missing = ctl(daemon, "recipe", "edit", "hand", env={**os.environ, "VISUAL": "/nowhere/vi", "EDITOR": ""})
    assert (missing.returncode, "'/nowhere/vi' cannot be found" in missing.stderr) == (1, True)
    assert "hint: set VISUAL or EDITOR" in missing.stderr


@pytest.mark.parametrize("answer", ["n\n", "\x04"])
def test_what_was_written_is_kept(daemon: RunningDaemon, tmp_path: Path, answer: str) -> None:
    """A recipe that has faults and is not edited again: the text is in a file that is named."""
    script = editor(tmp_path, "sed -i 's/512/many/' $1")
    with on_terminal(daemon, "recipe", "edit", "hand", EDITOR=script["EDITOR"], VISUAL="") as terminal:
        wait_until(lambda: terminal.has("edit again? [Y/n] "))
        os.write(terminal.descriptor, answer.encode())
        wait_until(lambda: terminal.process.poll() is not None)
        terminal.has("")
    assert terminal.process.returncode == 3
    assert "Traceback" not in terminal.text
    kept = Path(re.search(r"what you wrote is kept in (\S+)", terminal.text)[1])  # type: ignore[index]
    assert "max_model_len: many" in kept.read_text()
    kept.unlink()


def test_faults_of_an_edit_as_json(daemon: RunningDaemon, tmp_path: Path) -> None:
    """And that nothing was changed."""
    done = ctl(daemon, "recipe", "edit", "hand", "--json", env=editor(tmp_path, "sed -i 's/512/many/' $1"))
    assert (done.returncode, json.loads(done.stdout)["faults"][0]["line"]) == (3, 4)
    Path(re.search(r"kept in (\S+)", done.stderr)[1]).unlink()  # type: ignore[index]
    same = ctl(daemon, "recipe", "edit", "hand", "--json", env=editor(tmp_path, "true"))
    assert json.loads(same.stdout) == {"success": True, "id": "hand", "changed": False}


def test_edit_says_what_will_not_load(daemon: RunningDaemon, tmp_path: Path) -> None:
    """It is in force all the same: the file may come."""
    done = ctl(daemon, "recipe", "edit", "hand", env=editor(tmp_path, "sed -i s/other.gguf/gone.gguf/ $1"))
    assert done.returncode == 0
    assert "is written, and in force" in done.stdout
    assert done.stderr.startswith("warning: it cannot be loaded now: ")


def test_faulty_recipe_is_shown_and_mended(daemon: RunningDaemon, tmp_path: Path) -> None:
    """By its id, or by its file."""
    broken = daemon.home / "recipes.d" / "broken.yaml"
    broken.write_text(
        BY_HAND.format(path=daemon.home / "models" / "other.gguf").replace("512", "many").replace("hand", "odd")
    )
    daemon.ctl("reload")
    for name in ("odd", "broken.yaml"):
        assert daemon.ctl("recipe", "show", name).stdout == broken.read_text()
    refused = daemon.ctl("recipe", "delete", "odd")
    assert (refused.returncode, f"hint: `sudo rm {broken}`" in refused.stderr) == (5, True)
    done = ctl(daemon, "recipe", "edit", "odd", env=editor(tmp_path, "sed -i s/many/256/ $1"))
    assert done.returncode == 0, done.stderr
    assert daemon.state("odd") == "stopped"


def test_faulty_recipe_of_ours_is_mended_and_deleted(daemon: RunningDaemon) -> None:
    """Where the daemon wrote the file, whatever its name: a change goes into the same one."""
    text = BY_HAND.format(path=daemon.home / "models" / "other.gguf").replace("hand", "odd")
    body = text.replace("512", "many")
    file = daemon.home / "recipes.d" / "another.yaml"
    for _ in range(2):
        file.write_text(f"{MARK}{digest(body.encode())}\n{body}")
        daemon.ctl("reload")
        assert daemon.ctl("recipe", "show", "odd").stdout == body
        daemon.admin.put_text("recipes", "odd", text=text, tag=None)
        assert daemon.state("odd") == "stopped"
        assert sorted(path.name for path in file.parent.iterdir()) == ["another.yaml", "hand.yaml"]
        assert daemon.ctl("recipe", "delete", "odd").returncode == 0
        assert not file.exists()


def test_edit_is_refused_before_it_begins(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Whoever may not write the file by hand, and cannot have it written, does not edit in vain."""
    file = daemon.home / "recipes.d" / "hand.yaml"
    env = editor(tmp_path, f"touch {tmp_path}/was-opened")
    # Root may write any file, so what an ordinary user sees is tried with a file that nobody may.
    again = file.read_text()
    with unwritable(file) as is_possible:
        if not is_possible:
            pytest.skip("chattr +i is not possible here")
        done = ctl(daemon, "recipe", "edit", "hand", env=env)
    assert done.returncode == 5
    assert "was written by hand" in done.stderr
    assert not (tmp_path / "was-opened").exists()
    assert file.read_text() == again


def test_several_recipes_in_a_text_are_told(daemon: RunningDaemon) -> None:
    """A check that is not good says why."""
    path = daemon.home / "models" / "other.gguf"
    text = f"- {{id: a, model_path: {path}}}\n- {{id: b, model_path: {path}}}\n"
    checked = daemon.admin.post_text("recipes", "check", text=text)
    assert (checked["ok"], [fault["message"] for fault in checked["faults"]]) == (
        False,
        ["holds 2 recipes; only root edits such a file"],
    )


def test_edit_of_a_stored_recipe(daemon: RunningDaemon, tmp_path: Path) -> None:
    """What came over HTTP is changed the same way."""
    daemon.ctl("recipe", "new", str(daemon.home / "models" / "other.gguf"), "--id", "short")
    done = ctl(daemon, "recipe", "edit", "short", env=editor(tmp_path, "echo 'max_model_len: 320  # odd' >> $1"))
    assert done.returncode == 0, done.stderr
    assert "max_model_len: 320  # odd" in daemon.ctl("recipe", "show", "short").stdout


def test_command_becomes_a_recipe(daemon: RunningDaemon) -> None:
    """Printed by default, stored on request; what has no place in a recipe is told."""
    gguf = daemon.home / "models" / "tiny.gguf"
    command = f"llama-server -m {gguf} -c 512 -np 1 --port 8081 --top-k 20"
    printed = ctl(daemon, "recipe", "from-command", stdin=command)
    assert printed.returncode == 0, printed.stderr
    assert "max_model_len: 512" in printed.stdout
    assert "top-k: 20" in printed.stdout
    assert "note: --port is left out" in printed.stderr
    assert daemon.ctl("recipe", "from-command", *command.split()).stdout == printed.stdout
    assert "GGML_X: '1'" in ctl(daemon, "recipe", "from-command", stdin=f"GGML_X=1 {command}").stdout
    saved = daemon.ctl(
        "recipe", "from-command", "--save", "--", *command.replace("tiny.gguf", "tiny.gguf --alias mine").split()
    )
    assert saved.returncode == 0, saved.stderr
    assert daemon.admin.get("recipes", "mine")["id"] == "tiny"


def test_command_of_options_alone_becomes_a_recipe(daemon: RunningDaemon) -> None:
    """Its file is meant from here, and it may be called otherwise."""
    argv = [sys.executable, "-m", "llmstudiod.ctl.main", "--socket", daemon.admin.socket_path, "recipe", "from-command"]
    words = ["--id", "mine", "-m", "tiny.gguf", "-c", "512"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*argv, *words], cwd=daemon.home / "models", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"id: mine\nmodel_path: {daemon.home / 'models' / 'tiny.gguf'}\n" in done.stdout


def test_command_that_cannot_be_saved_says_how_it_can(daemon: RunningDaemon, tmp_path: Path) -> None:
    """What may not come over HTTP is printed, and root puts it where recipes are."""
    write_tiny_gguf(tmp_path / "elsewhere.gguf")
    done = daemon.ctl("recipe", "from-command", "--save", "-m", str(tmp_path / "elsewhere.gguf"))
    assert (done.returncode, done.stdout) == (3, "")
    assert f"| sudo tee {daemon.home / 'recipes.d' / 'elsewhere.yaml'}`" in done.stderr
    daemon.ctl("recipe", "new", str(daemon.home / "models" / "tiny.gguf"))
    taken = daemon.ctl("recipe", "from-command", "--save", "-m", str(daemon.home / "models" / "tiny.gguf"))
    assert (taken.returncode, "--id gives another name" in taken.stderr) == (2, True)


def test_no_command_is_told(daemon: RunningDaemon) -> None:
    """Also where the standard input is empty."""
    done = ctl(daemon, "recipe", "from-command", stdin="\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected a llama-server command, found nothing" in done.stderr


def test_what_is_no_command_is_told(daemon: RunningDaemon) -> None:
    """With what was expected."""
    done = ctl(daemon, "recipe", "from-command", stdin="llama-server -c 512")
    assert (done.returncode, done.stdout) == (2, "")
    assert "names no model" in done.stderr
    assert "hint: expected `-m FILE.gguf`" in done.stderr


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
