"""The scheduler, one fact a test: who waits, who starts, who goes, and what everybody is told."""

import dataclasses

import pytest

from llmstudiod.core.events import (
    BecameReady,
    Event,
    LoadProgressed,
    StopUnit,
    Timer,
    TimerFired,
    UnitFailed,
    UnitGone,
    UnitStarted,
)
from llmstudiod.core.lifecycle import STORY_LENGTH, Failure, State, StopCause, UpstreamFacts
from llmstudiod.core.scheduler import BACK_OFF_S, OVERTAKE_S, STABLE_S
from llmstudiod.errors import (
    BackingOffError,
    LoadFailedError,
    LoadStalledError,
    ModelNotFoundError,
    QueueFullError,
    ShuttingDownError,
    UnavailableError,
    UpstreamCrashedError,
)
from tests.unit.scheduler_world import Place, World, spec, world_of

OOM = Failure("oom_vram", "the GPU's memory is too small for it", "lower n_gpu_layers", ("cudaMalloc failed",))
LOAD_S = 3.0  # a start and a load as the world scripts them


def one_of(*models: str) -> World:
    """Return a world in which one of these models may run at once."""
    return world_of([spec(model) for model in models], max_instances=1)


def ready(world: World, model: str) -> World:
    """Return the world with a model ready and idle."""
    ticket = world.ask(model)
    world.advance(LOAD_S)
    world.end(ticket)
    assert world.state(model) is State.READY
    return world


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


# Room


def test_idle_model_is_evicted_for_another() -> None:
    """When the places are taken, an idle model is stopped at once for the one that is wanted."""
    world = one_of("a", "b")
    ready(world, "a")
    ticket = world.ask("b")
    assert world.view("a").stop_cause is StopCause.EVICT
    assert world.started() == ["a"], "not before the process is gone"
    world.advance(1.0 + LOAD_S)
    assert world.place(ticket) is Place.IN_FLIGHT


def test_zero_max_instances_is_no_limit() -> None:
    """Without a limit nothing is ever evicted."""
    world = world_of([spec(model) for model in "abcd"])
    tickets = [world.ask(model) for model in "abcd"]
    world.advance(LOAD_S)
    assert world.in_flight() == tickets
    assert world.stops == []


def test_least_recently_used_model_is_evicted_first() -> None:
    """Of several idle models the one goes whose last request is the longest ago; being loaded counts as a use."""
    world = world_of([spec(model) for model in "abc"], max_instances=2)
    ready(world, "a")
    world.load("b")
    world.advance(LOAD_S)
    world.ask("c")
    assert (world.state("a"), world.state("b")) == (State.STOPPING, State.READY)


def test_lower_priority_is_evicted_first() -> None:
    """Priority comes before recency: the less important idle model goes, though it was used last."""
    world = world_of([spec("a", priority=5), spec("b"), spec("c")], max_instances=2)
    ready(world, "a")
    ready(world, "b")
    world.ask("c")
    assert (world.state("a"), world.state("b")) == (State.READY, State.STOPPING)


def test_higher_priority_is_admitted_first() -> None:
    """A place that becomes free goes to the most important model that waits, then to the oldest waiter."""
    world = world_of([spec("a"), spec("b"), spec("c"), spec("d", priority=1)], max_instances=1)
    ready(world, "a")
    tickets = [world.ask("b"), world.ask("c"), world.ask("d")]
    world.advance(0.5)
    world.settle()
    assert world.started() == ["a", "d", "b", "c"]
    assert all(world.tickets[ticket].error is None for ticket in tickets)


def test_freshly_loaded_model_serves_its_request_before_it_is_evicted() -> None:
    """However long another waits already, the request that loaded a model is granted when that is ready."""
    world = one_of("a", "b")
    world.script("a").load_s = 30.0
    first = world.ask("a")
    second = world.ask("b")
    world.advance(31.0)
    assert world.place(first) is Place.IN_FLIGHT
    world.end(first)
    world.advance(1.0 + LOAD_S)
    assert world.place(second) is Place.IN_FLIGHT


