"""All recipes in force: those of the files, and one for each GGUF in the model directories that has none."""

from pathlib import Path

from llmstudiod.adapters.model_files import find_models
from llmstudiod.adapters.recipe_files import load_recipes
from llmstudiod.adapters.settings import Settings
from llmstudiod.core.catalogue import Catalogue, build_catalogue
from llmstudiod.core.recipe import Fault, Recipe, RecipeEntry, Severity


def load_catalogue(settings: Settings) -> Catalogue:
    """Read recipes and model directories. Blocks on the disk; bad input becomes faults, never an exception."""
    loaded = load_recipes(Path(settings.recipes_dir))
    entries, faults = list(loaded.entries), list(loaded.faults)
    if settings.auto_recipes:
        found, more = _without_recipe(settings, {_real(entry.recipe.model_path) for entry in entries})
        entries += found
        faults += more
    return build_catalogue(entries, faults)


def _without_recipe(settings: Settings, taken: set[str]) -> tuple[list[RecipeEntry], list[Fault]]:
    entries: list[RecipeEntry] = []
    faults: list[Fault] = []
    roots = [Path(directory) for directory in settings.model_dirs if Path(directory).is_dir()]
    real_roots = [root.resolve() for root in roots]
    for root in roots:
        models, errors = find_models(root)
        for model in models:
            target = model.path.resolve()
            if str(target) in taken:
                continue
            if not any(target.is_relative_to(real) for real in real_roots):
                message = f"its target '{target}' is outside the model directories"
                hint = "add its directory to model_dirs, or write a recipe for it"
                faults.append(Fault(message, str(model.path), key=model.model_id, hint=hint, severity=Severity.WARNING))
                continue
            taken.add(str(target))
            entries.append(RecipeEntry(Recipe(id=model.model_id, model_path=str(model.path))))
        for error in errors:
            path = str(error.details.get("path", root))
            faults.append(Fault(error.message, path, key=Path(path).stem, hint=error.hint, severity=Severity.WARNING))
    return entries, faults


def _real(path: str) -> str:
    try:
        return str(Path(path).resolve())
    except (OSError, RuntimeError):
        return path
