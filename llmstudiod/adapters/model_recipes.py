"""All recipes in force: those of the files, and one for each GGUF in the model directories that has none."""

from collections.abc import Iterable
from pathlib import Path

from llmstudiod.adapters.gguf_file import BadModelFileError
from llmstudiod.adapters.model_files import find_models, model_id_from_stem
from llmstudiod.core.catalogue import Catalogue, build_catalogue
from llmstudiod.core.recipe import Fault, LoadedRecipes, Recipe, RecipeEntry, Severity
from llmstudiod.core.settings import Settings


def load_catalogue(settings: Settings, loaded: LoadedRecipes) -> Catalogue:
    """Return the recipes of files and the GGUFs without one. Blocks on the disk; bad input becomes faults."""
    entries, faults = list(loaded.entries), list(loaded.faults)
    if settings.auto_recipes:
        claimed = [entry.recipe.model_path for entry in entries]
        claimed += [claim for fault in faults if fault.severity is Severity.FAULT for claim in fault.claims]
        taken = {target for path in claimed for target in real_paths(path, settings.model_dirs)}
        found, more = _without_recipe(settings, taken)
        entries += found
        faults += more
    return build_catalogue(entries, faults)


def _without_recipe(settings: Settings, taken: set[Path]) -> tuple[list[RecipeEntry], list[Fault]]:
    entries: list[RecipeEntry] = []
    faults: list[Fault] = []
    by_id: dict[str, Path] = {}
    roots = [Path(directory) for directory in settings.model_dirs if _is_directory(Path(directory))]
    real_roots = [root.resolve() for root in roots]
    for root in roots:
        models, errors = find_models(root)
        for model in models:
            target = model.path.resolve()
            if target in taken or target.parent in taken:  # a recipe may name the directory of its one model
                continue
            if not any(target.is_relative_to(real) for real in real_roots):
                message = f"expected a file in the model directories, found a link to '{target}'"
                hint = "add its directory to model_dirs, or write a recipe for it"
                faults.append(_warning(message, model.path, model.model_id, hint))
                continue
            taken.add(target)
            first = by_id.setdefault(model.model_id, model.path)
            if first is not model.path:
                message = f"expected a name that is free, found '{model.model_id}', which '{first}' has"
                faults.append(_warning(message, model.path, model.model_id, "rename it, or write a recipe for it"))
                continue
            entries.append(RecipeEntry(Recipe(id=model.model_id, model_path=str(model.path))))
        for error in errors:
            path = Path(str(error.details.get("path", root)))
            target = path.resolve()
            if not any(target.is_relative_to(real) for real in real_roots):
                message = f"expected a file in the model directories, found a link to '{target}'"
                faults.append(_warning(message, path, _model_id(path), "remove the link"))
                continue
            message = error.message.removeprefix(f"{str(path)!r} ")
            faults.append(_warning(message, path, _model_id(path), error.hint))
    return entries, faults


def _warning(message: str, path: Path, model_id: str | None, hint: str | None) -> Fault:
    return Fault(message, str(path), hint=hint, severity=Severity.WARNING, recipe_id=model_id)


def _model_id(path: Path) -> str | None:
    try:
        return model_id_from_stem(path.stem)
    except BadModelFileError:
        return None


def real_paths(path: str, model_dirs: Iterable[str]) -> list[Path]:
    """Return the real paths that a recipe's model_path may mean; a relative one is looked up in each directory."""
    try:
        return [(Path(directory) / path).resolve() for directory in ("/", *model_dirs)]
    except (OSError, RuntimeError, ValueError):
        return []


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False
