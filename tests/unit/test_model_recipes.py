"""All recipes in force: files, and a recipe for each GGUF that has none."""

from pathlib import Path

import pytest

from llmstudiod.adapters.model_recipes import load_catalogue
from llmstudiod.adapters.recipe_files import load_recipes
from llmstudiod.core.catalogue import Catalogue
from llmstudiod.core.errors import ModelNotFoundError
from llmstudiod.core.recipe import Severity
from llmstudiod.core.settings import Settings
from tests.gguf_files import write_model, write_shards


class Place:
    """A recipes directory and two model directories."""

    def __init__(self, top: Path) -> None:
        self.recipes, self.models, self.more = top / "recipes.d", top / "models", top / "more"
        for directory in (self.recipes, self.models, self.more):
            directory.mkdir()

    def recipe(self, name: str, text: str) -> None:
        """Write a recipe file."""
        (self.recipes / f"{name}.yaml").write_text(text)

    def load(self, *, auto_recipes: bool = True) -> Catalogue:
        """Return the catalogue."""
        directories = (str(self.models), str(self.more), "/nonexistent")
        settings = Settings(model_dirs=directories, auto_recipes=auto_recipes)
        return load_catalogue(settings, load_recipes(self.recipes))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Empty directories."""
    return Place(tmp_path)


def served(catalogue: Catalogue) -> dict[str, str]:
    """Return the model path of each recipe, and that nothing was told."""
    assert catalogue.faults == ()
    return {name: entry.recipe.model_path for name, entry in catalogue.entries.items()}


def test_file_without_a_recipe_is_served_under_its_stem(place: Place) -> None:
    """One model and nothing configured: it is served, and it is the default."""
    path = write_model(place.models / "Qwen3 8B-Q4_K_M.gguf")
    catalogue = place.load()
    assert served(catalogue) == {"qwen3-8b-q4_k_m": str(path)}
    entry = catalogue.entries["qwen3-8b-q4_k_m"]
    assert (entry.file, catalogue.resolve(None)) == (None, "qwen3-8b-q4_k_m")
    assert served(place.load(auto_recipes=False)) == {}


def test_shards_are_one_model(place: Place) -> None:
    """A split model is served once, under its name without the numbers."""
    shards = write_shards(place.models, named="Big")
    assert served(place.load()) == {"big": str(shards[0])}


@pytest.mark.parametrize("model_path", ["{models}/tiny.gguf", "tiny.gguf", "{models}", "{models}/link.gguf"])
def test_recipe_takes_its_file(model_path: str, place: Place) -> None:
    """A file that a recipe names, however it does, is not served a second time under its stem."""
    path = write_model(place.models / "tiny.gguf")
    if "link" in model_path:
        (place.models / "link.gguf").symlink_to(path)
    model_path = model_path.format(models=place.models)
    place.recipe("mine", f"model_path: {model_path}")
    assert served(place.load()) == {"mine": model_path}


def test_recipe_wins_over_a_file_of_its_name(place: Place) -> None:
    """Writing a recipe is how one replaces the defaults, also when it serves another file."""
    write_model(place.models / "tiny.gguf")
    write_model(place.models / "other.gguf")
    place.recipe("tiny", "model_path: /elsewhere.gguf")
    place.recipe("x", "{model_path: /x.gguf, aliases: [other]}")
    assert served(place.load()) == {"tiny": "/elsewhere.gguf", "x": "/x.gguf"}


def test_faulty_recipe_is_not_replaced_by_defaults(place: Place) -> None:
    """Its author did not want the model served without what the recipe says; asking for it tells the fault."""
    write_model(place.models / "tiny.gguf")
    place.recipe("tiny", f"model_path: {place.models}/tiny.gguf\nthreads: many")
    catalogue = place.load()
    assert dict(catalogue.entries) == {}
    with pytest.raises(ModelNotFoundError) as caught:
        catalogue.resolve("tiny")
    assert f"{place.recipes}/tiny.yaml:2: threads: expected a whole number" in str(caught.value.hint)


def test_model_of_a_faulty_recipe_is_not_served_under_its_file_name(place: Place) -> None:
    """Nor without the limits that its author wanted; each of its names tells the fault."""
    write_model(place.models / "Big.gguf")
    text = f"{{id: big-q4, model_path: {place.models}/Big.gguf, aliases: [gpt-4o], limits: {{memory_max: lots}}}}"
    place.recipe("mine", text)
    catalogue = place.load()
    assert dict(catalogue.entries) == {}
    for name in ("big-q4", "gpt-4o"):
        with pytest.raises(ModelNotFoundError) as caught:
            catalogue.resolve(name)
        assert "limits.memory_max: expected a size" in str(caught.value.hint)


def test_link_to_a_file_that_is_no_model_is_told_as_such(place: Place, tmp_path: Path) -> None:
    """Nobody is advised to open it, and nothing of it is told."""
    secret = tmp_path / "shadow"
    secret.write_text("root:$6$")
    secret.chmod(0o640)
    (place.models / "x.gguf").symlink_to(secret)
    catalogue = place.load()
    (fault,) = catalogue.faults
    assert fault.message == f"expected a file in the model directories, found a link to '{secret}'"
    assert "chmod" not in str(fault)
    with pytest.raises(ModelNotFoundError) as caught:
        catalogue.resolve("x")
    assert "found a link to" in str(caught.value.hint)
    assert "recipe is faulty" not in str(caught.value.hint)


def test_link_out_of_the_model_directories_is_told(place: Place, tmp_path: Path) -> None:
    """Whoever may write a model directory cannot have any file served; a recipe can."""
    target = write_model(tmp_path / "private" / "secret.gguf")
    (place.models / "open.gguf").symlink_to(target)
    catalogue = place.load()
    assert dict(catalogue.entries) == {}
    (fault,) = catalogue.faults
    assert (fault.file, fault.severity, fault.recipe_id) == (str(place.models / "open.gguf"), Severity.WARNING, "open")
    assert fault.message == f"expected a file in the model directories, found a link to '{target}'"
    assert "add its directory to model_dirs" in str(fault.hint)
    place.recipe("open", f"model_path: {place.models}/open.gguf")
    assert served(place.load()) == {"open": f"{place.models}/open.gguf"}


def test_link_into_another_model_directory_is_one_model(place: Place) -> None:
    """A file is served once, under the name that is met first."""
    path = write_model(place.more / "b.gguf")
    (place.models / "a.gguf").symlink_to(path)
    assert served(place.load()) == {"a": str(place.models / "a.gguf")}


def test_two_files_with_one_name_are_told(place: Place) -> None:
    """The first is served; the second is not silently forgotten."""
    first, second = write_model(place.models / "tiny.gguf"), write_model(place.more / "Tiny.gguf")
    catalogue = place.load()
    assert catalogue.entries["tiny"].recipe.model_path == str(first)
    (fault,) = catalogue.faults
    assert (fault.file, fault.severity) == (str(second), Severity.WARNING)
    assert fault.message == f"expected a name that is free, found 'tiny', which '{first}' has"


def test_damaged_file_is_told_and_asking_for_it_says_why(place: Place) -> None:
    """The others are served; the message does not say the path twice."""
    write_model(place.models / "good.gguf")
    (place.models / "Bad File.gguf").write_bytes(b"junk")
    catalogue = place.load()
    assert set(catalogue.entries) == {"good"}
    (fault,) = catalogue.faults
    assert (fault.file, fault.severity) == (str(place.models / "Bad File.gguf"), Severity.WARNING)
    assert fault.message == "is not GGUF: it does not begin with these letters"
    with pytest.raises(ModelNotFoundError) as caught:
        catalogue.resolve("bad-file")
    assert "is not GGUF" in str(caught.value.hint)
