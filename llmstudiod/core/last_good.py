"""A faulty change changes nothing: what was good before stays in force until the file is mended."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from llmstudiod.core.recipe import Fault, LoadedRecipes, RecipeEntry, Severity
from llmstudiod.core.settings import LoadedSettings

_STAYS = "until then its last good version stays in force"


def with_last_good(found: LoadedRecipes, before: Iterable[RecipeEntry], file: str) -> LoadedRecipes:
    """Return the recipes of one file, with those of ``before`` in place of what became faulty in it.

    A recipe that the file does not hold any more is gone; one that is faulty now stays as it was. So does each that is
    not there where the faults do not tell which is meant: nothing can be read, or its id is what is wrong.
    """
    faults = [fault for fault in found.faults if fault.severity is Severity.FAULT]
    earlier = [entry for entry in before if entry.file == file]
    if not faults or not earlier:
        return found
    there = {entry.recipe.id for entry in found.entries}
    broken = {fault.recipe_id for fault in faults}
    is_unclear = not there or not broken <= {entry.recipe.id for entry in earlier}
    kept = [entry for entry in earlier if entry.recipe.id not in there and (is_unclear or entry.recipe.id in broken)]
    return LoadedRecipes((*found.entries, *kept), _told(found.faults, [entry.recipe.id for entry in kept]))


def all_as_before(fault: Fault, before: Iterable[RecipeEntry]) -> LoadedRecipes:
    """Return the recipes as they were where the fault is that none can be read."""
    kept = tuple(before)
    return LoadedRecipes(kept, _told((fault,), [entry.recipe.id for entry in kept]))


def _told(faults: Sequence[Fault], kept: Sequence[str]) -> tuple[Fault, ...]:
    """Return the faults, each about a recipe that stays; one that could mean any of them is told for each."""
    silent = [model for model in kept if all(fault.recipe_id != model for fault in faults)]
    told: list[Fault] = []
    for fault in faults:
        if fault.recipe_id in kept:
            told.append(stays(fault))
        elif silent and fault.severity is Severity.FAULT:
            names = (*filter(None, [fault.recipe_id]), *fault.claims)
            told += [replace(stays(fault), recipe_id=model, claims=names) for model in silent]
            silent = []
        else:
            told.append(fault)
    return tuple(told)


def with_last_good_settings(found: LoadedSettings, before: LoadedSettings) -> LoadedSettings:
    """Return the settings, each faulty one as it was before; all of them where a file cannot be read."""
    faults = [fault for fault in found.faults if fault.severity is Severity.FAULT]
    if any(fault.key is None for fault in faults):
        return LoadedSettings(before.settings, before.sources, tuple(map(stays, found.faults)))
    names = {fault.key for fault in faults} & set(before.sources)
    kept = {name: getattr(before.settings, name) for name in names if name}
    sources = {**found.sources, **{name: before.sources[name] for name in kept}}
    told = tuple(stays(fault) if fault.key in kept else fault for fault in found.faults)
    return LoadedSettings(replace(found.settings, **kept), sources, told)


def stays(fault: Fault) -> Fault:
    """Return the fault with the word that until it is mended what was before counts."""
    if fault.severity is not Severity.FAULT:
        return fault
    hint = fault.hint if fault.hint and not fault.hint.startswith("until it is corrected") else ""
    return replace(fault, hint=f"{hint}; {_STAYS}" if hint else _STAYS)
