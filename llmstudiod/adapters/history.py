"""What outlasts the daemon's process of each model: its last transitions, and how often what has happened to it.

Transitions are told as they happen and written a moment later, in a thread; a daemon that is killed loses the last few.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from llmstudiod.adapters.state_db import StateDb
from llmstudiod.core.lifecycle import STORY_LENGTH, InstanceView, State, StopCause, Transition

PAUSE_S = 1.0
FLUSH_S = 30.0
TOTALS = ("requests", "loads", "failures", "evictions")
_STORIES, _TOTALS = "stories", "totals"


class History:
    """Stories and totals by model. ``clock`` is the monotonic one that transitions are told in."""

    def __init__(self, state: StateDb, clock: Callable[[], float]) -> None:
        self._state = state
        self._clock = clock
        self._stories: dict[str, deque[dict[str, Any]]] = {}
        self._totals: dict[str, dict[str, int]] = {}
        self._requests: dict[str, int] = {}  # as they were counted last, since the daemon's start
        self._dirty: set[str] = set()
        self._wake = asyncio.Event()

    def observe(self, model: str, step: Transition | None, shown: InstanceView | None) -> None:
        """Take a transition."""
        if step is None:
            return
        kept = {"at": self._wall(step.at), "old": str(step.old), "new": str(step.new), "cause": step.cause}
        self._stories.setdefault(model, deque(maxlen=STORY_LENGTH)).append(kept)
        totals = self._totals_of(model)
        totals["loads"] += step.new is State.READY and step.old in {State.STARTING, State.LOADING}
        totals["failures"] += step.new is State.FAILED
        is_evicted = shown is not None and shown.stop_cause is StopCause.EVICT
        totals["evictions"] += step.new is State.STOPPING and is_evicted
        self._dirty.add(model)
        self._wake.set()

    def totals(self, shown: InstanceView) -> dict[str, int]:
        """Return what a model's totals are now."""
        self._count_requests(shown)
        return dict(self._totals_of(shown.id))

    async def keep(self, views: Callable[[], Iterable[InstanceView]]) -> None:
        """Write what has changed, for as long as the daemon runs."""
        while True:
            try:
                async with asyncio.timeout(FLUSH_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            await asyncio.sleep(PAUSE_S)  # a load is several transitions
            for shown in views():
                self._count_requests(shown)
            self._wake.clear()
            await asyncio.to_thread(self.flush)

    def flush(self) -> None:
        """Write what has changed. Blocks."""
        dirty, self._dirty = self._dirty, set()
        for model in sorted(dirty):
            if story := list(self._stories.get(model, ())):
                self._state.put(_STORIES, model, {"steps": story})
            self._state.put(_TOTALS, model, dict(self._totals_of(model)))

    def read(self) -> dict[str, tuple[Transition, ...]]:
        """Return the stories that an earlier daemon wrote, and go on with its totals. Blocks."""
        found = {}
        for model, value in self._state.all(_STORIES).items():
            steps = [each for each in value.get("steps") or () if isinstance(each, dict)]
            found[model] = tuple(step for step in map(self._step, steps) if step is not None)
            self._stories[model] = deque([*steps, *self._stories.get(model, ())], STORY_LENGTH)
        for model, value in self._state.all(_TOTALS).items():
            totals = self._totals_of(model)
            for name in TOTALS:
                earlier = value.get(name)
                totals[name] += earlier if isinstance(earlier, int) else 0
        return found

    def _count_requests(self, shown: InstanceView) -> None:
        new = shown.n_requests - self._requests.get(shown.id, 0)
        if new:
            self._requests[shown.id] = shown.n_requests
            self._totals_of(shown.id)["requests"] += max(0, new)
            self._dirty.add(shown.id)

    def _totals_of(self, model: str) -> dict[str, int]:
        return self._totals.setdefault(model, dict.fromkeys(TOTALS, 0))

    def _step(self, value: Any) -> Transition | None:  # noqa: ANN401 - JSON holds anything
        try:
            at = self._clock() - (time.time() - float(value["at"]))
            return Transition(at, State(value["old"]), State(value["new"]), str(value["cause"]))
        except (KeyError, TypeError, ValueError):
            return None

    def _wall(self, at: float) -> float:
        return time.time() - (self._clock() - at)
