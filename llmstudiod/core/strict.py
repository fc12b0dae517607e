"""The launcher's judgements: which recipe of a file is meant, and what a recipe that came over HTTP may not hold.

Pure, and made again by the launcher, whatever the daemon has checked.
"""

import hashlib
import posixpath
import stat
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from llmstudiod.core.errors import AccessDeniedError, ConfigError, LlmstudioError
from llmstudiod.core.flags import why_denied
from llmstudiod.core.launcher_protocol import Launch
from llmstudiod.core.model_names import id_from_stem
from llmstudiod.core.recipe import Fault, LoadedRecipes, Recipe, recipe_hash
from llmstudiod.core.settings import Settings

_TRUST = "chown root, and chmod go-w: the file and every directory above it"
KEPT_DIGESTS = 8
BY_HAND = "was written by hand"
"""What a refusal says of a person's file; whoever asks the launcher knows it by that."""

_HINT = "write the file by hand, as root"


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
        raise ConfigError(message, hint="ask again in a moment: the daemon is about to read it")
    return recipe


def unnamed_recipe(launch: Launch, settings: Settings, resolved: Callable[[str], str]) -> Recipe:
    """Return the recipe of a model that is served without a file.

    Raises:
        AccessDeniedError: Such models are not served, or this is none; ``resolved`` follows the links of a path.
    """
    recipe = Recipe(id=launch.id, model_path=launch.model)
    stem = posixpath.basename(launch.model).rpartition(".")[0]
    if not settings.auto_recipes or recipe_hash(recipe) != launch.hash or id_from_stem(stem) != launch.id:
        raise AccessDeniedError(f"'{launch.model}' is not served without a recipe as '{launch.id}'")
    if faults := files_outside(recipe, settings.model_dirs, resolved):
        raise AccessDeniedError(str(faults[0]))
    return recipe


def refuse_place(file: str, settings: Settings, *, exists: bool) -> None:
    """Refuse a recipe file that is elsewhere, or gone.

    Raises:
        AccessDeniedError: It does not lie in the recipes directory.
        ConfigError: It is not there any more.
    """
    if posixpath.dirname(file) != posixpath.normpath(settings.recipes_dir):
        raise AccessDeniedError(f"'{file}' does not lie in the recipes directory, {settings.recipes_dir}")
    if not exists:
        raise ConfigError(f"there is no '{file}' any more, so its recipe is not started")


class Status(Protocol):
    """What stat(2) tells of a file."""

    @property
    def st_uid(self) -> int:
        """Its owner."""

    @property
    def st_mode(self) -> int:
        """Its kind and its permissions."""


def refuse_untrusted(path: str, status: Status, *, owner: int) -> None:
    """Refuse a file, or a directory above one, that nobody but its owner should have been able to write.

    Raises:
        AccessDeniedError: Another could have made it, or it is nothing that can be read.
    """
    is_directory, mode = stat.S_ISDIR(status.st_mode), stat.S_IMODE(status.st_mode)
    if status.st_uid not in {0, owner}:
        raise AccessDeniedError(f"'{path}': expected root to own it, found uid {status.st_uid}", hint=_TRUST)
    if mode & 0o022 and not (is_directory and mode & stat.S_ISVTX):
        raise AccessDeniedError(f"'{path}': expected nobody but root to write it, found mode {mode:04o}", hint=_TRUST)
    if not is_directory and not stat.S_ISREG(status.st_mode):
        raise AccessDeniedError(f"'{path}': expected a regular file, found something else")


def good_copy(
    kept: Mapping[str, Any] | None, launch: Launch, raw: bytes, read: Callable[[], LoadedRecipes]
) -> Recipe | None:
    """Return the recipe that was kept, if it is the one that is asked for; ``raw`` is what its file holds.

    It may be started although its file has changed; ``read`` makes recipes of it then.
    What only a person may give counts no longer than its file says so: a relaxation that was taken back is over. A
    file that is being edited, and faulty meanwhile, takes nothing back.
    """
    if not kept or (kept.get("hash"), kept.get("file")) != (launch.hash, launch.file):
        return None
    copy = Recipe.from_dict(kept["recipe"])
    if kept.get("content") == digest(raw) or not refused_over_http(copy):
        return copy
    return copy if all(entry.recipe.id != copy.id for entry in read().entries) else None