def test_two_waiters_for_one_victim_both_finish() -> None:
    """Two models want the place of one idle model: neither is refused, one is served after the other."""
    world = one_of("a", "b", "c")
    ready(world, "a")
    first, second = world.ask("b"), world.ask("c")
    assert world.waiting() == [first, second]
    world.advance(1.0 + LOAD_S)
    assert world.place(first) is Place.IN_FLIGHT
    world.end(first)
    world.advance(1.0 + LOAD_S)
    assert world.place(second) is Place.IN_FLIGHT


def test_busy_model_is_drained_for_who_has_waited_long_enough() -> None:
    """A busy model is asked to drain after the bound on overtaking, not before, and no request of it is cut."""
    world = one_of("a", "b")
    ready(world, "a")
    busy = world.ask("a")
    waiting = world.ask("b")
    world.advance(OVERTAKE_S - 0.1)
    assert world.state("a") is State.READY
    late = world.ask("a")
    assert world.place(late) is Place.IN_FLIGHT
    world.end(late)
    world.advance(0.1)
    assert world.state("a") is State.DRAINING
    queued = world.ask("a")
    assert world.place(queued) is Place.WAITING
    world.advance(3600.0)
    assert world.place(busy) is Place.IN_FLIGHT, "an eviction has no time limit"
    world.end(busy)
    world.advance(1.0 + LOAD_S)
    assert world.place(waiting) is Place.IN_FLIGHT
    world.settle()
    assert world.tickets[queued].granted_at is not None


def stream(world: World, model: str, *, seconds: float) -> None:
    """Keep a model busy: each request ends only after the next has arrived, and none gives up."""
    for _ in range(int(seconds / 0.5)):
        world.advance(0.5)
        newest = world.ask(model)
        world.end(*[ticket for ticket in world.in_flight(model) if ticket != newest])


@pytest.mark.parametrize(("stream_priority", "load_s"), [(0, 2.0), (10, 2.0), (0, 30.0), (10, 30.0)])
def test_stream_of_requests_does_not_starve_another_model(stream_priority: int, load_s: float) -> None:
    """One place, a stream of requests for the model in it: another model's request is served all the same.

    Also when the stream's model is more important, and when the other had waited through the whole of its load:
    neither may the stream's model take back the place that it has just made free.
    """
    world = world_of([spec("a", priority=stream_priority), spec("b")], max_instances=1)
    world.script("a").load_s = load_s
    world.ask("a")
    world.advance(0.5)
    waiting = world.ask("b")
    stream(world, "a", seconds=load_s + 20.0)
    assert world.tickets[waiting].granted_at is not None
    assert world.started()[:2] == ["a", "b"]


def test_busy_model_serves_older_waiters_before_it_drains() -> None:
    """A model with a queue that is older than the other's wait is not drained for it: it would have to come back."""
    world = one_of("a", "b")
    older = [world.ask("a") for _ in range(4)]
    world.advance(0.1)
    waiting = world.ask("b")
    world.advance(60.0)
    assert world.in_flight() == older[:2]
    assert world.state("a") is State.READY
    world.end(older[0])
    world.end(older[1])
    assert world.in_flight() == older[2:]
    assert world.state("a") is State.DRAINING
    world.end(*older[2:])
    world.advance(1.0 + LOAD_S)
    assert world.place(waiting) is Place.IN_FLIGHT
    assert world.started() == ["a", "b"]


def test_draining_model_is_recalled_when_its_room_is_not_needed() -> None:
    """The waiter for whom a busy model was drained leaves: the model serves on, its own waiters first."""
    world = one_of("a", "b")
    ready(world, "a")
    world.ask("a")
    waiting = world.ask("b")
    world.advance(OVERTAKE_S)
    queued = world.ask("a")
    assert world.state("a") is State.DRAINING
    world.end(waiting)
    assert world.state("a") is State.READY
    assert world.place(queued) is Place.IN_FLIGHT
    assert world.view("a").stop_cause is None


def test_unload_of_the_waiting_model_recalls_the_draining_one() -> None:
    """An operator's unload of a model that only waits takes its claim to the room away."""
    world = one_of("a", "b")
    ready(world, "a")
    world.ask("a")
    world.ask("b")
    world.advance(OVERTAKE_S)
    assert world.is_done(world.unload("b"))
    assert world.state("a") is State.READY


