"""Which files of the host a model's unit is given: where a recipe's files are, and which of them will not do.

Pure: whoever asks passes ``os.path`` in, the files' status and their first bytes.
"""

import re
import stat
from collections.abc import Iterable, Sequence
from typing import Protocol

from llmstudiod.core.command import ModelFiles
from llmstudiod.core.errors import AccessDeniedError, LoadFailedError
from llmstudiod.core.launcher_protocol import Launch
from llmstudiod.core.model_names import all_shards
from llmstudiod.core.recipe import Recipe
from llmstudiod.core.strict import is_inside

MAX_TEXT_BYTES = 1 << 20

# systemd reads neither in a path word as it was written: with a line break another file would be bound.
_UNBINDABLE = re.compile(r'[\x00-\x1f\x7f"]')


class Paths(Protocol):
    """What is asked of ``os.path``."""

    def join(self, path: str, /, *more: str) -> str:
        """See `os.path.join`."""

    def lexists(self, path: str, /) -> bool:
        """See `os.path.lexists`."""

    def isdir(self, path: str, /) -> bool:
        """See `os.path.isdir`."""

    def realpath(self, path: str, /) -> str:
        """See `os.path.realpath`."""

    def dirname(self, path: str, /) -> str:
        """See `os.path.dirname`."""


def model_files(recipe: Recipe, launch: Launch, model_dirs: Sequence[str], paths: Paths) -> ModelFiles:
    """Return where the recipe's files are, still unopened.

    Raises:
        AccessDeniedError: The daemon names a model that the recipe does not mean.
    """

    def located(path: str) -> str:
        places = [paths.join(directory, path) for directory in ("/", *model_dirs)]  # an absolute path stays as it is
        return next((place for place in places if paths.lexists(place)), path)

    model = located(recipe.model_path)
    if paths.isdir(model):
        if paths.realpath(paths.dirname(launch.model)) != paths.realpath(model):
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


def refuse_file(path: str, *, mode: int, start: bytes, is_text: bool) -> None:
    """Refuse what is neither a GGUF nor a text, or what the unit's own user could not read.

    ``path`` has no links in it; ``mode`` is st_mode, ``start`` the first `MAX_TEXT_BYTES` + 1 bytes of a text, or 4
    bytes of another file.

    Raises:
        LoadFailedError: What was found, and what was expected.
    """
    if _UNBINDABLE.search(path):
        found = f"{path!a} has a line break, another control character or a quotation mark in its path"
        raise LoadFailedError(found, hint="rename the file or its directory")
    if not stat.S_ISREG(mode):
        raise LoadFailedError(f"'{path}': expected a regular file, found something else")
    if is_text and (b"\0" in start or len(start) > MAX_TEXT_BYTES):
        raise LoadFailedError(f"'{path}': expected a text of at most 1 MiB, found something else")
    if not is_text and start != b"GGUF":
        message = f"'{path}': expected a GGUF file, found another"
        raise LoadFailedError(
            message, hint="only GGUF files are given to a model", details={"failure": "bad_model_file"}
        )
    if not mode & stat.S_IROTH:  # told last: nobody is advised to open a file that is no model
        found = f"'{path}' has mode {stat.S_IMODE(mode):04o}: the model's own user may not read it"
        raise LoadFailedError(found, hint=f"chmod o+r '{path}'", details={"failure": "permission"})


def refuse_links(path: str, real: str, *, link_owners: Iterable[int], owner: int, real_dirs: Iterable[str]) -> None:
    """Refuse a file that somebody's link leads to, who is neither root nor the file's ``owner``.

    Otherwise whoever may write a directory of models could have any file shown to a model, by a link.

    Raises:
        AccessDeniedError: The link is another's, and ``real`` lies outside the model directories.
    """
    foreign = sorted({*link_owners} - {0, owner})
    if foreign and not is_inside(real, real_dirs):
        raise AccessDeniedError(
            f"'{path}' leads to '{real}' by a link of uid {foreign[0]}: expected one of root's or of the file's owner",
            hint="name the file itself in the recipe, or add its directory to model_dirs",
        )
