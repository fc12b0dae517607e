"""The scheduler, one fact a test: unloads, failures, crashes, stalls, changed recipes and the shutdown."""

import pytest

from llmstudiod.core.errors import (
    BackingOffError,
    LoadStalledError,
    ModelNotFoundError,
    ShuttingDownError,
    UpstreamCrashedError,
)
from llmstudiod.core.events import (
    SetTimer,
    ShutdownAsked,
    SpecsChanged,
    StopUnit,
    UnitFailed,
    UnitFound,
)
from llmstudiod.core.lifecycle import State, StopCause
from llmstudiod.core.retry import BACK_OFF_S, STABLE_S
from llmstudiod.core.scheduler import OVERTAKE_S
from tests.unit.scheduler_world import EXITED, LOAD_S, OOM, Place, one_of, ready, spec, world_of

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
    world = world_of([spec("a", restart_limit=0)])
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


def test_stop_by_hand_is_no_failure() -> None:
    """`systemctl stop` of the unit or the slice: stopped, no pause, and who waits gets a fresh start."""
    world = ready(world_of([spec("a", concurrency_limit=1)]), "a")
    world.advance(5.0)
    world.crash("a", EXITED)
    assert (world.state("a"), world.view("a").failure) == (State.STOPPED, None)
    assert world.view("a").story[-1].cause == "stopped by hand"
    world.ask("a")
    waiting = world.ask("a")
    world.advance(LOAD_S + 5.0)
    world.crash("a", EXITED)
    world.advance(LOAD_S)
    assert world.tickets[waiting].run == world.starts[2].run


def test_server_that_ends_as_soon_as_it_is_ready_has_failed() -> None:
    """Nobody stopped it: it would be started for ever."""
    world = ready(world_of([spec("a")]), "a")
    world.crash("a", EXITED)
    assert world.state("a") is State.FAILED


def test_requests_of_an_old_run_do_not_disturb_the_new_one() -> None:
    """Exchanges that a crash cut end late: they free no slot of the new run and hold none."""
    world = world_of([spec("a")])
    old = [world.ask("a"), world.ask("a")]
    world.ask("a")
    world.advance(LOAD_S)
    world.crash("a")
    world.advance(LOAD_S)
    world.ask("a")
    assert world.view("a").in_flight == 2
    world.end(*old)
    assert world.view("a").in_flight == 2
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


def test_reload_sets_no_second_idle_timer() -> None:
    """The timer that runs is the right one; each reload would add another for ever. A new time-out needs one."""
    world = ready(world_of([spec("a", idle_timeout_s=60.0)]), "a")
    scheduler = world.scheduler
    assert scheduler.handle(SpecsChanged(world.now, {"a": spec("a", idle_timeout_s=60.0)})) == []
    timers = scheduler.handle(SpecsChanged(world.now, {"a": spec("a", idle_timeout_s=30.0)}))
    assert [type(action) for action in timers] == [SetTimer]


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
    """A recipe that is removed and put back while its model drains: it serves on, and nobody is cut off."""
    world = world_of([spec("a")])
    ticket = world.ask("a")
    world.advance(LOAD_S)
    world.use()
    assert world.state("a") is State.DRAINING
    world.use(spec("a"))
    again = world.ask("a")
    assert world.tickets[again].run == world.starts[0].run
    world.advance(1000.0)
    assert world.place(ticket) is Place.IN_FLIGHT


def test_another_recipe_that_comes_back_waits_for_requests_in_flight() -> None:
    """Removed, and put back with a change: as if it had only been changed."""
    world = world_of([spec("a")])
    ticket = world.ask("a")
    world.advance(LOAD_S)
    world.use()
    world.use(spec("a", recipe_hash="2"))
    assert (world.state("a"), world.view("a").is_stale) == (State.READY, True)
    world.end(ticket)
    assert world.view("a").stop_cause is StopCause.RECIPE


def test_drain_has_all_of_its_time_after_another_one_was_called_off() -> None:
    """The deadline of the first removal is none of the second."""
    world = world_of([spec("a", drain_timeout_s=60.0)])
    ticket = world.ask("a")
    world.advance(LOAD_S)
    world.use()
    world.use(spec("a", drain_timeout_s=60.0))
    world.advance(30.0)
    world.use()
    world.advance(50.0)
    assert (world.state("a"), world.place(ticket)) == (State.DRAINING, Place.IN_FLIGHT)
    world.advance(12.0)
    assert world.scheduler.view("a") is None
    world.end(ticket)


def test_recipe_that_is_changed_back_replaces_nothing() -> None:
    """What runs is what is to run, so it need not go when it falls idle."""
    world = world_of([spec("a")])
    ticket = world.ask("a")
    world.advance(LOAD_S)
    world.use(spec("a", recipe_hash="2"))
    world.use(spec("a"))
    assert not world.view("a").is_stale
    world.end(ticket)
    assert world.state("a") is State.READY


def test_unit_of_an_earlier_daemon_serves_on() -> None:
    """Who asks for the model waits until it is known to be ready, and nothing is started."""
    world = world_of([spec("a")])
    world.find("a")
    ticket = world.ask("a")
    assert world.place(ticket) is Place.WAITING
    world.advance(LOAD_S)
    assert world.place(ticket) is Place.IN_FLIGHT
    assert world.starts == []
    assert world.view("a").is_stale is False


def test_unit_of_an_earlier_recipe_is_replaced_when_idle() -> None:
    """It serves who is there already; the next who asks gets the recipe in force."""
    world = world_of([spec("a")])
    world.find("a", recipe_hash="sha256:old")
    ticket = world.ask("a")
    world.advance(LOAD_S)
    assert world.place(ticket) is Place.IN_FLIGHT
    world.end(ticket)
    assert world.view("a").state is State.STOPPING
    world.advance(10)
    other = world.ask("a")
    world.advance(10)
    assert world.place(other) is Place.IN_FLIGHT
    assert len(world.starts) == 1


def test_unit_without_a_recipe_is_not_taken_over() -> None:
    """Nor is one of a model that runs."""
    world = ready(world_of([spec("a")]), "a")
    run = world.view("a").run
    world.feed(UnitFound(world.now, "b", "sha256:0"))
    world.find("a")
    assert world.view("a").run == run


def test_leaving_keeps_the_units() -> None:
    """Waiters are answered, nothing is stopped."""
    world = ready(world_of([spec("a"), spec("b")]), "a")
    waiting = world.ask("b")
    world.feed(ShutdownAsked(world.now, leaves_units=True))
    assert isinstance(world.tickets[waiting].error, ShuttingDownError)
    assert world.stops == []


def test_runs_are_never_reused() -> None:
    """A model that is removed and comes back continues the count, so late events cannot be mistaken."""
    world = ready(world_of([spec("a")]), "a")
    world.use()
    world.advance(1.0)
    world.use(spec("a"))
    world.ask("a")
    assert [start.run for start in world.starts] == [1, 2]


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


def test_load_that_is_given_up_before_its_start_is_told() -> None:
    """Nothing was started, so no transition tells of it."""
    world = world_of([spec("a"), spec("b", is_pinned=True)], max_instances=1)
    world.ask("b")
    world.settle()
    world.script("a").vet_s = 5.0
    for give_up, cause in ((world.cancel, StopCause.CANCELLED), (world.unload, StopCause.UNLOAD)):
        number = world.load("a")
        world.shown_anew.clear()
        give_up("a")
        assert world.error(number).kind == "shutting_down"
        assert (world.view("a").stop_cause, world.shown_anew) == (cause, ["a"])