def test_model_that_falls_idle_goes_instead_of_a_draining_one() -> None:
    """A busy model drains for another; a third falls idle first: that one goes, and the busy one serves on."""
    world = world_of([spec("a"), spec("b", priority=1), spec("c")], max_instances=2)
    ready(world, "a")
    ready(world, "b")
    world.ask("a")
    short = world.ask("b")
    waiting = world.ask("c")
    world.advance(OVERTAKE_S)
    assert (world.state("a"), world.state("b")) == (State.DRAINING, State.READY)
    world.end(short)
    assert (world.state("a"), world.state("b")) == (State.READY, State.STOPPING)
    world.advance(1.0 + LOAD_S)
    assert world.place(waiting) is Place.IN_FLIGHT


def test_pinned_model_is_never_evicted() -> None:
    """The pinned model stays though it is idle and the least recently used; the other goes."""
    world = world_of([spec("a", is_pinned=True), spec("b"), spec("c")], max_instances=2)
    ready(world, "a")
    world.advance(10.0)
    ready(world, "b")
    world.ask("c")
    assert (world.state("a"), world.state("b")) == (State.READY, State.STOPPING)


def test_all_places_pinned_is_a_refusal() -> None:
    """Where every place is held by a pinned model, waiting would never help: it is said at once."""
    world = world_of([spec("a", is_pinned=True), spec("b")], max_instances=1)
    ready(world, "a")
    error = world.error(world.ask("b"))
    assert isinstance(error, UnavailableError)
    assert error.message == "cannot load 'b': the 1 models that may run at once are all pinned"
    assert error.hint is not None


def test_place_of_a_pinned_model_that_leaves_is_waited_for() -> None:
    """A pinned model that is being unloaded does not count as staying."""
    world = world_of([spec("a", is_pinned=True), spec("b")], max_instances=1)
    ready(world, "a")
    world.unload("a")
    ticket = world.ask("b")
    world.advance(1.0 + LOAD_S)
    assert world.place(ticket) is Place.IN_FLIGHT


def test_lower_max_instances_takes_effect_with_the_next_wish() -> None:
    """A reload that lowers the limit stops nobody by itself; whoever comes next waits until the number is right."""
    world = world_of([spec(model) for model in "abc"], max_instances=2)
    ready(world, "a")
    ready(world, "b")
    world.use(*world.specs.values(), max_instances=1)
    assert world.stops == []
    ticket = world.ask("c")
    world.advance(2.0 + LOAD_S)
    assert world.place(ticket) is Place.IN_FLIGHT
    assert world.alive.keys() == {"c"}


def test_higher_max_instances_takes_effect_at_once() -> None:
    """A reload that raises the limit starts whoever waited for room."""
    world = one_of("a", "b")
    world.ask("a")
    world.ask("b")
    world.use(*world.specs.values(), max_instances=2)
    assert world.started() == ["a", "b"]


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


# Idle unload


def test_idle_model_is_unloaded() -> None:
    """A model is unloaded when its idle time-out has passed since the end of its last request."""
    world = ready(world_of([spec("a", idle_timeout_s=60.0)]), "a")
    world.advance(40.0)
    ticket = world.ask("a")
    world.advance(5.0)
    world.end(ticket)
    world.advance(59.9)
    assert world.state("a") is State.READY
    world.advance(0.1)
    assert world.view("a").stop_cause is StopCause.IDLE
    world.advance(1.0)
    assert world.state("a") is State.STOPPED


def test_idle_unload_never_hits_a_request_in_flight() -> None:
    """A request that lasts longer than the idle time-out is not cut, and the time counts anew from its end."""
    world = world_of([spec("a", idle_timeout_s=60.0)])
    ticket = world.ask("a")
    world.advance(1000.0)
    assert world.place(ticket) is Place.IN_FLIGHT
    world.end(ticket)
    world.advance(59.9)
    assert world.state("a") is State.READY
    world.advance(0.2)
    assert world.state("a") is State.STOPPING


