"""Models that share a machine's memory: who starts beside whom, who goes for whom, and that it never overflows."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmstudiod.core import seating
from llmstudiod.core.errors import DoesNotFitError
from llmstudiod.core.events import (
    Action,
    Event,
    MeasureMemory,
    MemoryMeasured,
    PlanVetted,
    StartUnit,
    UnitFailed,
    UnitFound,
    UnitGone,
    VetPlan,
)
from llmstudiod.core.ledger import Memory
from llmstudiod.core.lifecycle import Failure, State, UpstreamFacts
from llmstudiod.core.memory import MIB, Run
from llmstudiod.core.model_shape import Layer, ModelShape
from llmstudiod.core.placement import Placement, Room, Wish, place
from tests.unit.scheduler_world import LOAD_S, OOM, Place, World, spec

GIB = 1 << 30


def wish(model: str, gib: float, **changes: Any) -> Wish:
    """A model of about so many GiB on a GPU, all of it in eight layers."""
    layer = Layer(k_row=64, v_row=64, weights=int((gib - 0.6) * GIB / 8))
    shape = ModelShape(
        architecture="llama", layers=(layer,) * 8, input_weights=10 * MIB, output_weights=MIB, n_embd=256, n_ff=512,
        n_head=4, q_width=256, kv_width=64, n_vocab=1000, n_ctx_train=8192,
    )  # fmt: skip
    return replace(Wish(model, shape, Run(2048), n_gpu_layers=9), **changes)


@dataclass(slots=True)
class MemoryWorld(World):
    """A world with memory: what a process takes is measured as soon as it starts, and freed a second after it ended."""

    capacity: Room = field(default_factory=lambda: Room(64 * GIB, (24 * GIB,)))
    others: Room = field(default_factory=lambda: Room(0, (0,)))
    wishes: dict[str, Wish] = field(default_factory=dict)
    placements: dict[tuple[str, int], Placement] = field(default_factory=dict)
    lingering: list[tuple[float, Room]] = field(default_factory=list)
    lag_s: float = 1.0
    measurements: int = 0
    can_dry_run: bool = False
    are_processes_told: bool = False
    dry_runs: list[str] = field(default_factory=list)
    real: dict[str, float] = field(default_factory=dict)  # how much more than its estimate a model takes

    def __post_init__(self) -> None:
        """Have memory planned."""
        World.__post_init__(self)
        self.scheduler.watch.is_on = True

    def held(self) -> list[Room]:
        """Return what every process has, and what those that ended have not given back yet."""
        n = len(self.capacity.devices)
        self.lingering = [(until, room) for until, room in self.lingering if until > self.now]
        alive = [self.placements[model, run].held(n) for model, run in self.alive.items()]
        return [*alive, *(room for _, room in self.lingering), self.others]

    def free(self) -> Room:
        """Return what a measurement shows."""
        rooms = self.held()
        devices = tuple(
            size - sum(room.devices[n] for room in rooms) for n, size in enumerate(self.capacity.devices)
        )  # fmt: skip
        return Room(self.capacity.host - sum(room.host for room in rooms), devices)

    def _perform(self, action: Action) -> None:
        match action:
            case MeasureMemory():
                self.measurements += 1
                names = tuple(f"GPU {n}" for n in range(len(self.capacity.devices)))
                alive = {
                    model: self.placements[model, run].held(len(names)).devices for model, run in self.alive.items()
                }
                taken = alive if self.are_processes_told else {}
                memory = Memory(self.now, self.capacity, self.free(), names, taken=taken)
                self._vetted.append(MemoryMeasured(self.now, action.number, memory))
            case VetPlan():
                failure = self.script(action.model).vet_failure
                self.dry_runs += [action.model] * action.is_thorough
                is_proven = action.is_thorough or not self.can_dry_run
                wish = self.wishes.get(action.model)
                self._vetted.append(PlanVetted(self.now, action.model, action.recipe_hash, failure, wish, is_proven))
            case StartUnit():
                assert action.placement is not None
                self.placements[action.model, action.run] = action.placement
                World._perform(self, action)
                free = self.free()
                assert min(free.host, *free.devices) >= 0, f"{action.model} overflows: {free}"
                more = self.real.get(action.model, 1.0) - 1.0
                held = action.placement.held(len(free.devices)).devices
                if any(size * more > left for size, left in zip(held, free.devices, strict=True)):
                    self._at(UnitFailed(self.now + 0.1, action.model, action.run, OOM))
            case _:
                World._perform(self, action)

    def feed(self, event: Event) -> None:
        """Keep what a process had for a while when it ends."""
        if isinstance(event, UnitFailed | UnitGone) and self.alive.get(event.model) == event.run:
            room = self.placements[event.model, event.run].held(len(self.capacity.devices))
            self.lingering.append((self.now + self.lag_s, room))
        World.feed(self, event)

    def _check_room(self) -> None:
        """Who may wait, and for whom somebody drains, is told by the tests below."""


def world_of(*wishes: Wish, devices: tuple[float, ...] = (24,), **changes: Any) -> MemoryWorld:
    """Return a world with these models and GPUs of so many GiB."""
    capacity = Room(64 * GIB, tuple(int(size * GIB) for size in devices))
    others = Room(0, (0,) * len(devices))
    world = MemoryWorld(capacity=capacity, others=others, wishes={each.model: each for each in wishes})
    world.use(*(spec(each.model, **changes.get(each.model, {})) for each in wishes))
    return world


def serve(world: MemoryWorld, *models: str) -> None:
    """Ask each model once, and wait for the end of the answer."""
    for model in models:
        number = world.ask(model)
        world.advance(LOAD_S + 10)
        assert world.place(number) is Place.IN_FLIGHT, world.tickets[number]
        world.end(number)


def ready(world: MemoryWorld) -> list[str]:
    """Return who is ready."""
    return [view.id for view in world.scheduler.views() if view.state is State.READY]


def test_models_that_fit_stay_together() -> None:
    """Nobody goes while there is room."""
    world = world_of(wish("a", 8), wish("b", 8), wish("c", 7))
    serve(world, "a", "b", "c", "a", "b")
    assert ready(world) == ["a", "b", "c"]
    assert world.stops == []


def test_fewest_and_least_recently_used_go() -> None:
    """One large one rather than two small ones, though they were used before it."""
    world = world_of(wish("a", 4), wish("b", 4), wish("c", 14), wish("d", 13))
    serve(world, "a", "b", "c", "d")
    assert [stop.model for stop in world.stops] == ["c"]
    assert ready(world) == ["a", "b", "d"]
    assert "evicted" in world.view("c").story[-2].cause


def test_pinned_stays() -> None:
    """Whoever is in the way of it is refused instead, with the sum."""
    world = world_of(wish("a", 14), wish("b", 14), a={"is_pinned": True})
    serve(world, "a")
    number = world.ask("b")
    error = world.error(number)
    assert isinstance(error, DoesNotFitError)
    assert error.message.startswith("cannot load 'b': it needs 13.9 GiB (weights 13.4 GiB, KV cache")
    assert "GPU 0 has 10.1 GiB free, 0 B could be freed" in error.message
    assert ready(world) == ["a"]


def test_model_that_fits_nowhere_costs_nobody_anything() -> None:
    """It is refused at once."""
    world = world_of(wish("a", 14), wish("b", 30))
    serve(world, "a")
    error = world.error(world.ask("b"))
    assert "GPU 0 has 10.1 GiB free, 13.9 GiB could be freed" in error.message
    assert ready(world) == ["a"]


def test_refused_load_is_shown() -> None:
    """No transition tells of it: its reason is in the view until it is started, reset or another recipe."""
    world = world_of(wish("b", 30))
    error = world.error(world.load("b"))
    shown = world.view("b")
    assert shown.refused == Failure("does_not_fit", error.message, error.hint)
    assert (shown.state, shown.failure, world.shown_anew) == (State.STOPPED, None, ["b"])
    for _ in range(3):  # requests are refused by the thousand, for the same reason
        world.ask("b")
    assert world.shown_anew == ["b"]
    world.load("b")
    assert world.shown_anew == ["b", "b"]
    world.reset("b")
    assert (world.view("b").refused, world.shown_anew) == (None, ["b", "b", "b"])
    world.load("b")
    world.capacity = Room(64 * GIB, (48 * GIB,))
    world.advance(10)
    serve(world, "b")
    assert world.view("b").refused is None


def test_memory_is_waited_for_until_it_is_measured_free() -> None:
    """It follows a second after the process; until then nobody else has to go."""
    world = world_of(wish("a", 14), wish("b", 5), wish("c", 14))
    serve(world, "a", "b")
    number = world.ask("c")
    world.advance(1.0 + 0.5)  # a has gone, its memory is not free yet
    assert (world.state("a"), world.state("c")) == (State.STOPPED, State.STOPPED)
    world.advance(1.0)
    assert world.state("c") is not State.STOPPED
    world.advance(LOAD_S)
    assert world.place(number) is Place.IN_FLIGHT
    assert [stop.model for stop in world.stops] == ["a"]


def test_who_waits_for_memory_to_come_back_keeps_his_place() -> None:
    """A younger one must not take the half that is free already: it would have to go again for the older one."""
    world = world_of(wish("a", 10, gpus=(0,)), wish("b", 10, gpus=(1,)), wish("c", 18), devices=(12, 12))
    world.script("a").stop_s, world.script("b").stop_s = 0.1, 3.0
    serve(world, "a", "b")
    older = world.ask("c")
    world.advance(3.5)  # both have gone, and what b had is not free yet
    assert (world.state("b"), world.free().devices[0]) == (State.STOPPED, 12 * GIB)
    younger = world.ask("a")
    world.advance(LOAD_S + 2)
    assert (world.place(older), world.place(younger)) == (Place.IN_FLIGHT, Place.WAITING)
    assert [start.model for start in world.starts] == ["a", "b", "c"]


def test_story_says_for_whom_one_had_to_go() -> None:
    """Idle or busy."""
    world = world_of(wish("a", 14), wish("b", 14), wish("c", 14))
    serve(world, "a", "b")
    assert [step.cause for step in world.view("a").story][-2:] == ["evicted for b", "no process is left"]
    busy = world.ask("b")
    world.ask("c")
    world.advance(5)
    world.end(busy)
    assert [step.cause for step in world.view("b").story][-2:] == ["evicted for c", "evicted for c"]


def test_requests_that_change_nothing_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """While somebody waits for a busy model, which answers thousands; whatever does change is seen at once."""
    world = world_of(wish("a", 14), wish("b", 14))
    world.script("a").facts = UpstreamFacts(n_parallel=4, n_ctx=1000)
    busy = [world.ask("a"), world.ask("a")]
    world.advance(LOAD_S + 1)
    waiting = world.ask("b")
    looks = 0

    look = seating.seating

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal looks
        looks += 1
        return look(*given, **named)

    monkeypatch.setattr(seating, "seating", counted)
    for _ in range(50):
        world.end(world.ask("a"))
    assert looks <= 2
    world.end(*busy)
    world.advance(LOAD_S + 5)
    assert world.place(waiting) is Place.IN_FLIGHT


def test_memory_of_other_programs_is_respected() -> None:
    """What was measured counts, whatever our books say; when memory does not come back, others go as well."""
    world = world_of(wish("a", 8), wish("b", 8), wish("c", 8))
    serve(world, "a", "b")
    world.others = Room(0, (3 * GIB,))
    serve(world, "c")
    assert [stop.model for stop in world.stops] == ["a"]
    world.others = Room(0, (18 * GIB,))
    error = world.error(world.ask("a"))
    assert isinstance(error, DoesNotFitError)


def test_busy_one_is_waited_for() -> None:
    """It drains after two seconds of waiting, and is never cut short."""
    world = world_of(wish("a", 14), wish("b", 14))
    busy = world.ask("a")
    world.advance(LOAD_S + 1)
    waiting = world.ask("b")
    world.advance(1.0)
    assert world.state("a") is State.READY
    world.advance(5.0)
    assert world.state("a") is State.DRAINING
    world.end(busy)
    world.advance(LOAD_S + 5)
    assert world.place(waiting) is Place.IN_FLIGHT


def test_two_starts_at_once_do_not_share_the_same_bytes() -> None:
    """What is promised to one that still loads is not free for the next."""
    world = world_of(wish("a", 14), wish("b", 14), devices=(24, 16))
    first, second = world.ask("a"), world.ask("b")
    world.advance(LOAD_S + 1)
    assert [world.place(first), world.place(second)] == [Place.IN_FLIGHT] * 2
    assert [world.placements[start.model, start.run].gpus for start in world.starts] == [(1,), (0,)]


def test_model_whose_need_is_unknown_is_not_held_back() -> None:
    """Nothing is known of it, so nothing can be promised: llama-server will tell."""
    world = world_of(wish("a", 14))
    world.use(spec("a"), spec("x"))
    world.wishes.pop("a")
    with pytest.raises(AssertionError, match=r"StartUnit\(model='x', run=1, placement=None\)"):
        world.ask("x")  # the world wants a placement, and gets none


def test_crash_frees_memory_for_the_next(**_: object) -> None:
    """It is measured again before anybody starts."""
    world = world_of(wish("a", 14), wish("b", 14))
    serve(world, "a")
    world.crash("a", OOM)
    before = world.measurements
    serve(world, "b")
    assert world.measurements > before
    assert ready(world) == ["b"]


def test_idle_one_goes_rather_than_layers() -> None:
    """Whoever could have all its layers on GPUs gets them: a model that lies on the CPU stays slow for as long."""
    world = world_of(wish("a", 14), wish("b", 14, n_gpu_layers=None, is_context_open=True, are_slots_open=True))
    serve(world, "a", "b")
    assert [stop.model for stop in world.stops] == ["a"]
    assert world.placements["b", world.starts[-1].run].run.n_gpu_layers == 9


def test_pinned_one_leaves_what_it_leaves() -> None:
    """Beside it a model takes the layers that fit, since it could never have more."""
    world = world_of(wish("a", 14), wish("b", 14, n_gpu_layers=None), a={"is_pinned": True})
    serve(world, "a", "b")
    assert world.stops == []
    assert 0 < world.placements["b", world.starts[-1].run].run.n_gpu_layers < 9


def test_llama_server_is_asked_where_it_matters() -> None:
    """Where little would be left, where somebody had to go, or where it would be refused; once each time."""
    world = world_of(wish("a", 10), wish("b", 13), wish("c", 10), wish("d", 30))
    world.can_dry_run = True
    serve(world, "a")
    assert world.dry_runs == []
    serve(world, "b")  # 1 GiB would be left
    assert world.dry_runs == ["b"]
    serve(world, "c")
    assert (world.dry_runs, [stop.model for stop in world.stops]) == (["b", "c"], ["a"])
    world.error(world.ask("d"))
    assert world.dry_runs == ["b", "c", "d"]


def test_llama_server_is_asked_where_the_formulas_were_not_validated() -> None:
    """Also where there is room for twice as much."""
    model = wish("a", 4)
    world = world_of(replace(model, shape=replace(model.shape, architecture="new-one")))
    world.can_dry_run = True
    serve(world, "a")
    assert world.dry_runs == ["a"]


def test_what_a_dry_run_tells_counts_before_anybody_goes() -> None:
    """It needs less than was thought, so nobody has to go for it."""
    world = world_of(wish("a", 14), wish("b", 12))
    world.can_dry_run = True
    serve(world, "a")
    ask = world.scheduler.handle

    def told(event: Event) -> list[Action]:
        if isinstance(event, PlanVetted) and event.is_proven:
            event = replace(event, wish=wish("b", 8))
        return ask(event)

    world.scheduler.handle = told  # type: ignore[method-assign]
    serve(world, "b")
    assert world.stops == []
    assert ready(world) == ["a", "b"]


def test_gpu_that_was_too_small_is_tried_once_more_with_the_idle_ones_gone() -> None:
    """It took more than was promised to it; only those on its GPU go, and its waiters never hear of it."""
    world = world_of(wish("a", 8), wish("b", 8), wish("c", 6), devices=(24, 12), b={"priority": 1})
    world.real["b"] = 2.5
    serve(world, "c", "a")
    assert [world.placements[start.model, start.run].gpus for start in world.starts] == [(1,), (0,)]
    number = world.ask("b")
    world.advance(LOAD_S + 10)
    assert world.place(number) is Place.IN_FLIGHT
    assert [stop.model for stop in world.stops] == ["a"]
    assert ready(world) == ["b", "c"]
    causes = [step.cause for step in world.view("b").story]
    assert causes.count(OOM.message) == 1
    assert world.view("b").failures == 0


def test_second_time_it_is_refused() -> None:
    """With what llama-server said; and the next request has a second try again."""
    world = world_of(wish("a", 8), wish("b", 8))
    world.real["b"] = 4.0
    serve(world, "a")
    number = world.ask("b")
    world.advance(10)
    assert "the GPU's memory is too small" in world.error(number).message
    assert sum(start.model == "b" for start in world.starts) == 2
    assert world.view("b").failures == 1
    world.advance(100)
    world.ask("b")
    world.advance(10)
    assert sum(start.model == "b" for start in world.starts) == 4


def test_second_try_waits_until_memory_is_back() -> None:
    """What the idle ones had comes back a second after they have gone; before that it would fail again."""
    world = world_of(wish("a", 7), wish("b", 8))
    world.real["b"] = 2.8
    serve(world, "a")
    number = world.ask("b")
    world.advance(1.5)
    assert world.view("b").state is State.FAILED
    world.advance(LOAD_S + 2)
    assert world.place(number) is Place.IN_FLIGHT


@pytest.mark.parametrize("is_told", [False, True], ids=["all", "each"])
def test_what_a_loading_one_has_taken_does_not_count_twice(*, is_told: bool) -> None:
    """It is measured as used and promised as well: the next one waits for a moment rather than get less, or nothing."""
    world = world_of(wish("a", 14), wish("b", 9, n_gpu_layers=None), wish("c", 14))
    world.are_processes_told = is_told
    world.ask("a")
    world.advance(2.5)  # a has its memory, and goes on loading
    assert world.state("a") is State.LOADING
    number, refused = world.ask("b"), world.ask("c")
    assert world.state("b") is (State.STARTING if is_told else State.STOPPED)
    world.advance(LOAD_S)
    assert world.place(number) is not Place.SETTLED
    world.advance(LOAD_S + 2)
    assert world.place(number) is Place.IN_FLIGHT
    assert world.placements["b", world.starts[1].run].run.n_gpu_layers == 9
    assert world.place(refused) is Place.WAITING


def test_only_busy_ones_that_help_are_asked_to_go() -> None:
    """A place on the other GPU is no use to it."""
    world = world_of(
        wish("a", 10, gpus=(0,)), wish("b", 10, gpus=(1,)), wish("c", 10, gpus=(1,)), devices=(12, 12)
    )  # fmt: skip
    first, second = world.ask("a"), world.ask("b")
    world.advance(LOAD_S + 1)
    waiting = world.ask("c")
    world.advance(5)
    assert (world.state("a"), world.state("b")) == (State.READY, State.DRAINING)
    world.end(second)
    world.advance(LOAD_S + 3)
    assert [world.place(first), world.place(waiting)] == [Place.IN_FLIGHT] * 2


def test_found_model_holds_what_it_was_given() -> None:
    """A daemon that comes back knows where it lies, though its mapped pages look free."""
    world = world_of(wish("a", 14), wish("b", 14))
    placement = place(wish("a", 14), Room(64 * GIB, (24 * GIB,)))
    assert placement is not None
    world.placements["a", 1] = placement
    world.feed(UnitFound(world.now, "a", world.specs["a"].recipe_hash, placement))
    world.advance(LOAD_S + 1)
    serve(world, "b")
    assert [stop.model for stop in world.stops] == ["a"]


def test_never_together() -> None:
    """One goes for the other, though both would fit; a pinned one is in the way for good."""
    never = {"a": {"excludes": frozenset({"b"})}, "b": {"excludes": frozenset({"a"})}}
    world = world_of(wish("a", 4), wish("b", 4), wish("c", 4), **never)  # type: ignore[arg-type]
    serve(world, "c", "a", "b")
    assert ready(world) == ["b", "c"]
    serve(world, "a")
    assert ready(world) == ["a", "c"]
    first, second = world.ask("a"), world.ask("b")
    world.advance(20)
    assert world.place(second) is Place.WAITING
    world.end(first)
    world.advance(LOAD_S + 3)
    assert world.place(second) is Place.IN_FLIGHT
    pinned = world_of(wish("a", 4), wish("b", 4), a={**never["a"], "is_pinned": True}, b=never["b"])
    serve(pinned, "a")
    error = pinned.error(pinned.ask("b"))
    assert error.message == "cannot load 'b': it may never be loaded beside 'a', which is pinned"


def test_always_together() -> None:
    """Asking for one loads the other; they go at once, and neither while the other is in use."""
    always = {"a": {"companions": frozenset({"b"})}, "b": {"companions": frozenset({"a"})}}
    world = world_of(wish("a", 4), wish("b", 4), wish("c", 18), wish("d", 14), **always)  # type: ignore[arg-type]
    serve(world, "a")
    assert ready(world) == ["a", "b"]
    busy = world.ask("b")
    waiting = world.ask("c")
    world.advance(1.0)
    assert ready(world) == ["a", "b"]
    world.end(busy)
    world.advance(LOAD_S + 5)
    assert world.place(waiting) is Place.IN_FLIGHT
    assert ready(world) == ["c"]
    world.end(waiting)
    serve(world, "a")
    assert ready(world) == ["a", "b"]
    serve(world, "d")
    assert ready(world) == ["a", "b", "d"]


def test_always_together_where_both_do_not_fit() -> None:
    """Whoever is asked for comes, and the other one does not throw it out in turn."""
    always = {"a": {"companions": frozenset("b")}, "b": {"companions": frozenset("a")}}
    world = world_of(wish("a", 14), wish("b", 14), **always)  # type: ignore[arg-type]
    serve(world, "a")
    assert ready(world) == ["a"]
    serve(world, "b")
    assert ready(world) == ["b"]
    world.advance(100)
    assert len(world.starts) == 2


def test_always_together_where_both_fail() -> None:
    """Neither brings the other back in turn, without an end."""
    always = {"a": {"companions": frozenset("b")}, "b": {"companions": frozenset("a")}}
    world = world_of(wish("a", 4), wish("b", 4), **always)  # type: ignore[arg-type]
    world.real = {"a": 9.0, "b": 9.0}
    world.ask("a")
    world.advance(100)
    assert [start.model for start in world.starts].count("a") == 2
    assert [start.model for start in world.starts].count("b") <= 2
    assert world.waiting() == []


def test_always_together_is_unloaded_together() -> None:
    """The one that was used last keeps the other."""
    idle = {"idle_timeout_s": 30.0}
    world = world_of(
        wish("a", 4), wish("b", 4), a={"companions": frozenset("b"), **idle}, b={"companions": frozenset("a"), **idle}
    )  # fmt: skip
    serve(world, "a")
    world.advance(20)
    serve(world, "b")
    world.advance(15)
    assert ready(world) == ["a", "b"]
    world.advance(30)
    assert ready(world) == []


MODELS = ("a", "b", "c", "d")
GROUPS: list[dict[str, dict[str, frozenset[str]]]] = [
    {},
    {"a": {"excludes": frozenset("b")}, "b": {"excludes": frozenset("a")}},
    {"a": {"companions": frozenset("b")}, "b": {"companions": frozenset("a")}},
    {
        "a": {"companions": frozenset("b"), "excludes": frozenset("c")}, "b": {"companions": frozenset("a")},
        "c": {"excludes": frozenset("a")},
    },
]  # fmt: skip
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from(MODELS)),
        st.tuples(st.just("end"), st.integers(0, 20)),
        st.tuples(st.just("wait"), st.sampled_from([0.1, 0.6, 2.5, 7.0])),
        st.tuples(st.just("crash"), st.sampled_from(MODELS)),
        st.tuples(st.just("unload"), st.sampled_from(MODELS)),
        st.tuples(st.just("others"), st.integers(0, 6)),
        st.tuples(st.just("real"), st.sampled_from(MODELS), st.sampled_from([1.0, 1.2, 2.0])),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=150)
@given(
    steps=STEPS,
    sizes=st.tuples(*[st.floats(1, 20)] * 4),
    devices=st.lists(st.sampled_from([6.0, 12.0, 24.0]), min_size=1, max_size=3),
    pinned=st.sets(st.sampled_from(MODELS), max_size=1),
    groups=st.sampled_from(GROUPS),
    can_dry_run=st.booleans(),
    are_processes_told=st.booleans(),
)
def test_nothing_overflows_and_nobody_waits_for_ever(
    steps: list[tuple[Any, ...]],
    sizes: tuple[float, ...],
    devices: list[float],
    pinned: set[str],
    groups: dict[str, dict[str, frozenset[str]]],
    *,
    can_dry_run: bool,
    are_processes_told: bool,
) -> None:
    """In any course of things; the world checks each start, and that no busy one is cut short for another."""
    wishes = [wish(model, size, n_gpu_layers=None) for model, size in zip(MODELS, sizes, strict=True)]
    changes = {model: {**groups.get(model, {}), "is_pinned": model in pinned} for model in MODELS}
    world = world_of(*wishes, devices=tuple(devices), **changes)
    world.can_dry_run, world.are_processes_told = can_dry_run, are_processes_told
    for what, value, *more in steps:
        if what == "ask":
            world.ask(value)
        elif what == "end" and (
            going := [*world.in_flight(), *(n for n in world.waiting() if world.tickets[n].is_request)]
        ):
            world.end(going[value % len(going)])
        elif what == "wait":
            world.advance(value)
        elif what == "crash" and value in world.alive and world.state(value) is State.READY:
            world.crash(value)
        elif what == "unload":
            world.unload(value)
        elif what == "real":
            world.real[value] = more[0]
        elif what == "others" and all(size >= 0 for size in world.free().devices):
            room = min(value * GIB, *world.free().devices, world.others.devices[0] + world.free().devices[0])
            world.others = Room(0, (max(0, room), *world.others.devices[1:]))
            world.advance(2.5)  # nobody can know what another program takes the moment after a measurement
        for model in MODELS:
            assert not world.specs[model].excludes & world.alive.keys() or model not in world.alive
    world.settle()
    assert world.waiting() == []
