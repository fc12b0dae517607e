"""What becomes of a model that failed: back-off with jitter, a budget of failures, and who clears it."""

from math import inf

import pytest

from llmstudiod.core.errors import BackingOffError, ConflictError, ModelNotFoundError, ShuttingDownError
from llmstudiod.core.events import StoriesRead, Timer, UnitFoundFailed, Warned
from llmstudiod.core.life import HUNG_GRACE_S
from llmstudiod.core.lifecycle import Instance, PastFailure, Restart, State, StopCause, Transition
from llmstudiod.core.retry import BACK_OFF_S, JITTER, STABLE_S, note_failure
from tests.unit.scheduler_world import CRASH, HUNG, LOAD_S, NO_FILE, OOM, Place, World, spec, world_of


def failing(**changes: object) -> World:
    """Return a world whose one model never loads."""
    world = world_of([spec("a", **changes)])
    world.script("a").failure = OOM
    return world


def fail_once(world: World) -> None:
    """Let a start be tried as soon as it may, and fail."""
    world.advance(max(0.0, world.view("a").retry_at - world.now))
    world.ask("a")
    world.advance(LOAD_S)
    assert world.state("a") is State.FAILED


def test_jitter_spreads_the_starts() -> None:
    """Models that failed together do not come back together."""
    waits = []
    for chance in (0.0, 0.5, 1.0):
        instance = Instance(spec("a"), since=0.0)
        note_failure(instance, 10.0, chance=chance)
        waits.append(instance.retry_at - 10.0)
    assert waits == pytest.approx([BACK_OFF_S[0], BACK_OFF_S[0] * (1 + JITTER / 2), BACK_OFF_S[0] * (1 + JITTER)])


def test_budget_leaves_it_down() -> None:
    """Three failures in ten minutes: it is left alone until the first is ten minutes ago, and that is told."""
    world = failing()
    began = world.now
    for _ in range(3):
        fail_once(world)
    shown = world.view("a")
    assert shown.is_exhausted
    assert shown.retry_at == pytest.approx(began + LOAD_S + 600)
    error = world.error(world.ask("a"))
    assert isinstance(error, BackingOffError)
    assert "failed 3 times within 10m" in error.message
    assert "llmstudioctl reset a" in (error.hint or "")
    world.advance(shown.retry_at - world.now)
    world.script("a").failure = None
    ticket = world.ask("a")
    world.advance(LOAD_S)
    assert world.place(ticket) is Place.IN_FLIGHT


def test_failures_that_are_far_apart_are_no_loop() -> None:
    """A failure an hour is not three in ten minutes."""
    world = failing()
    for _ in range(6):
        world.advance(3600)
        fail_once(world)
        assert not world.view("a").is_exhausted


def test_reset_clears_it() -> None:
    """An administrator has mended it: the next request starts it."""
    world = failing()
    for _ in range(3):
        fail_once(world)
    assert world.is_done(world.reset("a"))
    assert (world.state("a"), world.view("a").failures) == (State.STOPPED, 0)
    world.script("a").failure = None
    ticket = world.ask("a")
    world.advance(LOAD_S)
    assert world.place(ticket) is Place.IN_FLIGHT
    assert isinstance(world.error(world.reset("nobody")), ModelNotFoundError)


def test_changed_recipe_clears_it() -> None:
    """Another recipe has not failed yet."""
    world = failing()
    for _ in range(3):
        fail_once(world)
    world.use(spec("a", recipe_hash="2"))
    assert not world.view("a").is_exhausted
    assert world.place(world.ask("a")) is Place.WAITING


def test_a_minute_of_success_clears_it() -> None:
    """Who was ready for a while starts anew; who dies young does not."""
    world = world_of([spec("a")])
    for stays_s, expected in ((5.0, 1), (STABLE_S + 1, 1), (5.0, 2), (5.0, 3)):
        world.load("a")
        world.advance(LOAD_S + stays_s)
        world.crash("a")
        assert world.view("a").failures == expected
    assert world.view("a").is_exhausted


def test_always_comes_back_by_itself() -> None:
    """A model that shall always be there is started again after the back-off, without a request."""
    world = world_of([spec("a", restart=Restart.ALWAYS)])
    world.load("a")
    world.advance(LOAD_S)
    world.crash("a")
    assert world.state("a") is State.FAILED
    world.advance(BACK_OFF_S[0] * (1 + JITTER) + LOAD_S)
    assert world.state("a") is State.READY


