"""What an instance is: its states, its story, and why it failed.

Only the scheduler changes an `Instance`; everybody else reads the frozen `InstanceView` made from it.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf
from typing import NamedTuple

from llmstudiod.core.placement import Placement, Wish

STORY_LENGTH = 64


class State(StrEnum):
    """The states of an instance, in the order in which a healthy one passes them."""

    STOPPED = "stopped"
    STARTING = "starting"  # the unit is not active yet
    LOADING = "loading"  # active, /health answers 503
    READY = "ready"  # /health answers 200
    DRAINING = "draining"  # takes no new requests, finishes the ones in flight
    STOPPING = "stopping"
    FAILED = "failed"


RESIDENT = frozenset({State.STARTING, State.LOADING, State.READY, State.DRAINING, State.STOPPING})
"""States in which an instance holds a process, and so memory."""


class StopCause(StrEnum):
    """Why an instance is drained or stopped."""

    IDLE = "idle unload"
    EVICT = "evicted"
    UNLOAD = "unloaded on request"
    RECIPE = "its recipe changed"
    REMOVED = "its recipe was removed"
    SHUTDOWN = "the daemon stops"
    STALLED = "load stalled"
    ABANDONED = "nobody waits for it any more"
    CANCELLED = "its load was cancelled"
    HUNG = "it does not answer any more"
    DESERTED = "nobody listens at its socket"


class Restart(StrEnum):
    """What becomes of a model that ended without being asked to."""

    ON_REQUEST = "on-request"  # the next request starts it
    ALWAYS = "always"  # it is started again by itself
    NEVER = "never"  # it stays down until an administrator resets or loads it


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the scheduler must know of a recipe; everything else is the planner's business.

    ``concurrency_limit`` 0 means as many as the upstream has slots; ``idle_timeout_s`` 0 means never.
    """

    id: str
    recipe_hash: str
    priority: int = 0
    is_pinned: bool = False
    is_kv_unified: bool = False
    idle_timeout_s: float = 600.0
    drain_timeout_s: float = 60.0
    stall_timeout_s: float = 120.0
    concurrency_limit: int = 0
    max_queue: int = 64
    restart: Restart = Restart.ON_REQUEST
    restart_limit: int = 3
    restart_window_s: float = 600.0
    excludes: frozenset[str] = frozenset()  # who may never be loaded beside it
    companions: frozenset[str] = frozenset()  # who is always loaded and evicted with it


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a start or a running model ended: a category, one sentence, the next step, the last lines of the log."""

    kind: str
    message: str
    hint: str | None = None
    lines: tuple[str, ...] = ()
    never_ran: bool = False  # there was no process that could have crashed: a file, a flag or the launcher would not do


@dataclass(frozen=True, slots=True)
class PastFailure:
    """What an earlier daemon knew of a model that had failed; times are on this daemon's clock."""

    failure: Failure
    recipe_hash: str
    failures: int
    failed_at: tuple[float, ...]
    retry_at: float


@dataclass(frozen=True, slots=True)
class Transition:
    """One line of an instance's story. ``at`` is the scheduler's monotonic clock in seconds."""

    at: float
    old: State
    new: State
    cause: str


@dataclass(frozen=True, slots=True)
class UpstreamFacts:
    """What a ready server says of itself in /props: slots, and tokens that one slot can hold."""

    n_parallel: int
    n_ctx: int


class Waiter(NamedTuple):
    """A request, or a manual load, that waits for an instance."""

    ticket: int
    arrived_at: float
    cost_tokens: int | None  # None: it may use all of max_model_len
    is_load: bool
    is_along: bool = False


