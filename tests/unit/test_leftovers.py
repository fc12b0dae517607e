"""Servers that run without a recipe are stopped, but only when nothing speaks for them any more."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from llmstudiod.core.catalogue import build_catalogue
from llmstudiod.core.recipe import Fault, Recipe, RecipeEntry
from llmstudiod.daemon.leftovers import GRACE_S, Leftovers
from llmstudiod.daemon.main import kept
from llmstudiod.launchers.base import FoundUnit, Unit


@dataclass
class Shown:
    """What is asked of a view."""

    id: str
    since: float = 0.0
    is_resident: bool = False


@dataclass
class World:
    """Units that run, recipes that are there, and a clock: both launcher and supervisor."""

    running: dict[str, str] = field(default_factory=dict)
    recipes: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    adopted: list[str] = field(default_factory=list)
    now: float = 100.0
    can_read: bool = True
    reloads: int = 0
    on_reload: Callable[[], None] = lambda: None
    outlives_us: bool = True

    def __post_init__(self) -> None:
        self.leftovers = Leftovers(
            cast("Any", self), cast("Any", self), clock=lambda: self.now, reload=self.reload,
            can_read_recipes=self.can_read_recipes,
        )  # fmt: skip

    async def find_running(self) -> list[FoundUnit]:
        """Return the units."""
        return [FoundUnit(Unit(model, f"{model}.service", 1, run), "sha256:") for model, run in self.running.items()]

    async def stop(self, model: str, *, is_forced: bool) -> None:
        """Stop one."""
        assert not is_forced
        del self.running[model]

    async def adopt(self, found: FoundUnit) -> None:
        """Note it."""
        self.adopted.append(found.unit.model_id)

    async def reload(self) -> None:
        """Read the recipes."""
        self.reloads += 1
        self.on_reload()
        self.leftovers.recipes_were_read()

    async def can_read_recipes(self) -> bool:
        """Return whether the directory is there."""
        return self.can_read

    @property
    def catalogue(self) -> object:
        """Return the recipes."""
        entries = [RecipeEntry(Recipe(id=each, model_path="/m"), f"{each}.yaml") for each in sorted(self.recipes)]
        return build_catalogue(entries, self.faults)

    def views(self) -> list[Shown]:
        """Return what is known."""
        return [Shown(each, is_resident=each in self.adopted) for each in sorted(self.recipes)]

    def view(self, model: str) -> Shown | None:
        """Return one."""
        return next((shown for shown in self.views() if shown.id == model), None)

    async def look_later(self, after_s: float = GRACE_S) -> list[str]:
        """Let time go by, look, and return what runs."""
        self.now += after_s
        await self.leftovers.look()
        return list(self.running)


@pytest.fixture
async def world() -> World:
    """A daemon that has just started: one model has its recipe, one has none."""
    made = World({"a": "1", "b": "1"}, {"b"})
    await made.leftovers.adopt()
    assert made.adopted == ["b"]
    return made


async def test_stranger_is_stopped_at_a_second_look(world: World) -> None:
    """After a while in which a recipe could have come back, and after the recipes were read once more."""
    assert world.leftovers.any_unknown
    assert await world.look_later(1) == ["a", "b"]
    assert await world.look_later(GRACE_S - 2) == ["a", "b"]
    assert world.reloads == 0
    assert await world.look_later(1) == ["b"]
    assert world.reloads == 1
    await world.look_later()
    assert not world.leftovers.any_unknown


async def test_stranger_is_taken_over_when_its_recipe_comes_back(world: World) -> None:
    """At once, since the next request for it must find it."""
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        looking = tasks.create_task(world.leftovers.keep_looking())
        world.recipes.add("a")
        await world.reload()
        while world.adopted != ["b", "a"]:  # noqa: ASYNC110 - the fake tells nobody
            await asyncio.sleep(0.001)
        looking.cancel()
    assert await world.look_later() == ["a", "b"]
    assert not world.leftovers.any_unknown


async def test_last_reading_finds_what_nobody_noticed(world: World) -> None:
    """A disk that was mounted meanwhile."""
    world.on_reload = lambda: world.recipes.add("a")
    assert await world.look_later() == ["a", "b"]
    await world.look_later(0)
    assert world.adopted == ["b", "a"]


async def test_none_is_stopped_while_the_recipes_cannot_be_read(world: World) -> None:
    """For as long as that takes; it is stopped once they can, and do not name it."""
    world.can_read = False
    assert [await world.look_later() for _ in range(3)] == [["a", "b"]] * 3
    world.can_read = True
    assert await world.look_later() == ["b"]


@pytest.mark.parametrize("fault", [Fault("x", recipe_id="a"), Fault("x", recipe_id="A!", claims=("a",))])
async def test_none_is_stopped_while_its_recipe_is_faulty(world: World, fault: Fault) -> None:
    """An invalid change is no wish to end it."""
    world.faults.append(fault)
    assert [await world.look_later() for _ in range(3)] == [["a", "b"]] * 3
    world.faults.clear()
    assert await world.look_later() == ["b"]


async def test_each_run_has_its_own_time(world: World) -> None:
    """One that was started anew meanwhile is seen for the first time."""
    world.running["a"] = "2"
    assert await world.look_later() == ["a", "b"]
    assert await world.look_later() == ["b"]


async def test_keeper_goes_on_after_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """What it could not bear, such as a thread that could not be started, is logged with its traceback."""
    count = 0

    async def keep() -> None:
        nonlocal count
        count += 1
        if count < 3:
            raise RuntimeError("can't start new thread")

    await kept("history", keep, pause_s=0)
    assert count == 3
    assert caplog.text.count("RuntimeError: can't start new thread") == 2
    assert "history: this went wrong" in caplog.text


async def test_cancelled_keeper_ends() -> None:
    """The daemon's own end is no error."""

    async def keep() -> None:
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await kept("history", keep, pause_s=0)
