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
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, assert_never

from llmstudiod.adapters.planner import Plan, Planner
from llmstudiod.adapters.probe import NotOurs, wait_ready
from llmstudiod.core.catalogue import Catalogue
from llmstudiod.core.errors import LlmstudioError, ModelNotFoundError
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
from llmstudiod.core.lifecycle import Failure, InstanceView, State
from llmstudiod.core.model_spec import LifecycleDefaults, model_spec
from llmstudiod.core.placement import Wish
from llmstudiod.core.reasons import explain_exit
from llmstudiod.core.recipe import RecipeEntry, recipe_hash
from llmstudiod.core.scheduler import Scheduler
from llmstudiod.launchers.base import FoundUnit, Launcher, Unit

if TYPE_CHECKING:
    from llmstudiod.core.preview import Preview

logger = logging.getLogger(__name__)

PROGRESS_PERIOD_S = 1.0
POLL_S = 0.02
LOG_LINES, LOG_TRIES, LOG_LAG_S = 400, 4, 0.5  # a load writes some fifty, and the journal is late
_INTERNAL = Failure("internal", "an internal error, see the daemon's log")


class Upstreams(Protocol):
    """The proxy's connections, as far as the supervisor must steer them."""

    def open(self, model: str, run: int, socket_path: str) -> None:
        """Allow connections to this run's socket."""

    def close(self, model: str, run: int) -> None:
        """Cut every connection of this run; exchanges in flight end with an error."""


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


@dataclass(slots=True)
class _Running:
    """What belongs to the present run of a model outside the core."""

    run: int
    task: asyncio.Task[None] | None = None
    plan: Plan | None = None
    alias: str | None = None  # the name that the server knows itself by; None: a recipe of before said which
    unit: Unit | None = None
    verdict: Failure | None = None  # what we found out ourselves; it explains the end that we then bring about
    launched: asyncio.Event = field(default_factory=asyncio.Event)


