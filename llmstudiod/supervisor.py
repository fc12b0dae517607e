"""The one writer: feeds events to the scheduler, carries out its actions, sends their ends back as events.

Everything here runs on the event loop's thread and `Supervisor.post` never awaits, so each event is decided whole
before the next one; events posted meanwhile stand in a queue. The slow parts (planning, starting, probing, stopping)
are tasks, one start and one stop for each model, and everybody else reads immutable views.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, assert_never

from llmstudiod.adapters.planner import Plan, Planner
from llmstudiod.adapters.proc import Pulse
from llmstudiod.core.catalogue import Catalogue
from llmstudiod.core.errors import LlmstudioError, ModelNotFoundError
from llmstudiod.core.events import (
    Action,
    CancelAsked,
    Done,
    Event,
    Grant,
    LoadToo,
    MeasureMemory,
    MemoryMeasured,
    Publish,
    Refuse,
    RequestArrived,
    RequestEnded,
    ResetAsked,
    SetTimer,
    ShutdownAsked,
    SpecsChanged,
    StartUnit,
    StopUnit,
    TimerFired,
    UnitFound,
    UnloadAsked,
    VetPlan,
    WatchUnit,
)
from llmstudiod.core.ledger import Memory
from llmstudiod.core.lifecycle import InstanceView, State, Transition
from llmstudiod.core.model_spec import LifecycleDefaults, model_spec
from llmstudiod.core.placement import Wish
from llmstudiod.core.recipe import Recipe, RecipeEntry
from llmstudiod.core.rejections import shutting_down
from llmstudiod.core.scheduler import Scheduler
from llmstudiod.launchers.base import FoundUnit, Launcher, Unit
from llmstudiod.runs import Runs, Upstreams

if TYPE_CHECKING:
    from llmstudiod.core.preview import Preview

logger = logging.getLogger(__name__)

POLL_S = 0.02

Observer = Callable[[str, Transition | None, InstanceView | None], None]
"""Takes a model, its transition, or None where only something else that is shown has changed, and how it is now."""


@dataclass(slots=True)
class Ticket:
    """One request's place in the scheduler: granted (``run``), refused (``error``) or waiting."""

    number: int
    model: str
    run: int = 0
    error: LlmstudioError | None = None
    is_settled: bool = False
    waiter: asyncio.Future[None] | None = None

    def settle(self) -> None:
        """Wake whoever waits."""
        self.is_settled = True
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class Supervisor:
    """Owns the scheduler, the timers and the tasks that start and stop servers."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        launcher: Launcher,
        planner: Planner,
        upstreams: Upstreams,
        pulse: Callable[[Unit], Pulse],
        clock: Callable[[], float],
        measure: Callable[[float], Memory | None] | None = None,
    ) -> None:
        self._scheduler = scheduler
        self.measure_with(measure)
        self._launcher = launcher
        self._planner = planner
        self._clock = clock
        self._catalogue = Catalogue({}, {})
        self._defaults = LifecycleDefaults()
        self._pins: frozenset[str] = frozenset()
        self._numbers = itertools.count(1)
        self._tickets: dict[int, Ticket] = {}
        self._queue: deque[Event] = deque()
        self._is_handling = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._changes = asyncio.Event()
        self._observers: list[Observer] = []
        self._runs = Runs(
            launcher=launcher,
            planner=planner,
            upstreams=upstreams,
            pulse=pulse,
            clock=clock,
            entry=self._entry,
            view=scheduler.view,
            post=self.post,
            spawn=self.spawn,
        )

    def measure_with(self, measure: Callable[[float], Memory | None] | None) -> None:
        """Have memory planned by what this tells of a moment; it runs in a thread. None: memory is not planned."""
        self._measure = measure
        self._scheduler.watch.is_on = measure is not None

    # What others may read

    @property
    def catalogue(self) -> Catalogue:
        """The recipes in force."""
        return self._catalogue

    def view(self, model: str) -> InstanceView | None:
        """Return a frozen copy of one instance."""
        return self._scheduler.view(model)

    def views(self) -> list[InstanceView]:
        """Return frozen copies of all instances."""
        return self._scheduler.views()

    def plan_of(self, model: str) -> Plan | None:
        """Return what the present run of a model was started with."""
        run = self._runs.of(model)
        return run.plan if run else None

    def unit_of(self, model: str) -> Unit | None:
        """Return the unit of the present run of a model."""
        run = self._runs.of(model)
        return run.unit if run else None

    def socket_of(self, model: str) -> str:
        """Return where the model's server listens, running or not."""
        return self._launcher.socket_path(model)

    async def preview(self, model: str, wish: Wish | None, recipe: Recipe | None = None) -> "Preview | None":
        """Return what would happen if the model were wanted now; None where memory is not planned.

        ``recipe``: were it in force instead of the model's own.
        """
        memory = None
        if self._measure is not None:
            await self._planner.binary()
            memory = await asyncio.to_thread(self._measure, self._clock())
        if memory is None or (recipe is None and self._scheduler.view(model) is None):
            return None
        spec = model_spec(recipe, self._defaults) if recipe else None
        return self._scheduler.preview(model, wish, memory, self._clock(), spec)

    def counts(self) -> dict[str, int]:
        """Return what became of the requests since the start: see `llmstudiod.core.desk.Counts`."""
        return self._scheduler.counts()

    def observe(self, observer: Observer) -> None:
        """Have every change told from now on, at once; whoever observes must not take long, nor raise."""
        self._observers.append(observer)

    async def changed(self) -> None:
        """Return at the next change of any instance's state."""
        await self._changes.wait()

    # What others may ask

    def use_catalogue(self, catalogue: Catalogue, defaults: LifecycleDefaults, *, max_instances: int) -> None:
        """Put a set of recipes in force; models whose recipe changed are replaced when they are idle."""
        self._catalogue, self._defaults = catalogue, defaults
        self._scheduler.max_instances = max_instances
        self._put_specs()

    def pin(self, models: frozenset[str]) -> None:
        """Never evict nor idle-unload these, as if their recipes said so, and from now on no others."""
        self._pins = models
        self._put_specs()

    def _put_specs(self) -> None:
        specs = {model: model_spec(entry.recipe, self._defaults) for model, entry in self._catalogue.entries.items()}
        for model in self._pins & specs.keys():
            specs[model] = replace(specs[model], is_pinned=True)
        self.post(SpecsChanged(self._clock(), specs))

    def ready_run(self, model: str) -> int | None:
        """Return the run on which `ask` would be granted at this moment, or None when it would have to wait."""
        return self._scheduler.ready_run(model)

    def ask(
        self, model: str, *, cost_tokens: int | None = None, is_load: bool = False, is_along: bool = False
    ) -> Ticket:
        """Ask for a place; the ticket may be settled on return. Whoever asks must `end` it, whatever happens."""
        ticket = self._new_ticket(model)
        self.post(RequestArrived(self._clock(), ticket.number, model, cost_tokens, is_load, is_along))
        return ticket

    async def settled(self, ticket: Ticket) -> None:
        """Return when the ticket is granted or refused."""
        if not ticket.is_settled:
            if ticket.waiter is None:
                ticket.waiter = asyncio.get_running_loop().create_future()
            await asyncio.shield(ticket.waiter)

    def end(self, ticket: Ticket) -> None:
        """Give a ticket back: the exchange is over, or its client has left."""
        if self._tickets.pop(ticket.number, None) is not None:
            self.post(RequestEnded(self._clock(), ticket.number))

    async def load(self, model: str) -> None:
        """Return when the model is ready.

        Raises:
            LlmstudioError: Why it cannot be.
        """
        await self._fulfil(self.ask(model, is_load=True))

    def start_load(self, model: str, *, is_along: bool = False) -> None:
        """Load a model without waiting for it; a failure is logged and shown in its status."""
        _ = self.spawn(self._load_quietly(model, is_along=is_along), f"load {model}")

    async def _load_quietly(self, model: str, *, is_along: bool) -> None:
        try:
            await self._fulfil(self.ask(model, is_load=True, is_along=is_along))
        except LlmstudioError as error:
            logger.warning("%s", error.message)

    async def unload(self, model: str, *, is_forced: bool = False) -> None:
        """Return when the model is stopped; without ``is_forced`` requests in flight are finished first."""
        ticket = self._new_ticket(model)
        self.post(UnloadAsked(self._clock(), ticket.number, model, is_forced))
        await self._fulfil(ticket)

    async def cancel(self, model: str) -> None:
        """Give up a load; what waits for it is refused.

        Raises:
            LlmstudioError: It is not being loaded.
        """
        ticket = self._new_ticket(model)
        self.post(CancelAsked(self._clock(), ticket.number, model))
        await self._fulfil(ticket)

    async def reset(self, model: str) -> None:
        """Forget a model's failures."""
        ticket = self._new_ticket(model)
        self.post(ResetAsked(self._clock(), ticket.number, model))
        await self._fulfil(ticket)

    def _new_ticket(self, model: str) -> Ticket:
        ticket = Ticket(next(self._numbers), model)
        self._tickets[ticket.number] = ticket
        return ticket

    async def _fulfil(self, ticket: Ticket) -> None:
        try:
            await self.settled(ticket)
        finally:
            self.end(ticket)
        if ticket.error is not None:
            raise ticket.error

    async def adopt(self, found: FoundUnit) -> None:
        """Go on with a server that an earlier daemon started."""
        model = found.unit.model_id
        placement = await asyncio.to_thread(self._planner.learning.recall, found.unit.invocation_id)
        self._runs.found(found)
        self.post(UnitFound(self._clock(), model, found.recipe_hash, placement))

    async def leave(self, *, within_s: float) -> None:
        """Finish what is asked, refuse what is not done in time, and leave the servers running."""
        try:
            async with asyncio.timeout(within_s):
                while self._tickets:  # noqa: ASYNC110 - the end of a ticket is the hot path, and tells nobody
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            logger.warning("%d requests were not done within %.0f s", len(self._tickets), within_s)
        self.post(ShutdownAsked(self._clock(), leaves_units=True))
        for ticket in list(self._tickets.values()):  # loads and unloads whose end the next daemon will see
            if not ticket.is_settled:
                ticket.error = shutting_down()
                ticket.settle()
        await self._cancel_tasks()

    async def shut_down(self) -> None:
        """Answer every waiter, drain and stop every model; return when no process is left."""
        self.post(ShutdownAsked(self._clock()))
        while not self._scheduler.is_quiet():
            await self.changed()
        await self._cancel_tasks()

    async def _cancel_tasks(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # The one writer

    def post(self, event: Event) -> None:
        """Take an event; it and everything it leads to is decided before this returns, in order."""
        self._queue.append(event)
        if self._is_handling:
            return
        self._is_handling = True
        try:
            while self._queue:
                for action in self._scheduler.handle(self._queue.popleft()):
                    self._perform(action)
        finally:
            self._is_handling = False

    def _perform(self, action: Action) -> None:  # noqa: C901 - one arm for each kind of action
        match action:
            case Grant():
                ticket = self._tickets.get(action.ticket)
                if ticket is not None:
                    ticket.run = action.run
                    ticket.settle()
            case Refuse():
                self._settle(action.ticket, action.error)
            case Done():
                self._settle(action.ticket, None)
            case SetTimer():
                delay = max(0.0, action.at - self._clock())
                asyncio.get_running_loop().call_later(delay, self._timer_fired, action)
            case VetPlan():
                self._runs.vet(action)
            case StartUnit():
                self._runs.start(action)
            case LoadToo():
                self.start_load(action.model, is_along=True)
            case WatchUnit():
                self._runs.watch(action)
            case StopUnit():
                self._runs.stop(action)
            case Publish():
                self._publish(action)
            case MeasureMemory():
                _ = self.spawn(self._measure_memory(action.number), "measure memory")
            case _:
                assert_never(action)

    def _settle(self, number: int, error: LlmstudioError | None) -> None:
        ticket = self._tickets.get(number)
        if ticket is not None:
            ticket.error = error
            ticket.settle()

    def _timer_fired(self, timer: SetTimer) -> None:
        self.post(TimerFired(self._clock(), timer.model, timer.run, timer.timer))

    def _publish(self, action: Publish) -> None:
        changes, self._changes = self._changes, asyncio.Event()
        changes.set()
        step = action.transition  # not the instance's last one: one event may bring several
        shown = self._scheduler.view(action.model)
        for observer in self._observers:
            observer(action.model, step, shown)
        if step is None:
            return
        level = logging.WARNING if step.new is State.FAILED else logging.INFO
        logger.log(level, "%s: %s -> %s: %s", action.model, step.old, step.new, step.cause)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a task that we own: it is kept until it ends, and a bug in it is logged, not lost."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (bug := task.exception()) is not None:
            logger.error("%s: internal error", task.get_name(), exc_info=bug)

    async def _measure_memory(self, number: int) -> None:
        memory = None
        try:
            if self._measure is not None:
                with contextlib.suppress(LlmstudioError):  # whoever plans a start tells what is wrong with it
                    await self._planner.binary()  # it says which GPUs count
                memory = await asyncio.to_thread(self._measure, self._clock())
        finally:
            self.post(MemoryMeasured(self._clock(), number, memory))

    def _entry(self, model: str) -> RecipeEntry:
        entry = self._catalogue.entries.get(model)
        if entry is None:
            raise ModelNotFoundError(f"the recipe of '{model}' was removed")
        return entry
