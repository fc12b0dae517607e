"""Who runs, who waits, who goes: the pure heart of the daemon.

`Scheduler.handle` takes one event and returns the actions that follow. The supervisor is its only caller.
In every moment each request is in exactly one place: waiting in one instance, in flight in one instance, or gone.
Who has to go when there is not room for all is chosen in `llmstudiod.core.room`.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, assert_never

from llmstudiod.core import rejections, room
from llmstudiod.core.desk import Desk
from llmstudiod.core.events import (
    Action,
    BecameReady,
    CancelAsked,
    Done,
    Event,
    LoadProgressed,
    MeasureMemory,
    MemoryMeasured,
    PlanVetted,
    Refuse,
    RequestArrived,
    RequestEnded,
    ResetAsked,
    ShutdownAsked,
    SpecsChanged,
    StoriesRead,
    Timer,
    TimerFired,
    UnitFailed,
    UnitFound,
    UnitFoundFailed,
    UnitGone,
    UnitHung,
    UnitStarted,
    UnloadAsked,
    VetPlan,
    Warned,
)
from llmstudiod.core.ledger import Memory
from llmstudiod.core.life import Life
from llmstudiod.core.lifecycle import STORY_LENGTH, Instance, InstanceView, ModelSpec, State, StopCause, view
from llmstudiod.core.memory_watch import MemoryWatch
from llmstudiod.core.placement import Wish

if TYPE_CHECKING:
    from llmstudiod.core.preview import Preview
    from llmstudiod.core.seating import Seating

OVERTAKE_S = 2.0
OfRun = TypeVar("OfRun", UnitStarted, LoadProgressed, Warned, BecameReady, UnitFailed, UnitHung, UnitGone, TimerFired)

SECOND_TRY_MARGIN = 0.1


class Scheduler:
    """Holds every instance; changed by `handle` alone."""

    def __init__(
        self, *, max_instances: int = 0, overtake_s: float = OVERTAKE_S, chance: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.max_instances = max_instances
        self._overtake_s = overtake_s
        self._desk = Desk()
        self._is_shutting_down = False
        self._seen: object = None
        self._actions: list[Action] = []
        self.watch = MemoryWatch()
        self._life = Life(self._desk, self.watch, chance)
        self._instances = self._life.instances

    # What others may see

    def view(self, model: str) -> InstanceView | None:
        """Return a frozen copy of one instance, or None for an unknown model."""
        instance = self._instances.get(model)
        return None if instance is None else view(instance)

    def views(self) -> list[InstanceView]:
        """Return frozen copies of all instances, in the order of their ids."""
        return [view(instance) for _, instance in sorted(self._instances.items())]

    def counts(self) -> dict[str, int]:
        """Return what became of the requests since the start, by name: see `llmstudiod.core.desk.Counts`."""
        return self._desk.counted()

    def is_quiet(self) -> bool:
        """Whether no instance holds a process."""
        return not any(instance.is_resident for instance in self._instances.values())

    def preview(
        self, model: str, wish: Wish | None, memory: Memory, at: float, spec: ModelSpec | None = None
    ) -> "Preview":
        """Return what would happen if the model, with another ``spec`` it may be, were wanted now; changes nothing."""
        from llmstudiod.core.preview import preview

        instances = [each for each in self._instances.values() if spec is None or each.spec.id != model]
        instances += [Instance(spec, at)] if spec else []
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
        self._actions = self._desk.actions = self._life.actions = actions
        match event:
            case RequestArrived():
                self._arrive(event)
            case RequestEnded():
                self._end(event)
            case UnloadAsked():
                self._unload(event)
            case CancelAsked():
                self._cancel(event)
            case ResetAsked():
                self._reset(event)
            case PlanVetted():
                self._vetted(event)
            case UnitStarted():
                self._of_run(event, self._life.started)
            case LoadProgressed():
                self._of_run(event, self._life.progressed)
            case Warned():
                self._of_run(event, self._life.warned)
            case BecameReady():
                self._of_run(event, self._life.became_ready)
            case UnitFailed():
                self._of_run(event, self._life.unit_failed)
            case UnitHung():
                self._of_run(event, self._life.hung)
            case UnitGone():
                self._of_run(event, self._life.gone)
            case TimerFired():
                self._of_run(event, self._life.timer_fired)
            case SpecsChanged():
                self._change_specs(event)
            case UnitFound():
                self._life.adopt(event)
            case UnitFoundFailed():
                self._life.found_failed(event)
            case StoriesRead():
                self._life.past = event.failures
                for model, story in event.stories.items():
                    if (instance := self._instances.get(model)) is not None:
                        instance.story = deque([*story, *instance.story], maxlen=STORY_LENGTH)
            case MemoryMeasured():
                self.watch.answer(event)
            case ShutdownAsked():
                self._shut_down(event)
            case _:
                assert_never(event)
        # Whatever happened may have made a wish, a place or an idle instance; asking again changes nothing.
        # Nearly always nobody waits and nobody drains, and this is asked twice for each request.
        if (self._desk.is_anybody_waiting or self._life.n_draining) and not self._is_as_before(event):
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
            self._desk.turn_away(event, refusal)
            return
        assert instance is not None
        if not instance.waiters and not instance.is_resident:
            instance.yields_to = None  # for whom it once made room is long past
        self._desk.arrive(instance, event)

    def _end(self, event: RequestEnded) -> None:
        if instance := self._desk.leave(event.ticket):
            if not instance.waiters:
                instance.is_vetted = instance.is_proven = False  # the next who asks may come much later
                self._life.see_to_restart(instance)  # nobody did while somebody waited
            self._desk.admit(instance, event.at)
        elif instance := self._desk.end(event.ticket):
            instance.idle_since = instance.last_used = event.at
            if instance.state is State.DRAINING and not instance.in_flight:
                self._life.stop(instance, event.at)
            self._desk.admit(instance, event.at)
            self._life.replace_if_stale(instance, event.at)

    # Operators

    def _unload(self, event: UnloadAsked) -> None:
        instance = self._instances.get(event.model)
        if instance is None:
            self._actions.append(Refuse(event.ticket, rejections.no_model(event.model)))
            return
        unloaded = rejections.unloaded(event.model)
        if not instance.is_resident:
            self._life.clear(instance, event.at)
            self._life.give_up(instance, event.at, StopCause.UNLOAD, unloaded)
            self._actions.append(Done(event.ticket))
            return
        instance.unload_tickets.append(event.ticket)
        self._desk.refuse_all(instance, unloaded)
        if instance.state is State.STOPPING:
            instance.stop_cause = StopCause.UNLOAD  # for what it went before, it might be started again by itself
            return
        if event.is_forced or instance.state in {State.STARTING, State.LOADING}:
            self._life.stop(instance, event.at, cause=StopCause.UNLOAD, is_forced=event.is_forced)
        else:
            self._life.drain(instance, event.at, StopCause.UNLOAD)

    def _cancel(self, event: CancelAsked) -> None:
        """Give a load up, also one that waits for its place; what is ready already is nobody's load."""
        instance = self._instances.get(event.model)
        if instance is None:
            self._actions.append(Refuse(event.ticket, rejections.no_model(event.model)))
        elif instance.state in {State.STARTING, State.LOADING}:
            self._desk.refuse_all(instance, rejections.cancelled(event.model))
            instance.unload_tickets.append(event.ticket)
            self._life.stop(instance, event.at, cause=StopCause.CANCELLED)
        elif instance.waiters and not instance.is_resident:
            self._life.give_up(instance, event.at, StopCause.CANCELLED, rejections.cancelled(event.model))
            self._actions.append(Done(event.ticket))
        else:
            self._actions.append(Refuse(event.ticket, rejections.nothing_to_cancel(instance)))

    def _reset(self, event: ResetAsked) -> None:
        instance = self._instances.get(event.model)
        if instance is None:
            self._actions.append(Refuse(event.ticket, rejections.no_model(event.model)))
            return
        was_down_by_itself = instance.is_down_by_itself
        self._life.clear(instance, event.at)
        self._actions.append(Done(event.ticket))
        if was_down_by_itself:
            self._life.load_if_always(instance)

    def _change_specs(self, event: SpecsChanged) -> None:
        for model, spec in event.specs.items():
            instance = self._instances.get(model)
            if instance is None:
                self._instances[model] = Instance(spec, since=event.at)
                continue
            old, instance.spec = instance.spec, spec
            if instance.is_resident and (old.idle_timeout_s, old.is_pinned) != (spec.idle_timeout_s, spec.is_pinned):
                self._life.set_idle_timer(instance, event.at)  # otherwise the one that is set is the right one
            if instance.is_removed:
                self._put_back(instance, event.at)
            if old.restart is not spec.restart:
                self._life.change_restart(instance, event.at)
            self._life.forget_plan(instance, event.at)
            if old.recipe_hash != spec.recipe_hash:
                instance.is_vetted = instance.is_proven = False
                self._outdate(instance, event.at)
        for model in [model for model in self._instances if model not in event.specs]:
            self._remove(self._instances[model], event.at)

    def _outdate(self, instance: Instance, at: float) -> None:
        if instance.is_down_by_itself:
            self._life.clear(instance, at, StopCause.RECIPE.value)
            self._life.load_if_always(instance)
        else:
            instance.refused = None
            self._life.replace_if_stale(instance, at)

    def _put_back(self, instance: Instance, at: float) -> None:
        """Let what was removed, and drains, serve on; under another recipe it is replaced as any other."""
        instance.is_removed = False
        if instance.state is not State.DRAINING or instance.stop_cause is not StopCause.REMOVED:
            return
        if instance.unload_tickets or instance.failure is not None:  # why it drained before it was removed
            instance.stop_cause = StopCause.UNLOAD if instance.unload_tickets else StopCause.HUNG
        else:
            self._life.recall(instance, at, "its recipe is there again")
            self._life.replace_if_stale(instance, at)

    def _remove(self, instance: Instance, at: float) -> None:
        instance.is_removed = True
        model = instance.spec.id
        self._desk.refuse_all(instance, rejections.removed(model))
        if not instance.is_resident:
            del self._instances[model]
        elif instance.state in {State.STARTING, State.LOADING}:
            self._life.stop(instance, at, cause=StopCause.REMOVED)
        elif instance.state is not State.STOPPING:
            self._life.drain(instance, at, StopCause.REMOVED)

    def _shut_down(self, event: ShutdownAsked) -> None:
        self._is_shutting_down, at = True, event.at
        for instance in self._instances.values():
            self._desk.refuse_all(instance, rejections.shutting_down())
            if event.leaves_units:
                continue
            if instance.state in {State.STARTING, State.LOADING}:
                self._life.stop(instance, at, cause=StopCause.SHUTDOWN)
            elif instance.state in {State.READY, State.DRAINING}:
                self._life.drain(instance, at, StopCause.SHUTDOWN)

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
            self._life.start(instance, at, placement)
        for instance, wanted in found.stop:
            instance.evicted_for = wanted.spec.id
            self._life.stop(instance, at, cause=StopCause.EVICT if instance.is_idle else StopCause.ABANDONED)
        for instance in found.recall:
            self._life.recall(instance, at)
        self._vet(found.unknown)
        for instance, busy in found.crowded:
            self._wait_for_busy(instance, busy, at)
        for instance, error in found.hopeless:
            self._life.refuse(instance, at, error or rejections.all_pinned(instance.spec.id, self.max_instances))
        for instance in found.settling[:1]:
            if (again_at := self.watch.again(at)) is not None:
                self._life.set_timer(instance, Timer.MEASURE, again_at)

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
            self._life.fail(instance, event.at, event.failure, was_serving=False)

    def _wait_for_busy(self, wanted: Instance, busy: Iterable[Instance], at: float) -> None:
        """Nothing that is unused would do: ask busy instances to drain once ``wanted`` has waited for long enough."""
        waited_since = room.oldest_arrival(wanted)
        due_at = waited_since + self._overtake_s
        if at < due_at:
            if wanted.overtake_at != due_at:
                wanted.overtake_at = due_at
                self._life.set_timer(wanted, Timer.OVERTAKE, due_at)
            return
        for victim in busy:
            victim.yields_to, victim.evicted_for = wanted, wanted.spec.id
            self._life.drain(victim, at, StopCause.EVICT)
