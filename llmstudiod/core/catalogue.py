"""The set of recipes in force, and the names by which requests may ask for them.

Immutable: a reload makes a new one. No fuzzy match: a name is one of a recipe's own or it is unknown.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from llmstudiod.core.errors import BadRequestError, ModelNotFoundError
from llmstudiod.core.recipe import Fault, RecipeEntry, Severity

_NEW = "a new file is noticed within ten seconds"
_FIRST = f"put a GGUF into a model directory (model_dirs), or a recipe into recipes_dir; {_NEW}"


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Recipes by id, ids by every name, and the faults of the recipes that were left out."""

    entries: Mapping[str, RecipeEntry]
    ids_by_name: Mapping[str, str]
    faults: tuple[Fault, ...] = ()
    default_id: str | None = None

    def faulty(self) -> frozenset[str]:
        """Return the ids, or files, of the recipes that were left out."""
        return frozenset(fault.recipe_id or fault.file for fault in self.faults if fault.severity is Severity.FAULT)

    def resolve(self, name: str | None) -> str:
        """Return the id for the name in a request; None means that the request names no model.

        Raises:
            ModelNotFoundError: No recipe has this name.
            BadRequestError: The request names no model and none is the default.
        """
        if name is None:
            if not self.entries:
                raise BadRequestError("the request names no model, and there is none yet", hint=_FIRST)
            if self.default_id is None:
                raise BadRequestError(
                    f"the request names no model, and none of the {len(self.entries)} recipes is marked default",
                    hint='put "model" into the request, or `default: true` into one recipe',
                )
            return self.default_id
        found = self.ids_by_name.get(name)
        if found is not None:
            return found
        close = difflib.get_close_matches(name[:200], self.ids_by_name, n=3)
        listed = f"`llmstudioctl list` or GET /v1/models lists the models; {_NEW}" if self.entries else _FIRST
        hint = f"did you mean {', '.join(close)}?" if close else listed
        about = [fault for fault in self.faults if name == fault.recipe_id or name in fault.claims]
        broken = next(iter(sorted(about, key=lambda fault: fault.severity is Severity.WARNING)), None)
        if broken is not None and broken.severity is Severity.FAULT:
            hint = f"its recipe is faulty: {broken}"
        elif broken is not None:  # a file without a recipe that will not do
            hint = f"{replace(broken, severity=Severity.FAULT)}"
        raise ModelNotFoundError(f"there is no model '{name[:200]}'", hint=hint)


def build_catalogue(candidates: Iterable[RecipeEntry], faults: Iterable[Fault] = ()) -> Catalogue:
    """Return the catalogue of ``candidates``; one that claims a name already taken becomes a fault.

    The first to come keeps an id; an id is stronger than anybody's alias. A recipe from a file wins over a GGUF
    that is served without one, silently, since writing the recipe is how one replaces the defaults. So does a
    faulty recipe: its model is not served with defaults instead, which its author did not want.
    """
    all_faults = list(faults)
    entries: dict[str, RecipeEntry] = {}
    candidates = list(candidates)
    for entry in candidates:
        if entry.file is None:
            continue
        known = entries.setdefault(entry.recipe.id, entry)
        if known is not entry:
            all_faults.append(_taken(entry, "id", entry.recipe.id, known))
    owners = {model: model for model in entries}
    for model in list(entries):
        entry = entries[model]
        clash = next((name for name in entry.recipe.names if owners.get(name, model) != model), None)
        if clash is not None:
            key = "served_model_name" if clash == entry.recipe.served_model_name else "aliases"
            all_faults.append(_taken(entry, key, clash, entries[owners[clash]]))
            del entries[model]
            owners = {name: owner for name, owner in owners.items() if owner != model}
            continue
        owners |= dict.fromkeys(entry.recipe.names, model)
    broken = {fault.recipe_id for fault in all_faults if fault.severity is Severity.FAULT}
    for entry in candidates:
        if entry.file is None and entry.recipe.id not in owners and entry.recipe.id not in broken:
            entries[entry.recipe.id] = entry
            owners[entry.recipe.id] = entry.recipe.id
    default_id, default_faults = _default(entries)
    return Catalogue(
        entries=MappingProxyType(entries),
        ids_by_name=MappingProxyType(owners),
        faults=tuple(all_faults + default_faults),
        default_id=default_id,
    )


def _default(entries: Mapping[str, RecipeEntry]) -> tuple[str | None, list[Fault]]:
    marked = [entry for entry in entries.values() if entry.recipe.default]
    if not marked:
        return (next(iter(entries)) if len(entries) == 1 else None), []
    faults = [
        Fault(
            f"expected one default recipe, found '{entry.recipe.id}' beside '{marked[0].recipe.id}', which is used",
            file=entry.file or "",
            line=entry.line,
            key="default",
            hint="keep `default: true` in one recipe",
            severity=Severity.WARNING,
            recipe_id=entry.recipe.id,
        )
        for entry in marked[1:]
    ]
    return marked[0].recipe.id, faults


def _taken(entry: RecipeEntry, key: str, name: str, owner: RecipeEntry) -> Fault:
    place = f"{owner.file}:{owner.line}" if owner.line else str(owner.file)
    whose = "another recipe" if owner.recipe.id == name else f"recipe '{owner.recipe.id}'"
    return Fault(
        f"expected a name that is free, found '{name}', which {whose} has ({place})",
        file=entry.file or "",
        line=entry.line,
        key=key,
        hint="give one of them another name, or remove it",
        recipe_id=entry.recipe.id,
    )
