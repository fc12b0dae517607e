"""``llmstudioctl recipe`` as administrators type it: made, edited, shown, deleted, and made of a command."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmstudiod.adapters.recipe_writer import MARK
from llmstudiod.core.strict import digest
from llmstudiod.demo.tiny_gguf import write_tiny_gguf
from tests.integration.ctl_programs import BY_HAND, ctl, daemon_with_recipe, editor, on_terminal
from tests.integration.running_daemon import RunningDaemon, wait_until

pytestmark = pytest.mark.engine


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    """A daemon with one GGUF without a recipe (`tiny`) and a recipe that a person wrote (`hand`)."""
    with daemon_with_recipe(tmp_path) as running:
        yield running


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
