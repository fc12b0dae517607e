"""Models that share a machine's memory: who starts beside whom, who goes for whom, and that it never overflows."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmstudiod.core.errors import DoesNotFitError
from llmstudiod.core.events import (
    Action,
    Event,
    MeasureMemory,
    MemoryMeasured,
    PlanVetted,
    StartUnit,
    UnitFailed,
    UnitGone,
    VetPlan,
)
from llmstudiod.core.ledger import Memory
from llmstudiod.core.lifecycle import State
from llmstudiod.core.memory import MIB, Run
from llmstudiod.core.model_shape import Layer, ModelShape
from llmstudiod.core.placement import Placement, Room, Wish
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
                memory = Memory(self.now, self.capacity, self.free(), names)
                self._vetted.append(MemoryMeasured(self.now, action.number, memory))  # type: ignore[arg-type]
            case VetPlan():
                failure = self.script(action.model).vet_failure
                found = PlanVetted(self.now, action.model, action.recipe_hash, failure, self.wishes.get(action.model))
                self._vetted.append(found)
            case StartUnit():
                assert action.placement is not None
                self.placements[action.model, action.run] = action.placement
                World._perform(self, action)
                free = self.free()
                assert min(free.host, *free.devices) >= 0, f"{action.model} overflows: {free}"
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


MODELS = ("a", "b", "c", "d")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from(MODELS)),
        st.tuples(st.just("end"), st.integers(0, 20)),
        st.tuples(st.just("wait"), st.sampled_from([0.1, 0.6, 2.5, 7.0])),
        st.tuples(st.just("crash"), st.sampled_from(MODELS)),
        st.tuples(st.just("unload"), st.sampled_from(MODELS)),
        st.tuples(st.just("others"), st.integers(0, 6)),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=150)
@given(
    steps=STEPS,
    sizes=st.tuples(*[st.floats(1, 20)] * 4),
    devices=st.lists(st.sampled_from([6.0, 12.0, 24.0]), min_size=1, max_size=3),
    pinned=st.sets(st.sampled_from(MODELS), max_size=1),
)
def test_nothing_overflows_and_nobody_waits_for_ever(
    steps: list[tuple[str, Any]], sizes: tuple[float, ...], devices: list[float], pinned: set[str]
) -> None:
    """In any course of things; the world checks each start, and that no busy one is cut short for another."""
    wishes = [wish(model, size, n_gpu_layers=None) for model, size in zip(MODELS, sizes, strict=True)]
    world = world_of(*wishes, devices=tuple(devices), **{model: {"is_pinned": True} for model in pinned})
    for what, value in steps:
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
        elif what == "others" and all(size >= 0 for size in world.free().devices):
            room = min(value * GIB, *world.free().devices, world.others.devices[0] + world.free().devices[0])
            world.others = Room(0, (max(0, room), *world.others.devices[1:]))
            world.advance(2.5)  # nobody can know what another program takes the moment after a measurement
    world.settle()
    assert world.waiting() == []
