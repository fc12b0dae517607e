"""What happens to one instance after another: it starts, loads, serves, drains, stops or fails.

Who may start, and who has to go for it, is decided in `llmstudiod.core.scheduler`.
"""

from collections.abc import Callable, Mapping
from math import inf
from typing import assert_never

from llmstudiod.core import rejections, room
from llmstudiod.core.desk import Desk
from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.events import (
    Action,
    BecameReady,
    Done,
    LoadProgressed,
    LoadToo,
    Publish,
    SetTimer,
    StartUnit,
    StopUnit,
    Timer,
    TimerFired,
    UnitFailed,
    UnitFound,
    UnitFoundFailed,
    UnitGone,
    UnitHung,
    UnitStarted,
    Warned,
    WatchUnit,
)
from llmstudiod.core.lifecycle import Failure, Instance, PastFailure, Restart, State, StopCause
from llmstudiod.core.memory_watch import MemoryWatch
from llmstudiod.core.placement import Placement
from llmstudiod.core.retry import BACK_OFF_S, STABLE_S, forget_failures, note_failure, recall_failures

SETTLED_S = 1.0  # a server that ends without an error so soon after it was ready was not stopped by somebody
HUNG_GRACE_S = 5.0  # for what may still be on its way from a server that answers nothing new
_WISHES = frozenset({StopCause.UNLOAD, StopCause.REMOVED, StopCause.SHUTDOWN})
"""Causes for which somebody wants it gone, whatever else happens to it."""
_REPLACED = frozenset({StopCause.RECIPE, StopCause.REMOVED, StopCause.DESERTED})
"""Causes for which it goes though its recipe, the one in force, may want it to be up."""


