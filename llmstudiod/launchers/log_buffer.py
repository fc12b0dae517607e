"""The last lines of a model's output; for launchers that have no journal, always drained and never blocking.

What a model writes is in its clients' hands, so lines are bounded in length, in number and in all.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator

MAX_LINES = 2000
MAX_LINE_CHARS = 2 << 10  # those that explain anything have some two hundred
MAX_BYTES = 512 << 10
_STR_BYTES = 56  # of CPython's, beside its characters


def cut(line: str) -> str:
    """Return a line that may be kept."""
    return line if len(line) <= MAX_LINE_CHARS else f"{line[:MAX_LINE_CHARS]}…"


class Lines:
    """The last lines that were added, oldest first. ``count``: how many there ever were."""

    def __init__(self) -> None:
        self.count = 0
        self._lines: deque[str] = deque()
        self._n_bytes = 0

    def add(self, line: str) -> str:
        """Take a line; return it as it is kept."""
        line = cut(line)
        self.count += 1
        self._lines.append(line)
        self._n_bytes += _size(line)
        while self._n_bytes > MAX_BYTES or len(self._lines) > MAX_LINES:
            self._n_bytes -= _size(self._lines.popleft())
        return line

    def all(self) -> list[str]:
        """Return them."""
        return list(self._lines)


def _size(line: str) -> int:
    """Return the most that a string takes."""
    return _STR_BYTES + len(line) * (1 if line.isascii() else 4)


class LogBuffer:
    """A ring of lines that lives through restarts of its model; a follower that is too slow loses lines."""

    def __init__(self) -> None:
        self._lines = Lines()
        self._run_began_at = 0
        self._followers: set[asyncio.Queue[str]] = set()

    @property
    def count(self) -> int:
        """How many lines there ever were: shows that a loading server is alive."""
        return self._lines.count

    def begin_run(self) -> None:
        """Remember where the lines of this run begin: a line of the last failure must not explain the next one."""
        self._run_began_at = self.count

    def last(self, limit: int) -> list[str]:
        """Return the last lines of all runs, oldest first."""
        return self._lines.all()[-limit:] if limit > 0 else []

    @property
    def count_of_run(self) -> int:
        """How many lines the present run has written."""
        return self.count - self._run_began_at

    def last_of_run(self, limit: int) -> list[str]:
        """Return the last lines of the present run."""
        return self.last(min(limit, self.count_of_run))

    def add(self, raw: bytes) -> None:
        """Take one line without its end."""
        line = self._lines.add(raw.decode(errors="replace").rstrip("\r"))
        for queue in self._followers:
            if not queue.full():
                queue.put_nowait(line)

    async def follow(self, limit: int) -> AsyncIterator[str]:
        """Yield the last lines, then those that come from now on, until the caller stops."""
        queue: asyncio.Queue[str] = asyncio.Queue(maxsize=MAX_LINES)
        self._followers.add(queue)
        earlier = self.last(limit)
        try:
            for line in earlier:
                yield line
            while True:
                yield await queue.get()
        finally:
            self._followers.discard(queue)


class PipeDrain(asyncio.Protocol):
    """Reads one run's pipe into the buffer; ``closed`` is set when nobody holds the other end any more."""

    def __init__(self, log: LogBuffer) -> None:
        self.closed = asyncio.Event()
        self._log = log
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        """Cut what came into lines."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[: 4 * MAX_LINE_CHARS]  # the others would be cut off anyway
        for line in lines:
            self._log.add(line)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Keep what had no line end, and let waiters know."""
        if self._rest:
            self._log.add(self._rest)
            self._rest = b""
        self.closed.set()
