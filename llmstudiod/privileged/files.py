"""The files of a model, found and looked at before they are bound into its unit."""

import os
import stat
from collections.abc import Sequence
from dataclasses import replace

from llmstudiod.core.command import BoundFile, ModelFiles
from llmstudiod.core.errors import AccessDeniedError, LoadFailedError
from llmstudiod.core.launcher_protocol import Launch
from llmstudiod.core.model_names import all_shards
from llmstudiod.core.recipe import Recipe

MAX_TEXT_BYTES = 1 << 20


def model_files(recipe: Recipe, launch: Launch, model_dirs: Sequence[str]) -> ModelFiles:
    """Return where the recipe's files are; nothing is opened yet.

    Raises:
        LoadFailedError: One is not there.
        AccessDeniedError: The daemon names a model that the recipe does not mean.
    """
    model = _located(recipe.model_path, model_dirs)
    if os.path.isdir(model):
        if os.path.realpath(os.path.dirname(launch.model)) != os.path.realpath(model):
            raise AccessDeniedError(f"'{launch.model}' does not lie in '{model}', which the recipe names")
        model = launch.model
    single = {
        name: None if (path := getattr(recipe, name)) is None else _located(path, model_dirs)
        for name in ("mmproj", "draft_model", "chat_template_file")
    }
    return ModelFiles(
        model=tuple(all_shards(model)),
        lora=tuple(_located(adapter.path, model_dirs) for adapter in recipe.lora),
        n_ctx_train=launch.n_ctx_train,
        **single,
    )


def checked(files: Sequence[BoundFile], text_file: str | None) -> tuple[BoundFile, ...]:
    """Return the files with their real places, each one looked into: GGUF, or text, readable for everybody.

    Raises:
        LoadFailedError: One will not do.
    """
    return tuple(replace(file, host=_real_place(file.host, is_text=file.host == text_file)) for file in files)


def _located(path: str, model_dirs: Sequence[str]) -> str:
    places = [path] if os.path.isabs(path) else [os.path.join(directory, path) for directory in model_dirs]
    return next((place for place in places if os.path.lexists(place)), places[0] if places else path)


def _real_place(path: str, *, is_text: bool) -> str:
    try:
        real = os.path.realpath(path, strict=True)
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise LoadFailedError(f"'{path}' cannot be read: {reason}", hint="check the path and its mode") from error
    with open(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise LoadFailedError(f"'{path}': expected a regular file, found something else")
        if not status.st_mode & stat.S_IROTH:
            found = f"'{real}' has mode {stat.S_IMODE(status.st_mode):04o}: the model's own user may not read it"
            raise LoadFailedError(found, hint=f"chmod o+r '{real}'", details={"failure": "permission"})
        if is_text:
            if b"\0" in (start := stream.read(MAX_TEXT_BYTES + 1)) or len(start) > MAX_TEXT_BYTES:
                raise LoadFailedError(f"'{path}': expected a text of at most 1 MiB, found something else")
        elif stream.read(4) != b"GGUF":
            hint = "only GGUF files are given to a model"
            raise LoadFailedError(f"'{path}': expected a GGUF file, found another", hint=hint)
    return real
