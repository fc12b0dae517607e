"""The set of recipes in force: who owns a name, which one is the default, and what an unknown name is told."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstudiod.core.catalogue import Catalogue, build_catalogue
from llmstudiod.core.errors import BadRequestError, ModelNotFoundError
from llmstudiod.core.name_clashes import without_clashes
from llmstudiod.core.recipe import Fault, LoadedRecipes, Recipe, RecipeEntry, Severity


def entry(model: str, *, file: str | None = "models.yaml", line: int | None = None, **fields: Any) -> RecipeEntry:
    """Return a recipe of a file; ``file=None`` is a GGUF without one."""
    return RecipeEntry(Recipe(id=model, model_path=f"/{model}.gguf", **fields), file, line)


def real_faults(catalogue: Catalogue) -> list[Fault]:
    """Return the faults that left a recipe out."""
    return [fault for fault in catalogue.faults if fault.severity is Severity.FAULT]


def test_every_name_of_a_recipe_finds_it() -> None:
    """A request may use the id, the served name or an alias; no other spelling."""
    catalogue = build_catalogue([entry("a", served_model_name="Model-A", aliases=("gpt-4o", "x")), entry("b")])
    assert {name: catalogue.resolve(name) for name in ("a", "Model-A", "gpt-4o", "x", "b")} == {
        "a": "a", "Model-A": "a", "gpt-4o": "a", "x": "a", "b": "b",
    }  # fmt: skip
    for name in ("A", "model-a", "a ", "", "gpt-4"):
        with pytest.raises(ModelNotFoundError):
            catalogue.resolve(name)


def test_first_recipe_keeps_an_id() -> None:
    """Of two recipes with one id the first in the order of the files is served; the other is told, with its place."""
    first, second = entry("a", file="10-a.yaml", line=1), entry("a", file="20-a.yaml", line=7)
    catalogue = build_catalogue([first, second])
    assert catalogue.entries["a"] is first
    (fault,) = real_faults(catalogue)
    assert (fault.file, fault.line, fault.key, fault.recipe_id) == ("20-a.yaml", 7, "id", "a")
    assert "10-a.yaml:1" in fault.message


@pytest.mark.parametrize("order", [1, -1])
def test_id_is_stronger_than_an_alias(order: int) -> None:
    """A recipe whose alias is another's id is left out, whichever comes first."""
    catalogue = build_catalogue([entry("a"), entry("b", aliases=("a",))][::order])
    assert set(catalogue.entries) == {"a"}
    (fault,) = real_faults(catalogue)
    assert (fault.key, fault.recipe_id) == ("aliases", "b")


def test_first_recipe_keeps_an_alias() -> None:
    """Of two recipes with one alias the first is served; the other is left out with all of its names."""
    catalogue = build_catalogue([entry("a", aliases=("x",)), entry("b", aliases=("y", "x")), entry("c")])
    assert set(catalogue.entries) == {"a", "c"}
    assert catalogue.resolve("x") == "a"
    with pytest.raises(ModelNotFoundError):
        catalogue.resolve("y")


def test_name_of_a_recipe_that_was_left_out_is_free() -> None:
    """What a recipe without effect claimed does not stand in the way of a later one."""
    catalogue = build_catalogue([entry("a"), entry("b", aliases=("a",)), entry("c", aliases=("b",))])
    assert set(catalogue.entries) == {"a", "c"}
    assert catalogue.resolve("b") == "c"


def test_served_name_that_is_taken_is_told_by_its_key() -> None:
    """The fault names the key under which the clash stands in the file."""
    (fault,) = real_faults(build_catalogue([entry("a"), entry("b", served_model_name="a")]))
    assert fault.key == "served_model_name"


def test_recipe_wins_over_a_file_without_one() -> None:
    """A GGUF is served with defaults unless a recipe has its name, good or faulty; that is no fault."""
    found = [entry("a", file=None), entry("b", file=None), entry("c", file=None)]
    broken = Fault("expected a number, found 'x'", "c.yaml", 2, "n_batch", recipe_id="c")
    catalogue = build_catalogue([*found, entry("a"), entry("z", aliases=("b",))], [broken])
    assert catalogue.entries["a"].file == "models.yaml"
    assert catalogue.resolve("b") == "z"
    assert "c" not in catalogue.entries
    assert real_faults(catalogue) == [broken]


