"""The scheduler, one fact a test: who makes room for whom, when, and who is unloaded because nobody uses it."""

import pytest

from llmstudiod.core.errors import (
    UnavailableError,
)
from llmstudiod.core.events import (
    Timer,
)
from llmstudiod.core.lifecycle import State, StopCause
from llmstudiod.core.scheduler import OVERTAKE_S
from tests.unit.scheduler_world import LOAD_S, OOM, Place, World, one_of, ready, spec, world_of

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


def test_check_of_a_plan_is_shown_as_part_of_the_load() -> None:
    """Whoever waits meanwhile hears that the model is being loaded, not that it waits for others."""
    world = world_of([spec("a"), spec("b")], max_instances=1)
    ready(world, "a")
    world.script("b").vet_s = 1.0
    world.ask("b")
    assert world.view("b").is_being_vetted
    world.advance(1.0)
    assert not world.view("b").is_being_vetted


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
    assert error.message == "cannot load 'b': max_instances is 1, and all that run are pinned"
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


def test_waiting_for_room_sets_few_timers() -> None:
    """A stream of requests that overtake a waiter does not set a timer each."""
    world = one_of("a", "b")
    ready(world, "a")
    held = world.ask("a")
    world.ask("b")
    for _ in range(50):
        world.end(world.ask("a"))
    world.end(world.ask("b"))
    assert world.timers(Timer.OVERTAKE) == 1
    assert world.place(held) is Place.IN_FLIGHT


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


def test_recipe_that_cannot_start_evicts_nobody() -> None:
    """File, flags and binary are checked before anybody has to go; then the model backs off as after a failed load."""
    world = ready(one_of("a", "b"), "a")
    world.script("b").vet_failure = OOM
    refused = world.ask("b")
    assert "the GPU's memory is too small" in world.error(refused).message
    assert world.state("a") is State.READY
    assert world.state("b") is State.FAILED
    assert world.error(world.ask("b")).kind == "backing_off"
    assert world.stops == []


def test_nobody_goes_while_the_check_lasts() -> None:
    """An answer that is still to come may be a bad one."""
    world = ready(one_of("a", "b"), "a")
    world.script("b").vet_s = 5.0
    waiting = world.ask("b")
    world.advance(4.9)
    assert world.state("a") is State.READY
    world.advance(0.2 + 1.0 + LOAD_S)
    assert world.place(waiting) is Place.IN_FLIGHT


def test_check_of_an_older_recipe_does_not_count() -> None:
    """A recipe that changes while it is checked is checked again."""
    world = ready(one_of("a", "b"), "a")
    world.script("b").vet_s, world.script("b").vet_failure = 5.0, OOM
    waiting = world.ask("b")
    world.advance(1.0)
    world.script("b").vet_s, world.script("b").vet_failure = 0.0, None
    world.use(spec("a"), spec("b", recipe_hash="2"))
    world.advance(5.0 + 1.0 + LOAD_S)
    assert world.place(waiting) is Place.IN_FLIGHT


def test_place_that_falls_free_meanwhile_is_taken_at_once() -> None:
    """With a place of its own nobody has to go, so nothing needs to be checked before the start."""
    world = ready(one_of("a", "b"), "a")
    world.script("b").vet_s = 50.0
    waiting = world.ask("b")
    world.unload("a")
    world.advance(1.0 + LOAD_S)
    assert world.place(waiting) is Place.IN_FLIGHT