@pytest.mark.parametrize("changes", [{"idle_timeout_s": 0.0}, {"is_pinned": True, "idle_timeout_s": 1.0}])
def test_idle_unload_can_be_switched_off(changes: dict[str, object]) -> None:
    """A time-out of 0 and a pin both mean never."""
    world = ready(world_of([spec("a", **changes)]), "a")
    world.advance(1e6)
    assert world.state("a") is State.READY


def test_model_whose_only_client_left_before_it_was_ready_is_unloaded() -> None:
    """A model that nobody has used counts its idle time from when it became ready."""
    world = world_of([spec("a", idle_timeout_s=60.0)])
    world.end(world.ask("a"))
    world.advance(LOAD_S)
    assert world.state("a") is State.READY
    world.advance(61.0)
    assert world.state("a") is State.STOPPED


def test_new_idle_timeout_holds_for_running_models() -> None:
    """A reload that changes the daemon's default counts for what is loaded already, both ways."""
    world = ready(world_of([spec("a", idle_timeout_s=0.0)]), "a")
    world.advance(100.0)
    world.use(spec("a", idle_timeout_s=60.0))
    world.advance(1.0)
    world.use(spec("a", idle_timeout_s=0.0))
    world.advance(1000.0)
    assert world.state("a") is State.READY
    world.use(spec("a", idle_timeout_s=60.0))
    world.advance(60.0)
    assert world.state("a") is State.STOPPING


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


# Operators


def test_manual_unload_answers_the_waiters_of_its_model_only() -> None:
    """Unload refuses who waits for this model, and leaves the queue of every other model alone."""
    world = world_of([spec("a"), spec("b")])
    refused, kept = world.ask("a"), world.ask("b")
    unload = world.unload("a")
    assert isinstance(world.error(refused), ShuttingDownError)
    assert world.place(unload) is Place.WAITING
    world.advance(LOAD_S)
    assert world.is_done(unload)
    assert world.place(kept) is Place.IN_FLIGHT
    assert world.state("a") is State.STOPPED


def test_manual_unload_answers_who_waits_for_a_stop_to_end() -> None:
    """An unload that comes while the model stops anyway still answers the waiters, and starts nothing again."""
    world = one_of("a", "b")
    ready(world, "a")
    world.end(world.ask("b"))
    refused = world.ask("a")
    unload = world.unload("a")
    assert isinstance(world.error(refused), ShuttingDownError)
    world.advance(10.0)
    assert world.is_done(unload)
    assert world.started() == ["a"]


def test_unload_waits_for_requests_in_flight() -> None:
    """A plain unload lets what is in flight end, then stops; who asks meanwhile gets a fresh start."""
    world = world_of([spec("a")])
    ticket = world.ask("a")
    world.advance(LOAD_S)
    unload = world.unload("a")
    assert world.state("a") is State.DRAINING
    later = world.ask("a")
    world.end(ticket)
    assert world.stops == [StopUnit("a", world.starts[0].run)]
    world.advance(1.0 + LOAD_S)
    assert world.is_done(unload)
    assert world.place(later) is Place.IN_FLIGHT


def test_drain_for_an_unload_has_a_deadline() -> None:
    """A request that does not end cannot hold an unload up for longer than drain_timeout."""
    world = world_of([spec("a", drain_timeout_s=60.0)])
    world.ask("a")
    world.advance(LOAD_S)
    unload = world.unload("a")
    world.advance(59.0)
    assert world.state("a") is State.DRAINING
    world.advance(2.0)
    assert world.is_done(unload)


def test_unload_gives_a_drain_for_an_eviction_its_deadline() -> None:
    """A model that drains for another without a limit gets one when an operator wants it gone."""
    world = one_of("a", "b")
    ready(world, "a")
    world.ask("a")
    waiting = world.ask("b")
    world.advance(1000.0)
    assert world.state("a") is State.DRAINING
    world.unload("a")
    world.advance(61.0 + LOAD_S)
    assert world.place(waiting) is Place.IN_FLIGHT


def test_forced_unload_does_not_wait() -> None:
    """A forced unload stops at once; the end of the requests that it cut disturbs nobody."""
    world = world_of([spec("a")])
    tickets = [world.ask("a"), world.ask("a")]
    world.advance(LOAD_S)
    unload = world.unload("a", is_forced=True)
    assert world.stops == [StopUnit("a", world.starts[0].run, is_forced=True)]
    world.advance(1.0)
    assert world.is_done(unload)
    again = world.ask("a")
    world.advance(LOAD_S)
    world.end(*tickets)
    assert world.view("a").in_flight == 1
    assert world.in_flight() == [again]


