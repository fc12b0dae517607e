"""Recipes from ``/etc/llmstudio/recipes.d``: YAML or JSON, one recipe or a list in a file.

A faulty recipe is left out and told with file, line and key; the others are served. Nothing here raises for bad input.
"""

from dataclasses import replace
from pathlib import Path

from llmstudiod.adapters.documents import read_document
from llmstudiod.core.recipe import Fault, LoadedRecipes
from llmstudiod.core.recipe_reader import parse_recipes

SUFFIXES = frozenset({".yaml", ".yml", ".json"})


def load_recipes(directory: Path) -> LoadedRecipes:
    """Return every recipe of ``directory``; one that does not exist holds none."""
    try:
        files = sorted(
            path for path in directory.iterdir() if path.suffix in SUFFIXES and not path.name.startswith(".")
        )
    except FileNotFoundError:
        return LoadedRecipes((), ())
    except OSError as error:
        return LoadedRecipes((), (Fault(f"cannot read the directory: {error.strerror}", file=str(directory)),))
    parts = [load_recipe_file(path) for path in files]
    return LoadedRecipes(
        tuple(entry for part in parts for entry in part.entries),
        tuple(fault for part in parts for fault in part.faults),
    )


def load_recipe_file(path: Path) -> LoadedRecipes:
    """Return the recipes of one file."""
    document = read_document(path)
    if isinstance(document, Fault):
        return LoadedRecipes((), (replace(document, recipe_id=path.stem),))
    return parse_recipes(document, default_id=path.stem)
