"""Several recipes together: whose name is whose, and which one serves requests without a model."""

import pytest

from llmstudiod.adapters.recipe_files import parse_recipes
from llmstudiod.adapters.yaml_lines import Document, parse_document
from llmstudiod.core.catalogue import Catalogue, build_catalogue
from llmstudiod.core.recipe import Recipe, RecipeEntry, Severity
from llmstudiod.errors import BadRequestError, ModelNotFoundError


def catalogue(text: str, *, autos: tuple[str, ...] = ()) -> Catalogue:
    """Return the catalogue of a file's recipes, and of GGUF files without one."""
    document = parse_document(text, file="r.yaml")
    assert isinstance(document, Document)
    loaded = parse_recipes(document, default_id="r")
    extra = [RecipeEntry(Recipe(id=name, model_path=f"/{name}.gguf")) for name in autos]
    return build_catalogue([*loaded.entries, *extra], loaded.faults)


def test_second_recipe_with_an_id_is_left_out() -> None:
    """The first to come keeps the id; the fault names both places."""
    found = catalogue("- {id: a, model_path: /1}\n- {id: a, model_path: /2}")
    assert found.entries["a"].recipe.model_path == "/1"
    (fault,) = found.faults
    assert (fault.line, fault.key) == (2, "id")
    assert fault.message == "expected a name that is free, found 'a', which another recipe has (r.yaml:1)"


@pytest.mark.parametrize(
    ("second", "key"),
    [("aliases: [x]", "aliases"), ("served_model_name: x", "served_model_name"), ("aliases: [a]", "aliases")],
)
def test_second_recipe_with_a_name_is_left_out_and_told(second: str, key: str) -> None:
    """An alias that is somebody's id or alias takes the recipe out, and asking for it tells why."""
    found = catalogue(f"- {{id: a, model_path: /1, aliases: [x]}}\n- {{id: b, model_path: /2, {second}}}")
    assert (set(found.entries), found.resolve("x")) == ({"a"}, "a")
    assert (found.faults[0].key, found.faults[0].line) == (key, 2)
    with pytest.raises(ModelNotFoundError) as caught:
        found.resolve("b")
    assert "expected a name that is free" in str(caught.value.hint)


def test_default_is_the_marked_one_or_the_only_one() -> None:
    """A request without a model goes to the marked recipe, or to the only one; else it is refused."""
    one_recipe, two = "- {id: a, model_path: /1}", "\n- {id: b, model_path: /2}"
    assert catalogue(one_recipe).resolve(None) == "a"
    with pytest.raises(BadRequestError, match="none of the 2 recipes is marked default"):
        catalogue(one_recipe + two).resolve(None)
    assert catalogue(one_recipe + two.replace("/2", "/2, default: true")).resolve(None) == "b"
    both = catalogue((one_recipe + two).replace("}", ", default: true}"))
    assert both.resolve(None) == "a"
    assert [(fault.severity, fault.key, fault.line) for fault in both.faults] == [(Severity.WARNING, "default", 2)]


def test_recipe_wins_over_a_file_of_its_name_even_when_it_is_faulty() -> None:
    """A model whose recipe is broken is not served with defaults that its author did not want."""
    found = catalogue("- {id: a, model_path: /1}\n- {id: b, model_path: /2, threads: x}", autos=("a", "b", "c"))
    assert {name: entry.file for name, entry in found.entries.items()} == {"a": "r.yaml", "c": None}
    with pytest.raises(ModelNotFoundError) as caught:
        found.resolve("b")
    assert "r.yaml:2: threads" in str(caught.value.hint)
