"""What outlasts the daemon of each model: its last transitions, and how often what has happened to it."""

import dataclasses
import time
from math import inf
from pathlib import Path

import pytest

from llmstudiod.adapters.history import History
from llmstudiod.adapters.state_db import StateDb
from llmstudiod.core.lifecycle import Failure, Instance, InstanceView, State, StopCause, Transition, view
from tests.unit.scheduler_world import spec

STEPS = [
    (State.STOPPED, State.STARTING, "wanted by a request"),
    (State.STARTING, State.LOADING, "the unit is active"),
    (State.LOADING, State.READY, "/health answers 200"),
    (State.READY, State.STOPPING, "evicted for b"),
    (State.STOPPING, State.STOPPED, "no process is left"),
]


def shown(model: str = "a", *, cause: StopCause | None = None, n_requests: int = 0) -> InstanceView:
    """Return the view of a model."""
    instance = Instance(spec(model), since=0.0, stop_cause=cause, n_requests=n_requests)
    return view(instance)


def live(history: History, clock: float, *, n_requests: int = 0) -> None:
    """Let a model pass a whole life."""
    for number, (old, new, why) in enumerate(STEPS):
        cause = StopCause.EVICT if new in {State.STOPPING, State.STOPPED} else None
        history.observe("a", Transition(clock + number, old, new, why), shown(cause=cause))
    history.totals(shown(n_requests=n_requests))
    history.flush()


def test_next_daemon_goes_on(tmp_path: Path) -> None:
    """Stories and totals are there again, and grow."""
    path = tmp_path / "state.db"
    first = StateDb(path)
    live(History(first, lambda: 100.0), 90.0, n_requests=7)
    first.close()
    second = StateDb(path)
    history = History(second, lambda: 5000.0)
    story = history.read()["a"]
    assert [(step.old, step.new, step.cause) for step in story] == STEPS
    assert story[-1].at == pytest.approx(5000 - 6, abs=2)  # as long ago as it was, on another clock
    live(history, 5000.0, n_requests=2)
    assert history.totals(shown(n_requests=2)) == {"requests": 9, "loads": 2, "failures": 0, "evictions": 2}
    second.close()
    third = StateDb(path)
    assert len(History(third, lambda: 0.0).read()["a"]) == 10
    third.close()


def test_what_happens_before_it_is_read_is_not_lost(tmp_path: Path) -> None:
    """The daemon serves before it has read its past."""
    state = StateDb(tmp_path / "state.db")
    live(History(state, lambda: 100.0), 90.0)
    history = History(state, lambda: 100.0)
    history.observe("a", Transition(100.0, State.STOPPED, State.FAILED, "crash"), shown())
    history.read()
    history.flush()
    assert len(History(state, lambda: 100.0).read()["a"]) == 6
    assert history.totals(shown())["failures"] == 1
    assert history.totals(shown())["loads"] == 1
    state.close()


@pytest.mark.parametrize("value", [{"steps": [{"at": "x"}, 3]}, {"steps": [{"at": 1, "old": "up", "new": "down"}]}, {}])
def test_damaged_rows_are_left_out(tmp_path: Path, value: dict[str, object]) -> None:
    """Whoever has written into the database: the daemon does not fail for it."""
    state = StateDb(tmp_path / "state.db")
    state.put("stories", "a", value)
    state.put("totals", "a", {"loads": "many", "requests": 3})
    history = History(state, time.monotonic)
    assert history.read() == {"a": ()}
    assert history.totals(dataclasses.replace(shown()))["requests"] == 3
    state.close()


OOM = Failure("oom_vram", "too small", "lower it", ("cudaMalloc failed",))


def failed(clock: float, *, retry_at: float) -> InstanceView:
    """Return the view of a model that has just failed for the second time."""
    instance = Instance(spec("a"), since=0.0, state=State.FAILED, failures=2, failed_at=(clock - 60, clock))
    instance.last_failure, instance.retry_at = (2, OOM), retry_at
    return view(instance)


@pytest.mark.parametrize("retry_at", [400.0, inf])
def test_next_daemon_knows_why_it_failed(tmp_path: Path, retry_at: float) -> None:
    """Reason, budget and the time of the next try, as long ago and as far ahead as they were, on another clock."""
    path = tmp_path / "state.db"
    state = StateDb(path)
    history = History(state, lambda: 100.0)
    history.observe("a", Transition(100.0, State.LOADING, State.FAILED, "too small"), failed(100.0, retry_at=retry_at))
    history.flush()
    for clock in (5000.0, 900.0):  # the one after the next knows it too, though nothing has happened meanwhile
        history = History(state, lambda clock=clock: clock)  # type: ignore[misc]
        history.read()
        kept = history.failures()["a"]
        assert (kept.failure, kept.recipe_hash, kept.failures) == (OOM, "1", 2)
        assert kept.failed_at == pytest.approx((clock - 60, clock), abs=2)
        assert kept.retry_at == pytest.approx(clock + retry_at - 100, abs=2)
    history.observe("a", Transition(clock, State.FAILED, State.STARTING, "asked for"), shown())
    history.flush()
    later = History(state, lambda: 0.0)
    later.read()
    assert later.failures() == {}
    state.close()


def test_damaged_failure_is_left_out(tmp_path: Path) -> None:
    """As everything else that may stand in the database."""
    state = StateDb(tmp_path / "state.db")
    for kept in (3, {}, {"failure": 1}, {"failure": {"kind": 1}, "recipe_hash": "1", "failed_at": "x"}):
        state.put("stories", "a", {"steps": [], "failure": kept})
        history = History(state, time.monotonic)
        history.read()
        assert history.failures() == {}
    state.close()


def test_progress_is_no_transition(tmp_path: Path) -> None:
    """What is only shown is not written down."""
    state = StateDb(tmp_path / "state.db")
    history = History(state, time.monotonic)
    history.observe("a", None, shown())
    history.flush()
    assert history.read() == {}
    state.close()
