"""A world for the scheduler to live in: units that start, load, fail and stop on a virtual clock, and its laws.

`World` feeds events to `Scheduler.handle`, performs the actions that come back, and keeps its own books of tickets and
processes. After each event it holds the scheduler's account against them; a difference is an `AssertionError`, so
every test that moves a world checks the laws too.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, assert_never

from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.events import (
    Action,
    BecameReady,
    CancelAsked,
    Done,
    Event,
    Grant,
    LoadProgressed,
    LoadToo,
    MeasureMemory,
    PlanVetted,
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
    Timer,
    TimerFired,
    UnitFailed,
    UnitFound,
    UnitGone,
    UnitHung,
    UnitStarted,
    UnloadAsked,
    VetPlan,
    WatchUnit,
)
from llmstudiod.core.lifecycle import Failure, InstanceView, ModelSpec, Restart, State, StopCause, UpstreamFacts
from llmstudiod.core.scheduler import Scheduler

LOAD_S = 3.0
"""Seconds from the start of a unit until it is ready, unless a test scripts it otherwise."""

OOM = Failure("oom_vram", "the GPU's memory is too small for it", "lower n_gpu_layers", ("cudaMalloc failed",))
NO_FILE = Failure("model_not_found", "there is no such file", "see model_path", never_ran=True)
EXITED = Failure("exited", "it ended by itself without an error")
CRASH = Failure("crash", "llama-server crashed (signal 11)")
HUNG = Failure("hung", "it does not answer any more")
NEVER_CUTS = {StopCause.EVICT, StopCause.IDLE, StopCause.ABANDONED, StopCause.RECIPE}
"""Causes for which no request in flight may be cut short."""


class Place(StrEnum):
    """Where a ticket is; it only ever moves down this list."""

    WAITING = "waiting"
    IN_FLIGHT = "in flight"
    SETTLED = "settled"


@dataclass(slots=True)
class Ticket:
    """A request, a manual load or a manual unload, as whoever holds it sees it."""

    model: str
    is_request: bool
    is_unload: bool = False
    place: Place = Place.WAITING
    run: int = 0
    error: LlmstudioError | None = None
    settled_at: float | None = None
    granted_at: float | None = None


@dataclass(slots=True)
class Script:
    """How a model's unit behaves from its next start on. Seconds; ``load_s`` None is a load that never ends."""

    start_s: float = 1.0
    load_s: float | None = 2.0
    stop_s: float = 1.0
    failure: Failure | None = None
    vet_s: float = 0.0  # 0: the check is done before anything else happens
    vet_failure: Failure | None = None
    facts: UpstreamFacts = field(default_factory=lambda: UpstreamFacts(n_parallel=2, n_ctx=1000))


