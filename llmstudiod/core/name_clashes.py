"""Whose a name is where several recipes claim it: his who has it; else an id is stronger than an alias, then the first.

A new name that is taken is an invalid change like any other: what was in force before stays as it was.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from llmstudiod.core.last_good import stays
from llmstudiod.core.recipe import Fault, LoadedRecipes, Recipe, RecipeEntry


def without_clashes(found: LoadedRecipes, before: Iterable[RecipeEntry] = ()) -> LoadedRecipes:
    """Return the recipes that have their names for themselves, and the others as faults.

    Who had a name in ``before``, and has it still, keeps it. A recipe that was edited to claim the name of another
    falls back to its earlier version; one that was not there before is left out, and what its file held instead of it
    stays: its id was changed to one that is taken.
    """
    in_force = {entry.recipe.id: entry for entry in before}
    held = {name: entry.recipe.id for entry in in_force.values() for name in entry.recipe.names}
    entries, faults = _one_for_each_id(found.entries, in_force)
    fallen: dict[str, Fault] = {}
    returned: dict[str, Fault] = {}
    while True:  # who falls back claims names again that others may have taken meanwhile: at most once for each recipe
        clashes = _clashes(entries, held)
        back = {
            model: stays(fault)
            for model, fault in clashes.items()
            if model not in fallen and model in in_force and in_force[model].file == entries[model].file
        }
        renamed = {entries[model].file: fault for model, fault in clashes.items() if model not in in_force}
        again = {
            model: replace(stays(renamed[entry.file]), recipe_id=model)
            for model, entry in in_force.items()
            if entry.file in renamed and model not in entries and model not in returned
        }
        if not back and not again:
            break
        fallen |= back
        returned |= again
        entries |= {model: in_force[model] for model in (*back, *again)}
    told = (*fallen.values(), *(fault for model, fault in returned.items() if model not in clashes))
    return LoadedRecipes(
        tuple(entry for model, entry in entries.items() if model not in clashes),
        (*found.faults, *faults, *told, *(f for model, f in clashes.items() if model not in fallen)),
    )


def _one_for_each_id(
    found: Iterable[RecipeEntry], in_force: Mapping[str, RecipeEntry]
) -> tuple[dict[str, RecipeEntry], list[Fault]]:
    """Return the owner of each id: the file that had it before, else the first."""
    rivals: dict[str, list[RecipeEntry]] = {}
    for entry in found:
        rivals.setdefault(entry.recipe.id, []).append(entry)
    owners: dict[str, RecipeEntry] = {}
    faults = []
    for model, entries in rivals.items():
        file = in_force[model].file if model in in_force else None
        owner = next((entry for entry in entries if entry.file == file), entries[0])
        owners[model] = owner
        faults += [taken(entry, model, owner) for entry in entries if entry is not owner]
    return owners, faults


def _clashes(entries: Mapping[str, RecipeEntry], held: Mapping[str, str]) -> dict[str, Fault]:
    """Return the recipes that claim the name of another, each with the first such name as its fault."""
    owners = {name: model for name, model in held.items() if model in entries and name in entries[model].recipe.names}
    for model in entries:
        owners.setdefault(model, model)
    clashes: dict[str, Fault] = {}
    for model, entry in entries.items():
        clash = next((name for name in entry.recipe.names if owners.get(name, model) != model), None)
        if clash is None:
            owners |= dict.fromkeys(entry.recipe.names, model)
        else:
            clashes[model] = taken(entry, clash, entries[owners[clash]])
            for name in entry.recipe.names:  # the others are free
                if owners.get(name) == model:
                    del owners[name]
    return clashes


def key_of(recipe: Recipe, name: str) -> str:
    """Return the field that gives a recipe one of its names."""
    return "id" if name == recipe.id else "served_model_name" if name == recipe.served_model_name else "aliases"


def taken(entry: RecipeEntry, name: str, owner: RecipeEntry) -> Fault:
    """Return the fault of a recipe that claims a name that another has."""
    recipe = entry.recipe
    place = f"{owner.file}:{owner.line}" if owner.line else str(owner.file)
    whose = "another recipe" if owner.recipe.id == name else f"recipe '{owner.recipe.id}'"
    return Fault(
        f"expected a name that is free, found '{name}', which {whose} has ({place})",
        file=entry.file or "",
        line=entry.line,
        key=key_of(recipe, name),
        hint="give one of them another name, or remove it",
        recipe_id=recipe.id,
        claims=(*recipe.names, recipe.model_path)[:100],
    )
