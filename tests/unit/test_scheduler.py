"""The scheduler, one fact a test: who waits, who is admitted, who is refused, and what others see of it."""

import dataclasses

import pytest

from llmstudiod.core.errors import (
    LoadFailedError,
    ModelNotFoundError,
    QueueFullError,
)
from llmstudiod.core.events import (
    BecameReady,
    Event,
    LoadProgressed,
    Timer,
    TimerFired,
    UnitFailed,
    UnitGone,
    UnitStarted,
)
from llmstudiod.core.lifecycle import STORY_LENGTH, State, StopCause, UpstreamFacts
from tests.unit.scheduler_world import LOAD_S, OOM, Place, one_of, ready, spec, world_of

# Requests and starts


def test_request_for_a_stopped_model_starts_it() -> None:
    """A cold request starts the model, waits, and is granted to that very run."""
    world = world_of([spec("a")])
    ticket = world.ask("a")
    assert (world.state("a"), world.place(ticket)) == (State.STARTING, Place.WAITING)
    world.advance(1.0)
    assert world.state("a") is State.LOADING
    world.advance(2.0)
    assert (world.state("a"), world.place(ticket)) == (State.READY, Place.IN_FLIGHT)
    assert world.tickets[ticket].run == world.starts[0].run


def test_request_for_a_ready_model_is_granted_at_once() -> None:
    """Where there is a free slot, the answer to the arrival is the grant, and it is counted in the same step."""
    world = ready(world_of([spec("a")]), "a")
    ticket = world.ask("a")
    assert world.place(ticket) is Place.IN_FLIGHT
    assert world.view("a").in_flight == 1


def test_simultaneous_cold_requests_share_one_start() -> None:
    """However many ask for a cold model, it is started once, and all of them are served."""
    world = world_of([spec("a", concurrency_limit=8)])
    tickets = [world.ask("a") for _ in range(8)]
    world.advance(LOAD_S)
    assert world.started() == ["a"]
    assert {world.place(ticket) for ticket in tickets} == {Place.IN_FLIGHT}


def test_failed_load_answers_every_waiter_with_the_same_reason() -> None:
    """All who waited for a load that fails get its one sentence, its hint and its category."""
    world = world_of([spec("a")])
    world.script("a").failure = OOM
    tickets = [world.ask("a"), world.ask("a"), world.load("a")]
    world.advance(LOAD_S)
    for ticket in tickets:
        error = world.error(ticket)
        assert isinstance(error, LoadFailedError)
        assert error.message == "cannot load 'a': the GPU's memory is too small for it"
        assert error.hint == "lower n_gpu_layers"
        assert error.details == {"failure": "oom_vram", "lines": ["cudaMalloc failed"]}
    assert world.state("a") is State.FAILED


def test_unknown_model_is_refused() -> None:
    """A request, a load or an unload for a model without a recipe is refused at once."""
    world = world_of([spec("a")])
    for ticket in (world.ask("b"), world.load("b"), world.unload("b")):
        assert isinstance(world.error(ticket), ModelNotFoundError)


def test_waiters_are_admitted_in_their_order() -> None:
    """Slots are given to the oldest waiters first, one for each that becomes free."""
    world = world_of([spec("a")])
    tickets = [world.ask("a") for _ in range(4)]
    world.advance(LOAD_S)
    assert world.in_flight() == tickets[:2]
    world.end(tickets[1])
    assert world.in_flight() == [tickets[0], tickets[2]]


def test_concurrency_limit_replaces_the_number_of_slots() -> None:
    """A recipe's own limit counts, below the server's slots or above them."""
    for limit in (1, 5):
        world = world_of([spec("a", concurrency_limit=limit)])
        for _ in range(7):
            world.ask("a")
        world.advance(LOAD_S)
        assert len(world.in_flight()) == limit


def test_load_is_done_when_the_model_is_ready() -> None:
    """A manual load is answered as soon as the model is ready, whoever queues before it, and takes no slot."""
    world = world_of([spec("a", concurrency_limit=1)])
    requests = [world.ask("a"), world.ask("a")]
    load = world.load("a")
    world.advance(LOAD_S)
    assert world.is_done(load)
    assert world.in_flight() == requests[:1]
    assert world.is_done(world.load("a"))
    assert world.waiting() == requests[1:]


# Clients that leave


