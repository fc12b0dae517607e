"""One `journalctl` that follows all models' units: what they write while they load and run, some 200 ms late.

It explains and shows progress; that a process has ended is seen elsewhere, in two milliseconds. Only what journald
itself vouches for is believed: any user can write an entry that carries our fields, but not one whose trusted fields
(with ``_`` in front) name our units.
"""

import asyncio
import contextlib
import json
import logging
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any

from llmstudiod.core.unit import PREFIX
from llmstudiod.launchers.log_buffer import Lines

logger = logging.getLogger(__name__)

MAX_RUNS, MAX_ENDED, MAX_KNOWN = 64, 4, 2000
MAX_ENTRY_BYTES = 4 << 20
PAUSES_S = (0.1, 0.5, 2.0, 5.0)
_FIELDS = "MESSAGE,_SYSTEMD_UNIT,_SYSTEMD_INVOCATION_ID"
COMMAND = (
    "journalctl", "--quiet", "--follow", "--output=json", "--all", f"--output-fields={_FIELDS}",
)  # fmt: skip
MATCH = "LLMSTUDIO=model"  # LogExtraFields= of every model's unit


class Journal:
    """Keeps the last lines of each run that it has seen; its own end costs nothing but a moment."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = tuple(command)
        self._runs: OrderedDict[str, Lines] = OrderedDict()
        self._ended: deque[str] = deque()
        self._known: deque[str] = deque(maxlen=MAX_KNOWN)  # cursors, for what is sent twice
        self._n_taken = 0
        self._n_before = 0
        self._cursor: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._may_repeat = False

    def start(self, *, n_before: int = 0) -> None:
        """Follow from now on, if that is not so already. ``n_before``: entries of before that are to be read too."""
        if self._task is None:
            self._n_before = n_before
            self._task = asyncio.get_running_loop().create_task(self._keep_following(), name="follow the journal")

    def lines(self, invocation_id: str) -> list[str]:
        """Return the last that a run has written, the oldest first."""
        lines = self._runs.get(invocation_id)
        return lines.all() if lines else []

    def ended(self, invocation_id: str) -> None:
        """Forget a run that is over, in a while: its last lines may still be on their way."""
        self._ended.append(invocation_id)
        while len(self._ended) > MAX_ENDED:
            self._runs.pop(self._ended.popleft(), None)

    def count(self, invocation_id: str) -> int:
        """Return how many lines a run has written since `start`."""
        lines = self._runs.get(invocation_id)
        return lines.count if lines else 0

    async def close(self) -> None:
        """End the follower."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _keep_following(self) -> None:
        n_failures = 0
        while True:
            n_taken = self._n_taken
            reason = await self._follow()
            n_failures = 0 if self._n_taken > n_taken else n_failures + 1
            pause_s = PAUSES_S[min(n_failures, len(PAUSES_S) - 1)]
            # journald that is restarted or upgraded ends it, and so does a journal that is vacuumed.
            logger.log(logging.WARNING if n_failures > 1 else logging.INFO, "journalctl ended (%s): again", reason)
            if n_failures > 1:
                self._cursor = None  # it may point to what is not there any more
            await asyncio.sleep(pause_s)

    async def _follow(self) -> str:
        """Read until journalctl ends; return how."""
        # Without a cursor a little of the past is read again: what came while nobody followed must not be missing.
        self._may_repeat = self._cursor is None and bool(self._known)
        first = "--since=-10s" if self._may_repeat else f"--lines={self._n_before}"
        begin = f"--after-cursor={self._cursor}" if self._cursor else first
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command, begin, MATCH, limit=MAX_ENTRY_BYTES, stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
        except OSError as error:
            return str(error)
        assert process.stdout is not None
        try:
            while True:
                try:
                    raw = await process.stdout.readline()
                except ValueError:  # longer than any entry may be
                    continue
                if not raw:
                    break
                self._take(raw)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        return f"exit code {process.returncode}"

    def _take(self, raw: bytes) -> None:
        try:
            entry: dict[str, Any] = json.loads(raw)
        except (ValueError, RecursionError):
            return
        cursor = entry.get("__CURSOR")
        if not isinstance(cursor, str) or (self._may_repeat and cursor in self._known):
            return
        self._known.append(cursor)
        self._n_taken += 1
        self._cursor = cursor
        unit, run = entry.get("_SYSTEMD_UNIT"), entry.get("_SYSTEMD_INVOCATION_ID")
        if not isinstance(unit, str) or not unit.startswith(PREFIX) or not isinstance(run, str):
            return
        lines = self._runs.setdefault(run, Lines())
        self._runs.move_to_end(run)
        for line in message(entry.get("MESSAGE")).splitlines() or [""]:
            lines.add(line)
        while len(self._runs) > MAX_RUNS:
            self._runs.popitem(last=False)


def message(value: object) -> str:
    """Return an entry's text: a string, bytes as numbers where it is not UTF-8, or several of them.

    >>> message([104, 105])
    'hi'
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(each, int) and 0 <= each < 256 for each in value):
        return bytes(value).decode(errors="replace")
    if isinstance(value, list):
        return "\n".join(map(message, value))
    return ""