def test_several_models_stop_in_parallel() -> None:
    """Unloads do not queue behind each other."""
    world = world_of([spec(model) for model in "abc"])
    for model in "abc":
        ready(world, model)
    unloads = [world.unload(model) for model in "abc"]
    assert len(world.stops) == 3
    world.advance(1.0)
    assert all(world.is_done(unload) for unload in unloads)


def test_every_unload_is_answered() -> None:
    """Unloading what is stopped is done at once; two who unload the same model are both answered at its end."""
    world = world_of([spec("a")])
    assert world.is_done(world.unload("a"))
    ready(world, "a")
    unloads = [world.unload("a"), world.unload("a", is_forced=True)]
    world.advance(1.0)
    assert all(world.is_done(unload) for unload in unloads)
    assert len(world.stops) == 1


# Failures


def test_failed_model_backs_off() -> None:
    """After a failed start requests are refused with the reason and the time to wait, then tried again."""
    world = world_of([spec("a")])
    world.script("a").failure = OOM
    world.ask("a")
    world.advance(LOAD_S)
    error = world.error(world.ask("a"))
    assert isinstance(error, BackingOffError)
    assert error.message == "'a' is not started again for 2 s: the GPU's memory is too small for it"
    assert error.hint == "lower n_gpu_layers"
    assert error.retry_after_s == 2
    assert world.view("a").retry_at == world.now + BACK_OFF_S[0]
    world.advance(error.details["retry_after_s"])
    world.ask("a")
    assert world.started() == ["a", "a"]


def test_back_off_grows() -> None:
    """Each failure in a row waits longer, up to the last step of the table."""
    world = world_of([spec("a")])
    world.script("a").failure = OOM
    waits = []
    for _ in range(len(BACK_OFF_S) + 2):
        world.ask("a")
        world.advance(LOAD_S)
        waits.append(world.view("a").retry_at - world.now)
        world.advance(waits[-1])
    assert waits == [*BACK_OFF_S, BACK_OFF_S[-1], BACK_OFF_S[-1]]


def test_manual_load_tries_at_once() -> None:
    """An operator's load does not wait for the end of the back-off, and requests may join it."""
    world = world_of([spec("a")])
    world.script("a").failure = OOM
    world.ask("a")
    world.advance(LOAD_S)
    world.script("a").failure = None
    load = world.load("a")
    joined = world.ask("a")
    world.advance(LOAD_S)
    assert world.is_done(load)
    assert world.place(joined) is Place.IN_FLIGHT


@pytest.mark.parametrize("when", ["failed", "loading"])
def test_changed_recipe_clears_the_back_off(when: str) -> None:
    """The back-off belongs to the recipe that failed; also when it was mended while that still loaded."""
    world = world_of([spec("a")])
    world.script("a").failure = OOM
    world.ask("a")
    if when == "failed":
        world.advance(LOAD_S)
    world.use(spec("a", recipe_hash="2"))
    world.advance(LOAD_S)
    world.script("a").failure = None
    ticket = world.ask("a")
    world.advance(LOAD_S)
    assert world.place(ticket) is Place.IN_FLIGHT
    assert world.view("a").failures == 0


def test_same_recipe_keeps_the_back_off() -> None:
    """A reload that changes nothing about the model does not make it start again."""
    world = world_of([spec("a"), spec("b")])
    world.script("a").failure = OOM
    world.ask("a")
    world.advance(LOAD_S)
    world.use(spec("a"), spec("b", recipe_hash="2"))
    assert isinstance(world.error(world.ask("a")), BackingOffError)


def test_unload_resets_a_failed_model() -> None:
    """Unloading a failed model forgets its failures: the next request may try."""
    world = world_of([spec("a")])
    world.script("a").failure = OOM
    world.ask("a")
    world.advance(LOAD_S)
    assert world.is_done(world.unload("a"))
    assert world.state("a") is State.STOPPED
    world.ask("a")
    assert world.started() == ["a", "a"]


