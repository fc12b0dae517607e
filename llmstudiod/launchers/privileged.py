"""Asks llmstudio-launcher, over its private socket, for what the daemon may not do."""

import asyncio
import json
import posixpath
from pathlib import Path
from typing import Any, Protocol

from llmstudiod.core import errors
from llmstudiod.core.command import ServerBinary
from llmstudiod.core.errors import LauncherError, LlmstudioError
from llmstudiod.core.launch import LaunchRequest
from llmstudiod.core.launcher_protocol import Check, Probe, Request, write_request
from llmstudiod.core.settings import Settings

ANSWER_TIMEOUT_S = 120.0
MAX_ANSWER_BYTES = 4 << 20
_KINDS = {
    kind.kind: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, LlmstudioError) and "kind" in vars(kind)
}


class PrivilegedHelper(Protocol):
    """What may start and stop units."""

    async def ask(self, request: Request) -> dict[str, Any]:
        """Return the answer.

        Raises:
            LlmstudioError: It refuses, it failed, or it is not there.
        """


class PrivilegedProgram:
    """llama-server as the launcher finds it, asked in a sandbox. See `llmstudiod.adapters.program.Program`."""

    def __init__(self, helper: PrivilegedHelper) -> None:
        self._helper = helper
        self._known: tuple[object, ServerBinary] | None = None
        self._lock = asyncio.Lock()

    def use_settings(self, settings: Settings) -> None:  # noqa: ARG002 - the launcher reads its own
        """Ask again: the settings may name another."""
        self._known = None

    async def binary(self) -> ServerBinary:
        """Return what the launcher found; asked again when the file on disk has changed."""
        async with self._lock:
            if self._known is None or self._known[0] != await asyncio.to_thread(_identity, self._known[1].argv[0]):
                answer = await self._helper.ask(Probe())
                binary = ServerBinary.from_dict(answer["binary"])
                self._known = (await asyncio.to_thread(_identity, binary.argv[0]), binary)
            return self._known[1]

    async def complaint(self, request: LaunchRequest) -> str | None:
        """Return what the binary's own parser says in the model's sandbox."""
        answer = await self._helper.ask(Check(**launch_fields(request)))
        complaint: str | None = answer["complaint"]
        return complaint


class PrivilegedClient:
    """One connection for each request; the launcher answers each on its own."""

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path

    async def ask(self, request: Request) -> dict[str, Any]:
        """Return the launcher's answer.

        Raises:
            LlmstudioError: It refuses, it failed, or it is not there.
        """
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                line = await self._exchange(write_request(request))
            answer: dict[str, Any] = json.loads(line)
        except (OSError, TimeoutError, ValueError) as error:
            raise LauncherError(
                f"llmstudio-launcher does not answer at {self._socket_path}: {str(error) or 'it took too long'}",
                hint="systemctl start llmstudio-launcher.socket; `journalctl -u llmstudio-launcher` tells more",
            ) from error
        if (told := answer.get("error")) is not None:
            kind = _KINDS.get(told["kind"], LauncherError)
            raise kind(told["message"], hint=told["hint"], details=told["details"])
        return answer

    async def _exchange(self, line: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(self._socket_path, limit=MAX_ANSWER_BYTES)
        try:
            writer.write(line)
            await writer.drain()
            return await reader.readline()
        finally:
            writer.close()


def launch_fields(request: LaunchRequest) -> dict[str, Any]:
    """Return what the launcher is told of a launch: which recipe, and what was found out about its files."""
    return {
        "id": request.model_id,
        "hash": request.recipe_hash,
        "file": request.recipe_file,
        "model": posixpath.normpath(request.model_path),
        "n_ctx_train": request.n_ctx_train,
    }


def _identity(path: str) -> object:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