def test_always_obeys_its_budget() -> None:
    """It is not started for ever."""
    world = failing(restart=Restart.ALWAYS)
    world.load("a")
    world.advance(500)
    assert len(world.starts) == 3


def test_on_request_waits_for_one() -> None:
    """Nobody asks, so nothing is started."""
    world = world_of([spec("a")])
    world.load("a")
    world.advance(LOAD_S)
    world.crash("a")
    world.advance(100)
    assert len(world.starts) == 1


def test_never_stays_down() -> None:
    """Whoever asks is told so; an operator's load brings it back."""
    world = world_of([spec("a", restart=Restart.NEVER)])
    world.load("a")
    world.advance(LOAD_S)
    waiting = [world.ask("a") for _ in range(3)]
    world.crash("a")
    assert isinstance(world.error(waiting[2]), Exception)
    world.advance(100_000)
    error = world.error(world.ask("a"))
    assert "restart: never" in error.message
    assert error.retry_after_s is None
    world.load("a")
    world.advance(LOAD_S)
    assert world.state("a") is State.READY


def test_no_limit() -> None:
    """restart_limit 0: the back-off is all."""
    world = failing(restart_limit=0)
    for _ in range(20):
        fail_once(world)
    assert not world.view("a").is_exhausted


def test_cancel_gives_a_load_up() -> None:
    """Whoever waits is told, the process is stopped, and it is no failure."""
    world = world_of([spec("a")])
    waiting = world.ask("a")
    world.advance(1.5)
    cancel = world.cancel("a")
    assert isinstance(world.error(waiting), ShuttingDownError)
    assert "was cancelled" in world.error(waiting).message
    world.advance(5)
    assert world.is_done(cancel)
    assert (world.state("a"), world.view("a").failures) == (State.STOPPED, 0)


def test_cancel_also_gives_a_wait_for_a_place_up() -> None:
    """A load that has not begun is given up as well."""
    world = world_of([spec("a"), spec("b")], max_instances=1)
    busy = world.ask("a")
    world.advance(LOAD_S)
    waiting = world.ask("b")
    assert world.is_done(world.cancel("b"))
    assert "was cancelled" in world.error(waiting).message
    assert world.place(busy) is Place.IN_FLIGHT


@pytest.mark.parametrize("is_ready", [True, False])
def test_there_is_nothing_to_cancel(is_ready: bool) -> None:
    """What is ready, or not wanted, is no load."""
    world = world_of([spec("a")])
    if is_ready:
        world.load("a")
        world.advance(LOAD_S)
    error = world.error(world.cancel("a"))
    assert isinstance(error, ConflictError)
    assert ("ready" if is_ready else "stopped") in error.message


def test_hung_server_is_drained_and_started_anew() -> None:
    """Nothing new goes to it, what it has is cut after a moment, and who waited gets a fresh one."""
    world = world_of([spec("a")])
    stuck = world.ask("a")
    world.advance(LOAD_S)
    assert world.place(stuck) is Place.IN_FLIGHT
    world.hang("a")
    assert world.state("a") is State.DRAINING
    waiting = world.ask("a")
    world.advance(6)
    assert world.stops[-1].is_forced
    assert world.view("a").stop_cause is not StopCause.UNLOAD
    world.advance(10)
    assert world.place(waiting) is Place.IN_FLIGHT
    shown = world.view("a")
    assert shown.last_failure is not None
    assert shown.last_failure[1].kind == "hung"
    assert shown.failures == 1


def test_failure_of_an_earlier_daemon_is_told() -> None:
    """A model that died while no daemon was there says why, and may be started at once."""
    world = world_of([spec("a")])
    world.feed(UnitFoundFailed(world.now, "a", CRASH))
    assert world.view("a").failure == CRASH
    ticket = world.ask("a")
    world.advance(LOAD_S)
    assert world.place(ticket) is Place.IN_FLIGHT


def past(world: World, *, recipe_hash: str = "1", retry_in_s: float = 500.0, n: int = 3) -> PastFailure:
    """Return what an earlier daemon wrote down of a model that it left alone."""
    failed_at = tuple(world.now - 30.0 + number for number in range(n))
    return PastFailure(OOM, recipe_hash, failures=n, failed_at=failed_at, retry_at=world.now + retry_in_s)


