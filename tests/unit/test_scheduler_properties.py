"""Whatever happens, in whatever order: the laws of `scheduler_world.World` hold, and nobody waits for ever.

`HYPOTHESIS_PROFILE=thorough` tries far more, for some minutes (with ``-o timeout=0``).
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmstudiod.core.events import LoadProgressed, Timer, TimerFired, UnitGone
from llmstudiod.core.lifecycle import Failure, Restart, State, UpstreamFacts
from llmstudiod.core.scheduler import OVERTAKE_S
from tests.unit.scheduler_world import Place, World, spec

MODELS = ("a", "b", "c", "d")
FAILURE = Failure("load_failed", "it ended with exit code 1")
EXAMPLES = {"default": 800, "thorough": 40_000}[os.environ.get("HYPOTHESIS_PROFILE", "default")]

# What can be asked of a world, each as its name and arguments; `perform` knows what they do.
a_model = st.sampled_from(MODELS)
a_change = st.sampled_from(
    (
        {"recipe_hash": "2"},
        {"recipe_hash": "3"},
        {"priority": 5},
        {"priority": -5},
        {"is_pinned": True},
        {"is_pinned": False},
        {"is_kv_unified": True},
        {"idle_timeout_s": 0.0},
        {"idle_timeout_s": 3.0},
        {"drain_timeout_s": 0.0},
        {"restart": Restart.ALWAYS, "restart_limit": 2},
        {"restart": Restart.ALWAYS, "is_pinned": True},
        {"restart": Restart.NEVER},
        {"stall_timeout_s": 1.5},
        {"concurrency_limit": 1},
        {"concurrency_limit": 3},
        {"max_queue": 0},
        {"max_queue": 2},
    )
)
a_script = st.sampled_from(
    (
        {"failure": FAILURE},
        {"failure": None},
        {"load_s": None},
        {"load_s": 0.0},
        {"load_s": 10.0},
        {"stop_s": 0.0},
        {"stop_s": 10.0},
        {"vet_s": 0.0},
        {"vet_s": 1.0},
        {"vet_failure": FAILURE},
        {"vet_failure": None},
    )
)
asks = st.tuples(st.just("ask"), a_model, st.sampled_from((None, 100, 700)))
advances = st.tuples(st.just("advance"), st.sampled_from((0.5, OVERTAKE_S, 3.0, 3.0, 30.0)))
ends = st.tuples(st.just("end"), st.integers(0, 7))
rare = st.one_of(
    st.tuples(st.just("burst"), a_model, st.integers(2, 5)),
    st.tuples(st.just("load"), a_model),
    st.tuples(st.just("unload"), a_model, st.booleans()),
    st.tuples(st.just("end all")),
    st.tuples(st.just("change"), a_model, a_change),
    st.tuples(st.just("remove"), a_model),
    st.tuples(st.just("max_instances"), st.integers(0, 3)),
    st.tuples(st.just("script"), a_model, a_script),
    st.tuples(st.just("crash"), a_model),
    st.tuples(st.just("progress"), a_model),
    st.tuples(st.just("hang"), a_model),
    st.tuples(st.just("cancel"), a_model),
    st.tuples(st.just("reset"), a_model),
    st.tuples(st.just("stray timer"), a_model, st.sampled_from(Timer)),
    st.tuples(st.just("late news"), a_model, st.integers(0, 3)),
    st.tuples(st.just("shut down")),
)
operations = st.lists(st.one_of(asks, asks, advances, ends, rare, rare), min_size=5, max_size=60)


def perform(world: World, operation: tuple[Any, ...]) -> None:  # noqa: C901 - a table of what can happen
    """Let one operation happen to the world, where it makes sense."""
    match operation:
        case ("ask", model, cost):
            world.ask(model, cost)
        case ("burst", model, count):
            for _ in range(count):
                world.ask(model)
        case ("load", model):
            world.load(model)
        case ("unload", model, is_forced):
            world.unload(model, is_forced=is_forced)
        case ("end", back):  # of an exchange, of a wait, or told of a ticket that is long settled
            numbers = [number for number, ticket in world.tickets.items() if not ticket.is_unload]
            world.end(*numbers[-1 - back :][:1])
        case ("end all",):
            world.end(*world.in_flight())
        case ("change", model, changes):
            changed = dataclasses.replace(world.specs.get(model, spec(model)), **changes)
            world.use(*(world.specs | {model: changed}).values())
        case ("remove", model):
            world.use(*[one for one in world.specs.values() if one.id != model])
        case ("max_instances", count):
            world.use(*world.specs.values(), max_instances=count)
        case ("script", model, changes):
            world.scripts[model] = dataclasses.replace(world.script(model), **changes)
        case ("crash", model) if model in world.alive:
            world.crash(model)
        case ("progress", model) if model in world.alive:
            world.progress(model, 0.5)
        case ("hang", model) if model in world.alive:
            world.hang(model)
        case ("cancel", model):
            world.cancel(model)
        case ("reset", model):
            world.reset(model)
        case ("stray timer", model, timer):
            world.feed(TimerFired(world.now, model, world.alive.get(model, 0), timer))
        case ("late news", model, run) if run != world.alive.get(model):
            world.feed(LoadProgressed(world.now, model, run))
            world.feed(UnitGone(world.now, model, run))
        case ("advance", seconds):
            world.advance(seconds)
        case ("shut down",):
            world.shut_down()


def world_for(max_instances: int, slots: int, changes: Mapping[str, Mapping[str, object]]) -> World:
    """Return a world with all models; ``changes`` are how some of them differ from the usual."""
    world = World(max_instances=max_instances)
    for model in MODELS:
        world.script(model).facts = UpstreamFacts(n_parallel=slots, n_ctx=1000)
    usual = {"idle_timeout_s": 20.0, "drain_timeout_s": 5.0, "stall_timeout_s": 20.0}
    world.use(*[spec(model, **{**usual, **changes.get(model, {})}) for model in MODELS])
    return world


worlds = st.builds(
    world_for, st.sampled_from((1, 1, 2, 3, 0)), st.integers(1, 3), st.dictionaries(a_model, a_change, max_size=3)
)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(world=worlds, story=operations)
def test_laws_hold_and_nobody_is_left_behind(world: World, story: list[tuple[Any, ...]]) -> None:
    """The laws hold after each event; when all exchanges have ended and time has passed, nobody waits any more.

    Then no start and no stop is half done, removed models are forgotten, and a shutdown ends quiet.
    """
    for operation in story:
        perform(world, operation)
    world.settle(but_for=Timer.RESTART)  # what is to be up always, and cannot be, is tried again for ever
    assert world.waiting() == []
    world.mend_what_is_tried_for_ever()
    world.settle()
    assert world.waiting() == []
    views = world.scheduler.views()
    assert {view.id for view in views} == world.specs.keys()
    assert {view.state for view in views} <= {State.STOPPED, State.READY, State.FAILED}
    failed = [view for view in views if view.state is State.FAILED and view.spec.restart is Restart.ALWAYS]
    assert not failed or ("shut down",) in story
    assert world.scheduler.is_quiet() == (not world.alive)
    world.shut_down()
    world.settle()
    assert world.scheduler.is_quiet()
    assert {ticket.place for ticket in world.tickets.values()} <= {Place.SETTLED}


@settings(max_examples=EXAMPLES // 4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(world=worlds, story=operations, model=a_model)
def test_one_who_waits_is_answered_while_all_others_go_on_asking(
    world: World, story: list[tuple[Any, ...]], model: str
) -> None:
    """After any history: among equals, a request is answered in bounded time though every model stays in demand."""
    for operation in story:
        perform(world, operation)
    world.scripts = {one: dataclasses.replace(script, load_s=2.0, stop_s=1.0) for one, script in world.scripts.items()}
    world.use(*[dataclasses.replace(one, priority=0) for one in world.specs.values()])
    ticket = world.ask(model)
    for _ in range(120):
        if world.place(ticket) is not Place.WAITING:
            return
        world.advance(0.5)
        newest = [world.ask(other) for other in MODELS]
        world.end(*[number for number in world.in_flight() if number not in newest and number != ticket])
    raise AssertionError(f"'{model}' still waits: {world.view(model)}")
