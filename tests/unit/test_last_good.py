"""A faulty change changes nothing: recipes and settings that were good stay in force."""

from pathlib import Path

import pytest

from llmstudiod.adapters.recipe_files import load_recipes
from llmstudiod.adapters.settings_file import load_settings
from llmstudiod.core.catalogue import build_catalogue
from llmstudiod.core.errors import ModelNotFoundError
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


@pytest.mark.parametrize("model", ['"A!"', "5", "[a]", "''", "{}"])
def test_faulty_id_keeps_what_was_good(tmp_path: Path, model: str) -> None:
    """Nobody can say which recipe it was meant to be, so none ends; the fault is told as that of the one that stays."""
    before = read(tmp_path, GOOD)
    after = read(tmp_path, f"id: {model}\nmodel_path: /m/a.gguf\n", before)
    assert after.entries == before.entries
    (fault,) = after.faults
    assert (fault.recipe_id, fault.key) == ("a", "id")
    assert "last good version stays in force" in (fault.hint or "")


def test_faulty_id_in_a_list_keeps_what_is_not_there(tmp_path: Path) -> None:
    """The good ones of the file count as they are now, and each that is missing stays as it was."""
    before = read(tmp_path, TWO)
    after = read(tmp_path, TWO.replace("id: b", 'id: "B!"').replace("/m/a.gguf", "/m/c.gguf"), before)
    assert {entry.recipe.id: entry.recipe.model_path for entry in after.entries} == {"a": "/m/c.gguf", "b": "/m/b.gguf"}
    assert [fault.recipe_id for fault in after.faults] == ["b"]
    assert {entry.recipe.id for entry in read(tmp_path, "id: [", before).entries} == {"a", "b"}
    assert {fault.recipe_id for fault in read(tmp_path, "id: [", before).faults} == {"a", "b"}


@pytest.mark.parametrize("model", ['"A!"', "5"])
def test_faulty_id_is_told_to_who_asks_for_the_files_name(tmp_path: Path, model: str) -> None:
    """There is nothing to fall back on; the name of the file is what its model would be expected under."""
    loaded = read(tmp_path, f"id: {model}\nmodel_path: /m/a.gguf\n")
    with pytest.raises(ModelNotFoundError) as caught:
        build_catalogue(loaded.entries, loaded.faults).resolve("models")
    assert f"{tmp_path}/models.yaml:1: id: " in (caught.value.hint or "")


@pytest.mark.parametrize("how", ["gone", "a file", "a loop"])
def test_directory_that_cannot_be_read_keeps_all(tmp_path: Path, how: str) -> None:
    """A mount that fails, or a mode that was wrong for a moment, ends no model; that it is so is told for each."""
    directory = tmp_path / "recipes.d"
    directory.mkdir()
    (directory / "models.yaml").write_text(TWO)
    before = load_recipes(directory)
    directory.rename(tmp_path / "away")
    if how == "a file":
        directory.write_text("")
    elif how == "a loop":
        directory.symlink_to(directory)
    after = load_recipes(directory, before.entries)
    assert after.entries == before.entries
    assert {(fault.recipe_id, fault.file) for fault in after.faults} == {("a", str(directory)), ("b", str(directory))}
    assert all("last good version stays in force" in (fault.hint or "") for fault in after.faults)
    again = load_recipes(directory, after.entries)
    assert again == after
    if how != "gone":  # one that is not there has never held any
        assert [fault.file for fault in load_recipes(directory).faults] == [str(directory)]
    directory.unlink(missing_ok=True)
    directory.mkdir()
    assert load_recipes(directory, after.entries) == LoadedRecipes((), ())


A, B = "id: a\nmodel_path: /m/a.gguf\n", "id: b\nmodel_path: /m/b.gguf\naliases: [gpt]\n"


class Directory:
    """A recipes directory, read again and again as a daemon does."""

    def __init__(self, directory: Path) -> None:
        self.path, self.in_force = directory, LoadedRecipes((), ())

    def put(self, **files: str | None) -> dict[str, tuple[str, ...]]:
        """Change files, read them all, and return the names of each recipe in force."""
        for name, text in files.items():
            path = self.path / f"{name.strip('_')}.yaml"
            path.unlink() if text is None else path.write_text(text)
        self.in_force = load_recipes(self.path, self.in_force.entries)
        return {entry.recipe.id: entry.recipe.names for entry in self.in_force.entries}

    def faults(self) -> list[tuple[str, str | None, str | None]]:
        """Return file, key and recipe of each fault."""
        return [(Path(fault.file).stem, fault.key, fault.recipe_id) for fault in self.in_force.faults]


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    """Two recipes, one with an alias."""
    made = Directory(tmp_path)
    assert made.put(a=A, b=B) == {"a": ("a",), "b": ("b", "gpt")}
    return made


