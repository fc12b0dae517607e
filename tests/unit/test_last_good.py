"""A faulty change changes nothing: recipes and settings that were good stay in force."""

from pathlib import Path

import pytest

from llmstudiod.adapters.recipe_files import load_recipes
from llmstudiod.adapters.settings_file import load_settings
from llmstudiod.core.last_good import with_last_good_settings
from llmstudiod.core.recipe import LoadedRecipes

GOOD = "id: a\nmodel_path: /m/a.gguf\n"
TWO = "- {id: a, model_path: /m/a.gguf}\n- {id: b, model_path: /m/b.gguf}\n"


def read(directory: Path, text: str, before: LoadedRecipes | None = None) -> LoadedRecipes:
    """Write a recipe file and read it."""
    (directory / "models.yaml").write_text(text)
    return load_recipes(directory, before.entries if before else ())


def ids(loaded: LoadedRecipes) -> list[str]:
    """Return the recipes in force."""
    return sorted(entry.recipe.id for entry in loaded.entries)


@pytest.mark.parametrize(
    "text",
    ["id: [", "id: a\nmodel_path: 5\n", "id: a\nmodel_path: /m/a.gguf\nmax_num_seqs: many\n", "", "- 3", "\0"],
)
def test_faulty_file_keeps_what_was_good(tmp_path: Path, text: str) -> None:
    """Half a file, a slip of the pen, no YAML at all: the last good recipe serves on, and the fault is told."""
    before = read(tmp_path, GOOD)
    after = read(tmp_path, text, before)
    assert after.entries == before.entries
    assert any("its last good version stays in force" in (fault.hint or "") for fault in after.faults)


def test_good_change_counts(tmp_path: Path) -> None:
    """What is good replaces what was."""
    before = read(tmp_path, GOOD)
    after = read(tmp_path, GOOD + "max_num_seqs: 2\n", before)
    assert [entry.recipe.max_num_seqs for entry in after.entries] == [2]


def test_one_of_two_is_faulty(tmp_path: Path) -> None:
    """Only the faulty one stays as it was."""
    before = read(tmp_path, TWO)
    after = read(tmp_path, TWO.replace("/m/b.gguf", "5").replace("/m/a.gguf", "/m/c.gguf"), before)
    assert {entry.recipe.id: entry.recipe.model_path for entry in after.entries} == {"a": "/m/c.gguf", "b": "/m/b.gguf"}


def test_removed_recipe_is_gone(tmp_path: Path) -> None:
    """A fault of another recipe brings nothing back that was taken out."""
    before = read(tmp_path, TWO)
    after = read(tmp_path, "- {id: b, model_path: 5}\n- {id: c, model_path: /m/c.gguf}\n", before)
    assert ids(after) == ["b", "c"]


def test_faulty_file_keeps_nothing_of_another(tmp_path: Path) -> None:
    """Where nothing of a file can be read its own recipes stay, and those of a file that was removed do not."""
    (tmp_path / "other.yaml").write_text("id: b\nmodel_path: /m/b.gguf\n")
    before = read(tmp_path, GOOD)
    assert ids(before) == ["a", "b"]
    (tmp_path / "other.yaml").unlink()
    assert ids(read(tmp_path, "id: [", before)) == ["a"]


def test_removed_file_is_gone(tmp_path: Path) -> None:
    """So is a whole file."""
    before = read(tmp_path, GOOD)
    (tmp_path / "models.yaml").unlink()
    assert ids(load_recipes(tmp_path, before.entries)) == []


def test_what_was_never_good_is_left_out(tmp_path: Path) -> None:
    """There is nothing to fall back on."""
    assert ids(read(tmp_path, "id: [")) == []


def test_settings_stay(tmp_path: Path) -> None:
    """A faulty setting stays as it was set; where a file cannot be read, all do."""
    config = tmp_path / "llmstudiod.yaml"
    config.write_text("idle_timeout: 5m\nmax_queue: 7\n")
    before = load_settings(config, None)
    config.write_text("idle_timeout: soon\nmax_queue: 8\n")
    after = with_last_good_settings(load_settings(config, None), before)
    assert (after.settings.idle_timeout, after.settings.max_queue) == (300.0, 8)
    assert "last good" in (after.faults[0].hint or "")
    config.write_text("idle_timeout: [")
    after = with_last_good_settings(load_settings(config, None), before)
    assert after.settings == before.settings
    assert after.faults