def refuse_put(
    new: LoadedRecipes, others: Iterable[LoadedRecipes], model_dirs: Sequence[str], resolved: Callable[[str], str]
) -> None:
    """Refuse a recipe file that came over HTTP.

    ``others`` are the other files of the directory; ``resolved`` follows the links of a path.

    Raises:
        AccessDeniedError: What is wrong, all of it.
    """
    faults = list(new.faults)
    for entry in new.entries:
        faults += [*refused_over_http(entry.recipe), *files_outside(entry.recipe, model_dirs, resolved)]
    taken = {name for other in others for name in _names(other)}
    mine = dict.fromkeys(name for entry in new.entries for name in entry.recipe.names)
    faults += [Fault(f"expected a name that is free, found '{name}'") for name in mine if name in taken]
    if faults or not new.entries:
        told = "; ".join(str(fault) for fault in faults[:10]) or "it holds no recipe"
        details = {"faults": [asdict(fault) for fault in faults]}
        raise AccessDeniedError(f"the recipe cannot be written: {told}", hint=_HINT, details=details)


def refuse_foreign(path: str, raw: bytes, written: Collection[object] | None) -> None:
    """Refuse to touch a file that is not, byte for byte, what the launcher wrote.

    ``written``: the `digest` of each text that it was about to write there; a crash leaves one of them.

    Raises:
        AccessDeniedError: A person wrote it.
    """
    if digest(raw) not in (written or ()):
        raise AccessDeniedError(f"'{path}' {BY_HAND}", hint=f"{_HINT}, or remove it")


async def refuses_as_foreign(put: Callable[[str, str], Awaitable[None]], name: str) -> bool:
    """Return whether ``put`` takes a file for a person's.

    It is asked to write an empty text: whose the file is is judged first, and an empty text is no recipe, so nothing
    is written either way. The launcher alone knows what it wrote, and needs no further verb like this.
    """
    try:
        await put(name, "")
    except LlmstudioError as error:
        return BY_HAND in error.message
    return False


def digest(raw: bytes) -> str:
    """Return what tells a file's content from any other."""
    return hashlib.sha256(raw).hexdigest()


def noted(written: Mapping[str, Sequence[str]], name: str, raw: bytes) -> dict[str, Sequence[str]]:
    """Return what the launcher notes before it writes a file: the `digest` of the last few texts, by name."""
    before = written.get(name, ())
    before = [before] if isinstance(before, str) else before  # of an earlier version
    return {**written, name: [*before[-KEPT_DIGESTS:], digest(raw)]}


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
    outside = dict.fromkeys((field, real) for field, real in places if not is_inside(real, real_dirs))
    return [Fault(f"{expected}, found '{real}'", key=field) for field, real in outside]


def _names(loaded: LoadedRecipes) -> Iterator[str]:
    for entry in loaded.entries:
        yield from entry.recipe.names
    for fault in loaded.faults:
        yield from filter(None, (fault.recipe_id, *fault.claims))


def _refused(recipe: Recipe) -> Iterator[Fault]:
    if relaxations := recipe.sandbox.relaxations():
        yield _fault("sandbox", "no relaxation over HTTP", ", ".join(relaxations))
    if recipe.env_vars:
        yield _fault("env_vars", "no environment variables over HTTP", ", ".join(recipe.env_vars))
    for key in recipe.extra_args:
        if why := why_denied(key, over_http=True):
            yield _fault(f"extra_args.{key}", "a flag that may be given over HTTP", f"{key}: {why}")


def _fault(key: str, expected: str, found: str) -> Fault:
    return Fault(f"expected {expected}, found {found}", key=key, hint=_HINT)
