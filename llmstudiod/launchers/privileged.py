"""Asks llmstudio-launcher, over its private socket, for what the daemon may not do."""

import asyncio
import contextlib
import json
import posixpath
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from llmstudiod.core import errors, strict
from llmstudiod.core.command import ServerBinary
from llmstudiod.core.errors import LauncherError, LlmstudioError
from llmstudiod.core.launch import LaunchRequest
from llmstudiod.core.launcher_protocol import Act, Launch, Request, Verb, Write, write_request
from llmstudiod.core.settings import Settings

ANSWER_TIMEOUT_S = 120.0
TRIES = 3
READY_FOR_S = 5.0  # the launcher waits for a request for 10 s
MAX_ANSWER_BYTES = 4 << 20
_KINDS = {
    kind.kind: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, LlmstudioError) and "kind" in vars(kind)
}


class PrivilegedHelper(Protocol):
    """What may start and stop units."""

    def wake(self) -> None:
        """Say that something will be asked soon."""

    def close(self) -> None:
        """Hold nothing any more."""

    async def ask(self, request: Request) -> dict[str, Any]:
        """Return the answer.

        Raises:
            LlmstudioError: It refuses, it failed, or it is not there.
        """


class PrivilegedProgram:
    """llama-server as the launcher finds it, asked in a sandbox. See `llmstudiod.adapters.program.Program`."""

    takes_drafts = False  # it looks for itself at the recipe that is named

    def __init__(self, helper: PrivilegedHelper) -> None:
        self._helper = helper
        self._known: tuple[object, ServerBinary] | None = None
        self._settings: Settings | None = None
        self._lock = asyncio.Lock()

    def use_settings(self, settings: Settings) -> None:
        """Ask again: the settings may name another. The launcher reads its own."""
        self._known, self._settings = None, settings

    def wake(self) -> None:
        """Say that a start will follow."""
        self._helper.wake()

    async def binary(self) -> ServerBinary:
        """Return what the launcher found; asked again when the file on disk has changed."""
        async with self._lock:
            known, settings = self._known, self._settings
            if known is None or known[0] != await asyncio.to_thread(_identity, known[1].argv[0]):
                answer = await self._helper.ask(Act(Verb.PROBE))
                binary = ServerBinary.from_dict(answer["binary"])
                known = (await asyncio.to_thread(_identity, binary.argv[0]), binary)
            # Settings that came meanwhile are for whoever asks next.
            self._known = known if settings is self._settings else None
            return known[1]

    async def complaint(self, request: LaunchRequest) -> str | None:
        """Return what the binary's own parser says in the model's sandbox."""
        answer = await self._helper.ask(launch(Verb.CHECK, request))
        complaint: str | None = answer["complaint"]
        return complaint

    async def dry_run(self, request: LaunchRequest) -> list[str]:
        """Return what the binary prints in the model's sandbox, until it tells its memory."""
        answer = await self._helper.ask(launch(Verb.DRY_RUN, request))
        output: str = answer["output"]
        return output.splitlines()


class PrivilegedRecipes:
    """Recipe files are root's, so the launcher writes them. See `llmstudiod.adapters.recipe_writer.RecipeWriter`."""

    def __init__(self, helper: PrivilegedHelper) -> None:
        self._helper = helper

    async def put(self, name: str, text: str) -> None:
        """Have a file written."""
        await self._helper.ask(Write(Verb.PUT_RECIPE, name, text))

    async def delete(self, name: str) -> None:
        """Have a file removed."""
        await self._helper.ask(Write(Verb.DELETE_RECIPE, name))

    async def is_foreign(self, name: str) -> bool:
        """Return whether the launcher holds a file for a person's."""
        return await strict.refuses_as_foreign(self.put, name)


class PrivilegedClient:
    """One connection for each request; the launcher answers each on its own."""

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path
        self._ready: tuple[float, socket.socket] | None = None

    def wake(self) -> None:
        """Have systemd start the launcher while we still find out what to ask it, which takes as long."""
        if self._ready is not None and time.monotonic() - self._ready[0] < READY_FOR_S:
            return
        self._drop_ready()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            connection.connect(self._socket_path)
        except OSError:
            connection.close()  # `ask` tries again, and tells
        else:
            self._ready = (time.monotonic(), connection)

    def close(self) -> None:
        """Give up a connection that nobody used."""
        self._drop_ready()

    def _drop_ready(self) -> None:
        if self._ready is not None:
            self._ready[1].close()
            self._ready = None

    async def ask(self, request: Request) -> dict[str, Any]:
        """Return the launcher's answer. Asked again when it ends before it has answered: it does all things over again.

        Raises:
            LlmstudioError: It refuses, it failed, or it is not there.
        """
        line = b""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                for _ in range(TRIES):
                    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                        line = await self._exchange(write_request(request))
                    if line.endswith(b"\n"):
                        break
            if not line.endswith(b"\n"):
                raise ConnectionResetError("it ended before it had answered")
            answer: dict[str, Any] = json.loads(line)
        except (OSError, TimeoutError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or str(error) or "it took too long"
            raise LauncherError(
                f"llmstudio-launcher does not answer at {self._socket_path}: {reason}",
                hint="systemctl start llmstudio-launcher.socket; `journalctl -u llmstudio-launcher` tells more",
            ) from error
        if (told := answer.get("error")) is not None:
            kind = _KINDS.get(told["kind"], LauncherError)
            raise kind(told["message"], hint=told["hint"], details=told["details"])
        return answer

    async def _exchange(self, line: bytes) -> bytes:
        self.wake()
        (_, connection), self._ready = self._ready or (0.0, None), None
        if connection is not None:
            reader, writer = await asyncio.open_unix_connection(sock=connection, limit=MAX_ANSWER_BYTES)
        else:
            reader, writer = await asyncio.open_unix_connection(self._socket_path, limit=MAX_ANSWER_BYTES)
        try:
            writer.write(line)
            await writer.drain()
            return await reader.readline()
        finally:
            writer.close()


def launch(verb: Verb, request: LaunchRequest) -> Launch:
    """Return what the launcher is told of a launch: which recipe, and what was found out about its files."""
    return Launch(
        verb=verb,
        id=request.model_id,
        hash=request.recipe_hash,
        file=request.recipe_file,
        model=posixpath.normpath(request.model_path),
        n_ctx_train=request.n_ctx_train,
        memory_max=int(request.limits.get("MemoryMax", 0)),
        **asdict(request.decisions),
    )


def _identity(path: str) -> object:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