def test_new_recipe_takes_no_alias_away(directory: Directory) -> None:
    """Its id is the alias of one that serves, which keeps it; it counts as soon as that one lets go of it."""
    for _ in range(2):
        assert directory.put(gpt="model_path: /m/gpt.gguf\n") == {"a": ("a",), "b": ("b", "gpt")}
        assert directory.faults() == [("gpt", "id", "gpt")]
    assert directory.put(b=B.replace("gpt", "x")) == {"a": ("a",), "b": ("b", "x"), "gpt": ("gpt",)}
    assert directory.faults() == []


def test_new_file_takes_no_id_away(directory: Directory) -> None:
    """Though it comes first in the order of the files; it counts once the other is gone."""
    directory.put(_0=A.replace("/m/a.gguf", "/m/other.gguf"))
    assert [entry.recipe.model_path for entry in directory.in_force.entries] == ["/m/a.gguf", "/m/b.gguf"]
    assert directory.faults() == [("0", "id", "a")]
    directory.put(a=None)
    assert [entry.recipe.model_path for entry in directory.in_force.entries] == ["/m/other.gguf", "/m/b.gguf"]
    assert directory.faults() == []


@pytest.mark.parametrize("line", ["aliases: [x, a]", "served_model_name: a"])
def test_edited_recipe_that_claims_a_taken_name_stays_as_it_was(directory: Directory, line: str) -> None:
    """With all that it had; what else was changed in it does not count either, and the fault says so."""
    for _ in range(2):
        edited = f"id: b\nmodel_path: /m/b.gguf\nmax_num_seqs: 2\n{line}\n"
        assert directory.put(b=edited) == {"a": ("a",), "b": ("b", "gpt")}
        assert directory.faults() == [("b", line.partition(":")[0], "b")]
        assert "last good version stays in force" in (directory.in_force.faults[0].hint or "")
        assert directory.in_force.entries[1].recipe.max_num_seqs is None
    assert directory.put(b=B.replace("gpt", "x")) == {"a": ("a",), "b": ("b", "x")}


def test_id_that_is_changed_to_a_taken_one_leaves_the_recipe_as_it_was(directory: Directory) -> None:
    """Its model serves on under the old id, and the fault says so; the new id counts once it is free."""
    for _ in range(2):
        assert directory.put(a=A.replace("id: a", "id: gpt")) == {"a": ("a",), "b": ("b", "gpt")}
        assert directory.faults() == [("a", "id", "a"), ("a", "id", "gpt")]
        assert "last good version stays in force" in (directory.in_force.faults[0].hint or "")
    assert directory.put(b=B.replace("gpt", "x")) == {"gpt": ("gpt",), "b": ("b", "x")}
    assert directory.faults() == []


def test_name_that_falls_back_is_not_free(directory: Directory) -> None:
    """Who claims the alias that an edited recipe gave up gets it, unless the edit does not count."""
    with_gpt = A + "aliases: [gpt]\n"
    assert directory.put(a=with_gpt, b=B.replace("gpt", "a")) == {"a": ("a",), "b": ("b", "gpt")}
    assert directory.faults() == [("b", "aliases", "b"), ("a", "aliases", "a")]
    assert directory.put(b=B.replace("gpt", "x")) == {"a": ("a", "gpt"), "b": ("b", "x")}


def test_names_can_be_swapped(directory: Directory) -> None:
    """All changes of one moment count together."""
    directory.put(a=A + "aliases: [x]\n")
    assert directory.put(a=A + "aliases: [gpt]\n", b=B.replace("gpt", "x")) == {"a": ("a", "gpt"), "b": ("b", "x")}
    assert directory.faults() == []


def test_left_out_recipe_tells_its_other_names(directory: Directory) -> None:
    """Its model is not served with default settings, and whoever asks for it finds the fault."""
    directory.put(gpt="{model_path: /m/gpt.gguf, aliases: [new]}")
    (fault,) = directory.in_force.faults
    assert set(fault.claims) == {"gpt", "new", "/m/gpt.gguf"}


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