class Life:
    """The instances, and every step that one of them can take; ``actions`` is where the consequences go."""

    def __init__(self, desk: Desk, watch: MemoryWatch, chance: Callable[[], float]) -> None:
        self.instances: dict[str, Instance] = {}
        self.actions: list[Action] = []
        self.desk = desk
        self.watch = watch
        self.n_draining = 0
        self.past: Mapping[str, PastFailure] = {}
        self._chance = chance
        self._last_run = 0

    def _is_up(self, model: str) -> bool:
        return model in self.instances and self.instances[model].is_resident

    # From the start to the end

    def start(self, instance: Instance, at: float, placement: Placement | None) -> None:
        """Start it at a place that was found for it."""
        self._begin_run(instance, at, instance.spec.recipe_hash)
        instance.is_vetted = instance.is_proven = False
        instance.yields_to = None
        instance.overtake_at = 0.0
        for other in self.instances.values():
            if other.yields_to is instance:
                other.yields_to = None
        self.move(instance, State.STARTING, at, "wanted by a request" if instance.waiters else "asked for")
        instance.placement = placement
        self.actions.append(StartUnit(instance.spec.id, instance.run, placement))
        others = sorted(instance.spec.companions - instance.protects)
        self.actions += [LoadToo(model) for model in others if not self._is_up(model)]
        self.set_timer(instance, Timer.STALL, at + instance.spec.stall_timeout_s)

    def adopt(self, event: UnitFound) -> None:
        """Take over what an earlier daemon started; under another recipe it serves on until it is idle."""
        instance = self.instances.get(event.model)
        if instance is None or instance.is_resident:
            return
        self._begin_run(instance, event.at, event.recipe_hash)
        instance.placement = event.placement
        self.move(instance, State.LOADING, event.at, "it was running already")
        self.actions.append(WatchUnit(event.model, instance.run))
        self.set_timer(instance, Timer.STALL, event.at + instance.spec.stall_timeout_s)

    def _begin_run(self, instance: Instance, at: float, recipe_hash: str) -> None:
        """Let nothing of the run before be left; only its failures count on."""
        self._last_run += 1
        instance.run = self._last_run
        instance.run_hash = recipe_hash
        instance.failure = instance.refused = None
        instance.warnings = ()
        instance.progress_at = at
        instance.stop_cause = None
        instance.is_exhausted = False
        instance.restart_at = 0.0

    def found_failed(self, event: UnitFoundFailed) -> None:
        """Tell why a model of an earlier daemon ended; if that one has not seen it, it may be started at once."""
        instance = self.instances.get(event.model)
        if instance is None or instance.state is not State.STOPPED:
            return
        failure, past = event.failure, self.past.get(event.model)
        instance.retry_at = event.at
        if past is not None and past.recipe_hash == instance.spec.recipe_hash:
            failure = past.failure  # of that run: nothing has happened to the model since
            recall_failures(instance, past, event.at)
        instance.failure = failure
        instance.last_failure = (instance.run, failure)
        self.move(instance, State.FAILED, event.at, failure.message)
        self.see_to_restart(instance)

    def started(self, instance: Instance, event: UnitStarted) -> None:
        """Its process runs."""
        if instance.state is State.STARTING:
            instance.progress_at = event.at
            self.move(instance, State.LOADING, event.at, "the unit is active")

    def progressed(self, instance: Instance, event: LoadProgressed) -> None:
        """Something has moved in a load."""
        if instance.state in {State.STARTING, State.LOADING}:
            instance.progress_at = event.at
            instance.progress = max(event.progress or 0.0, instance.progress or 0.0) or None
            instance.stage = event.stage
            self.actions.append(Publish(instance.spec.id))

    def warned(self, instance: Instance, event: Warned) -> None:
        """Note what is not as it was asked for."""
        instance.warnings = event.warnings
        self.actions.append(Publish(instance.spec.id))

    def became_ready(self, instance: Instance, event: BecameReady) -> None:
        """Let those in who waited for it."""
        if instance.state not in {State.STARTING, State.LOADING}:
            return
        instance.facts = event.facts
        instance.progress = None
        instance.is_second_try = False
        self.watch.outdate()  # what it has taken was promised until now
        instance.ready_at = instance.idle_since = event.at
        self.move(instance, State.READY, event.at, "/health answers 200")
        self.set_idle_timer(instance, event.at)
        if instance.failures or instance.failed_at:
            self.set_timer(instance, Timer.STABLE, event.at + STABLE_S)
        self.desk.admit(instance, event.at)
        self.replace_if_stale(instance, event.at)

    def unit_failed(self, instance: Instance, event: UnitFailed) -> None:
        """Its process has ended, or could not be started."""
        if instance.state is State.STOPPING or not instance.is_resident:
            return  # whoever stops it tells when nothing is left; until then its name and socket are taken
        if instance.state is State.DRAINING and instance.stop_cause is StopCause.HUNG:
            self.fail(instance, event.at, instance.failure or event.failure, was_serving=True)
            return
        if instance.state is State.DRAINING and instance.stop_cause is not StopCause.EVICT:
            self._settle(instance, event.at, "it ended while it was drained")
            return
        was_serving = instance.state in {State.READY, State.DRAINING}
        if not was_serving and self._try_again_alone(instance, event):
            return
        instance.is_second_try = False
        if was_serving and event.failure.kind == "exited" and event.at - instance.ready_at > SETTLED_S:
            self._settle(instance, event.at, "stopped by hand")  # `systemctl stop` of the unit or the slice
            return
        self.fail(instance, event.at, event.failure, was_serving=was_serving)

    def hung(self, instance: Instance, event: UnitHung) -> None:
        """Take no more requests to a server that does not answer, and start it anew; who is to go goes the sooner."""
        if instance.state is State.LOADING:  # it was found so; whoever waits for it waits for a fresh one
            self.stop(instance, event.at, cause=StopCause.DESERTED, is_forced=True)
        elif instance.state in {State.READY, State.DRAINING}:
            instance.failure = event.failure
            if instance.state is State.DRAINING and instance.stop_cause in _WISHES:
                self._limit_drain(instance, event.at + HUNG_GRACE_S)
            else:
                self.drain(instance, event.at, StopCause.HUNG)

    def _try_again_alone(self, instance: Instance, event: UnitFailed) -> bool:
        """Let idle ones go and try once more where a GPU's memory was too small; return whether that is so.

        It needs more than was promised to it, or somebody else has taken it.
        """
        at, others = event.at, room.idle_neighbours(self.instances.values(), instance.placement)
        if event.failure.kind != "oom_vram" or not room.may_try_again(instance, others):
            return False
        self._note_failure(instance, at, event.failure)
        instance.is_second_try = True
        forget_failures(instance, at)
        for other in others:
            other.evicted_for = instance.spec.id
            self.stop(other, at, cause=StopCause.EVICT)
        return True

    def fail(self, instance: Instance, at: float, failure: Failure, *, was_serving: bool) -> None:
        """Write a failure down, answer whoever waits, and see to the next start."""
        self._note_failure(instance, at, failure)
        is_hopeful = instance.failures <= 1 and not instance.is_exhausted and instance.spec.restart is not Restart.NEVER
        if was_serving and is_hopeful:  # it did load before: one fresh start is worth the while of whoever asks
            instance.retry_at = at
            if instance.waiters:  # they have sent nothing yet
                return
        self.desk.refuse_all(instance, rejections.failed(instance.spec.id, failure, was_serving=was_serving))
        self.see_to_restart(instance)

    def see_to_restart(self, instance: Instance, *, no_sooner: float = 0.0) -> None:
        """Have it started again by itself where its recipe says so, and it is down for no reason of anybody's."""
        if instance.spec.restart is Restart.ALWAYS and instance.is_down_by_itself:
            instance.restart_at = max(instance.retry_at, no_sooner)
            self.set_timer(instance, Timer.RESTART, instance.restart_at)

    def refuse(self, instance: Instance, at: float, error: LlmstudioError) -> None:
        """Turn everybody away although nothing was started: no transition tells why, so it is told by itself."""
        refused = Failure(error.kind, error.message, error.hint)
        is_news = refused != instance.refused or any(waiter.is_load for waiter in instance.waiters.values())
        instance.refused = refused
        self.desk.refuse_all(instance, error)
        if is_news:  # requests may come, and be refused, by the thousand
            self.actions.append(Publish(instance.spec.id))
        if instance.restart_at <= at:  # one timer is enough for all of them
            self.see_to_restart(instance, no_sooner=at + BACK_OFF_S[-1])

    def give_up(self, instance: Instance, at: float, cause: StopCause, error: LlmstudioError) -> None:
        """Turn everybody away because an operator does not want it to be started."""
        if not instance.waiters:
            return
        instance.refused = None
        instance.stop_cause = cause
        self.desk.refuse_all(instance, error)
        self.actions.append(Publish(instance.spec.id))
        if cause is StopCause.CANCELLED:  # it failed before; whoever cancels does not want it at once
            self.see_to_restart(instance, no_sooner=at + BACK_OFF_S[-1])

    def _note_failure(self, instance: Instance, at: float, failure: Failure) -> None:
        note_failure(instance, at, chance=self._chance(), is_crash=not failure.never_ran)
        instance.failure = failure
        instance.last_failure = (instance.run, failure)
        instance.refused = None
        self._forget_run(instance, at)
        if instance.is_stale:  # the recipe in force now is another one, and has not failed yet
            forget_failures(instance, at)
        self.move(instance, State.FAILED, at, failure.message)
        self._answer_unloads(instance)

    def drain(self, instance: Instance, at: float, cause: StopCause) -> None:
        """Let what is in flight end, then stop. An eviction has no time limit: it never cuts a request short."""
        instance.stop_cause = cause
        if not instance.in_flight:
            self.stop(instance, at)
            return
        if instance.state is not State.DRAINING:
            instance.drain_by = inf
        self.move(instance, State.DRAINING, at, instance.why_stopped)
        if cause is not StopCause.EVICT:
            limit_s = HUNG_GRACE_S if cause is StopCause.HUNG else instance.spec.drain_timeout_s
            self._limit_drain(instance, at + limit_s)

    def _limit_drain(self, instance: Instance, due_at: float) -> None:
        """Let a drain end at this time, unless it does so sooner."""
        if due_at < instance.drain_by:
            instance.drain_by = due_at
            self.set_timer(instance, Timer.DRAIN, due_at)

    def stop(self, instance: Instance, at: float, *, cause: StopCause | None = None, is_forced: bool = False) -> None:
        """End its process."""
        instance.stop_cause = cause or instance.stop_cause
        self.move(instance, State.STOPPING, at, instance.why_stopped)
        is_forced = is_forced or instance.failure is not None  # it hangs, and would not hear a polite word
        self.actions.append(StopUnit(instance.spec.id, instance.run, is_forced))

    def gone(self, instance: Instance, event: UnitGone) -> None:
        """No process of it is left."""
        if instance.state is not State.STOPPING:
            return
        cause, failure = instance.stop_cause, instance.failure
        if cause in {StopCause.STALLED, StopCause.HUNG} and failure is not None and not instance.is_removed:
            if cause is StopCause.STALLED:
                self.desk.refuse_all(instance, rejections.stalled(failure))
            self.fail(instance, event.at, failure, was_serving=cause is StopCause.HUNG)
            return
        self._settle(instance, event.at, "no process is left")
        if cause in _REPLACED and not instance.is_removed:
            self.load_if_always(instance)

    def load_if_always(self, instance: Instance) -> None:
        """Load what is to be up always, and is down for no reason of its own."""
        if instance.spec.restart is Restart.ALWAYS:
            self.actions.append(LoadToo(instance.spec.id))

    def _settle(self, instance: Instance, at: float, cause: str) -> None:
        instance.failures = 0
        instance.failure = None
        self._forget_run(instance, at)
        self.move(instance, State.STOPPED, at, cause)
        self._answer_unloads(instance)
        if instance.is_removed:
            del self.instances[instance.spec.id]

    def _forget_run(self, instance: Instance, at: float) -> None:
        """Nothing is in flight in a process that is gone; `_end` knows tickets of old runs by their run."""
        instance.placement = None
        self.watch.gone(at)
        instance.in_flight = {}
        instance.facts = None
        instance.progress = None
        instance.stage = ""

    def _answer_unloads(self, instance: Instance) -> None:
        self.actions += map(Done, instance.unload_tickets)
        instance.unload_tickets.clear()

    def move(self, instance: Instance, new: State, at: float, cause: str) -> None:
        """Change its state, and tell."""
        self.n_draining += (new is State.DRAINING) - (instance.state is State.DRAINING)
        instance.move(new, at=at, cause=cause)
        self.actions.append(Publish(instance.spec.id, instance.story[-1]))

    def set_timer(self, instance: Instance, timer: Timer, at: float) -> None:
        """Be told at this time."""
        self.actions.append(SetTimer(instance.spec.id, instance.run, timer, at))

    # Timers

    def timer_fired(self, instance: Instance, event: TimerFired) -> None:
        """Do what the time has come for."""
        match event.timer:
            case Timer.IDLE:
                self._idle_due(instance, event.at)
            case Timer.STALL:
                self._stall_due(instance, event.at)
            case Timer.DRAIN:
                if instance.state is State.DRAINING and event.at >= instance.drain_by:
                    self.stop(instance, event.at)
            case Timer.OVERTAKE:
                pass  # it only wakes us up to look for room
            case Timer.MEASURE:
                self.watch.outdate()
            case Timer.RESTART:
                is_due = event.at >= max(instance.restart_at, instance.retry_at)
                if instance.is_down_by_itself and not instance.waiters and is_due:
                    self.load_if_always(instance)
            case Timer.STABLE:
                if instance.state in {State.READY, State.DRAINING} and event.at >= instance.ready_at + STABLE_S:
                    forget_failures(instance, event.at)
                    self.actions.append(Publish(instance.spec.id))
            case _:
                assert_never(event.timer)

    def set_idle_timer(self, instance: Instance, at: float) -> None:
        """Look, in time, whether nobody uses it any more."""
        if instance.spec.idle_timeout_s and not instance.spec.is_pinned:
            self.set_timer(instance, Timer.IDLE, at + instance.spec.idle_timeout_s)

    def _idle_due(self, instance: Instance, at: float) -> None:
        timeout_s = instance.spec.idle_timeout_s
        if not timeout_s or instance.spec.is_pinned or not instance.is_resident:
            return
        due_at = room.idle_since(instance, self.instances.values(), at) + timeout_s
        if due_at > at:
            self.set_timer(instance, Timer.IDLE, due_at)
        else:
            self.stop(instance, at, cause=StopCause.IDLE)

    def _stall_due(self, instance: Instance, at: float) -> None:
        if instance.state not in {State.STARTING, State.LOADING}:
            return
        due_at = instance.progress_at + instance.spec.stall_timeout_s
        if due_at > at:
            self.set_timer(instance, Timer.STALL, due_at)
            return
        instance.failure = rejections.stall(instance)
        self.desk.refuse_all(instance, rejections.stalled(instance.failure))
        self.stop(instance, at, cause=StopCause.STALLED, is_forced=True)

    def replace_if_stale(self, instance: Instance, at: float) -> None:
        """Let it go, once nobody uses it, for the sake of its new recipe."""
        if instance.is_stale and instance.is_idle:
            self.drain(instance, at, StopCause.RECIPE)

    def recall(self, instance: Instance, at: float, why: str = "its place is not needed any more") -> None:
        """Let an instance that drains serve on: nobody wants it gone any more."""
        instance.stop_cause = None
        instance.yields_to = None
        self.move(instance, State.READY, at, why)
        self.desk.admit(instance, at)

    def clear(self, instance: Instance, at: float, why: str = "reset on request") -> None:
        """Forget its failures."""
        forget_failures(instance, at)
        if instance.refused is not None:
            instance.refused = None
            self.actions.append(Publish(instance.spec.id))
        if instance.state is State.FAILED:
            self.move(instance, State.STOPPED, at, why)
            instance.failure = None

    def change_restart(self, instance: Instance, at: float) -> None:
        """Let another rule hold for what is down already."""
        if instance.state is State.FAILED:
            never = instance.spec.restart is Restart.NEVER
            instance.retry_at = inf if never else at if instance.retry_at == inf else instance.retry_at
        self.see_to_restart(instance)

    def forget_plan(self, instance: Instance, at: float) -> None:
        """Let what failed without a process be tried again: whatever was missing may be there now."""
        if (
            instance.state is State.FAILED
            and instance.failure
            and instance.failure.never_ran
            and instance.retry_at < inf
        ):
            instance.failures, instance.retry_at = 0, at
            self.see_to_restart(instance)
            self.actions.append(Publish(instance.spec.id))
