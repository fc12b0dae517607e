"""What every launcher offers: start, wait for the end, stop, read the log. The supervisor knows no more."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from llmstudiod.core.launch import LaunchRequest


@dataclass(frozen=True, slots=True)
class Unit:
    """A running server. ``name`` is the systemd unit, or ``process`` for a plain one."""

    model_id: str
    name: str
    pid: int
    invocation_id: str


@dataclass(frozen=True, slots=True)
class FoundUnit:
    """A running server of an earlier daemon, and the hash of the recipe that it was started with."""

    unit: Unit
    recipe_hash: str


@dataclass(frozen=True, slots=True)
class Exit:
    """How a server ended. ``result`` is systemd's word: success, exit-code, signal, core-dump, oom-kill, timeout."""

    result: str
    code: int | None = None
    signal: int | None = None
    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the end in a few words."""
        if self.result == "oom-kill":
            return "killed for want of memory"
        if self.signal is not None:
            return f"killed by signal {self.signal}"
        return f"exit code {self.code}"


class Launcher(Protocol):
    """Starts and stops one server for each model. Not thread-safe; each model has one server at a time."""

    name: str
    is_sandboxed: bool
    outlives_us: bool
    """Whether servers run on when the daemon ends."""

    def socket_path(self, model_id: str) -> str:
        """Return where the model's server must listen."""

    async def show(self, request: LaunchRequest) -> list[str] | None:
        """Return the command line that starts the server's unit, or None when there are no units."""

    async def start(self, request: LaunchRequest) -> Unit:
        """Start the server; return once it is executing.

        Raises:
            LauncherError: It could not be started.
        """

    async def wait(self, unit: Unit) -> Exit:
        """Return when the server has ended, with its last lines."""

    async def stop(self, model_id: str, *, is_forced: bool) -> None:
        """Stop the model's server and everything that it started; return when nothing is left."""

    async def lines(self, model_id: str, *, limit: int) -> list[str]:
        """Return the last lines of the model's log, oldest first."""

    async def first_lines(self, unit: Unit, *, limit: int) -> list[str]:
        """Return the first lines of one run, those of its load, as far as they are written and kept."""

    def told(self, unit: Unit) -> list[str]:
        """Return what a run has written so far, oldest first, as far as it is at hand; never waits."""

    def n_told(self, unit: Unit) -> int:
        """Return how many lines a run has written so far, those that are not at hand any more among them."""

    def follow(self, model_id: str, *, limit: int) -> AsyncIterator[str]:
        """Return the last lines of the model's log, then those that its server writes from now on."""

    async def memory(self, unit: Unit) -> int | None:
        """Return the host memory that the server has now, in bytes, the mapped file's pages included; None: unknown."""

    async def find_running(self) -> list[FoundUnit]:
        """Return the servers of an earlier daemon that still run; they are to be watched, or to be stopped."""

    async def find_failed(self) -> list[tuple[str, Exit]]:
        """Return the models whose last server, of whichever daemon, ended in failure, and how."""

    async def close(self) -> None:
        """Give up whatever the launcher itself holds."""