@dataclass(slots=True)
class World:
    """The scheduler and everything around it."""

    max_instances: int = 0
    scripts: dict[str, Script] = field(default_factory=dict)
    now: float = 100.0
    tickets: dict[int, Ticket] = field(default_factory=dict)
    starts: list[StartUnit] = field(default_factory=list)
    stops: list[StopUnit] = field(default_factory=list)
    alive: dict[str, int] = field(default_factory=dict)  # model -> the run whose process exists
    specs: dict[str, ModelSpec] = field(default_factory=dict)
    scheduler: Scheduler = field(init=False)
    _is_shutting_down: bool = False
    _vetted: list[Event] = field(default_factory=list)
    _being_vetted: set[str] = field(default_factory=set)
    _due: list[tuple[float, int, Event]] = field(default_factory=list)
    _numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    shown_anew: list[str] = field(default_factory=list)  # what was published without a transition

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(max_instances=self.max_instances)

    # What a test does

    def use(self, *specs: ModelSpec, max_instances: int | None = None) -> None:
        """Put a set of recipes in force."""
        self.specs = {spec.id: spec for spec in specs}
        if max_instances is not None:
            self.max_instances = self.scheduler.max_instances = max_instances
        self.feed(SpecsChanged(self.now, dict(self.specs)))

    def script(self, model: str) -> Script:
        """Return the script of a model, to be changed."""
        return self.scripts.setdefault(model, Script())

    def ask(self, model: str, cost_tokens: int | None = None) -> int:
        """Let a request arrive; return its ticket."""
        number = self._new_ticket(Ticket(model, is_request=True))
        self.feed(RequestArrived(self.now, number, model, cost_tokens))
        return number

    def load(self, model: str) -> int:
        """Let an operator load a model; return the ticket."""
        number = self._new_ticket(Ticket(model, is_request=False))
        self.feed(RequestArrived(self.now, number, model, is_load=True))
        return number

    def unload(self, model: str, *, is_forced: bool = False) -> int:
        """Let an operator unload a model; return the ticket."""
        number = self._new_ticket(Ticket(model, is_request=False, is_unload=True))
        self.feed(UnloadAsked(self.now, number, model, is_forced))
        return number

    def cancel(self, model: str) -> int:
        """Let an operator give a load up; return the ticket."""
        number = self._new_ticket(Ticket(model, is_request=False, is_unload=True))
        self.feed(CancelAsked(self.now, number, model))
        return number

    def reset(self, model: str) -> int:
        """Let an operator say that a failure is mended; return the ticket."""
        number = self._new_ticket(Ticket(model, is_request=False, is_unload=True))
        self.feed(ResetAsked(self.now, number, model))
        return number

    def hang(self, model: str) -> None:
        """Let a model's process be there and answer nothing any more."""
        self.feed(UnitHung(self.now, model, self.alive[model], HUNG))

    def mend_what_is_tried_for_ever(self) -> None:
        """Let those that are to be up always load from now on, and find room: else they are tried again for ever."""
        for model, spec in self.specs.items():
            if spec.restart is Restart.ALWAYS:
                self.scripts[model] = Script(load_s=0.0, facts=self.script(model).facts)  # within any stall time-out
        self.use(*self.specs.values(), max_instances=0)

    def end(self, *numbers: int) -> None:
        """End exchanges, or let clients leave that still wait."""
        for number in numbers:
            ticket = self.tickets[number]
            if ticket.place is not Place.SETTLED:
                ticket.place = Place.SETTLED
                ticket.settled_at = self.now
            self.feed(RequestEnded(self.now, number))

    def progress(self, model: str, progress: float | None = None) -> None:
        """Let a loading server move."""
        self.feed(LoadProgressed(self.now, model, self.alive[model], progress))

    def crash(self, model: str, failure: Failure = CRASH) -> None:
        """Let a model's process end without being asked to."""
        self.feed(UnitFailed(self.now, model, self.alive[model], failure))

    def shut_down(self) -> None:
        """Stop everything."""
        self.feed(ShutdownAsked(self.now))

    def advance(self, seconds: float) -> None:
        """Let time pass, with everything that falls due in it."""
        until = self.now + seconds
        while self._due and self._due[0][0] <= until:
            self._step()
        self.now = until

    def settle(self, *, but_for: Timer | None = None, max_events: int = 3000) -> None:
        """End what is in flight and let time pass until nothing is due any more, but for timers of one kind.

        Raises:
            AssertionError: The world does not come to rest.
        """
        for _ in range(max_events):
            if in_flight := self.in_flight():
                self.end(in_flight[0])
            elif len(self._due) > (self.timers(but_for) if but_for else 0):
                self._step()
            else:
                return
        raise AssertionError(f"no rest after {max_events} events: {self._due[:4]}")

    # What a test asks

    def view(self, model: str) -> InstanceView:
        """Return the scheduler's view of a model that exists."""
        view = self.scheduler.view(model)
        assert view is not None
        return view

    def state(self, model: str) -> State:
        """Return the state of a model."""
        return self.view(model).state

    def place(self, number: int) -> Place:
        """Return where a ticket is."""
        return self.tickets[number].place

    def error(self, number: int) -> LlmstudioError:
        """Return with what a ticket was refused."""
        error = self.tickets[number].error
        assert error is not None, f"ticket {number} was not refused"
        return error

    def is_done(self, number: int) -> bool:
        """Return whether a manual load or unload is complete, without an error."""
        ticket = self.tickets[number]
        return ticket.place is Place.SETTLED and ticket.error is None

    def started(self) -> list[str]:
        """Return the models in the order of their starts."""
        return [action.model for action in self.starts]

    def in_flight(self, model: str | None = None) -> list[int]:
        """Return the tickets in flight."""
        return [
            number
            for number, ticket in self.tickets.items()
            if ticket.place is Place.IN_FLIGHT and model in {None, ticket.model}
        ]

    def waiting(self) -> list[int]:
        """Return the tickets that wait for an answer of any kind."""
        return [number for number, ticket in self.tickets.items() if ticket.place is Place.WAITING]

    def timers(self, timer: Timer) -> int:
        """Return how many timers of this kind are set."""
        return sum(isinstance(event, TimerFired) and event.timer is timer for _, _, event in self._due)

    # The course of things

    def feed(self, event: Event) -> None:
        """Give the scheduler one event, perform what it answers, and check the laws."""
        if isinstance(event, UnitFailed | UnitGone) and self.alive.get(event.model) == event.run:
            del self.alive[event.model]
        if isinstance(event, UnitFailed):
            self._forget(event.model, event.run, UnitStarted, BecameReady, UnitFailed)
        if isinstance(event, UnitGone):
            self._forget(event.model, event.run, UnitStarted, BecameReady, UnitFailed, UnitGone)
        if isinstance(event, PlanVetted):
            self._being_vetted.discard(event.model)
        for action in self.scheduler.handle(event):
            self._perform(action)
        while self._vetted:
            for action in self.scheduler.handle(self._vetted.pop(0)):
                self._perform(action)
        self._is_shutting_down |= isinstance(event, ShutdownAsked)
        self._check_tickets()
        self._check_room()
        self._check_stories()
        self._check_restarts()

    def _step(self) -> None:
        at, _, event = heapq.heappop(self._due)
        self.now = max(self.now, at)
        self.feed(event)

    def find(self, model: str, *, recipe_hash: str | None = None) -> None:
        """An earlier daemon has left a unit of the model."""
        self.feed(UnitFound(self.now, model, recipe_hash or self.specs[model].recipe_hash))

    def _new_ticket(self, ticket: Ticket) -> int:
        number = next(self._numbers)
        self.tickets[number] = ticket
        return number

    def _at(self, event: Event) -> None:
        heapq.heappush(self._due, (event.at, next(self._numbers), event))

    def _forget(self, model: str, run: int, *kinds: type) -> None:
        def concerns(event: Event) -> bool:
            return isinstance(event, kinds) and (getattr(event, "model", ""), getattr(event, "run", 0)) == (model, run)

        self._due = [item for item in self._due if not concerns(item[2])]
        heapq.heapify(self._due)

    def _perform(self, action: Action) -> None:  # noqa: C901 - one arm for each kind of action
        match action:
            case VetPlan():
                script = self.script(action.model)
                at = self.now + script.vet_s
                vetted = PlanVetted(at, action.model, action.recipe_hash, script.vet_failure)
                if script.vet_s:
                    self._being_vetted.add(action.model)
                    self._at(vetted)
                else:
                    self._vetted.append(vetted)
            case StartUnit():
                self._start(action)
            case WatchUnit():
                assert action.model not in self.alive, f"{action} beside another run"
                self.alive[action.model] = action.run
                facts = self.script(action.model).facts
                self._at(BecameReady(self.now + LOAD_S, action.model, action.run, facts))
            case StopUnit():
                self._stop(action)
            case Grant():
                self._grant(action)
            case Refuse():
                self._answer(action.ticket, action.error)
            case Done():
                assert not self.tickets[action.ticket].is_request, "a request is granted, not done"
                self._answer(action.ticket, None)
            case SetTimer():
                self._at(TimerFired(max(self.now, action.at), action.model, action.run, action.timer))
            case LoadToo():
                number = self._new_ticket(Ticket(action.model, is_request=False))
                self._vetted.append(RequestArrived(self.now, number, action.model, is_load=True, is_along=True))
            case Publish():
                if action.transition is None:
                    self.shown_anew.append(action.model)
            case MeasureMemory():
                raise AssertionError("memory is planned by nobody here")
            case _:
                assert_never(action)

    def _start(self, action: StartUnit) -> None:
        assert action.model not in self.alive, f"{action} while the previous run is not gone"
        assert action.run > max((start.run for start in self.starts), default=0), "runs must increase"
        self.starts.append(action)
        self.alive[action.model] = action.run
        assert not self.max_instances or len(self.alive) <= self.max_instances, f"too many at once: {self.alive}"
        script = self.script(action.model)
        started_at = self.now + script.start_s
        self._at(UnitStarted(started_at, action.model, action.run))
        if script.load_s is None:
            return
        if script.failure is not None:
            self._at(UnitFailed(started_at + script.load_s, action.model, action.run, script.failure))
        else:
            self._at(BecameReady(started_at + script.load_s, action.model, action.run, script.facts))

    def _stop(self, action: StopUnit) -> None:
        assert self.alive.get(action.model) == action.run, f"{action}: there is no such process"
        assert action not in self.stops, f"{action} twice"
        self.stops.append(action)
        cause = self.view(action.model).stop_cause
        if cause in NEVER_CUTS:
            cut = [number for number in self.in_flight(action.model) if self.tickets[number].run == action.run]
            assert not cut, f"{action} ({cause}) cuts {cut} short"
        self._at(UnitGone(self.now + self.script(action.model).stop_s, action.model, action.run))

    def _grant(self, action: Grant) -> None:
        ticket = self.tickets[action.ticket]
        assert ticket.place is Place.WAITING, f"{action}: the ticket is {ticket.place}"
        assert ticket.is_request
        assert self.alive.get(action.model) == action.run, f"{action}: no such process"
        ticket.place, ticket.run, ticket.granted_at = Place.IN_FLIGHT, action.run, self.now
        served = [number for number in self.in_flight(action.model) if self.tickets[number].run == action.run]
        limit = self.specs[action.model].concurrency_limit or self.script(action.model).facts.n_parallel
        assert len(served) <= limit, f"{action}: {len(served)} in flight, {limit} at most"

    def _answer(self, number: int, error: LlmstudioError | None) -> None:
        ticket = self.tickets[number]
        assert ticket.place is Place.WAITING, f"ticket {number} is answered, and is {ticket.place}"
        ticket.place, ticket.error, ticket.settled_at = Place.SETTLED, error, self.now
        if error is not None and "are pinned" in error.message:
            assert all(self.specs[model].is_pinned for model in self.alive), f"{error.message}: {self.alive}"

    # The laws

    def _check_tickets(self) -> None:
        """Hold the scheduler's counts against the tickets: nobody is lost, nobody is counted twice."""
        counts = self.scheduler.counts()
        requests = [ticket for ticket in self.tickets.values() if ticket.is_request]
        assert counts["waiting"] == sum(ticket.place is Place.WAITING for ticket in requests)
        assert counts["in_flight"] == len(self.in_flight())
        assert counts["arrived"] == counts["granted"] + counts["refused"] + counts["left"] + counts["waiting"]
        assert counts["granted"] == counts["ended"] + counts["in_flight"]
        waiting: Counter[str] = Counter()
        in_flight: Counter[tuple[str, int]] = Counter()
        for ticket in self.tickets.values():
            waiting[ticket.model] += ticket.place is Place.WAITING and not ticket.is_unload
            in_flight[ticket.model, ticket.run] += ticket.place is Place.IN_FLIGHT
        views = {view.id: view for view in self.scheduler.views()}
        assert {model: view.queued for model, view in views.items() if view.queued} == +waiting
        for model, view in views.items():
            if view.state in {State.READY, State.DRAINING}:
                assert view.in_flight == in_flight[model, view.run], f"{model}: {view}"
            elif view.state is not State.STOPPING:
                assert view.in_flight == 0, f"{model}: {view}"
        residents = {view.id for view in views.values() if view.state not in {State.STOPPED, State.FAILED}}
        assert set(self.alive) <= residents, f"{self.alive} run, {residents} are known"

    def _check_room(self) -> None:
        """Nobody waits beside a free place or an idle model, and nobody is drained for a wish that is gone."""
        if self._is_shutting_down:
            return
        views = self.scheduler.views()
        wanted = [view for view in views if view.queued and view.state in {State.STOPPED, State.FAILED}]
        residents = [view for view in views if view.state not in {State.STOPPED, State.FAILED}]
        drained = [v for v in residents if v.state is State.DRAINING and v.stop_cause is StopCause.EVICT]
        leaving = [v for v in residents if v.state in {State.DRAINING, State.STOPPING} and v not in drained]
        staying = [v for v in residents if v not in drained and v not in leaving and not self.specs[v.id].is_pinned]
        for view in views:
            assert view.state is not State.READY or view.in_flight or not view.queued, f"nothing holds it up: {view}"
        if wanted:
            assert self.max_instances, f"{wanted} wait though there is no limit"
            assert len(residents) >= self.max_instances, f"{wanted} wait beside a free place"
        wanted = [view for view in wanted if view.id not in self._being_vetted]  # nobody goes for them yet
        if len(wanted) > len(leaving):
            unused = [view.id for view in staying if not view.in_flight and not view.queued]
            assert not unused, f"{wanted} wait beside {unused}"
        assert len(drained) <= max(0, len(wanted) - len(leaving)), f"{drained} are drained for nobody"

    def _check_restarts(self) -> None:
        """What is to be up always, and is down though nobody wanted that, waits for room or has a timer."""
        if self._is_shutting_down:
            return
        timed = {(e.model, e.run) for _, _, e in self._due if isinstance(e, TimerFired) and e.timer is Timer.RESTART}
        for view in self.scheduler.views():
            is_down = view.state is State.FAILED or (view.state is State.STOPPED and view.refused is not None)
            if view.spec.restart is Restart.ALWAYS and is_down:
                assert view.queued or (view.id, view.run) in timed, f"nothing brings it up again: {view}"

    def _check_stories(self) -> None:
        for view in self.scheduler.views():
            story = view.story
            assert not story or story[-1].new is view.state
            for earlier, later in itertools.pairwise(story):
                assert earlier.new is later.old
                assert earlier.at <= later.at


def spec(model: str, **changes: Any) -> ModelSpec:
    """Return a spec whose times are short and round; ``changes`` are its fields."""
    values: dict[str, Any] = {
        "recipe_hash": "1",
        "idle_timeout_s": 600.0,
        "drain_timeout_s": 60.0,
        "stall_timeout_s": 120.0,
    }
    return ModelSpec(id=model, **(values | changes))


def world_of(specs: Iterable[ModelSpec], *, max_instances: int = 0) -> World:
    """Return a world with these models, all stopped."""
    world = World(max_instances=max_instances)
    world.use(*specs)
    return world


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
