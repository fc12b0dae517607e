"""The set of recipes in force, and the names by which requests may ask for them.

Immutable: a reload makes a new one. No fuzzy match: a name is one of a recipe's own or it is unknown.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from llmstudiod.core.errors import BadRequestError, ModelNotFoundError
from llmstudiod.core.name_clashes import key_of, taken, without_clashes
from llmstudiod.core.recipe import Fault, LoadedRecipes, Recipe, RecipeEntry, Severity

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

    def broken_file(self, name: str) -> str | None:
        """Return the file of a recipe that was left out, by the recipe's id or the file's name."""
        faults = (fault for fault in self.faults if fault.severity is Severity.FAULT and fault.file)
        return next((each.file for each in faults if name in {each.recipe_id, each.file.rpartition("/")[2]}), None)

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

    def clashes(self, recipe: Recipe, *, is_new: bool) -> list[Fault]:
        """Return a fault for each name of a recipe, not yet stored, that another has; of ``is_new`` the id as well.

        A GGUF that is served without a recipe owns no name: writing one is how its defaults are replaced.
        """
        faults = []
        for name in recipe.names:
            owner = self.entries.get(self.ids_by_name.get(name, ""))
            is_own = owner is not None and owner.recipe.id == recipe.id
            if owner and owner.file is not None and (not is_own or (is_new and name == recipe.id)):
                faults.append(taken(RecipeEntry(recipe), name, owner))
            elif broken := self._broken_owner(name, None if is_new else recipe.id):
                message = f"expected a name that is free, found '{name}', which a faulty recipe has ({broken.file})"
                faults.append(Fault(message, key=key_of(recipe, name), recipe_id=recipe.id))
        return faults

    def _broken_owner(self, name: str, own: str | None) -> Fault | None:
        """Return a fault of a recipe that was left out and has this name; not of the one that is being mended."""
        return next(
            (
                fault
                for fault in self.faults
                if fault.severity is Severity.FAULT
                and fault.recipe_id != own
                and (name == fault.recipe_id or name in fault.claims)
            ),
            None,
        )


def build_catalogue(candidates: Iterable[RecipeEntry], faults: Iterable[Fault] = ()) -> Catalogue:
    """Return the catalogue of ``candidates``; one that claims a name already taken becomes a fault.

    The first to come keeps an id; an id is stronger than anybody's alias: who had which name before was settled when
    the files were read. A recipe from a file wins over a GGUF that is served without one, silently, since writing the
    recipe is how one replaces the defaults. So does a faulty recipe: its model is not served with defaults instead,
    which its author did not want.
    """
    candidates = list(candidates)
    of_files = LoadedRecipes(tuple(entry for entry in candidates if entry.file is not None), tuple(faults))
    settled = without_clashes(of_files)
    entries = {entry.recipe.id: entry for entry in settled.entries}
    owners = {name: entry.recipe.id for entry in settled.entries for name in entry.recipe.names}
    broken = {fault.recipe_id for fault in settled.faults if fault.severity is Severity.FAULT}
    for entry in candidates:
        if entry.file is None and entry.recipe.id not in owners and entry.recipe.id not in broken:
            entries[entry.recipe.id] = entry
            owners[entry.recipe.id] = entry.recipe.id
    default_id, default_faults = _default(entries)
    return Catalogue(
        entries=MappingProxyType(entries),
        ids_by_name=MappingProxyType(owners),
        faults=(*settled.faults, *default_faults),
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
