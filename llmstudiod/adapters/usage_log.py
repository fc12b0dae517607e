"""What requests have cost and how long they took, in ``state.db``; what was said is nowhere in it.

Sums of ten minutes for each model and key are kept for the setting ``usage_keep``, and the last requests themselves
for quantiles (at most 500 of each two seconds): a report costs the same after months of traffic as after an hour.
Requests are noted in memory and written in bunches, in a thread; a daemon that is killed loses the last two seconds.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llmstudiod.adapters.state_db import StateDb
from llmstudiod.core.usage import spent

PERIOD_S = 2.0
MAX_NOTED = 50_000
BUCKET_S = 600  # time zones differ by quarters of an hour
KEPT_S, KEPT_ROWS = 30 * 86400.0, 10_000
TRIM_EVERY, TRIM_S = 2000, 3600.0
UPTIME_S = 60.0
CANCELLED = 499
MAX_SAMPLED = 500


class Row(NamedTuple):
    """One request as it is kept. Times in milliseconds, 0: not told; the last two are the model's own."""

    at: float
    model: str
    key: str
    status: int
    stream: int
    prompt: int
    completion: int
    cached: int
    ttft_ms: float
    duration_ms: float
    prompt_ms: float
    completion_ms: float


SUMS = (
    "requests", "good", "prompt", "completion", "cached", "told", "told_prompt", "told_cached", "hits",
    "good_ms", "ttft_ms", "waited", "prompt_ms", "completion_ms", "read", "written", "cancelled",
)  # fmt: skip
"""The sums of a bucket: see `_sums_of`."""
_INSERT = f"INSERT INTO requests VALUES ({', '.join('?' * len(Row._fields))})"  # noqa: S608 - question marks
_USED = f"""INSERT INTO usage (at, model, key, last_at, {", ".join(SUMS)}) VALUES (?, ?, ?, ?{", ?" * len(SUMS)})
    ON CONFLICT (at, model, key) DO UPDATE SET last_at = max(last_at, excluded.last_at),
    {", ".join(f"{name} = {name} + excluded.{name}" for name in SUMS)}"""  # noqa: S608 - our own names
_SPENT = """INSERT INTO spent VALUES (?, ?, ?, ?, ?) ON CONFLICT (model) DO UPDATE SET
    requests = requests + excluded.requests, prompt = prompt + excluded.prompt, cached = cached + excluded.cached,
    completion = completion + excluded.completion"""
# max() of two values, and min(), is NULL where one of them is.
_PEAKS = """INSERT INTO peaks VALUES (?, ?, ?, ?) ON CONFLICT (model) DO UPDATE SET
    prefill_tps = ifnull(max(prefill_tps, excluded.prefill_tps), ifnull(prefill_tps, excluded.prefill_tps)),
    generation_tps = ifnull(max(generation_tps, excluded.generation_tps),
        ifnull(generation_tps, excluded.generation_tps)),
    ttft_ms = ifnull(min(ttft_ms, excluded.ttft_ms), ifnull(ttft_ms, excluded.ttft_ms))"""
_ADD = "INSERT INTO lifetime VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value"
_FIRST = "INSERT OR IGNORE INTO lifetime VALUES ('first_started_at', ?)"
TABLES = (
    f"requests ({', '.join(f'{name} NOT NULL' for name in Row._fields)})",
    f"usage (at, model, key, last_at, {', '.join(SUMS)}, PRIMARY KEY (at, model, key)) WITHOUT ROWID",
    # What is never trimmed.
    "spent (model TEXT PRIMARY KEY, requests NOT NULL, prompt NOT NULL, cached NOT NULL, completion NOT NULL)",
    "peaks (model TEXT PRIMARY KEY, prefill_tps, generation_tps, ttft_ms)",
    "lifetime (name TEXT PRIMARY KEY, value NOT NULL)",
)
RETIRED = ("used",)
"""It held sums that were counted otherwise."""


