"""The launcher's judgements: which recipe of a file is meant, and what a recipe that came over HTTP may not hold.

Pure, and made again by the launcher, whatever the daemon has checked.
"""

import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from llmstudiod.core.errors import AccessDeniedError, ConfigError
from llmstudiod.core.flags import why_denied
from llmstudiod.core.recipe import Fault, LoadedRecipes, Recipe, recipe_hash

_BY_HAND = "write the file by hand, as root"


def wanted_recipe(loaded: LoadedRecipes, *, model: str, expected_hash: str, file: str) -> Recipe:
    """Return the recipe of a file that has this id and this hash.

    Raises:
        ConfigError: The file holds none, a faulty one, or another one by now.
    """
    recipe = next((entry.recipe for entry in loaded.entries if entry.recipe.id == model), None)
    if recipe is None:
        about = [fault for fault in loaded.faults if fault.recipe_id in {model, None}]
        fault = next(iter(about or loaded.faults), None)
        raise ConfigError(str(fault or f"'{file}' holds no recipe '{model}'"))
    if recipe_hash(recipe) != expected_hash:
        message = f"the recipe of '{model}' in '{file}' has changed since the daemon read it"
        raise ConfigError(message, hint="systemctl reload llmstudiod")
    return recipe


def refuse_put(new: LoadedRecipes, old: LoadedRecipes | None, outside: Iterable[Fault]) -> None:
    """Refuse a recipe file that came over HTTP; ``old`` is what it would replace, ``outside`` its files elsewhere.

    Raises:
        AccessDeniedError: What is wrong, all of it.
    """
    faults = [*new.faults, *(fault for entry in new.entries for fault in refused_over_http(entry.recipe)), *outside]
    there = "the file that is there was written by hand: "
    faults += [replace(fault, message=there + fault.message) for fault in _by_hand(old)]
    if faults or not new.entries:
        told = "; ".join(str(fault) for fault in faults[:10]) or "it holds no recipe"
        raise AccessDeniedError(f"the recipe cannot be written: {told}", hint=_BY_HAND)


def refuse_delete(old: LoadedRecipes, file: str) -> None:
    """Refuse to delete what did not come over HTTP.

    Raises:
        AccessDeniedError: It holds what only a person can have written, or several recipes.
    """
    if _by_hand(old) or len(old.entries) != 1:
        raise AccessDeniedError(f"'{file}' was written by hand", hint="remove the file by hand, as root")


def refused_over_http(recipe: Recipe) -> list[Fault]:
    """Return what only a person who may write below /etc can give; the files are judged where they can be seen."""
    return list(_refused(recipe))


def named_files(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield field and path of every file that a recipe names."""
    yield "model_path", recipe.model_path
    for name in ("mmproj", "draft_model", "chat_template_file"):
        if (path := getattr(recipe, name)) is not None:
            yield name, path
    for adapter in recipe.lora:
        yield "lora", adapter.path


def is_inside(path: str, directories: Iterable[str]) -> bool:
    """Return whether a resolved path lies below one of the resolved directories."""
    return any(path.startswith(f"{directory.rstrip('/')}/") for directory in directories)


def files_outside(recipe: Recipe, model_dirs: Sequence[str], resolved: Callable[[str], str]) -> list[Fault]:
    """Return a fault for each file outside the model directories; ``resolved`` follows the links of a path."""
    real_dirs = [resolved(directory) for directory in model_dirs]
    places = [
        (field, resolved(posixpath.join(directory, path)))  # an absolute path stays as it is
        for field, path in named_files(recipe)
        for directory in model_dirs
    ]
    expected = "expected a file in the model directories (model_dirs)"
    return [Fault(f"{expected}, found '{real}'", key=field) for field, real in places if not is_inside(real, real_dirs)]


def _by_hand(old: LoadedRecipes | None) -> list[Fault]:
    return [fault for entry in (old.entries if old else ()) for fault in refused_over_http(entry.recipe)]


def _refused(recipe: Recipe) -> Iterator[Fault]:
    if relaxations := recipe.sandbox.relaxations():
        yield _fault("sandbox", "no relaxation over HTTP", ", ".join(relaxations))
    if recipe.env_vars:
        yield _fault("env_vars", "no environment variables over HTTP", ", ".join(recipe.env_vars))
    for key in recipe.extra_args:
        if why := why_denied(key, over_http=True):
            yield _fault(f"extra_args.{key}", "a flag that may be given over HTTP", f"{key}: {why}")


def _fault(key: str, expected: str, found: str) -> Fault:
    return Fault(f"expected {expected}, found {found}", key=key, hint=_BY_HAND)
