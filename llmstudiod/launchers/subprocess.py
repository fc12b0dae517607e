"""Models as plain processes, for machines and containers without systemd.

Each server runs under a guard process (`llmstudiod.launchers.guard`), so that nothing is left behind even when the
daemon is killed with SIGKILL. Its output is always drained: a full pipe freezes llama-server completely.
"""

import asyncio
import errno
import os
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from llmstudiod.adapters.binary import clean_environment
from llmstudiod.adapters.proc import pulse
from llmstudiod.core.errors import LauncherError
from llmstudiod.core.launch import LaunchRequest
from llmstudiod.launchers.base import Exit, FoundUnit, Unit
from llmstudiod.launchers.log_buffer import MAX_LINES, LogBuffer, PipeDrain

GUARD = str(Path(__file__).with_name("guard.py"))
TERM_GRACE_S = 5.0
LAST_LINES = 50


@dataclass(slots=True)
class _Process:
    unit: Unit
    link: asyncio.StreamWriter
    ended: asyncio.Future[Exit]
    watcher: asyncio.Task[None] | None = field(default=None)


class SubprocessLauncher:
    """See `llmstudiod.launchers.base.Launcher`."""

    name = "subprocess"
    is_sandboxed = False
    outlives_us = False

    def __init__(self, runtime_dir: Path, *, term_grace_s: float = TERM_GRACE_S) -> None:
        self._runtime_dir = runtime_dir
        self._term_grace_s = term_grace_s
        self._processes: dict[str, _Process] = {}
        self._logs: dict[str, LogBuffer] = {}

    def socket_path(self, model_id: str) -> str:
        """Return the socket in a directory that only we may enter."""
        return str(self._runtime_dir / model_id / "llama.sock")

    async def show(self, request: LaunchRequest) -> list[str] | None:  # noqa: ARG002 - the protocol's
        """There are no units here."""
        return None

    async def start(self, request: LaunchRequest) -> Unit:
        """Start the guard and the server under it."""
        socket_path = Path(request.socket_path)
        try:
            await asyncio.to_thread(_prepare, socket_path)
        except OSError as error:
            raise LauncherError(
                f"cannot prepare '{socket_path.parent}' for '{request.model_id}': {error.strerror}",
                hint="set runtime_dir to a directory that the daemon may write",
            ) from error
        ours, theirs = socket.socketpair()
        log_r, log_w = os.pipe2(os.O_CLOEXEC)
        try:
            guard = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", GUARD, str(theirs.fileno()), *request.argv,
                stdin=asyncio.subprocess.DEVNULL, stdout=log_w, stderr=log_w, pass_fds=[theirs.fileno()],
                env=clean_environment() | dict(request.environment), cwd="/", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            ours.close()
            os.close(log_r)
            raise LauncherError(f"cannot start a process for '{request.model_id}': {error.strerror}") from error
        finally:
            theirs.close()
            os.close(log_w)
        log = self._log(request.model_id)
        log.begin_run()
        drain = PipeDrain(log)
        await asyncio.get_running_loop().connect_read_pipe(lambda: drain, os.fdopen(log_r, "rb", buffering=0))
        reader, writer = await asyncio.open_connection(sock=ours)
        pid = await self._first_word(reader, writer, guard, request)
        unit = Unit(request.model_id, "process", pid, invocation_id=str(pid))
        process = _Process(unit, writer, asyncio.get_running_loop().create_future())
        self._processes[request.model_id] = process
        process.watcher = asyncio.get_running_loop().create_task(self._watch(process, reader, guard, drain))
        return unit

    async def _first_word(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        guard: asyncio.subprocess.Process,
        request: LaunchRequest,
    ) -> int:
        """Return the pid of the server, or raise what kept it from being executed."""
        word, _, number = (await reader.readline()).decode().strip().partition(" ")
        if word == "pid":
            return int(number)
        writer.close()
        await guard.wait()
        reason = os.strerror(int(number)) if word == "error" else "its guard process ended"
        hint = f"is '{request.argv[0]}' there, and executable?" if number == str(errno.ENOENT) else None
        raise LauncherError(f"cannot execute '{request.argv[0]}': {reason}", hint=hint)

    async def _watch(
        self, process: _Process, reader: asyncio.StreamReader, guard: asyncio.subprocess.Process, drain: PipeDrain
    ) -> None:
        """Wait for the guard's last word, then for what is left in the pipe, but not for ever."""
        line = (await reader.readline()).decode().split()
        await guard.wait()
        try:
            await asyncio.wait_for(drain.closed.wait(), 0.5)
        except TimeoutError:
            pass
        lines = tuple(self._log(process.unit.model_id).last_of_run(LAST_LINES))
        if len(line) == 3 and int(line[2]):
            ended = Exit("signal", signal=int(line[2]), lines=lines)
        elif len(line) == 3:
            ended = Exit("exit-code" if int(line[1]) else "success", code=int(line[1]), lines=lines)
        else:
            ended = Exit("signal", signal=9, lines=lines)  # the guard itself was killed, and the server with it
        process.link.close()
        process.ended.set_result(ended)

    async def wait(self, unit: Unit) -> Exit:
        """Return when the process has ended."""
        return await asyncio.shield(self._processes[unit.model_id].ended)

    async def stop(self, model_id: str, *, is_forced: bool) -> None:
        """SIGTERM, some grace, SIGKILL for the whole tree."""
        process = self._processes.get(model_id)
        if process is None:
            return
        if not is_forced:
            self._order(process, b"T")
            try:
                await asyncio.wait_for(asyncio.shield(process.ended), self._term_grace_s)
            except TimeoutError:
                is_forced = True
        if is_forced:
            self._order(process, b"K")
            await asyncio.shield(process.ended)
        if process.watcher is not None:
            await process.watcher
        self._processes.pop(model_id, None)  # two may stop it at a time
        await asyncio.to_thread(_remove, Path(self.socket_path(model_id)))

    @staticmethod
    def _order(process: _Process, letter: bytes) -> None:
        if not process.link.is_closing():
            process.link.write(letter)

    def _log(self, model_id: str) -> LogBuffer:
        return self._logs.setdefault(model_id, LogBuffer())

    async def lines(self, model_id: str, *, limit: int) -> list[str]:
        """Return the last lines; they live as long as the daemon."""
        return self._log(model_id).last(limit)

    async def first_lines(self, unit: Unit, *, limit: int) -> list[str]:
        """Return the first of the lines that are kept since the model was started last."""
        return self.told(unit)[:limit]

    def told(self, unit: Unit) -> list[str]:
        """Return the lines since the model was started last."""
        return self._log(unit.model_id).last_of_run(MAX_LINES)

    def n_told(self, unit: Unit) -> int:
        """Return how many lines there were since the model was started last."""
        return self._log(unit.model_id).count_of_run

    def follow(self, model_id: str, *, limit: int) -> AsyncIterator[str]:
        """Return the last lines, then new ones as they come, over restarts of the model too."""
        return self._log(model_id).follow(limit)

    async def memory(self, unit: Unit) -> int | None:
        """Return the process's resident memory."""
        return pulse(unit.pid).resident

    async def find_running(self) -> list[FoundUnit]:
        """Nothing outlives the daemon here."""
        return []

    async def find_failed(self) -> list[tuple[str, Exit]]:
        """What has failed is known to the daemon that saw it."""
        return []

    async def close(self) -> None:
        """Kill what still runs."""
        for model_id in list(self._processes):
            await self.stop(model_id, is_forced=True)


def _prepare(socket_path: Path) -> None:
    socket_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    socket_path.unlink(missing_ok=True)  # a stale socket makes the next start fail


def _remove(socket_path: Path) -> None:
    socket_path.unlink(missing_ok=True)
    try:
        socket_path.parent.rmdir()
    except OSError:
        pass  # somebody put something beside it; not ours to delete