class Served(NamedTuple):
    """One request. ``at``: its end, since 1970; ``key``: the name of its API key; ``status`` 0: cut off.

    ``ttft_s``: until its answer began, ``duration_s``: until it ended, both from when it was passed to the model.
    ``tail``: the parts of the answer in which it tells what it has cost; ``n_events``: those of a stream, about one
    for each token.
    """

    at: float
    model: str
    key: str
    status: int
    is_stream: bool
    ttft_s: float
    duration_s: float
    tail: bytes
    n_events: int = 0


class UsageLog:
    """Takes requests and answers questions about them. ``told`` gets the rows too, on the loop.

    ``keep_s``: for how long sums and requests are kept, and how far back reports look.
    """

    def __init__(
        self,
        state: StateDb,
        told: Callable[[list[Row]], None],
        *,
        keep_s: float = KEPT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.keep_s = keep_s
        self._clock = clock
        self._counted_until = clock()
        self._state = state
        self._told = told
        self._untold: deque[list[Row]] = deque()
        self._noted: deque[Served] = deque(maxlen=MAX_NOTED)
        self._n_written = 0

    def note(self, served: Served) -> None:
        """Take a request; cheap."""
        self._noted.append(served)

    async def keep(self) -> None:
        """Write what was noted, for as long as the daemon runs."""
        trim_at, uptime_at = self._clock(), self._clock() + UPTIME_S
        while True:
            await asyncio.sleep(PERIOD_S)
            if (now := self._clock()) >= trim_at:
                trim_at = now + TRIM_S
                await asyncio.to_thread(self.trim)
            if now >= uptime_at:
                uptime_at = now + UPTIME_S
                await asyncio.to_thread(self.count_uptime)
            if self._noted:
                await asyncio.to_thread(self.flush)
            while self._untold:
                self._told(self._untold.popleft())

    def flush(self) -> None:
        """Write what was noted. Blocks."""
        rows = []
        for _ in range(len(self._noted)):
            with contextlib.suppress(IndexError):  # two threads may be at it
                rows.append(_row(self._noted.popleft()))
        if not rows:
            return
        self._untold.append(rows)
        by_model: dict[str, list[Row]] = {}
        for row in rows:
            by_model.setdefault(row.model, []).append(row)
        sample = rows[:: -(-len(rows) // MAX_SAMPLED)]
        self._state.write(
            (_INSERT, sample),
            (_USED, _buckets(rows)),
            (_SPENT, [_spent_by(model, of_model) for model, of_model in by_model.items()]),
            (_PEAKS, [(model, *_best(of_model)) for model, of_model in by_model.items()]),
        )
        self._n_written += len(rows)
        if self._n_written >= TRIM_EVERY:
            self._n_written = 0
            self.trim()

    def trim(self) -> None:
        """Forget what is too old. Blocks."""
        since = time.time() - self.keep_s
        self._state.write(
            ("DELETE FROM usage WHERE at < ?", [(since,)]),
            ("DELETE FROM requests WHERE at < ?", [(since,)]),
            ("DELETE FROM requests WHERE rowid <= (SELECT max(rowid) FROM requests) - ?", [(KEPT_ROWS,)]),
        )

    def count_uptime(self) -> None:
        """Add the time since this was counted last to that of all daemons. Blocks."""
        now = self._clock()
        span_s, self._counted_until = now - self._counted_until, now
        self._state.write((_ADD, [("uptime_s", span_s)]))

    def close(self) -> None:
        """Write what is not written yet. Blocks."""
        self.count_uptime()
        self.flush()

    def started(self, at: float) -> None:
        """Note the daemon's start; the first one counts. Blocks."""
        self._state.write((_FIRST, [(at,)]))

    def add_energy(self, watt_hours: float) -> None:
        """Count energy. Blocks."""
        self._state.write((_ADD, [("energy_wh", watt_hours)]))

    def by_model(self) -> list[dict[str, Any]]:
        """Return what each model has ever read and written. Blocks."""
        return self.ask(
            "SELECT model, requests, prompt AS prompt_tokens, cached AS cached_tokens, completion AS completion_tokens"
            " FROM spent ORDER BY model"
        )

    def lifetime(self) -> dict[str, Any]:
        """Return the sums of all times. Blocks."""
        select = "SELECT ifnull(sum(requests), 0) AS requests, ifnull(sum(prompt), 0) AS prompt, "
        select += "ifnull(sum(completion), 0) AS completion FROM spent"
        found: dict[str, Any] = {
            "requests": 0,
            "prompt": 0,
            "completion": 0,
            "energy_wh": 0.0,
            "uptime_s": 0.0,
            "first_started_at": None,
        }
        for row in self.ask(select):
            found |= row
        found |= {row["name"]: row["value"] for row in self.ask("SELECT name, value FROM lifetime")}
        return found | {"uptime_s": found["uptime_s"] + self._clock() - self._counted_until}

    def ask(self, select: str, values: Sequence[object] = ()) -> list[dict[str, Any]]:
        """Return the rows that a SELECT of ours finds, by the names of its columns. Blocks."""
        self.flush()
        return self._state.rows(select, values)


def _row(served: Served) -> Row:
    cost = spent(served.tail)
    completion = cost.completion
    if not completion and served.status in {CANCELLED, 0}:  # it ended before it could tell; the first event is no token
        completion = max(0, served.n_events - 1)
    # A whole answer comes when everything is written: its first token is seen by nobody, but the model may tell.
    ttft_ms = served.ttft_s * 1000 if served.is_stream else cost.prompt_ms
    return Row(
        served.at, served.model, served.key, served.status, int(served.is_stream), cost.prompt, completion,
        cost.cached, ttft_ms, served.duration_s * 1000, cost.prompt_ms, cost.completion_ms,
    )  # fmt: skip


def _buckets(rows: Sequence[Row]) -> list[tuple[object, ...]]:
    """Return what these rows add to each bucket."""
    groups: dict[tuple[float, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.at // BUCKET_S * BUCKET_S, row.model, row.key), []).append(row)
    return [
        (*place, max(row.at for row in group), *map(sum, zip(*map(_sums_of, group), strict=True)))
        for place, group in groups.items()
    ]


def _spent_by(model: str, rows: Sequence[Row]) -> tuple[str, int, int, int, int]:
    prompt, cached = sum(row.prompt for row in rows), sum(row.cached for row in rows)
    return model, len(rows), prompt, cached, sum(row.completion for row in rows)


def _sums_of(row: Row) -> tuple[float, ...]:
    """Return what a request adds to `SUMS`.

    ``good``: answered; ``told``: it said how it read its prompt; ``hits``: some of that was in the cache; ``good_ms``:
    of the good ones; ``ttft_ms``: of those of them that tell, which are ``waited``; ``read`` and ``written``: the
    tokens of ``prompt_ms`` and ``completion_ms``; ``cancelled``: the client did not wait for the end.
    """
    is_good = is_answered(row.status)
    is_told = bool(row.prompt and row.prompt_ms)
    return (
        1, is_good, row.prompt, row.completion, row.cached,
        is_told, row.prompt if is_told else 0, row.cached if is_told else 0, is_told and row.cached > 0,
        row.duration_ms if is_good else 0, row.ttft_ms if is_good else 0, is_good and row.ttft_ms > 0,
        row.prompt_ms, row.completion_ms,
        row.prompt - row.cached if row.prompt_ms else 0, row.completion if row.completion_ms else 0,
        row.status == CANCELLED,
    )  # fmt: skip


def is_answered(status: int) -> bool:
    """Whether a status means that the request was served."""
    return 200 <= status < 400


def _best(rows: Sequence[Row]) -> tuple[float | None, float | None, float | None]:
    """Return the best speeds of requests long enough to show one, in tokens a second, and time to first token."""
    reads = [
        (row.prompt - row.cached) * 1000 / row.prompt_ms
        for row in rows
        if row.prompt - row.cached >= 32 and row.prompt_ms > 0
    ]
    writes = [
        row.completion * 1000 / row.completion_ms for row in rows if row.completion >= 8 and row.completion_ms > 0
    ]
    waits = [row.ttft_ms for row in rows if row.status == 200 and row.prompt > 0 and row.ttft_ms > 0]
    return max(reads, default=None), max(writes, default=None), min(waits, default=None)
