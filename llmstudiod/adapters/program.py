"""llama-server as the planner sees it: what it is, and what its own parser has against a command line."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from llmstudiod.adapters.binary import check_argv, dry_run_output, probe_binary
from llmstudiod.adapters.find_binary import find_binary
from llmstudiod.core.binary_answers import INSTALL_HINT
from llmstudiod.core.command import ServerBinary
from llmstudiod.core.errors import BinaryError
from llmstudiod.core.launch import LaunchRequest
from llmstudiod.core.settings import Settings


class Program(Protocol):
    """The program that serves models, asked here or where it will run.

    ``takes_drafts``: whether it may be asked about a recipe that is in no file yet.
    """

    takes_drafts: bool

    def wake(self) -> None:
        """Say that a start will follow."""

    async def binary(self) -> ServerBinary:
        """Return it with what it says of itself; asked again when its file has changed.

        Raises:
            LlmstudioError: There is none, or it does not run.
        """

    async def complaint(self, request: LaunchRequest) -> str | None:
        """Return what its own parser has against a command line, or None; no model is read.

        Raises:
            LlmstudioError: It cannot be asked.
        """

    async def dry_run(self, request: LaunchRequest) -> list[str]:
        """Return what it prints until it tells what memory it would take; see `llmstudiod.core.command.dry_run`.

        Raises:
            LlmstudioError: It cannot be asked.
        """

    def use_settings(self, settings: Settings) -> None:
        """Take the settings of a reload, which may name another."""


class LocalProgram:
    """A program that we run ourselves."""

    takes_drafts = True

    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        self._settings = settings
        self._environment = environment
        self._known: tuple[tuple[object, ...], ServerBinary] | None = None
        self._lock = asyncio.Lock()

    def use_settings(self, settings: Settings) -> None:
        """See `Program`."""
        self._settings = settings

    def wake(self) -> None:
        """See `Program`; there is nobody to wake."""

    async def binary(self) -> ServerBinary:
        """See `Program`. Takes some 30 ms for a file that was not asked before."""
        async with self._lock:
            found = await asyncio.to_thread(find_binary, self._settings.llama_server, self._environment)
            identity = await asyncio.to_thread(_identity, found)
            if self._known is None or self._known[0] != identity:
                self._known = (identity, await probe_binary(found))
            return self._known[1]

    async def complaint(self, request: LaunchRequest) -> str | None:
        """See `Program`."""
        return await check_argv(request.argv, request.environment)

    async def dry_run(self, request: LaunchRequest) -> list[str]:
        """See `Program`."""
        return await dry_run_output(request.argv, request.environment)


def _identity(binary: ServerBinary) -> tuple[object, ...]:
    try:
        status = Path(binary.argv[0]).stat()
    except OSError as error:  # it was there a moment ago: a package is being upgraded
        raise BinaryError(f"cannot look at '{binary.argv[0]}': {error.strerror}", hint=INSTALL_HINT) from error
    return (*binary.argv, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