class Supervisor:
    """Owns the scheduler, the timers and the tasks that start and stop servers."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        launcher: Launcher,
        planner: Planner,
        upstreams: Upstreams,
        progress_mark: Callable[[Unit], object],
        clock: Callable[[], float],
        measure: Callable[[float], Memory | None] | None = None,
    ) -> None:
        self._scheduler = scheduler
        self.measure_with(measure)
        self._launcher = launcher
        self._planner = planner
        self._upstreams = upstreams
        self._progress_mark = progress_mark
        self._clock = clock
        self._catalogue = Catalogue({}, {})
        self._numbers = itertools.count(1)
        self._tickets: dict[int, Ticket] = {}
        self._queue: deque[Event] = deque()
        self._is_handling = False
        self._running: dict[str, _Running] = {}
        self._found: dict[str, FoundUnit] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changes = asyncio.Event()

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
        running = self._running.get(model)
        return running.plan if running else None

    def unit_of(self, model: str) -> Unit | None:
        """Return the unit of the present run of a model."""
        running = self._running.get(model)
        return running.unit if running else None

    def socket_of(self, model: str) -> str:
        """Return where the model's server listens, running or not."""
        return self._launcher.socket_path(model)

    async def preview(self, model: str, wish: Wish | None) -> "Preview | None":
        """Return what would happen if the model were wanted now; None where memory is not planned."""
        memory = None
        if self._measure is not None:
            await self._planner.binary()
            memory = await asyncio.to_thread(self._measure, self._clock())
        if memory is None or self._scheduler.view(model) is None:
            return None
        return self._scheduler.preview(model, wish, memory, self._clock())

    async def changed(self) -> None:
        """Return at the next change of any instance's state."""
        await self._changes.wait()

    # What others may ask

    def use_catalogue(self, catalogue: Catalogue, defaults: LifecycleDefaults, *, max_instances: int) -> None:
        """Put a set of recipes in force; models whose recipe changed are replaced when they are idle."""
        self._catalogue = catalogue
        self._scheduler.max_instances = max_instances
        specs = {model: model_spec(entry.recipe, defaults) for model, entry in catalogue.entries.items()}
        self.post(SpecsChanged(self._clock(), specs))

    def ready_run(self, model: str) -> int | None:
        """Return the run on which `ask` would be granted at this moment, or None when it would have to wait."""
        return self._scheduler.ready_run(model)

    def ask(
        self, model: str, *, cost_tokens: int | None = None, is_load: bool = False, is_along: bool = False
    ) -> Ticket:
        """Ask for a place; the ticket may be settled on return. Whoever asks must `end` it, whatever happens."""
        ticket = Ticket(next(self._numbers), model)
        self._tickets[ticket.number] = ticket
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
        ticket = Ticket(next(self._numbers), model)
        self._tickets[ticket.number] = ticket
        self.post(UnloadAsked(self._clock(), ticket.number, model, is_forced))
        await self._fulfil(ticket)

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
        self._found[model] = found
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
                _ = self.spawn(self._vet(action), f"check {action.model}")
            case StartUnit():
                running = self._running[action.model] = _Running(action.run)
                running.task = self.spawn(self._start(action, running), f"start {action.model}")
            case LoadToo():
                self.start_load(action.model, is_along=True)
            case WatchUnit():
                running = self._running[action.model] = self._adopted(action)
                running.task = self.spawn(self._watch(action.model, running), f"watch {action.model}")
            case StopUnit():
                _ = self.spawn(self._stop(action), f"stop {action.model}")
            case Publish():
                self._publish(action)
            case MeasureMemory():
                _ = self.spawn(self._measure_memory(action.number), "measure memory")
            case _:
                assert_never(action)

    def _adopted(self, action: WatchUnit) -> _Running:
        found = self._found.pop(action.model)
        entry = self._catalogue.entries[action.model]
        is_same = found.recipe_hash == recipe_hash(entry.recipe)
        running = _Running(action.run, unit=found.unit, alias=entry.recipe.alias if is_same else None)
        running.launched.set()
        return running

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

    # Starting and stopping

    async def _measure_memory(self, number: int) -> None:
        memory = None
        try:
            if self._measure is not None:
                with contextlib.suppress(LlmstudioError):  # whoever plans a start tells what is wrong with it
                    await self._planner.binary()  # it says which GPUs count
                memory = await asyncio.to_thread(self._measure, self._clock())
        finally:
            self.post(MemoryMeasured(self._clock(), number, memory))

    async def _vet(self, action: VetPlan) -> None:
        """Make the plan without carrying it out."""
        failure: Failure | None = _INTERNAL
        wish, is_proven = None, True
        try:
            wish, is_proven = await self._planner.vet(self._entry(action.model), is_thorough=action.is_thorough)
            failure = None
        except LlmstudioError as error:
            failure = _failure_of(error)
        finally:
            self.post(PlanVetted(self._clock(), action.model, action.recipe_hash, failure, wish, is_proven))

    async def _start(self, action: StartUnit, running: _Running) -> None:
        """Plan and start, then watch: the whole life of one run."""
        model = action.model
        try:
            entry = self._entry(model)
            running.plan = await self._planner.plan(entry, action.placement)
            running.alias = entry.recipe.alias
            running.unit = await self._launcher.start(running.plan.request)
        except LlmstudioError as error:
            self._failed(model, running.run, _failure_of(error))
            return
        except Exception:  # a bug must fail the start, not leave its waiters hanging
            self._failed(model, running.run, _INTERNAL)
            raise
        finally:
            running.launched.set()
        logger.info("%s: %s was started, pid %d", model, running.unit.name, running.unit.pid)
        self.post(UnitStarted(self._clock(), model, running.run))
        if self._launcher.outlives_us and action.placement is not None:
            remember = self._planner.learning.remember
            await asyncio.to_thread(remember, running.unit.invocation_id, action.placement)
        await self._watch(model, running)

    async def _watch(self, model: str, running: _Running) -> None:
        """Wait until a unit that runs is ready, then for its end."""
        unit = running.unit
        assert unit is not None
        readiness = self.spawn(self._await_ready(model, running), f"probe {model}")
        try:
            end = await self._launcher.wait(unit)
        except Exception:  # whatever it is, a server that nobody watches must not be taken for a ready one
            await self._stop_unit(model, is_forced=True)
            self._failed(model, running.run, _INTERNAL)
            raise
        finally:
            readiness.cancel()
            self._upstreams.close(model, running.run)
        failure = running.verdict or explain_exit(result=end.result, code=end.code, signal=end.signal, lines=end.lines)
        self._failed(model, running.run, failure)

    def _entry(self, model: str) -> RecipeEntry:
        entry = self._catalogue.entries.get(model)
        if entry is None:
            raise ModelNotFoundError(f"the recipe of '{model}' was removed")
        return entry

    def _failed(self, model: str, run: int, failure: Failure) -> None:
        self.post(UnitFailed(self._clock(), model, run, failure))

    async def _await_ready(self, model: str, running: _Running) -> None:
        assert running.unit is not None
        watcher = self.spawn(self._watch_progress(model, running.run, running.unit), f"progress {model}")
        try:
            socket_path = self._launcher.socket_path(model)
            facts = await wait_ready(socket_path, alias=running.alias)
        finally:
            watcher.cancel()
        if isinstance(facts, NotOurs):
            message = f"'{facts.alias}' answers at its socket instead of '{running.alias}'"
            running.verdict = Failure("socket", message, "is another server using this socket?")
            await self._stop_unit(model, is_forced=True)
            return
        self._upstreams.open(model, running.run, socket_path)
        self.post(BecameReady(self._clock(), model, running.run, facts))
        await self._learn(running.unit, running.plan)

    async def _learn(self, unit: Unit, plan: Plan | None) -> None:
        """Keep what a model needed, once for each file, settings and build: it counts instead of the estimate."""
        if plan is None or plan.wish is None or plan.placement is None or plan.wish.correction.is_of_a_run:
            return
        for _ in range(LOG_TRIES):
            lines = await self._launcher.run_lines(unit, limit=LOG_LINES)
            if any("listening on" in line for line in lines):  # all of the load has been logged then
                await asyncio.to_thread(self._planner.learn, plan, lines, unit.pid)
                return
            await asyncio.sleep(LOG_LAG_S)

    async def _watch_progress(self, model: str, run: int, unit: Unit) -> None:
        """Tell the scheduler whenever something moves in a loading server, so that only a standstill counts."""
        last: object = None
        while True:
            mark = await asyncio.to_thread(self._progress_mark, unit)
            if mark != last:
                last = mark
                self.post(LoadProgressed(self._clock(), model, run))
            await asyncio.sleep(PROGRESS_PERIOD_S)

    async def _stop(self, action: StopUnit) -> None:
        """Stop a run, also one that is only just being started."""
        running = self._running.get(action.model)
        self._upstreams.close(action.model, action.run)
        if running is not None and running.task is not None:
            if running.plan is None:
                running.task.cancel()  # planning can be dropped
            # A systemd-run under way is left to finish, so that there is a unit to stop.
            launched = self.spawn(_wait_for(running.launched), f"launch of {action.model}")
            await asyncio.wait({running.task, launched}, return_when=asyncio.FIRST_COMPLETED)
            launched.cancel()
        await self._stop_unit(action.model, is_forced=action.is_forced)
        if running is not None and running.task is not None:
            running.task.cancel()
        self.post(UnitGone(self._clock(), action.model, action.run))

    async def _stop_unit(self, model: str, *, is_forced: bool) -> None:
        """Stop a model's unit. A failure is told and no more: whoever waits for the end must not wait for ever."""
        try:
            await self._launcher.stop(model, is_forced=is_forced)
        except LlmstudioError as error:
            logger.error("%s: cannot be stopped: %s", model, error)  # noqa: TRY400 - a user's error, no bug
        except Exception:
            logger.exception("%s: cannot be stopped", model)


async def _wait_for(event: asyncio.Event) -> None:
    await event.wait()


def _failure_of(error: LlmstudioError) -> Failure:
    message = error.message.partition(": ")[2] if error.message.startswith("cannot load '") else error.message
    lines: Mapping[str, Any] = error.details
    return Failure(str(lines.get("failure") or error.kind), message, error.hint, tuple(lines.get("lines", ())))
