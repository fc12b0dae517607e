"""The admin interface, built when it is first asked for: a connection may be waiting for the daemon to start."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from llmstudiod.adapters.history import History
from llmstudiod.adapters.planner import Planner
from llmstudiod.adapters.recipe_writer import RecipeWriter
from llmstudiod.adapters.usage_log import UsageLog
from llmstudiod.adapters.usage_report import last_uses
from llmstudiod.core.devices import Machine
from llmstudiod.core.errors import ModelNotFoundError
from llmstudiod.core.keys import Key
from llmstudiod.core.recipe import Fault
from llmstudiod.core.settings import LoadedSettings
from llmstudiod.http.admin import Admin
from llmstudiod.http.admin_gpus import AdminGpus
from llmstudiod.http.admin_keys import AdminKeys
from llmstudiod.http.admin_logs import AdminLogs
from llmstudiod.http.admin_models import AdminModels
from llmstudiod.http.admin_recipes import AdminRecipes
from llmstudiod.http.admin_usage import AdminUsage
from llmstudiod.http.events import Copy, Events
from llmstudiod.http.figures import Figures
from llmstudiod.http.instances import Instances
from llmstudiod.http.listing import Listing
from llmstudiod.http.live import Live
from llmstudiod.http.relay import Pools
from llmstudiod.http.sessions import Sessions
from llmstudiod.http.streams import Streams
from llmstudiod.launchers.base import Launcher
from llmstudiod.supervisor import Supervisor

LINES = 500


@dataclass(frozen=True, slots=True)
class Parts:
    """What the interface shows and steers."""

    supervisor: Supervisor
    planner: Planner
    launcher: Launcher
    pools: Pools
    listing: Listing
    history: History
    usage: UsageLog
    figures: Figures
    events: Events
    streams: Streams
    sessions: Sessions
    writer: RecipeWriter
    measure: Callable[[], Machine]
    settings: Callable[[], LoadedSettings]
    faults: Callable[[], list[Fault]]
    ports: Callable[[], list[int]]
    clock: Callable[[], float]
    keys: Callable[[], tuple[Key, ...]]
    needs_key: Callable[[], bool]
    database: Path | None
    reread_keys: Callable[[], Awaitable[None]]
    put_keys: Callable[[tuple[Key, ...]], Awaitable[None]]
    pin: Callable[[str, bool], Awaitable[None]]
    reload: Callable[[], Awaitable[None]]
    began_at: float


class Interface:
    """Answers its requests, and keeps those who read the events up to date."""

    def __init__(self, parts: Parts) -> None:
        supervisor, planner, launcher = parts.supervisor, parts.planner, parts.launcher
        gpus = AdminGpus(parts.measure, supervisor, planner.binary)
        self.instances = Instances(
            supervisor=supervisor,
            launcher=launcher,
            gpus=gpus,
            figures=parts.figures,
            clock=parts.clock,
            faults=parts.faults,
            totals=parts.history.totals,
            streams=parts.streams,
        )
        keys = AdminKeys(
            keys=parts.keys,
            reread=parts.reread_keys,
            put=parts.put_keys,
            model_names=lambda: frozenset(supervisor.catalogue.ids_by_name),
            last_uses=lambda: last_uses(parts.usage),
        )
        recipes = AdminRecipes(
            supervisor=supervisor,
            planner=planner,
            writer=parts.writer,
            settings=lambda: parts.settings().settings,
            reload=parts.reload,
            launcher_name=launcher.name,
        )
        usage = AdminUsage(
            supervisor=supervisor,
            pools=parts.pools,
            log=parts.usage,
            figures=parts.figures,
            instances=self.instances,
            events=parts.events,
            gpus=gpus.measured,
            began_at=parts.began_at,
        )
        models = AdminModels(supervisor, lambda: parts.settings().settings, parts.measure)
        self._supervisor = supervisor
        self._logs = logs = AdminLogs(supervisor, launcher, parts.streams)
        self._admin = Admin(
            supervisor=supervisor,
            planner=planner,
            launcher=launcher,
            listing=parts.listing,
            instances=self.instances,
            settings=parts.settings,
            ports=parts.ports,
            clock=parts.clock,
            faults=parts.faults,
            sessions=parts.sessions,
            needs_key=parts.needs_key,
            database=parts.database,
            pin=parts.pin,
            reload=parts.reload,
            parts=[keys, recipes, gpus, usage, models, logs, parts.events],
        )
        self.live = Live(
            events=parts.events,
            instances=self.instances,
            figures=parts.figures,
            status=self._admin.status_event,
            gpus=gpus.measured,
            metrics=usage.event,
            add_energy=parts.usage.add_energy,
        )
        self._runner = web.AppRunner(self._admin.application, access_log=None)
        self._setting_up = asyncio.Lock()

    def along(self, name: str) -> tuple[Copy, ...]:
        """Return what is told beside the events to whoever looks at one model: its slots, its last hour, its log."""
        try:
            model = self._supervisor.catalogue.resolve(name)
        except ModelNotFoundError:
            return ()  # it may have been removed a moment ago
        return (
            lambda write: self.instances.tell_live(model, write),
            lambda write: self._logs.tell(model, LINES, write),
        )

    async def has_route(self, request: web.Request) -> bool:
        """Whether there is something at a request's path."""
        await self._set_up()
        return await self._admin.has_route(request)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a request."""
        await self._set_up()
        assert self._runner.server is not None
        return await self._runner.server.request_handler(request)

    async def _set_up(self) -> None:
        if self._runner.server is None:
            async with self._setting_up:
                if self._runner.server is None:
                    await self._runner.setup()

    async def close(self) -> None:
        """Give up what the routes hold."""
        await self._runner.cleanup()
