"""The supervisor with real sockets and a launcher that does as it is told: starts, ends, identity."""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from llmstudiod import runs
from llmstudiod.adapters.learning import Learning
from llmstudiod.adapters.state_db import StateDb
from llmstudiod.core.command import BoundFile
from llmstudiod.core.errors import LauncherError, LlmstudioError, LoadFailedError, ModelNotFoundError
from llmstudiod.core.ledger import Memory
from llmstudiod.core.lifecycle import State, UpstreamFacts
from llmstudiod.core.memory import Run
from llmstudiod.core.model_shape import Layer, ModelShape
from llmstudiod.core.placement import Room, Wish
from llmstudiod.core.recipe import recipe_hash
from llmstudiod.launchers.base import Exit, FoundUnit
from tests.integration.house import House, eventually, open_house


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """The endpoint with its usual models."""
    async with open_house(tmp_path) as opened:
        yield opened


async def failure_of(house: House, model: str = "tiny") -> LlmstudioError:
    """Load the model, and return why it cannot be loaded."""
    with pytest.raises(LlmstudioError) as caught:
        await house.supervisor.load(model)
    return caught.value


async def test_load_and_unload(house: House) -> None:
    """A load returns when the model is ready, an unload when nothing of it is left."""
    await house.supervisor.load("tiny")
    assert house.state() is State.READY
    await house.supervisor.unload("tiny")
    assert house.state() is State.STOPPED
    assert not house.tiny.open_connections


async def test_second_load_joins_the_first(house: House) -> None:
    """Two loads are one start."""
    await asyncio.gather(house.supervisor.load("tiny"), house.supervisor.load("tiny"))
    assert house.launcher.starts == ["tiny"]


async def test_start_that_fails_is_told(house: House) -> None:
    """What the launcher has to say reaches who waited, with its hint."""
    house.launcher.start_error = LauncherError("cannot execute '/x': No such file", hint="is it there?")
    error = await failure_of(house)
    assert isinstance(error, LoadFailedError)
    assert error.message == "cannot load 'tiny': cannot execute '/x': No such file"
    assert error.hint == "is it there?"
    assert house.state() is State.FAILED


async def test_end_while_loading_is_told_at_once(house: House) -> None:
    """The exit ends the wait for readiness, and the log's last lines say why."""
    house.tiny.is_ready = False
    loading = asyncio.ensure_future(failure_of(house))  # noqa: TID251 - awaited below
    await eventually(lambda: house.state() is State.LOADING)
    lines = ("0.00.012.000 E srv  llama_server: error loading model: unknown model architecture: 'zz'",)
    house.launcher.die("tiny", Exit("exit-code", code=1, lines=lines))
    error = await loading
    assert error.details["failure"] == "unsupported_arch"
    assert error.hint == "install a newer llama-server"


async def test_somebody_else_at_the_socket_is_a_failure(house: House) -> None:
    """A server that does not know itself by the model's name gets no traffic, and is stopped."""
    house.tiny.alias = "somebody"
    error = await failure_of(house)
    assert "'somebody' answers at its socket instead of 'org/Tiny'" in error.message
    assert house.tiny.open_connections == 0


async def test_server_is_not_ready_before_it_says_who_it_is(house: House) -> None:
    """/health alone proves nothing: who answers, and how many slots it has, is told by /props."""
    house.tiny.props_status = b"503 Service Unavailable"
    house.supervisor.start_load("tiny")
    await eventually(lambda: house.state() is State.LOADING)
    await asyncio.sleep(0.3)
    assert house.state() is State.LOADING
    house.tiny.props_status = b"200 OK"
    await eventually(lambda: house.state() is State.READY)
    shown = house.supervisor.view("tiny")
    assert shown is not None
    assert shown.facts == UpstreamFacts(n_parallel=4, n_ctx=4096)


async def test_server_without_props_is_somebody_else(house: House) -> None:
    """Every llama-server has them."""
    house.tiny.props_status = b"404 Not Found"
    assert "somebody who does not speak llama-server's language" in (await failure_of(house)).message


