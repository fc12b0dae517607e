"""Speed and memory of each model in the last hour: for the list, the charts, the events and the metrics."""

import bisect
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llmstudiod.adapters.usage_log import Row

HOUR_S, MINUTE_S = 3600.0, 60.0
MAX_ROWS, MAX_SIZES = 20_000, 1000
RECENT_S = 60.0


@dataclass(frozen=True, slots=True)
class Recent:
    """Of the requests that ended in the last minute; None: there were none, or they told nothing.

    ``generation_tps`` and ``prompt_tps``: tokens per second of computing; ``ttft_ms``: their median time to the
    first token.
    """

    generation_tps: float | None = None
    prompt_tps: float | None = None
    ttft_ms: float | None = None


NOTHING = Recent()


class _Course:
    """How much each model held of something, over time."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._sizes: dict[str, deque[tuple[float, int]]] = defaultdict(lambda: deque(maxlen=MAX_SIZES))

    def add(self, sizes: dict[str, int]) -> None:
        for model, size in sizes.items():
            self._sizes[model].append((self._now(), size))

    def last(self, model: str) -> int | None:
        """Return what was measured last, within the last minute."""
        kept = self._sizes.get(model)
        return kept[-1][1] if kept and kept[-1][0] > self._now() - RECENT_S else None

    def minutes(self, model: str, begin: float) -> list[int | None]:
        """Return the last of each of sixty minutes."""
        held: list[int | None] = [None] * 60
        for at, size in self._sizes.get(model, ()):
            if at >= begin:
                held[min(59, int((at - begin) // MINUTE_S))] = size
        return held


class Figures:
    """Takes what requests have cost, and what models hold. ``now``: seconds since 1970."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._rows: dict[str, deque[Row]] = defaultdict(lambda: deque(maxlen=MAX_ROWS))
        self._memory = _Course(now)
        self._gpu_memory = _Course(now)
        self._recent: dict[str, tuple[float, Recent]] = {}

    def add(self, rows: Iterable[Row]) -> None:
        """Take requests."""
        for row in rows:
            self._rows[row.model].append(row)
            self._recent.pop(row.model, None)

    def add_memory(self, ram: dict[str, int], gpus: dict[str, int]) -> None:
        """Take what running models have of RAM and of all GPUs now, in bytes."""
        self._memory.add(ram)
        self._gpu_memory.add(gpus)

    def memory(self, model: str) -> int | None:
        """Return what a model held of RAM when it was measured last, within the last minute."""
        return self._memory.last(model)

    def recent(self, model: str) -> Recent:
        """Return how fast a model has been of late."""
        if model not in self._rows:
            return NOTHING
        now = self._now()
        known = self._recent.get(model)
        if known is None or known[0] < now - 1:
            known = self._recent[model] = (now, speed(self._since(model, now - RECENT_S)))
        return known[1]

    def history(self, model: str) -> dict[str, Any]:
        """Return the last hour in sixty minutes, the oldest first; null where there was nothing."""
        begin = (self._now() // MINUTE_S) * MINUTE_S - HOUR_S + MINUTE_S
        rows: list[list[Row]] = [[] for _ in range(60)]
        for row in self._since(model, begin):
            rows[min(59, int((row.at - begin) // MINUTE_S))].append(row)
        speeds = [speed(each) for each in rows]
        return {
            "from": begin,
            "step_s": MINUTE_S,
            "requests": [len(each) for each in rows],
            "tokens_per_second": [each.generation_tps for each in speeds],
            "prompt_tokens_per_second": [each.prompt_tps for each in speeds],
            "ttft_ms": [each.ttft_ms for each in speeds],
            "memory": self._memory.minutes(model, begin),
            "gpu_memory": self._gpu_memory.minutes(model, begin),
        }

    def _since(self, model: str, begin: float) -> list[Row]:
        rows = list(self._rows.get(model, ()))
        return rows[bisect.bisect_left(rows, begin, key=lambda row: row.at) :]


def speed(rows: Iterable[Row]) -> Recent:
    """Return how fast requests were served."""
    rows = list(rows)
    waits = sorted(row.ttft_ms for row in rows if row.status == 200 and row.ttft_ms)
    read = sum(row.prompt - row.cached for row in rows if row.prompt_ms)
    return Recent(
        generation_tps=_rate(sum(row.completion for row in rows if row.completion_ms), [r.completion_ms for r in rows]),
        prompt_tps=_rate(read, [row.prompt_ms for row in rows]),
        ttft_ms=round(waits[(len(waits) - 1) // 2], 1) if waits else None,
    )


def _rate(tokens: int, milliseconds: list[float]) -> float | None:
    total = sum(milliseconds)
    return round(tokens / total * 1000, 2) if tokens and total else None
