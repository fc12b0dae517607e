"""Who runs, who waits, who goes: the pure heart of the daemon.

`Scheduler.handle` takes one event and returns the actions that follow. The supervisor is its only caller.
In every moment each request is in exactly one place: waiting in one instance, in flight in one instance, or gone.
Who has to go when there is not room for all is chosen in `llmstudiod.core.room`.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, assert_never

from llmstudiod.core import rejections, room
from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.events import (
    Action,
    BecameReady,
    Done,
    Event,
    Grant,
    LoadProgressed,
    LoadToo,
    MeasureMemory,
    MemoryMeasured,
    PlanVetted,
    Publish,
    Refuse,
    RequestArrived,
    RequestEnded,
    SetTimer,
    ShutdownAsked,
    SpecsChanged,
    StartUnit,
    StopUnit,
    Timer,
    TimerFired,
    UnitFailed,
    UnitFound,
    UnitGone,
    UnitStarted,
    UnloadAsked,
    VetPlan,
    WatchUnit,
)
from llmstudiod.core.ledger import Memory
from llmstudiod.core.lifecycle import Failure, Instance, InstanceView, State, StopCause, Waiter, view
from llmstudiod.core.memory_watch import MemoryWatch
from llmstudiod.core.placement import Placement, Wish

if TYPE_CHECKING:
    from llmstudiod.core.preview import Preview
    from llmstudiod.core.seating import Seating

BACK_OFF_S = (2.0, 5.0, 15.0, 60.0, 300.0)
OVERTAKE_S = 2.0
OfRun = TypeVar("OfRun", UnitStarted, LoadProgressed, BecameReady, UnitFailed, UnitGone, TimerFired)

SECOND_TRY_MARGIN = 0.1
SETTLED_S = 1.0  # a server that ends without an error so soon after it was ready was not stopped by somebody
STABLE_S = 60.0  # a model that was ready for so long starts its count of failures anew


class Scheduler:
    """Holds every instance; changed by `handle` alone."""

    def __init__(self, *, max_instances: int = 0, overtake_s: float = OVERTAKE_S) -> None:
        self.max_instances = max_instances
        self._overtake_s = overtake_s
        self._instances: dict[str, Instance] = {}
        self._waiting_in: dict[int, Instance] = {}
        self._flying_in: dict[int, tuple[Instance, int]] = {}
        self._last_run = 0
        self._n_draining = 0
        self._is_shutting_down = False
        self._seen: object = None
        self._actions: list[Action] = []
        self.watch = MemoryWatch()

    # What others may see

    def view(self, model: str) -> InstanceView | None:
        """Return a frozen copy of one instance, or None for an unknown model."""
        instance = self._instances.get(model)
        return None if instance is None else view(instance)

    def views(self) -> list[InstanceView]:
        """Return frozen copies of all instances, in the order of their ids."""
        return [view(instance) for _, instance in sorted(self._instances.items())]

    def _is_up(self, model: str) -> bool:
        return model in self._instances and self._instances[model].is_resident

    def is_quiet(self) -> bool:
        """Whether no instance holds a process."""
        return not any(instance.is_resident for instance in self._instances.values())

    def preview(self, model: str, wish: Wish | None, memory: Memory, at: float) -> "Preview":
        """Return what would happen if the model were wanted now; changes nothing."""
        from llmstudiod.core.preview import preview

        instances = self._instances.values()
        return preview(instances, model, wish, max_instances=self.max_instances, memory=memory, at=at)

    def ready_run(self, model: str) -> int | None:
        """Return the run that would be granted to a request arriving now, or None when it would not be granted."""
        instance = self._instances.get(model)
        if instance is None or instance.state is not State.READY or instance.waiters or self._is_shutting_down:
            return None
        return instance.run if not instance.is_removed and instance.has_room_for(None) else None

    # The one entrance

    def handle(self, event: Event) -> list[Action]:  # noqa: C901 - one arm for each kind of event
        """Take one event, return what must be done about it."""
        actions: list[Action] = []
        self._actions = actions
        match event:
            case RequestArrived():
                self._arrive(event)
            case RequestEnded():
                self._end(event)
            case UnloadAsked():
                self._unload(event)
            case PlanVetted():
                self._vetted(event)
            case UnitStarted():
                self._of_run(event, self._started)
            case LoadProgressed():
                self._of_run(event, self._progressed)
            case BecameReady():
                self._of_run(event, self._became_ready)
            case UnitFailed():
                self._of_run(event, self._unit_failed)
            case UnitGone():
                self._of_run(event, self._gone)
            case TimerFired():
                self._of_run(event, self._timer_fired)
            case SpecsChanged():
                self._change_specs(event)
            case UnitFound():
                self._adopt(event)
            case MemoryMeasured():
                self.watch.answer(event)
            case ShutdownAsked():
                self._shut_down(event)
            case _:
                assert_never(event)
        # Whatever happened may have made a wish, a place or an idle instance; asking again changes nothing.
        # Nearly always nobody waits and nobody drains, and this is asked twice for each request.
        if (self._waiting_in or self._n_draining) and not self._is_as_before(event):
            n_before = len(actions)
            self._make_room(event.at)
            self._seen = room.look(self._instances.values()) if len(actions) == n_before else None
        return actions

    def _is_as_before(self, event: Event) -> bool:
        """Whether a request has changed nothing that matters to those who wait; looking at all takes a millisecond."""
        if not isinstance(event, RequestArrived | RequestEnded) or self._seen is None:
            return False
        is_known = not self.watch.is_on or self.watch.is_fresh(event.at)
        return is_known and self._seen == room.look(self._instances.values())

    def _of_run(self, event: OfRun, handler: Callable[[Instance, OfRun], None]) -> None:
        """Pass an event on unless it speaks of a run that is over."""
        if (instance := self._instances.get(event.model)) is not None and instance.run == event.run:
            handler(instance, event)

    # Requests

    def _arrive(self, event: RequestArrived) -> None:
        instance = self._instances.get(event.model)
        if refusal := rejections.at_once(instance, event, is_shutting_down=self._is_shutting_down):
            self._actions.append(Refuse(event.ticket, refusal))
            return
        assert instance is not None
        if not instance.waiters and not instance.is_resident:
            instance.yields_to = None  # for whom it once made room is long past
        may_pass = instance.state is State.READY and not instance.waiters and not event.is_load
        if may_pass and instance.has_room_for(event.cost_tokens):
            self._grant(instance, event.ticket, event.cost_tokens, event.at)
            return
        waiter = Waiter(event.ticket, event.at, event.cost_tokens, event.is_load, event.is_along)
        instance.waiters[event.ticket] = waiter
        self._waiting_in[event.ticket] = instance
        self._admit(instance, event.at)

    def _admit(self, instance: Instance, at: float) -> None:
        """Grant waiters in their order for as long as there is room for the first; a load has what it wants at once."""
        if instance.state is not State.READY:
            return
        for waiter in list(instance.waiters.values()):
            if waiter.is_load:
                self._leave_queue(instance, waiter)
                self._actions.append(Done(waiter.ticket))
        while instance.waiters:
            waiter = next(iter(instance.waiters.values()))
            if not instance.has_room_for(waiter.cost_tokens):
                return
            self._leave_queue(instance, waiter)
            self._grant(instance, waiter.ticket, waiter.cost_tokens, at)

    def _grant(self, instance: Instance, ticket: int, cost_tokens: int | None, at: float) -> None:
        instance.in_flight[ticket] = cost_tokens
        instance.last_used = at
        self._flying_in[ticket] = (instance, instance.run)
        self._actions.append(Grant(ticket, instance.spec.id, instance.run))

    def _leave_queue(self, instance: Instance, waiter: Waiter) -> None:
        del instance.waiters[waiter.ticket]
        del self._waiting_in[waiter.ticket]

    def _end(self, event: RequestEnded) -> None:
        if waiting_in := self._waiting_in.pop(event.ticket, None):
            del waiting_in.waiters[event.ticket]
            if not waiting_in.waiters:
                waiting_in.is_vetted = waiting_in.is_proven = False  # the next who asks may come much later
            self._admit(waiting_in, event.at)
            return
        instance, run = self._flying_in.pop(event.ticket, (None, 0))
        if instance is None or instance.run != run:
            return
        instance.in_flight.pop(event.ticket, None)
        instance.idle_since = instance.last_used = event.at
        if instance.state is State.DRAINING and not instance.in_flight:
            self._stop(instance, event.at)
        self._admit(instance, event.at)
        self._replace_if_stale(instance, event.at)

    def _refuse_waiters(self, instance: Instance, error: LlmstudioError) -> None:
        for ticket in instance.waiters:
            del self._waiting_in[ticket]
            self._actions.append(Refuse(ticket, error))
        instance.waiters.clear()

    # The life of an instance

    def _start(self, instance: Instance, at: float, placement: Placement | None) -> None:
        self._last_run += 1
        instance.run = self._last_run
        instance.failure = None
        instance.progress_at = at
        instance.stop_cause = None
        instance.is_stale = False
        instance.is_vetted = instance.is_proven = False
        instance.yields_to = None
        instance.overtake_at = 0.0
        for other in self._instances.values():
            if other.yields_to is instance:
                other.yields_to = None
        self._move(instance, State.STARTING, at, "wanted by a request" if instance.waiters else "asked for")
        instance.placement = placement
        self._actions.append(StartUnit(instance.spec.id, instance.run, placement))
        others = sorted(instance.spec.companions - instance.protects)
        self._actions += [LoadToo(model) for model in others if not self._is_up(model)]
        self._set_timer(instance, Timer.STALL, at + instance.spec.stall_timeout_s)

    def _adopt(self, event: UnitFound) -> None:
        """Take over what an earlier daemon started; under another recipe it serves on until it is idle."""
        instance = self._instances.get(event.model)
        if instance is None or instance.is_resident:
            return
        self._last_run += 1
        instance.run = self._last_run
        instance.progress_at = event.at
        instance.stop_cause = None
        instance.is_stale = event.recipe_hash != instance.spec.recipe_hash
        instance.placement = event.placement
        self._move(instance, State.LOADING, event.at, "it was running already")
        self._actions.append(WatchUnit(event.model, instance.run))
        self._set_timer(instance, Timer.STALL, event.at + instance.spec.stall_timeout_s)

    def _started(self, instance: Instance, event: UnitStarted) -> None:
        if instance.state is State.STARTING:
            instance.progress_at = event.at
            self._move(instance, State.LOADING, event.at, "the unit is active")

    def _progressed(self, instance: Instance, event: LoadProgressed) -> None:
        if instance.state in {State.STARTING, State.LOADING}:
            instance.progress_at = event.at
            instance.progress = event.progress

    def _became_ready(self, instance: Instance, event: BecameReady) -> None:
        if instance.state not in {State.STARTING, State.LOADING}:
            return
        instance.facts = event.facts
        instance.progress = None
        instance.is_second_try = False
        self.watch.outdate()  # what it has taken was promised until now
        instance.ready_at = instance.idle_since = event.at
        self._move(instance, State.READY, event.at, "/health answers 200")
        self._set_idle_timer(instance, event.at)
        self._admit(instance, event.at)
        self._replace_if_stale(instance, event.at)

    def _unit_failed(self, instance: Instance, event: UnitFailed) -> None:
        if instance.state is State.STOPPING or not instance.is_resident:
            return  # whoever stops it tells when nothing is left; until then its name and socket are taken
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
        if was_serving and event.at - instance.ready_at > STABLE_S:
            instance.failures = 0
        self._fail(instance, event.at, event.failure)
        if was_serving and instance.failures <= 1 and instance.waiters:
            # They have sent nothing yet and the model did load before: one fresh start is worth their while.
            instance.retry_at = event.at
        else:
            self._refuse_waiters(instance, rejections.failed(instance.spec.id, event.failure, was_serving=was_serving))

    def _try_again_alone(self, instance: Instance, event: UnitFailed) -> bool:
        """Let idle ones go and try once more where a GPU's memory was too small; return whether that is so.

        It needs more than was promised to it, or somebody else has taken it.
        """
        at, others = event.at, room.idle_neighbours(self._instances.values(), instance.placement)
        if event.failure.kind != "oom_vram" or not room.may_try_again(instance, others):
            return False
        self._fail(instance, at, event.failure)
        instance.failures, instance.retry_at, instance.is_second_try = 0, at, True
        for other in others:
            other.evicted_for = instance.spec.id
            self._stop(other, at, cause=StopCause.EVICT)
        return True

    def _fail(self, instance: Instance, at: float, failure: Failure) -> None:
        instance.failures += 1
        instance.failure = failure
        self._forget_run(instance, at)
        instance.retry_at = at + BACK_OFF_S[min(instance.failures, len(BACK_OFF_S)) - 1]
        if instance.is_stale:  # the recipe in force now is another one, and has not failed yet
            instance.failures, instance.retry_at, instance.is_stale = 0, at, False
        self._move(instance, State.FAILED, at, failure.message)
        self._answer_unloads(instance)

    def _drain(self, instance: Instance, at: float, cause: StopCause) -> None:
        """Let what is in flight end, then stop. An eviction has no time limit: it never cuts a request short."""
        instance.stop_cause = cause
        if not instance.in_flight:
            self._stop(instance, at)
            return
        self._move(instance, State.DRAINING, at, instance.why_stopped)
        if cause is not StopCause.EVICT:
            self._set_timer(instance, Timer.DRAIN, at + instance.spec.drain_timeout_s)

    def _stop(self, instance: Instance, at: float, *, cause: StopCause | None = None, is_forced: bool = False) -> None:
        instance.stop_cause = cause or instance.stop_cause
        self._move(instance, State.STOPPING, at, instance.why_stopped)
        self._actions.append(StopUnit(instance.spec.id, instance.run, is_forced))

    def _gone(self, instance: Instance, event: UnitGone) -> None:
        if instance.state is not State.STOPPING:
            return
        if instance.stop_cause is StopCause.STALLED and instance.failure is not None and not instance.is_removed:
            self._refuse_waiters(instance, rejections.stalled(instance.failure))
            self._fail(instance, event.at, instance.failure)
            return
        self._settle(instance, event.at, "no process is left")

    def _settle(self, instance: Instance, at: float, cause: str) -> None:
        instance.failures = 0
        instance.is_stale = False
        self._forget_run(instance, at)
        self._move(instance, State.STOPPED, at, cause)
        self._answer_unloads(instance)
        if instance.is_removed:
            del self._instances[instance.spec.id]

    def _forget_run(self, instance: Instance, at: float) -> None:
        """Nothing is in flight in a process that is gone; `_end` knows tickets of old runs by their run."""
        instance.placement = None
        self.watch.gone(at)
        instance.in_flight = {}
        instance.facts = None
        instance.progress = None

    def _answer_unloads(self, instance: Instance) -> None:
        self._actions += map(Done, instance.unload_tickets)
        instance.unload_tickets.clear()

    def _move(self, instance: Instance, new: State, at: float, cause: str) -> None:
        self._n_draining += (new is State.DRAINING) - (instance.state is State.DRAINING)
        instance.move(new, at=at, cause=cause)
        self._actions.append(Publish(instance.spec.id, instance.story[-1]))

    def _set_timer(self, instance: Instance, timer: Timer, at: float) -> None:
        self._actions.append(SetTimer(instance.spec.id, instance.run, timer, at))

    # Timers

    def _timer_fired(self, instance: Instance, event: TimerFired) -> None:
        match event.timer:
            case Timer.IDLE:
                self._idle_due(instance, event.at)
            case Timer.STALL:
                self._stall_due(instance, event.at)
            case Timer.DRAIN:
                if instance.state is State.DRAINING and instance.stop_cause is not StopCause.EVICT:
                    self._stop(instance, event.at)
            case Timer.OVERTAKE:
                pass  # it only wakes us up to look for room
            case Timer.MEASURE:
                self.watch.outdate()
            case _:
                assert_never(event.timer)

    def _set_idle_timer(self, instance: Instance, at: float) -> None:
        if instance.spec.idle_timeout_s and not instance.spec.is_pinned:
            self._set_timer(instance, Timer.IDLE, at + instance.spec.idle_timeout_s)

    def _idle_due(self, instance: Instance, at: float) -> None:
        timeout_s = instance.spec.idle_timeout_s
        if not timeout_s or instance.spec.is_pinned or not instance.is_resident:
            return
        due_at = room.idle_since(instance, self._instances.values(), at) + timeout_s
        if due_at > at:
            self._set_timer(instance, Timer.IDLE, due_at)
        else:
            self._stop(instance, at, cause=StopCause.IDLE)

    def _stall_due(self, instance: Instance, at: float) -> None:
        if instance.state not in {State.STARTING, State.LOADING}:
            return
        due_at = instance.progress_at + instance.spec.stall_timeout_s
        if due_at > at:
            self._set_timer(instance, Timer.STALL, due_at)
            return
        instance.failure = rejections.stall(instance)
        self._refuse_waiters(instance, rejections.stalled(instance.failure))
        self._stop(instance, at, cause=StopCause.STALLED, is_forced=True)

    # Operators

    def _unload(self, event: UnloadAsked) -> None:
        instance = self._instances.get(event.model)
        if instance is None:
            self._actions.append(Refuse(event.ticket, rejections.no_model(event.model)))
            return
        unloaded = rejections.unloaded(event.model)
        if not instance.is_resident:
            if instance.state is State.FAILED:
                instance.failures = 0
                self._move(instance, State.STOPPED, event.at, "reset on request")
            self._refuse_waiters(instance, unloaded)
            self._actions.append(Done(event.ticket))
            return
        instance.unload_tickets.append(event.ticket)
        self._refuse_waiters(instance, unloaded)
        if instance.state is State.STOPPING:
            return
        if event.is_forced or instance.state in {State.STARTING, State.LOADING}:
            self._stop(instance, event.at, cause=StopCause.UNLOAD, is_forced=event.is_forced)
        else:
            self._drain(instance, event.at, StopCause.UNLOAD)

    def _change_specs(self, event: SpecsChanged) -> None:
        for model, spec in event.specs.items():
            instance = self._instances.get(model)
            if instance is None:
                self._instances[model] = Instance(spec, since=event.at)
                continue
            old, instance.spec = instance.spec, spec
            if instance.is_resident and (old.idle_timeout_s, old.is_pinned) != (spec.idle_timeout_s, spec.is_pinned):
                self._set_idle_timer(instance, event.at)  # otherwise the one that is set is the right one
            instance.is_removed = False
            if old.recipe_hash != spec.recipe_hash:
                instance.is_vetted = instance.is_proven = False
                self._outdate(instance, event.at)
        for model in [model for model in self._instances if model not in event.specs]:
            self._remove(self._instances[model], event.at)

    def _outdate(self, instance: Instance, at: float) -> None:
        if instance.state is State.FAILED:
            instance.failures, instance.retry_at = 0, at
            self._move(instance, State.STOPPED, at, StopCause.RECIPE.value)
        elif instance.is_resident:
            instance.is_stale = True
            self._replace_if_stale(instance, at)

    def _replace_if_stale(self, instance: Instance, at: float) -> None:
        if instance.is_stale and instance.is_idle:
            self._drain(instance, at, StopCause.RECIPE)

    def _remove(self, instance: Instance, at: float) -> None:
        instance.is_removed = True
        model = instance.spec.id
        self._refuse_waiters(instance, rejections.removed(model))
        if not instance.is_resident:
            del self._instances[model]
        elif instance.state in {State.STARTING, State.LOADING}:
            self._stop(instance, at, cause=StopCause.REMOVED)
        elif instance.state is not State.STOPPING:
            self._drain(instance, at, StopCause.REMOVED)

    def _shut_down(self, event: ShutdownAsked) -> None:
        self._is_shutting_down, at = True, event.at
        for instance in self._instances.values():
            self._refuse_waiters(instance, rejections.shutting_down())
            if event.leaves_units:
                continue
            if instance.state in {State.STARTING, State.LOADING}:
                self._stop(instance, at, cause=StopCause.SHUTDOWN)
            elif instance.state in {State.READY, State.DRAINING}:
                self._drain(instance, at, StopCause.SHUTDOWN)

    # Room

    def _make_room(self, at: float) -> None:
        """Start what is wanted, as far as there is room; make room where there is none."""
        if self._is_shutting_down:
            return
        instances = self._instances.values()
        wanted = room.wanted(instances)
        if not wanted and not room.recallable(instances):
            return
        is_planned = self.watch.is_on and bool(wanted)
        if is_planned and not self.watch.is_fresh(at):
            self._vet(each for each in wanted if not each.is_vetted)
            if (number := self.watch.ask()) is not None:
                self._actions.append(MeasureMemory(number))
            return
        from llmstudiod.core.seating import seating, used_by_others  # slow to import: nobody waits for it at a start

        memory = self.watch.memory if is_planned else None
        is_settling = self.watch.is_settling(at) or room.is_anybody_loading(instances)
        if memory is not None and not is_settling:
            self.watch.others = used_by_others(instances, memory)
        found = seating(
            instances,
            max_instances=self.max_instances,
            memory=memory,
            settling=self.watch.others if is_settling else None,
        )
        self._arrange(found, at)

    def _arrange(self, found: "Seating", at: float) -> None:
        for instance, placement in found.start:
            self._start(instance, at, placement)
        for instance, wanted in found.stop:
            instance.evicted_for = wanted.spec.id
            self._stop(instance, at, cause=StopCause.EVICT if instance.is_idle else StopCause.ABANDONED)
        for instance in found.recall:
            self._recall(instance, at)
        self._vet(found.unknown)
        for instance, busy in found.crowded:
            self._wait_for_busy(instance, busy, at)
        for instance, error in found.hopeless:
            self._refuse_waiters(instance, error or rejections.all_pinned(instance.spec.id, self.max_instances))
        for instance in found.settling[:1]:
            if (again_at := self.watch.again(at)) is not None:
                self._set_timer(instance, Timer.MEASURE, again_at)

    def _vet(self, wanted: Iterable[Instance]) -> None:
        """Have plans checked; a recipe that cannot start must cost nobody anything."""
        for instance in wanted:
            if not instance.is_being_vetted and not (instance.is_vetted and instance.is_proven):
                instance.is_being_vetted = True
                thoroughly = instance.is_vetted and self.watch.is_on
                self._actions.append(VetPlan(instance.spec.id, instance.spec.recipe_hash, thoroughly))

    def _vetted(self, event: PlanVetted) -> None:
        instance = self._instances.get(event.model)
        if instance is None:
            return
        instance.is_being_vetted = False
        if instance.is_resident or instance.spec.recipe_hash != event.recipe_hash:
            return  # it has found a place meanwhile, or is another recipe now, which is asked for anew
        instance.is_vetted = event.failure is None
        instance.is_proven = event.is_proven
        instance.wish = event.wish
        if event.wish is not None and instance.is_second_try:
            instance.wish = replace(event.wish, margin=SECOND_TRY_MARGIN)
        if event.failure is not None and instance.waiters:
            self._fail(instance, event.at, event.failure)
            self._refuse_waiters(instance, rejections.failed(instance.spec.id, event.failure, was_serving=False))

    def _recall(self, instance: Instance, at: float) -> None:
        """Let an instance that drains for an eviction serve on: nobody needs its place any more."""
        instance.stop_cause = None
        instance.yields_to = None
        self._move(instance, State.READY, at, "its place is not needed any more")
        self._admit(instance, at)

    def _wait_for_busy(self, wanted: Instance, busy: Iterable[Instance], at: float) -> None:
        """Nothing that is unused would do: ask busy instances to drain once ``wanted`` has waited for long enough."""
        waited_since = room.oldest_arrival(wanted)
        due_at = waited_since + self._overtake_s
        if at < due_at:
            if wanted.overtake_at != due_at:
                wanted.overtake_at = due_at
                self._set_timer(wanted, Timer.OVERTAKE, due_at)
            return
        for victim in busy:
            victim.yields_to, victim.evicted_for = wanted, wanted.spec.id
            self._drain(victim, at, StopCause.EVICT)
