"""The scheduler's language: events that go in, actions that come out. All frozen; time arrives inside events.

Those that come with every request are named tuples, which are made in a third of the time of a frozen dataclass.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.ledger import Memory
from llmstudiod.core.lifecycle import Failure, ModelSpec, PastFailure, Transition, UpstreamFacts
from llmstudiod.core.placement import Placement, Wish


class Timer(StrEnum):
    """What a timer is for; one that fires too late or for an old run is ignored, so none is ever cancelled."""

    IDLE = "idle"
    DRAIN = "drain"
    STALL = "stall"
    OVERTAKE = "overtake"
    MEASURE = "measure"
    RESTART = "restart"
    STABLE = "stable"


# Events


class RequestArrived(NamedTuple):
    """A request wants the model, or (``is_load``) an operator wants it ready.

    ``is_along``: it is loaded because another one of its group is, so none of these may have to go for it.
    """

    at: float
    ticket: int
    model: str
    cost_tokens: int | None = None
    is_load: bool = False
    is_along: bool = False


class RequestEnded(NamedTuple):
    """The exchange is over, however it ended, or its client left while it waited."""

    at: float
    ticket: int


@dataclass(frozen=True, slots=True)
class UnloadAsked:
    """An operator wants the model gone; ``is_forced`` does not wait for requests in flight."""

    at: float
    ticket: int
    model: str
    is_forced: bool = False


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """An operator does not want a load to go on; what is ready stays."""

    at: float
    ticket: int
    model: str


@dataclass(frozen=True, slots=True)
class ResetAsked:
    """An operator says that what made a model fail is mended."""

    at: float
    ticket: int
    model: str


@dataclass(frozen=True, slots=True)
class PlanVetted:
    """The check that `VetPlan` asked for is done; ``failure`` is what is wrong with this version of the recipe.

    ``wish`` is what it needs in memory, None where that is not known; ``is_proven``: nobody can tell better.
    """

    at: float
    model: str
    recipe_hash: str
    failure: Failure | None
    wish: Wish | None = None
    is_proven: bool = True


@dataclass(frozen=True, slots=True)
class UnitStarted:
    """The launcher has the process running."""

    at: float
    model: str
    run: int


@dataclass(frozen=True, slots=True)
class LoadProgressed:
    """Something moved in a loading server: memory, file or log. ``progress`` is 0 to 1 where it is known."""

    at: float
    model: str
    run: int
    progress: float | None = None
    stage: str = ""


@dataclass(frozen=True, slots=True)
class Warned:
    """The log of a run tells what is not as it was asked for; these replace what was told before."""

    at: float
    model: str
    run: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BecameReady:
    """/health says 200 and /props that it is ours."""

    at: float
    model: str
    run: int
    facts: UpstreamFacts


@dataclass(frozen=True, slots=True)
class UnitFailed:
    """The unit could not be started, or its process ended without being asked to."""

    at: float
    model: str
    run: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class UnitHung:
    """The process is there and does not answer any more: it was asked in every way."""

    at: float
    model: str
    run: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class UnitGone:
    """A stop is complete: no process of this run is left."""

    at: float
    model: str
    run: int


@dataclass(frozen=True, slots=True)
class TimerFired:
    """A timer set by `SetTimer` has run out."""

    at: float
    model: str
    run: int
    timer: Timer


@dataclass(frozen=True, slots=True)
class SpecsChanged:
    """The set of models after a start or a reload."""

    at: float
    specs: Mapping[str, ModelSpec]


@dataclass(frozen=True, slots=True)
class MemoryMeasured:
    """The answer to `MeasureMemory`; ``memory`` None: it cannot be measured, so it is not planned."""

    at: float
    number: int
    memory: Memory | None


@dataclass(frozen=True, slots=True)
class UnitFound:
    """A unit of an earlier daemon serves this model; ``recipe_hash`` is that of the recipe it was started with.

    ``placement``: where it lies, None where that is not known.
    """

    at: float
    model: str
    recipe_hash: str
    placement: Placement | None = None


@dataclass(frozen=True, slots=True)
class UnitFoundFailed:
    """A unit of an earlier daemon has ended meanwhile, and this is why."""

    at: float
    model: str
    failure: Failure


@dataclass(frozen=True, slots=True)
class StoriesRead:
    """What an earlier daemon wrote down: the last transitions of each model, the oldest first; why some had failed."""

    at: float
    stories: Mapping[str, tuple[Transition, ...]]
    failures: Mapping[str, PastFailure] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShutdownAsked:
    """Answer the waiters; then drain and stop the units, unless ``leaves_units``: the next daemon will find them."""

    at: float
    leaves_units: bool = False


Event = (
    RequestArrived
    | RequestEnded
    | UnloadAsked
    | CancelAsked
    | ResetAsked
    | PlanVetted
    | UnitStarted
    | LoadProgressed
    | Warned
    | BecameReady
    | UnitFailed
    | UnitHung
    | UnitGone
    | TimerFired
    | SpecsChanged
    | UnitFound
    | UnitFoundFailed
    | StoriesRead
    | MemoryMeasured
    | ShutdownAsked
)


# Actions


@dataclass(frozen=True, slots=True)
class MeasureMemory:
    """Measure what the machine has and what is free; ends in `MemoryMeasured`."""

    number: int


@dataclass(frozen=True, slots=True)
class VetPlan:
    """Check file, flags and binary of a model, and what it needs; ends in `PlanVetted`.

    Before another one has to go for it, and where memory is planned before every start. ``is_thorough``: llama-server
    itself is asked what it needs.
    """

    model: str
    recipe_hash: str
    is_thorough: bool = False


@dataclass(frozen=True, slots=True)
class StartUnit:
    """Plan and start a server for the model; ends in `UnitStarted` or `UnitFailed`, later in `BecameReady`.

    ``placement`` None: memory is not planned, and llama-server finds its place itself.
    """

    model: str
    run: int
    placement: Placement | None = None


@dataclass(frozen=True, slots=True)
class WatchUnit:
    """Watch the unit that was found, as if it had just been started; ends in `BecameReady` or `UnitFailed`."""

    model: str
    run: int


@dataclass(frozen=True, slots=True)
class LoadToo:
    """Load a model along with another one of its group; nobody waits for it."""

    model: str


@dataclass(frozen=True, slots=True)
class StopUnit:
    """Close the upstream's connections and stop the unit; ends in `UnitGone`."""

    model: str
    run: int
    is_forced: bool = False


class Grant(NamedTuple):
    """The request may go to the upstream of this run; it is in flight from now on."""

    ticket: int
    model: str
    run: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """The request is answered with this error."""

    ticket: int
    error: LlmstudioError


@dataclass(frozen=True, slots=True)
class Done:
    """A manual load or unload is complete."""

    ticket: int


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Send `TimerFired` at this time."""

    model: str
    run: int
    timer: Timer
    at: float


@dataclass(frozen=True, slots=True)
class Publish:
    """The model's state changed, or without ``transition`` something else that is shown: observers may want to look."""

    model: str
    transition: Transition | None = None


Action = (
    MeasureMemory | VetPlan | StartUnit | WatchUnit | StopUnit | LoadToo | Grant | Refuse | Done | SetTimer | Publish
)