def test_client_that_leaves_while_queued_starts_nothing_and_evicts_nothing() -> None:
    """With its client gone, a queued request has no effect when a place becomes free later."""
    world = one_of("a", "b")
    ready(world, "a")
    busy = world.ask("a")
    queued = world.ask("b")
    world.end(queued)
    world.end(busy)
    world.advance(30.0)
    assert world.started() == ["a"]
    assert world.state("a") is State.READY


def test_load_without_waiters_goes_on_when_nobody_needs_the_room() -> None:
    """A client that leaves while its model loads does not stop the load by itself."""
    world = one_of("a", "b")
    world.end(world.ask("a"))
    world.advance(LOAD_S)
    assert world.state("a") is State.READY


@pytest.mark.parametrize("order", ["leaves, then another asks", "another asks, then leaves"])
def test_load_without_waiters_gives_way(order: str) -> None:
    """A load that nobody waits for any more is cancelled as soon as another model needs its room."""
    world = one_of("a", "b")
    first = world.ask("a")
    if order.startswith("leaves"):
        world.end(first)
        second = world.ask("b")
    else:
        second = world.ask("b")
        assert world.stops == []
        world.end(first)
    assert world.view("a").stop_cause is StopCause.ABANDONED
    world.advance(1.0 + LOAD_S)
    assert world.place(second) is Place.IN_FLIGHT
    assert world.started() == ["a", "b"]


def test_load_with_another_waiter_does_not_give_way() -> None:
    """One of two waiters leaves: the load goes on for the other, and serves it."""
    world = one_of("a", "b")
    first, second = world.ask("a"), world.ask("a")
    world.ask("b")
    world.end(first)
    world.advance(LOAD_S)
    assert world.place(second) is Place.IN_FLIGHT


def test_manual_load_counts_as_a_waiter() -> None:
    """A model that an operator is loading is not thrown out half-way by a request for another."""
    world = one_of("a", "b")
    load = world.load("a")
    world.ask("b")
    world.advance(LOAD_S)
    assert world.is_done(load)
    world.settle()
    assert world.waiting() == []


# A stop under way


def test_request_during_a_slow_stop_gets_a_fresh_start() -> None:
    """A request that comes while its model stops waits for the end of the stop, then for a new run."""
    world = world_of([spec("a")])
    world.script("a").stop_s = 20.0
    ready(world, "a")
    world.unload("a")
    world.advance(10.0)
    ticket = world.ask("a")
    assert (world.state("a"), world.started()) == (State.STOPPING, ["a"])
    world.advance(10.0)
    assert world.started() == ["a", "a"]
    world.advance(LOAD_S)
    assert world.tickets[ticket].run == world.starts[1].run


def test_readiness_during_a_stop_is_ignored() -> None:
    """A model that becomes ready, fails or moves while it is being stopped stays on its way out."""
    world = world_of([spec("a")])
    world.script("a").stop_s = 20.0
    world.ask("a")
    world.unload("a")
    run = world.starts[0].run
    late: list[Event] = [
        UnitStarted(world.now, "a", run),
        LoadProgressed(world.now, "a", run, 0.5),
        BecameReady(world.now, "a", run, UpstreamFacts(1, 256)),
        UnitFailed(world.now, "a", run, OOM),
    ]
    for event in late:
        world.feed(event)
        assert world.state("a") is State.STOPPING
        assert world.view("a").progress is None
    world.advance(20.0)
    assert (world.state("a"), world.view("a").failures) == (State.STOPPED, 0)


def test_events_of_an_old_run_are_ignored() -> None:
    """Whatever is told late about a run that is over does not touch the present one."""
    world = ready(world_of([spec("a")]), "a")
    old = world.starts[0].run
    world.unload("a")
    world.advance(1.0)
    ticket = world.ask("a")
    world.advance(1.0)
    before = world.view("a")
    late: list[Event] = [
        UnitStarted(world.now, "a", old),
        BecameReady(world.now, "a", old, UpstreamFacts(1, 256)),
        UnitFailed(world.now, "a", old, OOM),
        UnitGone(world.now, "a", old),
        *[TimerFired(world.now, "a", old, timer) for timer in Timer],
    ]
    for event in late:
        assert world.scheduler.handle(event) == []
    assert world.view("a") == before
    world.advance(LOAD_S)
    assert world.place(ticket) is Place.IN_FLIGHT


# 429