def test_failed_load_frees_its_place() -> None:
    """A model that fails holds no room: the next one starts at once."""
    world = one_of("a", "b")
    world.script("a").failure = OOM
    world.ask("a")
    ticket = world.ask("b")
    world.advance(LOAD_S)
    assert world.started() == ["a", "b"]
    world.advance(LOAD_S)
    assert world.place(ticket) is Place.IN_FLIGHT


def test_failed_model_does_not_evict_again_while_it_backs_off() -> None:
    """A broken recipe throws a healthy model out once, not with each request that still asks for it."""
    world = one_of("a", "b")
    world.script("b").failure = OOM
    ready(world, "a")
    world.ask("b")
    world.advance(1.0 + LOAD_S)
    ready(world, "a")
    world.script("b").failure = OOM
    world.ask("b")
    world.advance(1.0 + LOAD_S)
    world.load("a")
    world.advance(LOAD_S)
    for _ in range(10):
        assert isinstance(world.error(world.ask("b")), BackingOffError)
    assert world.state("a") is State.READY


def test_second_end_of_a_run_is_not_a_second_failure() -> None:
    """An end that is told twice counts once."""
    world = world_of([spec("a")])
    world.ask("a")
    run = world.starts[0].run
    for _ in range(2):
        world.feed(UnitFailed(world.now, "a", run, OOM))
    assert world.view("a").failures == 1


# Crashes


def test_crash_restarts_for_its_waiters() -> None:
    """A ready model crashes for the first time: who only waited gets a fresh start instead of an error."""
    world = world_of([spec("a", concurrency_limit=1)])
    served, waiting = world.ask("a"), world.ask("a")
    world.advance(LOAD_S)
    world.crash("a")
    assert world.started() == ["a", "a"]
    world.advance(LOAD_S)
    assert world.tickets[waiting].run == world.starts[1].run
    world.end(served)
    assert world.view("a").in_flight == 1


def test_crash_loop_answers_its_waiters() -> None:
    """A model that crashes again soon after is not restarted: the waiters are told, and the back-off holds."""
    world = world_of([spec("a", concurrency_limit=1)])
    for _ in range(3):
        world.ask("a")
    world.advance(LOAD_S)
    world.crash("a")
    world.advance(LOAD_S)
    waiting = world.waiting()[0]
    world.crash("a")
    error = world.error(waiting)
    assert isinstance(error, UpstreamCrashedError)
    assert error.message == "'a' ended: llama-server crashed (signal 11)"
    assert world.started() == ["a", "a"]
    assert isinstance(world.error(world.ask("a")), BackingOffError)


def test_long_service_clears_the_count_of_failures() -> None:
    """Crashes that are far apart are each a first one."""
    world = world_of([spec("a", concurrency_limit=1)])
    for _ in range(4):
        world.ask("a")
    for _ in range(3):
        world.advance(LOAD_S + STABLE_S + 1.0)
        world.crash("a")
    assert len(world.starts) == 4


def test_crash_without_waiters_starts_nothing() -> None:
    """Nobody waits: the model is failed, and stays so until it is asked for."""
    world = ready(world_of([spec("a")]), "a")
    world.crash("a")
    assert world.state("a") is State.FAILED
    world.advance(1000.0)
    assert world.started() == ["a"]


def test_requests_of_an_old_run_do_not_disturb_the_new_one() -> None:
    """Exchanges that a crash cut end late: they free no slot of the new run and hold none."""
    world = world_of([spec("a")])
    old = [world.ask("a"), world.ask("a")]
    world.ask("a")
    world.advance(LOAD_S)
    world.crash("a")
    world.advance(LOAD_S)
    new = world.ask("a")
    assert world.view("a").in_flight == 2
    world.end(*old)
    assert world.view("a").in_flight == 2
    assert isinstance(new, int)
    assert world.place(world.ask("a")) is Place.WAITING