@dataclass(slots=True)
class Instance:
    """The scheduler's own record of one model; mutable, never handed out."""

    spec: ModelSpec
    since: float
    state: State = State.STOPPED
    run: int = 0
    run_hash: str = ""  # of the recipe that this run was started with
    story: deque[Transition] = field(default_factory=lambda: deque(maxlen=STORY_LENGTH))
    waiters: dict[int, Waiter] = field(default_factory=dict)  # insertion-ordered
    in_flight: dict[int, int | None] = field(default_factory=dict)  # ticket -> cost in tokens
    n_requests: int = 0  # granted since the daemon's start
    unload_tickets: list[int] = field(default_factory=list)
    stop_cause: StopCause | None = None
    evicted_for: str = ""
    failure: Failure | None = None
    last_failure: tuple[int, Failure] | None = None  # the run that failed last; it stays when the next one starts
    refused: Failure | None = None  # why it was not even started, when it was wanted last
    failures: int = 0
    failed_at: tuple[float, ...] = ()  # its latest failures, as many as its budget has
    is_exhausted: bool = False  # its budget of failures is used up
    retry_at: float = 0.0
    restart_at: float = 0.0  # when the timer that was set last for its restart runs out
    facts: UpstreamFacts | None = None
    ready_at: float = 0.0
    progress_at: float = 0.0
    progress: float | None = None
    stage: str = ""
    warnings: tuple[str, ...] = ()  # what of this run is not as it was asked for
    idle_since: float = 0.0
    last_used: float = 0.0
    drain_by: float = inf  # when a drain ends whatever is still in flight
    yields_to: "Instance | None" = None  # for whom it made room; until that one is started it comes back no sooner
    overtake_at: float = 0.0  # when the timer that was set last for its waiters runs out
    is_removed: bool = False
    is_vetted: bool = False  # its plan was found good, so that evicting for it is not in vain
    is_proven: bool = False  # llama-server itself has said what it needs, or nobody can
    is_second_try: bool = False  # the GPU's memory was too small for it a moment ago
    is_being_vetted: bool = False
    wish: Wish | None = None  # what it needs, once its plan was checked; None: not known
    placement: Placement | None = None  # where its process lies, while there is one

    @property
    def why_stopped(self) -> str:
        """Why it goes, for its story."""
        if self.stop_cause is StopCause.EVICT and self.evicted_for:
            return f"evicted for {self.evicted_for}"
        return self.stop_cause.value if self.stop_cause else "asked for"

    @property
    def protects(self) -> frozenset[str]:
        """Who may not have to go for it: those that it is to be loaded along with."""
        is_along = self.waiters and all(waiter.is_along for waiter in self.waiters.values())
        return self.spec.companions if is_along else frozenset()

    @property
    def is_resident(self) -> bool:
        """Whether it holds a process."""
        return self.state in RESIDENT

    @property
    def is_down_by_itself(self) -> bool:
        """Whether it is down though nobody wanted that: it failed, or was refused a start."""
        return self.state is State.FAILED or (self.state is State.STOPPED and self.refused is not None)

    @property
    def is_stale(self) -> bool:
        """Whether another recipe is in force than the one that its process was started with."""
        return self.is_resident and self.run_hash != self.spec.recipe_hash

    @property
    def is_idle(self) -> bool:
        """Ready, with nothing in flight and nobody waiting."""
        return self.state is State.READY and not self.in_flight and not self.waiters

    def move(self, new: State, *, at: float, cause: str) -> None:
        """Change the state and write it into the story."""
        self.story.append(Transition(at=at, old=self.state, new=new, cause=cause))
        self.state = new
        self.since = at

    def has_room_for(self, cost_tokens: int | None) -> bool:
        """Whether one more request fits beside those in flight: slots, and tokens where slots share one pool.

        With a unified KV cache four long requests in one pool all fail with "Context size has been exceeded.",
        so only what the pool is sure to hold is let in; an unbounded request therefore runs alone.
        """
        facts = self.facts
        if facts is None:
            return False
        if not self.in_flight:
            return True
        if len(self.in_flight) >= (self.spec.concurrency_limit or facts.n_parallel):
            return False
        if not self.spec.is_kv_unified:
            return True
        costs = [cost_tokens, *self.in_flight.values()]
        return sum(facts.n_ctx if cost is None else cost for cost in costs) <= facts.n_ctx


@dataclass(frozen=True, slots=True)
class InstanceView:
    """An immutable copy of an instance for everybody but the scheduler."""

    id: str
    spec: ModelSpec
    state: State
    since: float
    run: int
    in_flight: int
    n_requests: int
    queued: int
    failure: Failure | None
    last_failure: tuple[int, Failure] | None
    failures: int
    failed_at: tuple[float, ...]
    retry_at: float
    is_exhausted: bool
    facts: UpstreamFacts | None
    progress: float | None
    stage: str
    warnings: tuple[str, ...]
    idle_since: float
    last_used: float
    is_stale: bool
    is_being_vetted: bool
    stop_cause: StopCause | None
    story: tuple[Transition, ...]
    placement: Placement | None = None
    refused: Failure | None = None

    @property
    def is_resident(self) -> bool:
        """Whether it holds a process."""
        return self.state in RESIDENT


def view(instance: Instance) -> InstanceView:
    """Return the frozen copy of ``instance``."""
    return InstanceView(
        id=instance.spec.id,
        spec=instance.spec,
        state=instance.state,
        since=instance.since,
        run=instance.run,
        in_flight=len(instance.in_flight),
        n_requests=instance.n_requests,
        queued=len(instance.waiters),
        failure=instance.failure,
        last_failure=instance.last_failure,
        failures=instance.failures,
        failed_at=instance.failed_at,
        retry_at=instance.retry_at,
        is_exhausted=instance.is_exhausted,
        facts=instance.facts,
        progress=instance.progress,
        stage=instance.stage,
        warnings=instance.warnings,
        idle_since=instance.idle_since,
        last_used=instance.last_used,
        is_stale=instance.is_stale,
        is_being_vetted=instance.is_being_vetted,
        stop_cause=instance.stop_cause,
        story=tuple(instance.story),
        placement=instance.placement,
        refused=instance.refused,
    )