def test_full_queue_is_refused_at_arrival() -> None:
    """The request that finds the queue full is refused before any answer is begun; the others are served."""
    world = world_of([spec("a", max_queue=2)])
    waiting = [world.ask("a"), world.ask("a")]
    refused = world.ask("a")
    error = world.error(refused)
    assert isinstance(error, QueueFullError)
    assert error.retry_after_s == 1
    world.advance(LOAD_S)
    assert world.in_flight() == waiting


def test_cancelled_waiter_frees_its_place_in_the_queue() -> None:
    """A waiter holds a place for as long as it waits, and no longer."""
    world = world_of([spec("a", max_queue=2)])
    first = world.ask("a")
    world.ask("a")
    world.end(first)
    assert world.place(world.ask("a")) is Place.WAITING
    assert isinstance(world.error(world.ask("a")), QueueFullError)


def test_queue_counts_only_those_who_wait() -> None:
    """Requests in flight take slots, not places in the queue; with no queue at all a free slot is still given."""
    world = world_of([spec("a", max_queue=0)])
    world.load("a")
    world.advance(LOAD_S)
    assert [world.place(world.ask("a")) for _ in range(2)] == [Place.IN_FLIGHT] * 2
    assert isinstance(world.error(world.ask("a")), QueueFullError)


# The unified KV cache


def test_unified_pool_admits_what_it_is_sure_to_hold() -> None:
    """Slots on one pool: requests run together only as far as all of their tokens fit."""
    world = world_of([spec("a", is_kv_unified=True, concurrency_limit=8)])
    world.load("a")
    world.advance(LOAD_S)
    first, second = world.ask("a", 400), world.ask("a", 600)
    third = world.ask("a", 1)
    assert world.in_flight() == [first, second]
    world.end(first)
    assert world.in_flight() == [second, third]


def test_unbounded_request_has_the_pool_to_itself() -> None:
    """A request whose length nobody knows may use it all: it runs alone, and nobody overtakes it in the queue."""
    world = world_of([spec("a", is_kv_unified=True)])
    world.load("a")
    world.advance(LOAD_S)
    small, unbounded, behind = world.ask("a", 10), world.ask("a"), world.ask("a", 10)
    assert world.in_flight() == [small]
    world.end(small)
    assert world.in_flight() == [unbounded]
    world.end(unbounded)
    assert world.in_flight() == [behind]


def test_waiter_that_leaves_the_head_of_the_queue_lets_the_next_in() -> None:
    """The one that did not fit leaves: the one behind it, which fits, does not wait for an end."""
    world = world_of([spec("a", is_kv_unified=True)])
    world.load("a")
    world.advance(LOAD_S)
    world.ask("a", 10)
    unbounded, behind = world.ask("a"), world.ask("a", 10)
    world.end(unbounded)
    assert world.place(behind) is Place.IN_FLIGHT


def test_request_larger_than_the_pool_runs_alone() -> None:
    """A request that can never fit is the server's to refuse; it must not block the queue for good."""
    world = world_of([spec("a", is_kv_unified=True)])
    world.load("a")
    world.advance(LOAD_S)
    assert world.place(world.ask("a", 10_000)) is Place.IN_FLIGHT


# What others see


def test_story_tells_each_change_with_its_cause() -> None:
    """An instance's story is readable: old state, new state, why."""
    world = ready(world_of([spec("a", idle_timeout_s=60.0)]), "a")
    world.advance(62.0)
    story = world.view("a").story
    assert [f"{step.old}->{step.new}: {step.cause}" for step in story] == [
        "stopped->starting: wanted by a request",
        "starting->loading: the unit is active",
        "loading->ready: /health answers 200",
        "ready->stopping: idle unload",
        "stopping->stopped: no process is left",
    ]


def test_story_is_bounded() -> None:
    """Only the last transitions are kept."""
    world = world_of([spec("a")])
    for _ in range(STORY_LENGTH):
        ready(world, "a")
        world.unload("a")
        world.advance(1.0)
    assert len(world.view("a").story) == STORY_LENGTH


def test_views_are_frozen_and_sorted() -> None:
    """Readers get copies, in the order of ids, that the next event does not change."""
    world = world_of([spec("b"), spec("a")])
    before = world.view("a")
    world.ask("a")
    assert before.state is State.STOPPED
    assert [view.id for view in world.scheduler.views()] == ["a", "b"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.state = State.READY  # type: ignore[misc]