def test_crash_while_draining() -> None:
    """A model that dies while it drains is gone: an unload is answered, an eviction has its room."""
    world = world_of([spec("a"), spec("b")], max_instances=1)
    ready(world, "a")
    world.ask("a")
    unload = world.unload("a")
    world.crash("a")
    assert world.is_done(unload)
    assert world.state("a") is State.STOPPED
    ready(world, "a")
    world.ask("a")
    ticket = world.ask("b")
    world.advance(OVERTAKE_S)
    world.crash("a")
    world.advance(LOAD_S)
    assert world.place(ticket) is Place.IN_FLIGHT


# Stalls


def test_stalled_load_is_ended() -> None:
    """A load without progress for the stall time-out is killed; its waiters are told at once, and it backs off."""
    world = world_of([spec("a", stall_timeout_s=120.0)])
    world.script("a").load_s = None
    ticket = world.ask("a")
    world.advance(1.0 + 119.0)
    assert world.place(ticket) is Place.WAITING, "the start of the unit was progress"
    world.advance(1.0)
    error = world.error(ticket)
    assert isinstance(error, LoadStalledError)
    assert error.message == "'a' showed no progress for 120 s while loading"
    assert world.stops[0].is_forced
    joined = world.ask("a")
    world.advance(1.0)
    assert isinstance(world.error(joined), LoadStalledError)
    assert world.state("a") is State.FAILED
    assert world.view("a").retry_at > world.now


def test_stall_is_measured_by_progress() -> None:
    """A slow load that moves lives on; only the time since the last move counts."""
    world = world_of([spec("a", stall_timeout_s=120.0)])
    world.script("a").load_s = None
    world.ask("a")
    for step in range(20):
        world.advance(100.0)
        world.progress("a", step / 20)
    assert world.state("a") is State.LOADING
    assert world.view("a").progress == 19 / 20
    world.advance(119.0)
    assert world.state("a") is State.LOADING
    world.advance(1.0)
    assert world.state("a") is State.STOPPING


def test_ready_model_does_not_stall() -> None:
    """Once ready, no progress is expected, and none is shown."""
    world = ready(world_of([spec("a", idle_timeout_s=0.0)]), "a")
    world.progress("a", 0.9)
    assert world.view("a").progress is None
    world.advance(1000.0)
    assert world.state("a") is State.READY


# Recipes


def test_changed_recipe_replaces_an_idle_model() -> None:
    """An idle model with a new recipe is stopped at once; the next request starts it anew."""
    world = ready(world_of([spec("a")]), "a")
    world.use(spec("a", recipe_hash="2"))
    assert world.view("a").stop_cause is StopCause.RECIPE
    world.advance(1.0)
    assert world.state("a") is State.STOPPED
    assert not world.view("a").is_stale


def test_changed_recipe_waits_for_requests_in_flight() -> None:
    """A busy model serves on with the old recipe, and is replaced when it falls idle."""
    world = world_of([spec("a")])
    ticket = world.ask("a")
    world.advance(LOAD_S)
    world.use(spec("a", recipe_hash="2"))
    assert (world.state("a"), world.view("a").is_stale) == (State.READY, True)
    world.end(ticket)
    assert world.view("a").stop_cause is StopCause.RECIPE


def test_recipe_changed_while_loading_serves_its_waiters_first() -> None:
    """A load that is overtaken by a new recipe still serves who waits for it, then it is replaced."""
    world = world_of([spec("a")])
    ticket = world.ask("a")
    world.use(spec("a", recipe_hash="2"))
    world.advance(LOAD_S)
    assert world.place(ticket) is Place.IN_FLIGHT
    world.end(ticket)
    assert world.view("a").stop_cause is StopCause.RECIPE
    abandoned = world_of([spec("a")])
    abandoned.end(abandoned.ask("a"))
    abandoned.use(spec("a", recipe_hash="2"))
    abandoned.advance(LOAD_S)
    assert abandoned.view("a").stop_cause is StopCause.RECIPE


@pytest.mark.parametrize("busy", [False, True])
def test_removed_recipe_stops_its_model(busy: bool) -> None:
    """A removed model drains within its deadline, is stopped, and is forgotten."""
    world = world_of([spec("a")])
    ticket = world.ask("a")
    world.advance(LOAD_S)
    if not busy:
        world.end(ticket)
    world.use()
    assert isinstance(world.error(world.ask("a")), ModelNotFoundError)
    world.advance(62.0)
    assert world.scheduler.view("a") is None
    world.end(ticket)
    assert world.alive == {}