async def test_server_without_a_socket_is_started_afresh(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of an earlier daemon that nobody can reach costs neither who waits nor a place in the crash budget."""
    monkeypatch.setattr(runs, "DESERTED_S", 0.1)
    monkeypatch.setattr(runs, "PROGRESS_PERIOD_S", 0.05)
    await house.supervisor.adopt(house.launcher.left_behind("tiny"))
    async with asyncio.timeout(3):
        await house.supervisor.load("tiny")
    shown = house.supervisor.view("tiny")
    assert shown is not None
    assert (shown.state, shown.failures, shown.last_failure) == (State.READY, 0, None)
    assert "nobody listens at its socket" in [step.cause for step in shown.story]
    assert "tiny: nobody listens at its socket, though it runs" in house.faults.pop()


async def test_start_does_not_wait_for_the_database(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server is watched, and serves, while what is to be kept of it waits for the disk."""
    state = StateDb(tmp_path / "state.db")
    state.put("holdings", "x", {})
    monkeypatch.setattr(house.launcher, "outlives_us", True)
    house.planner.learning = Learning(state, None)
    house.planner.wishes = {"tiny": wish("tiny", 1)}
    house.supervisor.measure_with(lambda at: Memory(at, Room(12 << 30), Room(12 << 30)))
    with contextlib.closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        async with asyncio.timeout(1):
            await house.supervisor.load("tiny")
        other.execute("COMMIT")
    await asyncio.to_thread(state.close)
    assert state.get("holdings", "run-1") is not None


async def test_ready_model_has_left_word_of_its_memory(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that is killed the moment a load is done leaves the next one what it had promised."""
    state = StateDb(None)
    put = state.put

    def slowly(table: str, key: str, value: Mapping[str, Any]) -> None:
        time.sleep(0.1)
        put(table, key, value)

    monkeypatch.setattr(state, "put", slowly)
    monkeypatch.setattr(house.launcher, "outlives_us", True)
    house.planner.learning = Learning(state, None)
    house.planner.wishes = {"tiny": wish("tiny", 1)}
    house.supervisor.measure_with(lambda at: Memory(at, Room(12 << 30), Room(12 << 30)))
    await house.supervisor.load("tiny")
    assert state.get("holdings", "run-1") is not None


async def test_what_is_kept_of_a_run_goes_with_the_next(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest rows give way to new ones: those of ended runs must not push out that of a model that lasts."""
    state = StateDb(None)
    monkeypatch.setattr(house.launcher, "outlives_us", True)
    house.planner.learning = Learning(state, None)
    house.planner.wishes = {"tiny": wish("tiny", 1)}
    house.supervisor.measure_with(lambda at: Memory(at, Room(12 << 30), Room(12 << 30)))
    await house.supervisor.load("tiny")
    house.planner.learning.remember_warnings("run-1", ["11 of 17 layers are on the GPU"])
    await eventually(lambda: state.all("holdings").keys() == {"run-1", "run-1/warnings"})
    await house.supervisor.unload("tiny")
    await house.supervisor.load("tiny")
    await eventually(lambda: state.all("holdings").keys() == {"run-2"})


async def test_unload_while_it_loads_answers_who_waits(house: House) -> None:
    """A stop does not wait for a readiness that may never come."""
    house.tiny.is_ready = False
    loading = asyncio.ensure_future(failure_of(house))  # noqa: TID251 - awaited below
    await eventually(lambda: house.state() is State.LOADING)
    async with asyncio.timeout(2):
        await house.supervisor.unload("tiny")
    assert (await loading).kind == "shutting_down"
    assert house.state() is State.STOPPED


async def test_unknown_model_cannot_be_loaded(house: House) -> None:
    """Neither loaded nor unloaded."""
    with pytest.raises(ModelNotFoundError):
        await house.supervisor.load("nope")
    with pytest.raises(ModelNotFoundError):
        await house.supervisor.unload("nope")


async def test_load_that_nobody_waits_for_is_finished_quietly(house: House) -> None:
    """A model to be loaded at the start may fail without taking anything with it."""
    house.launcher.start_error = LauncherError("no")
    house.supervisor.start_load("tiny")
    await eventually(lambda: house.state() is State.FAILED)
    house.launcher.start_error = None
    house.supervisor.start_load("other")
    await eventually(lambda: house.state("other") is State.READY)


async def test_bug_in_a_start_fails_the_start_alone(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits is answered, the traceback is logged, and other models are served."""
    monkeypatch.setattr(house.launcher, "start", broken)
    assert "internal error" in (await failure_of(house)).message
    monkeypatch.undo()
    await house.supervisor.load("other")
    assert any("internal error" in fault for fault in house.faults)
    house.faults.clear()


async def test_bug_in_a_stop_keeps_nobody_waiting(house: House) -> None:
    """Whatever the launcher raises, an unload ends, and the model can be asked for again."""
    await house.supervisor.load("tiny")
    house.launcher.stop_error = OSError(24, "Too many open files")
    async with asyncio.timeout(2):
        await house.supervisor.unload("tiny")
    assert house.state() is State.STOPPED
    house.launcher.stop_error = None
    await house.launcher.stop("tiny", is_forced=True)
    assert "tiny: cannot be stopped" in house.faults.pop()


async def test_server_that_cannot_be_watched_is_stopped(house: House) -> None:
    """A model that would stay ready for ever, dead or alive, is a failure instead."""
    await house.supervisor.load("tiny")
    house.launcher.lose_sight("tiny", OSError(24, "Too many open files"))
    await eventually(lambda: house.state() is State.FAILED)
    assert house.tiny.open_connections == 0
    await house.supervisor.load("tiny")
    assert house.state() is State.READY
    assert "start tiny: internal error" in house.faults.pop()


async def test_crash_is_logged_though_a_start_follows_at_once(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """The reason of the end is told, also when the waiters bring the model up again in the same moment."""
    await house.supervisor.load("tiny")
    loading = house.supervisor.ask("tiny", is_load=True)
    house.supervisor.end(loading)
    fillers = [house.supervisor.ask("tiny") for _ in range(100)]
    with caplog.at_level("INFO"):
        house.launcher.die("tiny", Exit("signal", signal=11))
        await eventually(lambda: house.launcher.starts == ["tiny", "tiny"])
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("tiny: ready -> failed" in line for line in told), told
    for filler in fillers:
        house.supervisor.end(filler)


async def test_shutdown_ends_everything(house: House) -> None:
    """Models that run and models that load are gone afterwards, and whoever waits has an answer."""
    await house.supervisor.load("other")
    house.tiny.is_ready = False
    loading = asyncio.ensure_future(failure_of(house))  # noqa: TID251 - awaited below
    await eventually(lambda: house.state() is State.LOADING)
    async with asyncio.timeout(5):
        await house.supervisor.shut_down()
    assert (await loading).kind == "shutting_down"
    assert {house.state("other"), house.state("tiny")} == {State.STOPPED}
    assert (await failure_of(house, "other")).kind == "shutting_down"


async def found(house: House) -> FoundUnit:
    """Return a server that an earlier daemon started by the recipe that is in force."""
    entry = house.supervisor.catalogue.entries["tiny"]
    plan = await house.planner.plan(entry)
    return FoundUnit(await house.launcher.start(plan.request), recipe_hash(entry.recipe))


async def test_warnings_of_a_load_outlast_the_daemon(house: House) -> None:
    """Its lines may have scrolled away when the next one finds the server."""
    unit = await found(house)
    house.planner.learning.remember_warnings(unit.unit.invocation_id, ["11 of 17 layers are on the GPU"])
    await house.supervisor.adopt(unit)
    await eventually(lambda: (shown := house.supervisor.view("tiny")) is not None and bool(shown.warnings))


async def test_end_of_a_server_that_was_found_names_its_file(house: House) -> None:
    """Not the place that it has inside the sandbox."""
    house.planner.files = (BoundFile("/models/tiny.gguf", "/run/llmstudio-model/0/tiny.gguf"),)
    house.tiny.is_ready = False
    await house.supervisor.adopt(await found(house))
    await eventually(lambda: house.state() is State.LOADING)
    told = "failed to open GGUF file '/run/llmstudio-model/0/tiny.gguf' (Permission denied)"
    line = f"0.00.012.000 E gguf_init_from_file: {told}"
    house.launcher.die("tiny", Exit("exit-code", code=1, lines=(line,)))
    await eventually(lambda: house.state() is State.FAILED)
    shown = house.supervisor.view("tiny")
    assert shown is not None
    assert shown.failure is not None
    assert "'/models/tiny.gguf'" in shown.failure.message


async def broken(*_: object, **__: object) -> None:
    """Fail as a bug does."""
    raise RuntimeError("a bug")


async def test_bug_in_a_plan_hides_no_end(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a server that was found is told that it failed, without the names of its files."""
    house.tiny.is_ready = False
    await house.supervisor.adopt(await found(house))
    await eventually(lambda: house.state() is State.LOADING)
    monkeypatch.setattr(house.planner, "plan", broken)
    loading = asyncio.ensure_future(failure_of(house))  # noqa: TID251 - awaited below
    await eventually(lambda: (shown := house.supervisor.view("tiny")) is not None and shown.queued)
    house.launcher.die("tiny", Exit("exit-code", code=1))
    async with asyncio.timeout(2):
        assert "exit code 1" in (await loading).message
    assert "tiny: its plan cannot be made again" in house.faults.pop()


async def test_bug_in_reading_a_load_leaves_the_vigil_alone(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ready server is looked after for as long as it runs, whatever reading its log did to us."""
    looks: list[object] = []

    def told(unit: object) -> list[str]:
        looks.append(unit)
        return []

    monkeypatch.setattr(runs, "IDLE_LOOK_S", 0.01)
    monkeypatch.setattr(house.launcher, "first_lines", broken)
    await house.supervisor.load("tiny")
    await eventually(lambda: house.faults)
    assert "tiny: the log of its load cannot be read" in house.faults.pop()
    monkeypatch.setattr(house.launcher, "told", told)
    await eventually(lambda: len(looks) > 1, within_s=2)


def wish(model: str, gib: float) -> Wish:
    """A model that needs so many GiB of RAM."""
    layer = Layer(weights=int(gib * (1 << 30)))
    shape = ModelShape("llama", (layer,), 0, 0, 64, 64, 1, 64, 64, 100, 2048)
    return Wish(model, shape, Run(512), gpus=())


async def test_models_share_the_memory(house: House) -> None:
    """What was measured decides who may stay, and what does not fit is refused with the sum."""
    house.planner.wishes = {"tiny": wish("tiny", 8), "other": wish("other", 8)}
    free = 12 << 30
    house.supervisor.measure_with(lambda at: Memory(at, Room(12 << 30), Room(free)))
    await house.supervisor.load("tiny")
    await house.supervisor.load("other")
    assert (house.state("tiny"), house.state("other")) == (State.STOPPED, State.READY)
    placed = [placement for _, placement in house.planner.placements if placement is not None]
    assert [placement.estimate.host.weights for placement in placed] == [8 << 30] * 2
    free = 1 << 30
    await house.supervisor.unload("other")
    error = await failure_of(house)
    assert error.kind == "does_not_fit"
    assert error.message.startswith("cannot load 'tiny': it needs 8.")
    assert error.message.endswith("of RAM; 1.0 GiB of RAM are free, 0 B could be freed, other programs use 11.0 GiB")
    assert house.state() is State.STOPPED


async def test_memory_that_cannot_be_measured_is_not_planned(house: House) -> None:
    """Models are started as before, and llama-server tells what it lacks."""
    house.planner.wishes = {"tiny": wish("tiny", 8)}
    house.supervisor.measure_with(lambda _: None)
    await house.supervisor.load("tiny")
    assert house.state() is State.READY
