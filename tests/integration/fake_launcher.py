"""A launcher and a planner whose servers are `FakeUpstream` objects in this process; loads take what a test says."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from llmstudiod.adapters.learning import Learning
from llmstudiod.adapters.planner import Plan, Planner
from llmstudiod.adapters.state_db import StateDb
from llmstudiod.core.command import BoundFile, Command, Context, ServerBinary
from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.launch import LaunchRequest
from llmstudiod.core.placement import Placement, Wish
from llmstudiod.core.recipe import RecipeEntry
from llmstudiod.launchers.base import Exit, FoundUnit, Launcher, Unit
from tests.integration.fake_upstream import FakeUpstream


@dataclass
class FakeLauncher(Launcher):
    """Starts the prepared upstream of a model, again after each end. ``load_gate`` holds every /health back."""

    directory: Path
    name: str = "fake"
    is_sandboxed: bool = False
    outlives_us: bool = False
    upstreams: dict[str, FakeUpstream] = field(default_factory=dict)
    start_error: LlmstudioError | None = None
    stop_error: Exception | None = None
    starts: list[str] = field(default_factory=list)
    _ends: dict[str, asyncio.Future[Exit]] = field(default_factory=dict)

    def socket_path(self, model_id: str) -> str:
        """Return where the model's server listens."""
        return str(self.directory / f"{model_id}.sock")

    async def show(self, request: LaunchRequest) -> list[str] | None:
        """There are no units."""
        return None

    async def start(self, request: LaunchRequest) -> Unit:
        """Let the model's upstream listen, or fail as told."""
        self.starts.append(request.model_id)
        if self.start_error is not None:
            raise self.start_error
        await self.upstreams[request.model_id].listen(request.socket_path)
        self._ends[request.model_id] = asyncio.get_running_loop().create_future()
        return Unit(request.model_id, "fake", len(self.starts), f"run-{len(self.starts)}")

    def left_behind(self, model_id: str) -> FoundUnit:
        """Return a server that an earlier daemon has started, and whose socket is gone."""
        self._ends[model_id] = asyncio.get_running_loop().create_future()
        return FoundUnit(Unit(model_id, "fake", 1, "run-0"), "")

    async def wait(self, unit: Unit) -> Exit:
        """Return when the upstream was stopped or has died."""
        return await asyncio.shield(self._ends[unit.model_id])

    async def stop(self, model_id: str, *, is_forced: bool) -> None:
        """End the upstream."""
        if self.stop_error is not None:
            raise self.stop_error
        self.die(model_id, Exit("signal", signal=9 if is_forced else 15))

    def die(self, model_id: str, end: Exit) -> None:
        """Let the upstream end by itself."""
        self.upstreams[model_id].stop()
        Path(self.socket_path(model_id)).unlink(missing_ok=True)
        waiter = self._ends.get(model_id)
        if waiter is not None and not waiter.done():
            waiter.set_result(end)

    def lose_sight(self, model_id: str, bug: Exception) -> None:
        """Let the wait for the upstream's end fail, while it runs on."""
        self._ends[model_id].set_exception(bug)

    async def lines(self, model_id: str, *, limit: int) -> list[str]:
        """Return no lines: it writes none."""
        return []

    async def first_lines(self, unit: Unit, *, limit: int) -> list[str]:
        """Return no lines: it writes none."""
        return []

    def told(self, unit: Unit) -> list[str]:
        """Return no lines: it writes none."""
        return []

    def n_told(self, unit: Unit) -> int:
        """Count no lines: it writes none."""
        return 0

    async def follow(self, model_id: str, *, limit: int) -> AsyncIterator[str]:
        """Yield no lines."""
        lines: tuple[str, ...] = ()
        for line in lines:
            yield line

    async def memory(self, unit: Unit) -> int | None:
        """Tell nothing."""
        return None

    async def find_running(self) -> list[FoundUnit]:
        """Find nothing left."""
        return []

    async def find_failed(self) -> list[tuple[str, Exit]]:
        """Find nothing that failed."""
        return []

    async def close(self) -> None:
        """End every upstream."""
        for model_id in self.upstreams:
            self.die(model_id, Exit("success", code=0))


class FakePlanner(Planner):
    """Plans without looking for a file or a binary."""

    def __init__(self, launcher: FakeLauncher) -> None:
        self._fake_launcher = launcher
        self.learning = Learning(StateDb(None), None)
        self.backends = ()
        self.files: tuple[BoundFile, ...] = ()
        self.wishes: dict[str, Wish] = {}
        self.placements: list[tuple[str, Placement | None]] = []

    async def binary(self) -> ServerBinary:
        """Return one that nobody runs."""
        return ServerBinary(("fake",), "test")

    def has_nvidia(self) -> bool:
        """There is none."""
        return False

    async def plan(self, entry: RecipeEntry, placement: Placement | None = None, *, is_draft: bool = False) -> Plan:
        """Return a plan with nothing but the socket and the name."""
        recipe = entry.recipe
        self.placements.append((recipe.id, placement))
        request = LaunchRequest(
            model_id=recipe.id,
            recipe_hash="",
            recipe_file=None,
            argv=("fake",),
            environment={},
            socket_path=self._fake_launcher.socket_path(recipe.id),
            files=self.files,
        )
        command = Command(("fake",), {}, Context(4096, 4, 16384))
        return Plan(request, command, await self.binary(), recipe.alias, wish=self.wishes.get(recipe.id))