def next_daemon(kept: PastFailure, world: World, **changes: object) -> World:
    """Let a daemon start that finds the failed unit, and what was written down."""
    world.use(spec("a", **changes))
    world.feed(StoriesRead(world.now, {}, {"a": kept}))
    world.feed(UnitFoundFailed(world.now, "a", CRASH))
    return world


def test_budget_and_reason_outlast_the_daemon() -> None:
    """A restart of the daemon is no reason to try again, nor to know less of what was wrong."""
    world = World()
    kept = past(world)
    shown = next_daemon(kept, world).view("a")
    assert (shown.state, shown.failure, shown.failures) == (State.FAILED, OOM, 3)
    assert (shown.is_exhausted, shown.retry_at) == (True, kept.retry_at)
    assert "failed 3 times within 10m" in world.error(world.ask("a")).message
    world.advance(500)
    assert world.place(world.ask("a")) is Place.WAITING


def test_what_another_recipe_did_counts_for_nothing() -> None:
    """It was changed while no daemon ran."""
    world = World()
    shown = next_daemon(past(world, recipe_hash="0"), world).view("a")
    assert (shown.failure, shown.is_exhausted, shown.retry_at) == (CRASH, False, world.now)


def test_clock_that_was_wrong_locks_nobody_out() -> None:
    """What was written down is on the wall's clock; no wait is longer than the longest that there is."""
    world = World()
    shown = next_daemon(past(world, retry_in_s=1e9, n=1), world).view("a")
    assert shown.retry_at <= world.now + 600


def test_never_outlasts_the_daemon() -> None:
    """It stays down until an administrator wants it."""
    world = World()
    shown = next_daemon(past(world, retry_in_s=inf, n=1), world, restart=Restart.NEVER).view("a")
    assert shown.retry_at == inf


def test_always_goes_on_waiting_after_a_restart_of_the_daemon() -> None:
    """It is started again when its time has come, and not before."""
    world = World()
    next_daemon(past(world, retry_in_s=100, n=1), world, restart=Restart.ALWAYS)
    world.advance(99)
    assert world.starts == []
    world.advance(1 + LOAD_S)
    assert world.state("a") is State.READY


def test_stories_go_on() -> None:
    """What an earlier daemon wrote down stands before what has happened since."""
    world = world_of([spec("a")])
    world.load("a")
    old = Transition(1.0, State.STOPPING, State.STOPPED, "no process is left")
    world.feed(StoriesRead(world.now, {"a": (old,), "gone": (old,)}))
    story = world.view("a").story
    assert story[0] == old
    assert story[1].new is State.STARTING


# What is to be up always


def always(**changes: object) -> World:
    """Return a world whose one model is up, and is to be up always."""
    world = world_of([spec("a", restart=Restart.ALWAYS, **changes)])
    world.load("a")
    world.advance(LOAD_S)
    return world


def world_without_room() -> World:
    """Return a world in which the model serves beside a pinned one, with a place too few for it to come back."""
    world = world_of([spec("a", restart=Restart.ALWAYS), spec("b", is_pinned=True)], max_instances=2)
    world.load("a")
    world.load("b")
    world.advance(LOAD_S)
    world.use(*world.specs.values(), max_instances=1)
    return world


def is_back(world: World) -> bool:
    """Let time pass, and return whether the model is up by itself, in another run."""
    world.advance(BACK_OFF_S[0] * (1 + JITTER) + 10 + LOAD_S)
    return world.state("a") is State.READY and world.view("a").run > 1


def test_hung_server_that_ends_by_itself_comes_back() -> None:
    """It has its moment for what is in flight, and dies in it: that is no end that somebody wanted."""
    world = always()
    world.ask("a")
    world.hang("a")
    world.crash("a")
    assert (world.state("a"), world.view("a").failure) == (State.FAILED, HUNG)
    assert is_back(world)


def test_always_comes_back_after_a_reset() -> None:
    """Nobody has to ask for it."""
    world = always(restart_limit=1)
    world.crash("a")
    assert world.view("a").is_exhausted
    world.reset("a")
    assert is_back(world)


@pytest.mark.parametrize("when", ["failed", "idle", "gone and put back"])
def test_always_comes_back_with_another_recipe(when: str) -> None:
    """Its recipe is mended after it failed, or changed while nobody uses it, or removed for a moment."""
    world = always(restart_limit=1)
    if when == "failed":
        world.crash("a")
        assert world.view("a").is_exhausted
    if when == "gone and put back":
        world.use()
    world.use(spec("a", restart=Restart.ALWAYS, recipe_hash="2"))
    assert is_back(world)
    assert world.view("a").failure is None


