"""The snapshot of the configuration is used only while every file is as it was."""

import json
import os
import time
from pathlib import Path

import pytest

from llmstudiod.adapters.recipe_files import load_recipes
from llmstudiod.adapters.settings_file import load_settings
from llmstudiod.adapters.snapshot import NAME, Configuration, read_last_good, read_snapshot, write_snapshot

RECIPE = """\
id: one
model_path: /models/one.gguf
aliases: [first, uno]
max_model_len: 4096
tensor_split: [3, 1]
lora: [{path: /models/a.gguf, scale: 0.5}]
limits: {memory_max: 8GiB}
gpus: [0, 1]
extra_args: {top_k: 40, chat_template_kwargs: {enable_thinking: false}}
env_vars: {GGML_X: "1"}
port: 8000
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with a good recipe, a faulty one, and a drop-in; old enough to be kept."""
    (tmp_path / "recipes.d").mkdir()
    (tmp_path / "recipes.d" / "one.yaml").write_text(RECIPE)
    (tmp_path / "recipes.d" / "bad.yaml").write_text("id: BAD\n")
    (tmp_path / "d.yaml.d").mkdir()
    (tmp_path / "d.yaml.d" / "10.yaml").write_text("idle_timeout: 1h\nno_such: 1\n")
    config = tmp_path / "d.yaml"
    config.write_text(f"recipes_dir: {tmp_path}/recipes.d\nmodel_dirs: [/a, /b]\n")
    return config


def read(config: Path) -> Configuration:
    """Read everything from the files."""
    settings = load_settings(config)
    return Configuration(settings, load_recipes(Path(settings.settings.recipes_dir)))


def later() -> int:
    """A moment at which all files were left alone for a while."""
    return time.time_ns() + 10_000_000_000


def test_what_comes_out_is_what_went_in(config: Path, tmp_path: Path) -> None:
    """Settings, recipes, warnings and faults are the same as if they had been read and checked."""
    found = read(config)
    assert found.recipes.entries
    assert found.recipes.faults
    assert found.settings.faults
    write_snapshot(tmp_path, config, found, began_ns=later())
    assert read_snapshot(tmp_path, config) == found


@pytest.mark.parametrize("change", ["edit", "edit in place", "add", "remove", "drop-in", "settings"])
def test_any_change_makes_it_worthless(config: Path, tmp_path: Path, change: str) -> None:
    """One changed byte is enough, also where size and modification time were put back."""
    write_snapshot(tmp_path, config, read(config), began_ns=later())
    recipe = tmp_path / "recipes.d" / "one.yaml"
    if change == "edit":
        recipe.write_text(RECIPE + "# more\n")
    elif change == "edit in place":
        before = recipe.stat()
        recipe.write_text(RECIPE.replace("4096", "8192"))
        os.utime(recipe, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "add":
        (tmp_path / "recipes.d" / "two.yaml").write_text("model_path: /m.gguf\n")
    elif change == "remove":
        recipe.unlink()
    elif change == "drop-in":
        (tmp_path / "d.yaml.d" / "20.yaml").write_text("max_queue: 2\n")
    else:
        config.write_text(config.read_text() + "max_queue: 1\n")
    assert read_snapshot(tmp_path, config) is None


def test_name_that_is_not_utf8_is_kept(config: Path, tmp_path: Path) -> None:
    """A file's name may hold any bytes; the daemon must not end for it."""
    (tmp_path / "recipes.d" / os.fsdecode(b"caf\xe9.txt")).write_text("")
    (tmp_path / "recipes.d" / os.fsdecode(b"caf\xe9.yaml")).write_text("id: BAD\n")
    found = read(config)
    write_snapshot(tmp_path, config, found, began_ns=later())
    assert read_snapshot(tmp_path, config) == found


def test_files_changed_while_they_were_read_are_not_kept(config: Path, tmp_path: Path) -> None:
    """A file that changed since the reading began may not be what was read, so nothing is written."""
    write_snapshot(tmp_path, config, read(config), began_ns=time.time_ns())
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"version": "0.1.0"}', "\x00"])
def test_damaged_snapshot_is_no_snapshot(config: Path, tmp_path: Path, damage: str) -> None:
    """Whatever stands in the file, the daemon starts."""
    (tmp_path / NAME).write_text(damage)
    assert read_snapshot(tmp_path, config) is None


def test_snapshot_of_another_version_is_not_used(config: Path, tmp_path: Path) -> None:
    """An upgrade may read the same files in another way."""
    write_snapshot(tmp_path, config, read(config), began_ns=later())
    raw = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps(raw | {"version": "0.0.1"}))
    assert read_snapshot(tmp_path, config) is None


def test_last_good_of_another_version_is_what_was_in_force(config: Path, tmp_path: Path) -> None:
    """An upgrade, or one taken back, while a file is faulty ends no model: what this version understands counts."""
    found = read(config)
    write_snapshot(tmp_path, config, found, began_ns=later())
    raw = json.loads((tmp_path / NAME).read_text())
    (recipe,) = raw["recipes"]
    foreign = [recipe | {"recipe": recipe["recipe"] | change} for change in ({"id": "x", "new": 1}, {"id": 5})]
    settings = raw["settings"] | {"new": True, "max_queue": "many"}
    raw |= {"version": "0.0.1", "recipes": [recipe, *foreign], "settings": settings}
    (tmp_path / NAME).write_text(json.dumps(raw))
    assert read_snapshot(tmp_path, config) is None
    kept = read_last_good(tmp_path)
    assert kept is not None
    assert kept.recipes.entries == found.recipes.entries
    assert kept.settings.settings == found.settings.settings
    assert kept.settings.sources == found.settings.sources


def test_snapshot_that_cannot_be_written_is_no_fault(config: Path, tmp_path: Path) -> None:
    """A missing or full state directory costs time at the next start, nothing else."""
    write_snapshot(tmp_path / "missing", config, read(config), began_ns=later())
    assert read_snapshot(tmp_path / "missing", config) is None
