"""The files of a model, found and looked at before they are bound into its unit."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace

from llmstudiod.core.bound_file import MAX_TEXT_BYTES, refuse_file
from llmstudiod.core.command import BoundFile, ModelFiles
from llmstudiod.core.errors import AccessDeniedError, LoadFailedError
from llmstudiod.core.launcher_protocol import Launch
from llmstudiod.core.model_names import all_shards
from llmstudiod.core.recipe import Recipe


def model_files(recipe: Recipe, launch: Launch, model_dirs: Sequence[str]) -> ModelFiles:
    """Return where the recipe's files are, still unopened; AccessDeniedError for a model that it does not mean."""

    def located(path: str) -> str:
        places = [os.path.join(directory, path) for directory in ("/", *model_dirs)]  # an absolute path stays as it is
        return next((place for place in places if os.path.lexists(place)), path)

    model = located(recipe.model_path)
    if os.path.isdir(model):
        if os.path.realpath(os.path.dirname(launch.model)) != os.path.realpath(model):
            raise AccessDeniedError(f"'{launch.model}' does not lie in '{model}', which the recipe names")
        model = launch.model
    return ModelFiles(
        model=tuple(all_shards(model)),
        mmproj=recipe.mmproj and located(recipe.mmproj),
        draft_model=recipe.draft_model and located(recipe.draft_model),
        chat_template_file=recipe.chat_template_file and located(recipe.chat_template_file),
        lora=tuple(located(adapter.path) for adapter in recipe.lora),
        n_ctx_train=launch.n_ctx_train,
    )


def checked(files: Sequence[BoundFile], text_file: str | None) -> tuple[BoundFile, ...]:
    """Return the files with their real places, each one looked into; LoadFailedError for one that will not do."""
    return tuple(replace(file, host=_real_place(file.host, is_text=file.host == text_file)) for file in files)


def looked_at(path: str) -> tuple[int | None, bytes]:
    """Return mode and first bytes of a program; None where there is none."""
    mode = os.stat(path).st_mode if os.path.isfile(path) else None
    with contextlib.suppress(OSError), open(path, "rb") as stream:
        return mode, stream.read(2)
    return mode, b""


def _real_place(path: str, *, is_text: bool) -> str:
    try:
        real = os.path.realpath(path, strict=True)
        with open(os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as stream:
            start = stream.read(MAX_TEXT_BYTES + 1 if is_text else 4)
            refuse_file(real, mode=os.fstat(stream.fileno()).st_mode, start=start, is_text=is_text)
    except (OSError, ValueError) as error:
        raise LoadFailedError(f"'{path}' cannot be read: {error}", hint="check the path and its mode") from error
    return real