def test_always_comes_back_after_it_failed_without_a_daemon() -> None:
    """Nobody was there to see it end."""
    world = world_of([spec("a", restart=Restart.ALWAYS)])
    world.feed(UnitFoundFailed(world.now, "a", CRASH))
    world.advance(LOAD_S)
    assert world.state("a") is State.READY


def test_always_comes_back_though_who_waited_left() -> None:
    """It crashed before their eyes, and they went while another one's place was not free yet."""
    world = world_without_room()
    in_flight, waiting = [world.ask("a"), world.ask("a")], world.ask("a")
    world.unload("b")
    world.crash("a")
    assert world.view("a").queued == 1
    world.end(*in_flight, waiting)
    assert is_back(world)


@pytest.mark.parametrize("how", ["its client leaves", "it is cancelled"])
def test_always_comes_back_though_a_load_was_given_up(how: str) -> None:
    """An operator's load waits for room while the back-off ends; then nobody wants it but its recipe."""
    world = world_without_room()
    world.script("b").stop_s = 10.0
    world.crash("a")
    world.unload("b")
    load = world.load("a")
    assert world.view("a").queued == 1
    world.advance(BACK_OFF_S[0] * (1 + JITTER))
    assert world.view("a").queued == 1
    if how == "it is cancelled":
        world.cancel("a")
    else:
        world.end(load)
    world.advance(20)
    assert world.state("a") is (State.FAILED if how == "it is cancelled" else State.READY)
    world.advance(BACK_OFF_S[-1])
    assert world.state("a") is State.READY


@pytest.mark.parametrize("before", ["it failed", "its recipe changed"])
def test_always_comes_back_once_there_is_room(before: str) -> None:
    """Others that are pinned held every place when it was to be started again; it is tried now and then."""
    world = world_without_room()
    if before == "it failed":
        world.crash("a")
    else:
        world.use(spec("a", restart=Restart.ALWAYS, recipe_hash="2"), world.specs["b"])
    world.advance(10)
    assert world.view("a").refused is not None
    for _ in range(20):
        world.ask("a")
    assert world.timers(Timer.RESTART) == 1
    world.advance(3 * BACK_OFF_S[-1])
    assert (len(world.starts), world.timers(Timer.RESTART)) == (2, 1)
    world.use(*world.specs.values(), max_instances=2)
    world.advance(BACK_OFF_S[-1] + LOAD_S)
    assert world.state("a") is State.READY


def test_unload_ends_the_tries_for_room() -> None:
    """Who was refused a place, and is unloaded then, stays down when there is one."""
    world = world_without_room()
    world.crash("a")
    world.advance(10)
    world.unload("a")
    world.use(*world.specs.values(), max_instances=2)
    world.advance(3 * BACK_OFF_S[-1])
    assert (world.state("a"), len(world.starts)) == (State.STOPPED, 2)


@pytest.mark.parametrize("before", [Restart.NEVER, Restart.ON_REQUEST])
def test_always_holds_for_what_failed_before(before: Restart) -> None:
    """Its recipe, or the default for all, says so only now."""
    world = world_of([spec("a", restart=before)])
    world.load("a")
    world.advance(LOAD_S)
    world.crash("a")
    world.use(spec("a", restart=Restart.ALWAYS))
    assert is_back(world)


def test_never_holds_for_what_failed_before() -> None:
    """Its timer is not heeded any more, and who asks is told."""
    world = always()
    world.crash("a")
    world.use(spec("a", restart=Restart.NEVER))
    world.advance(500)
    assert "restart: never" in world.error(world.ask("a")).message
    assert len(world.starts) == 1
    world.use(spec("a"))
    assert world.place(world.ask("a")) is Place.WAITING


@pytest.mark.parametrize("order", ["unloaded, then hung", "hung, then unloaded", "hung, stopped, then unloaded"])
def test_operator_is_stronger_than_always(order: str) -> None:
    """Who is unloaded stays down, though it hangs; and nobody has to wait for what hangs as for what works."""
    world = always(drain_timeout_s=300.0)
    world.ask("a")
    if order == "unloaded, then hung":
        unload = world.unload("a")
        world.hang("a")
        world.advance(HUNG_GRACE_S)
        assert world.stops[-1].is_forced
    else:
        world.hang("a")
        world.advance(HUNG_GRACE_S if "stopped" in order else 1)
        unload = world.unload("a")
    world.advance(HUNG_GRACE_S + 2)
    assert world.is_done(unload)
    world.advance(500)
    assert (world.state("a"), len(world.starts)) == (State.STOPPED, 1)


