"""What outlasts the daemon's process of each model: its last transitions, and how often what has happened to it.

Where the last transition is a failure, also why, and when it may be tried again.
Transitions are told as they happen and written a moment later, in a thread; a daemon that is killed loses the last few.
"""

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable
from math import inf, isfinite
from typing import Any

from llmstudiod.adapters.state_db import StateDb
from llmstudiod.core.lifecycle import STORY_LENGTH, Failure, InstanceView, PastFailure, State, StopCause, Transition

PAUSE_S = 1.0
FLUSH_S = 30.0
TOTALS = ("requests", "loads", "failures", "evictions")
_STORIES, _TOTALS = "stories", "totals"


class History:
    """Stories and totals by model. ``clock`` is the monotonic one that transitions are told in."""

    def __init__(self, state: StateDb, clock: Callable[[], float]) -> None:
        self._state = state
        self._clock = clock
        self._failures: dict[str, dict[str, Any]] = {}  # of those whose last step was to fail
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
        if step.new is State.FAILED and shown is not None and shown.last_failure is not None:
            self._failures[model] = self._failure(shown, shown.last_failure[1])
        else:
            self._failures.pop(model, None)
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
                failure = self._failures.get(model)
                self._state.put(_STORIES, model, {"steps": story} | ({"failure": failure} if failure else {}))
            self._state.put(_TOTALS, model, dict(self._totals_of(model)))

    def read(self) -> dict[str, tuple[Transition, ...]]:
        """Return the stories that an earlier daemon wrote, and go on with its totals. Blocks."""
        found = {}
        for model, value in self._state.all(_STORIES).items():
            steps = [each for each in value.get("steps") or () if isinstance(each, dict)]
            found[model] = tuple(step for step in map(self._step, steps) if step is not None)
            if model not in self._stories and isinstance(value.get("failure"), dict):
                self._failures[model] = value["failure"]
            self._stories[model] = deque([*steps, *self._stories.get(model, ())], STORY_LENGTH)
        for model, value in self._state.all(_TOTALS).items():
            totals = self._totals_of(model)
            for name in TOTALS:
                earlier = value.get(name)
                totals[name] += earlier if isinstance(earlier, int) else 0
        return found

    def failures(self) -> dict[str, PastFailure]:
        """Return why those have failed of which that is the last that is known, once everything was read."""
        found = {model: self._past_failure(value) for model, value in self._failures.items()}
        return {model: past for model, past in found.items() if past is not None}

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
            at = self._monotonic(float(value["at"]))
            return Transition(at, State(value["old"]), State(value["new"]), str(value["cause"]))
        except (KeyError, TypeError, ValueError):
            return None

    def _failure(self, shown: InstanceView, failure: Failure) -> dict[str, Any]:
        return {
            "failure": dataclasses.asdict(failure),
            "recipe_hash": shown.spec.recipe_hash,
            "failures": shown.failures,
            "failed_at": [self._wall(at) for at in shown.failed_at],
            "retry_at": self._wall(shown.retry_at) if isfinite(shown.retry_at) else None,
        }

    def _past_failure(self, value: dict[str, Any]) -> PastFailure | None:
        try:
            told = value["failure"]
            hint = None if told["hint"] is None else str(told["hint"])
            lines = tuple(str(line) for line in told["lines"])
            failure = Failure(str(told["kind"]), str(told["message"]), hint, lines, never_ran=bool(told["never_ran"]))
            failed_at = tuple(self._monotonic(float(at)) for at in value["failed_at"])
            retry_at = inf if value["retry_at"] is None else self._monotonic(float(value["retry_at"]))
            return PastFailure(failure, str(value["recipe_hash"]), int(value["failures"]), failed_at, retry_at)
        except (KeyError, TypeError, ValueError):
            return None

    def _monotonic(self, wall: float) -> float:
        return self._clock() - (time.time() - wall)

    def _wall(self, at: float) -> float:
        return time.time() - (self._clock() - at)