@pytest.mark.parametrize("elapsed_s", [0.5, 1.5])
def test_removed_recipe_answers_its_waiters(elapsed_s: float) -> None:
    """Who waits for a model that starts or loads is told that the recipe is gone, and the unit is stopped."""
    world = world_of([spec("a")])
    ticket = world.ask("a")
    world.advance(elapsed_s)
    world.use()
    assert isinstance(world.error(ticket), ModelNotFoundError)
    world.advance(1.0)
    assert world.scheduler.view("a") is None


def test_removed_recipe_of_a_stalled_load_leaves_nothing_behind() -> None:
    """A model that is removed while a stalled load of it is killed is forgotten like any other."""
    world = world_of([spec("a")])
    world.script("a").load_s = None
    world.ask("a")
    world.advance(121.0)
    assert world.state("a") is State.STOPPING
    world.use()
    world.advance(1.0)
    assert world.scheduler.view("a") is None


def test_recipe_that_comes_back_is_served() -> None:
    """A recipe that is removed and put back while its model drains gets a fresh start."""
    world = world_of([spec("a")])
    ticket = world.ask("a")
    world.advance(LOAD_S)
    world.use()
    world.use(spec("a"))
    again = world.ask("a")
    world.end(ticket)
    world.advance(1.0 + LOAD_S)
    assert world.tickets[again].run == world.starts[1].run


def test_runs_are_never_reused() -> None:
    """A model that is removed and comes back continues the count, so late events cannot be mistaken."""
    world = ready(world_of([spec("a")]), "a")
    world.use()
    world.advance(1.0)
    world.use(spec("a"))
    world.ask("a")
    assert [start.run for start in world.starts] == [1, 2]


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


# Shutdown


def test_shutdown_answers_every_waiter_and_ends_quiet() -> None:
    """Every waiter is told, every model is stopped, whatever state it is in, and nothing starts any more."""
    world = world_of([spec(model, drain_timeout_s=30.0) for model in "abcd"], max_instances=3)
    ready(world, "a")
    busy = world.ask("b")
    world.advance(LOAD_S)
    loading = [world.ask("c"), world.load("c")]
    queued = world.ask("d")
    world.script("a").stop_s = 5.0
    assert world.state("a") is State.STOPPING, "it makes room for d"
    world.shut_down()
    for ticket in [*loading, queued, world.ask("a")]:
        assert isinstance(world.error(ticket), ShuttingDownError)
    assert world.place(busy) is Place.IN_FLIGHT
    world.advance(29.0)
    assert not world.scheduler.is_quiet()
    world.advance(2.0)
    assert world.scheduler.is_quiet()
    assert world.alive == {}
    assert world.started() == ["a", "b", "c"]


def test_shutdown_answers_unloads_too() -> None:
    """Who waits for an unload is answered when the process is gone, shutdown or not."""
    world = world_of([spec("a")])
    world.ask("a")
    world.advance(LOAD_S)
    unload = world.unload("a")
    world.shut_down()
    world.advance(61.0)
    assert world.is_done(unload)
    assert world.scheduler.is_quiet()


def test_shutdown_limits_a_drain_for_an_eviction() -> None:
    """A model that drains without a limit for another gets one when the daemon stops."""
    world = one_of("a", "b")
    ready(world, "a")
    world.ask("a")
    world.ask("b")
    world.advance(OVERTAKE_S)
    world.shut_down()
    world.advance(61.0)
    assert world.scheduler.is_quiet()


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


def test_waiting_for_room_sets_few_timers() -> None:
    """A stream of requests that overtake a waiter does not set a timer each."""
    world = one_of("a", "b")
    ready(world, "a")
    held = world.ask("a")
    world.ask("b")
    for _ in range(50):
        world.end(world.ask("a"))
    world.end(world.ask("b"))
    timers = [event for _, _, event in world._due if isinstance(event, TimerFired) and event.timer is Timer.OVERTAKE]  # noqa: SLF001
    assert len(timers) == 1
    assert world.place(held) is Place.IN_FLIGHT