@pytest.mark.parametrize("went_for", ["its recipe", "its removal", "its socket"])
def test_operator_is_stronger_than_what_it_went_for(went_for: str) -> None:
    """It is to be up always, and stops to come back at once; who unloads it meanwhile does not want it back."""
    world = world_of([spec("a", restart=Restart.ALWAYS)])
    if went_for == "its socket":
        world.find("a")
        world.hang("a")
    else:
        world.load("a")
        world.advance(LOAD_S)
    if went_for == "its removal":
        world.use()
    if went_for != "its socket":
        world.use(spec("a", restart=Restart.ALWAYS, recipe_hash="2"))
    assert world.state("a") is State.STOPPING
    unload, n_starts = world.unload("a"), len(world.starts)
    world.advance(500)
    assert world.is_done(unload)
    assert (world.state("a"), len(world.starts)) == (State.STOPPED, n_starts)


def test_removed_model_that_hangs_stays_away() -> None:
    """Its recipe is gone; that it hangs brings nothing back."""
    world = always()
    world.ask("a")
    world.use()
    world.hang("a")
    world.advance(20)
    assert world.scheduler.view("a") is None


@pytest.mark.parametrize("before", ["unload", "hang"])
def test_what_was_to_go_before_it_was_removed_goes_when_it_is_put_back(before: str) -> None:
    """Only what drained for the removal alone serves on; a hung server never does."""
    world = always(drain_timeout_s=300.0)
    world.ask("a")
    if before == "unload":
        world.unload("a")
    else:
        world.hang("a")
    world.use()
    world.use(spec("a", restart=Restart.ALWAYS, drain_timeout_s=300.0))
    assert world.state("a") is State.DRAINING
    world.advance(400)
    assert world.stops[0].run == 1
    assert world.state("a") is (State.STOPPED if before == "unload" else State.READY)


# What clears failures, and what is none


def test_success_clears_the_budget_in_time() -> None:
    """Who is ready for a minute has no failures any more, and shows none, also when it is unloaded later."""
    world = failing()
    for _ in range(3):
        fail_once(world)
    world.script("a").failure = None
    world.load("a")
    world.advance(LOAD_S)
    assert (world.state("a"), world.view("a").is_exhausted) == (State.READY, False)
    assert world.view("a").failures == 3
    world.advance(STABLE_S)
    assert world.view("a").failures == 0
    world.unload("a")
    world.advance(5)
    world.script("a").failure = OOM
    fail_once(world)
    assert not world.view("a").is_exhausted


def test_adopted_model_has_no_failure() -> None:
    """What ended before, or was not as asked for, was another run."""
    world = world_of([spec("a")])
    world.load("a")
    world.advance(LOAD_S)
    world.feed(Warned(world.now, "a", world.view("a").run, ("slow",)))
    world.crash("a")
    world.find("a")
    world.advance(LOAD_S)
    shown = world.view("a")
    assert (shown.state, shown.failure, shown.warnings) == (State.READY, None, ())


def test_failed_plan_is_no_crash() -> None:
    """No process ever ran: it backs off, and that is all."""
    world = world_of([spec("a")])
    world.script("a").failure = NO_FILE
    for _ in range(5):
        fail_once(world)
        assert not world.view("a").is_exhausted
    assert world.view("a").failures == 5


@pytest.mark.parametrize("restart", [Restart.ON_REQUEST, Restart.ALWAYS])
def test_reload_forgets_a_failed_plan(restart: Restart) -> None:
    """The file that was missing may be there now: who asks next is not refused; why it failed is shown still."""
    world = world_of([spec("a", restart=restart), spec("b")])
    world.script("a").failure = NO_FILE
    for _ in range(4):
        fail_once(world)
    world.script("a").failure = None
    n_starts = len(world.starts)
    world.use(*world.specs.values())
    assert world.view("a").failure == NO_FILE
    world.advance(LOAD_S)
    assert len(world.starts) - n_starts == (restart is Restart.ALWAYS)
    ticket = world.ask("a")
    world.advance(LOAD_S)
    assert world.place(ticket) is Place.IN_FLIGHT
