"""A faulty change changes nothing: what was good before stays in force until the file is mended."""

from collections.abc import Iterable
from dataclasses import replace

from llmstudiod.core.recipe import Fault, LoadedRecipes, RecipeEntry, Severity
from llmstudiod.core.settings import LoadedSettings

_STAYS = "until then its last good version stays in force"


def with_last_good(found: LoadedRecipes, before: Iterable[RecipeEntry], file: str) -> LoadedRecipes:
    """Return the recipes of one file, with those of ``before`` in place of what became faulty in it.

    A recipe that the file does not hold any more is gone; one that is faulty now, or all of them where nothing of the
    file can be read, stays as it was.
    """
    faults = [fault for fault in found.faults if fault.severity is Severity.FAULT]
    if not faults:
        return found
    there = {entry.recipe.id for entry in found.entries}
    broken = {fault.recipe_id for fault in faults}
    # Where nothing can be read a fault names the file, or, as its default id, the file's stem.
    is_unreadable = not there and broken <= {None, file.rpartition("/")[2].rpartition(".")[0]}
    kept = [
        entry
        for entry in before
        if entry.file == file and entry.recipe.id not in there and (is_unreadable or entry.recipe.id in broken)
    ]
    if not kept:
        return found
    ids = {entry.recipe.id for entry in kept}
    told = tuple(_stays(fault) if is_unreadable or fault.recipe_id in ids else fault for fault in found.faults)
    return LoadedRecipes((*found.entries, *kept), told)


def with_last_good_settings(found: LoadedSettings, before: LoadedSettings) -> LoadedSettings:
    """Return the settings, each faulty one as it was before; all of them where a file cannot be read."""
    faults = [fault for fault in found.faults if fault.severity is Severity.FAULT]
    if any(fault.key is None for fault in faults):
        return LoadedSettings(before.settings, before.sources, tuple(map(_stays, found.faults)))
    names = {fault.key for fault in faults} & set(before.sources)
    kept = {name: getattr(before.settings, name) for name in names if name}
    sources = {**found.sources, **{name: before.sources[name] for name in kept}}
    told = tuple(_stays(fault) if fault.key in kept else fault for fault in found.faults)
    return LoadedSettings(replace(found.settings, **kept), sources, told)


def _stays(fault: Fault) -> Fault:
    if fault.severity is not Severity.FAULT:
        return fault
    hint = fault.hint if fault.hint and not fault.hint.startswith("until it is corrected") else ""
    return replace(fault, hint=f"{hint}; {_STAYS}" if hint else _STAYS)