def test_only_model_is_the_default() -> None:
    """A request without a model means the only one there is; with two of them it must say which."""
    assert build_catalogue([entry("a")]).resolve(None) == "a"
    for catalogue in (build_catalogue([]), build_catalogue([entry("a"), entry("b")])):
        with pytest.raises(BadRequestError, match="the request names no model"):
            catalogue.resolve(None)


def test_marked_model_is_the_default() -> None:
    """`default: true` decides; a second one is told and has no effect."""
    catalogue = build_catalogue([entry("a"), entry("b", default=True), entry("c", default=True, line=3)])
    assert catalogue.resolve(None) == "b"
    (warning,) = catalogue.faults
    assert (warning.severity, warning.key, warning.line) == (Severity.WARNING, "default", 3)


def test_unknown_name_gets_a_suggestion() -> None:
    """A slip is answered with the names that are near, and never served as one of them."""
    catalogue = build_catalogue([entry("llama3-8b"), entry("qwen3")])
    with pytest.raises(ModelNotFoundError) as caught:
        catalogue.resolve("llama3-8")
    assert caught.value.message == "there is no model 'llama3-8'"
    assert caught.value.hint == "did you mean llama3-8b?"
    with pytest.raises(ModelNotFoundError) as caught:
        catalogue.resolve("zzz")
    assert caught.value.hint == (
        "`llmstudioctl list` or GET /v1/models lists the models; a new file is noticed within ten seconds"
    )


def test_faulty_recipe_is_the_hint() -> None:
    """Who asks for a model whose recipe is faulty is told what is wrong with it."""
    broken = Fault("expected a number, found 'x'", "q.yaml", 2, "n_batch", recipe_id="qwen3")
    with pytest.raises(ModelNotFoundError) as caught:
        build_catalogue([entry("a")], [broken]).resolve("qwen3")
    assert caught.value.hint == "its recipe is faulty: q.yaml:2: n_batch: expected a number, found 'x'"


def test_long_name_is_cut() -> None:
    """A name of megabytes is not thrown back at its sender, nor compared with every other."""
    with pytest.raises(ModelNotFoundError) as caught:
        build_catalogue([entry("a")]).resolve("x" * 1_000_000)
    assert len(caught.value.message) < 300


names = st.sampled_from("abcdef")
candidates = st.lists(
    st.builds(
        lambda model, aliases, file, is_default: entry(model, file=file, aliases=tuple(aliases), default=is_default),
        names,
        st.lists(names, max_size=3),
        st.sampled_from(("1.yaml", "2.yaml", None)),
        st.booleans(),
    ),
    max_size=8,
)


@given(candidates)
def test_names_are_owned_once(entries: list[RecipeEntry]) -> None:
    """Whatever the files say: each name has one owner who has that name, and each recipe is served or told."""
    catalogue = build_catalogue(entries)
    for name, owner in catalogue.ids_by_name.items():
        assert name in catalogue.entries[owner].recipe.names
    for model, served in catalogue.entries.items():
        if served.file is not None:
            assert {catalogue.ids_by_name[name] for name in served.recipe.names} == {model}
    told = len(real_faults(catalogue))
    of_files = [one for one in entries if one.file is not None]
    assert told == len(of_files) - sum(one.file is not None for one in catalogue.entries.values())


def of_files(entries: list[RecipeEntry]) -> LoadedRecipes:
    """Return what files hold, without the GGUFs that have no recipe."""
    return LoadedRecipes(tuple(one for one in entries if one.file is not None), ())


@given(candidates, candidates)
def test_what_was_in_force_is_never_lost_to_a_name(earlier: list[RecipeEntry], later: list[RecipeEntry]) -> None:
    """A recipe that its file still holds is served, new or as it was; reading the same files again changes nothing."""
    before = without_clashes(of_files(earlier)).entries
    found = of_files(later)
    after = without_clashes(found, before)
    served = {one.recipe.id: one for one in after.entries}
    assert len(served) == len(after.entries)
    assert len({name for one in after.entries for name in one.recipe.names}) == sum(
        len(one.recipe.names) for one in after.entries
    )
    for one in before:
        if any((new.recipe.id, new.file) == (one.recipe.id, one.file) for new in found.entries):
            assert served[one.recipe.id].file == one.file
    assert all(one in found.entries or one in before for one in after.entries)
    assert without_clashes(found, after.entries).entries == after.entries
