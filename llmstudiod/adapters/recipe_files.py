"""Recipes from ``/etc/llmstudio/recipes.d``: YAML or JSON, one recipe or a list in a file.

A faulty recipe is left out and told with file, line and key; the others are served. Nothing here raises for bad input.
"""

import shlex
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llmstudiod.adapters.documents import read_document
from llmstudiod.core.last_good import all_as_before, with_last_good
from llmstudiod.core.name_clashes import without_clashes
from llmstudiod.core.recipe import Fault, LoadedRecipes, RecipeEntry
from llmstudiod.core.recipe_reader import parse_recipes

SUFFIXES = frozenset({".yaml", ".yml", ".json"})


def load_recipes(directory: Path, before: Sequence[RecipeEntry] = ()) -> LoadedRecipes:
    """Return every recipe of ``directory`` that has its names for itself; one that does not exist holds none.

    What has become faulty since ``before`` stays as it was, where nobody but root could have written it. So does all of
    it where the directory cannot be read: a file system that is not mounted is no wish to end every model.
    """
    try:
        files = sorted(
            path for path in directory.iterdir() if path.suffix in SUFFIXES and not path.name.startswith(".")
        )
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not before:
            return LoadedRecipes((), ())
        fault = Fault(f"cannot read the directory: {error.strerror}", file=str(directory), hint=_hint(error, directory))
        return all_as_before(fault, before)
    parts = [_distrusted(path) or with_last_good(load_recipe_file(path), before, str(path)) for path in files]
    entries = tuple(entry for part in parts for entry in part.entries)
    faults = tuple(fault for part in parts for fault in part.faults)
    return without_clashes(LoadedRecipes(entries, faults), before)


def _hint(error: OSError, directory: Path) -> str:
    if isinstance(error, FileNotFoundError):
        return "put it back; an empty one ends its recipes"
    if isinstance(error, PermissionError):
        return f"let the daemon's user read it (chmod go+rx {shlex.quote(str(directory))})"
    return "put a directory there that can be read"


def _distrusted(path: Path) -> LoadedRecipes | None:
    """Return the faults of a file that another could have written; None where root's directory holds root's file.

    The launcher will not start such a recipe, so nobody should see it as a good one.
    """
    try:
        above, status = path.parent.stat(), path.lstat()
    except OSError:
        return None  # reading it tells
    if above.st_uid != 0:  # a directory of one's own, in development
        return None
    found = f"uid {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}"
    if stat.S_ISLNK(status.st_mode):
        message, hint = "expected a file, found a symbolic link", "put the file itself there"
    elif status.st_uid != 0:
        message, hint = f"expected root to own it, found {found}", f"chown root {shlex.quote(str(path))}"
    elif status.st_mode & 0o022:
        message, hint = f"expected nobody but root to write it, found {found}", f"chmod go-w {shlex.quote(str(path))}"
    else:
        return None
    fault = Fault(message, str(path), hint=hint, recipe_id=path.stem)
    recipes = [entry.recipe for entry in load_recipe_file(path).entries]
    named = [replace(fault, recipe_id=each.id, claims=(*each.names, each.model_path)) for each in recipes]
    return LoadedRecipes((), tuple(named) or (fault,))


def load_recipe_file(path: Path) -> LoadedRecipes:
    """Return the recipes of one file."""
    document = read_document(path)
    if isinstance(document, Fault):
        return LoadedRecipes((), (replace(document, recipe_id=path.stem),))
    return parse_recipes(document, default_id=path.stem)
