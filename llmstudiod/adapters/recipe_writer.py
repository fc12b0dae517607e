"""Recipe files that come over HTTP: written by the launcher where there is one, else by ourselves.

Either way a file that a person wrote, or has edited since, is left alone: its comments are worth more than our text.
"""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from llmstudiod.adapters.recipe_files import SUFFIXES, load_recipe_file
from llmstudiod.core import strict
from llmstudiod.core.errors import ConfigError
from llmstudiod.core.recipe import LoadedRecipes
from llmstudiod.core.recipe_reader import parse_recipe_bytes
from llmstudiod.core.settings import Settings

MARK = "# llmstudiod wrote this, "
_DIGITS = 64


class RecipeWriter(Protocol):
    """Writes and removes files of the recipes directory; atomically, and judged by `llmstudiod.core.strict`."""

    async def put(self, name: str, text: str) -> None:
        """Write a file.

        Raises:
            LlmstudioError: A person wrote it, the recipe may not come over HTTP, or it cannot be written.
        """

    async def delete(self, name: str) -> None:
        """Remove a file.

        Raises:
            LlmstudioError: A person wrote it, or it cannot be removed.
        """

    async def is_foreign(self, name: str) -> bool:
        """Return whether a person wrote a file, so that it would be neither written nor removed."""


class OwnRecipes:
    """Writes them itself, with a first line that tells whether anybody has edited the rest since."""

    def __init__(self, settings: Callable[[], Settings]) -> None:
        self._settings = settings
        self._lock = asyncio.Lock()

    async def put(self, name: str, text: str) -> None:
        """See `RecipeWriter`."""
        async with self._lock:
            await asyncio.to_thread(self._put, name, text)

    async def delete(self, name: str) -> None:
        """See `RecipeWriter`."""
        async with self._lock:
            await asyncio.to_thread(self._delete, name)

    async def is_foreign(self, name: str) -> bool:
        """See `RecipeWriter`."""
        return await strict.refuses_as_foreign(self.put, name)

    def _put(self, name: str, text: str) -> None:
        settings = self._settings()
        path = Path(settings.recipes_dir, name)
        _refuse_foreign(path)
        new = parse_recipe_bytes(text.encode(), file=str(path))
        strict.refuse_put(new, _others(path), settings.model_dirs, os.path.realpath)
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(f"{MARK}{strict.digest(text.encode())}\n{text}", "utf-8")
            part.replace(path)
        except OSError as error:
            raise ConfigError(f"'{path}' cannot be written: {error.strerror}") from error

    def _delete(self, name: str) -> None:
        path = Path(self._settings().recipes_dir, name)
        _refuse_foreign(path)
        try:
            path.unlink()
        except OSError as error:
            raise ConfigError(f"'{path}' cannot be removed: {error.strerror}") from error


def _refuse_foreign(path: Path) -> None:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror}") from error
    first, _, rest = raw.partition(b"\n")
    mark, written = first[: len(MARK)], first[len(MARK) :].decode("ascii", "replace")
    strict.refuse_foreign(str(path), rest, [written] if mark == MARK.encode() and len(written) == _DIGITS else None)


def _others(path: Path) -> Iterator[LoadedRecipes]:
    """Yield the other files of the directory."""
    for other in sorted(path.parent.glob("[!.]*.*")):
        if other.suffix in SUFFIXES and other != path:
            yield load_recipe_file(other)
