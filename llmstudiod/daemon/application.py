"""Everything that makes the daemon, built once and passed in: settings, recipes, launcher, supervisor, servers."""

import asyncio
import contextlib
import importlib
import logging
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from llmstudiod.adapters import usage_log
from llmstudiod.adapters.file_watch import Files, FileWatch, model_files
from llmstudiod.adapters.history import History
from llmstudiod.adapters.learning import Learning
from llmstudiod.adapters.memory_meter import measure_memory
from llmstudiod.adapters.model_recipes import load_catalogue
from llmstudiod.adapters.own_thread import in_own_thread
from llmstudiod.adapters.planner import Planner
from llmstudiod.adapters.proc import pulse
from llmstudiod.adapters.program import LocalProgram, Program
from llmstudiod.adapters.state_db import StateDb
from llmstudiod.adapters.usage_log import UsageLog
from llmstudiod.core.catalogue import Catalogue
from llmstudiod.core.devices import Machine
from llmstudiod.core.errors import ConfigError, LlmstudioError
from llmstudiod.core.events import StoriesRead, UnitFoundFailed
from llmstudiod.core.gpus import with_gpus
from llmstudiod.core.keys import Key
from llmstudiod.core.ledger import Memory
from llmstudiod.core.lifecycle import InstanceView, Restart, State
from llmstudiod.core.model_spec import lifecycle_defaults
from llmstudiod.core.reasons import explain_exit
from llmstudiod.core.recipe import Fault, Severity
from llmstudiod.core.scheduler import Scheduler
from llmstudiod.core.settings import LoadedSettings, Settings
from llmstudiod.core.sharing import strangers
from llmstudiod.core.units import counted
from llmstudiod.daemon.config_files import ConfigFiles
from llmstudiod.daemon.keyring import Keyring
from llmstudiod.daemon.leftovers import Leftovers
from llmstudiod.daemon.sockets import BACKLOG, Listeners
from llmstudiod.http.access import Access, Rules
from llmstudiod.http.client import EndpointServer
from llmstudiod.http.events import Events
from llmstudiod.http.fast_path import FastPath
from llmstudiod.http.figures import Figures
from llmstudiod.http.listing import Listing
from llmstudiod.http.meter import Meter
from llmstudiod.http.proxy import FORWARDED_POSTS, Proxy
from llmstudiod.http.relay import Pools
from llmstudiod.http.sessions import Sessions
from llmstudiod.http.streams import Streams
from llmstudiod.http.tcp_admin import TcpAdmin
from llmstudiod.launchers import systemd
from llmstudiod.launchers.base import Launcher
from llmstudiod.launchers.privileged import PrivilegedClient, PrivilegedProgram, PrivilegedRecipes
from llmstudiod.launchers.subprocess import SubprocessLauncher
from llmstudiod.supervisor import Supervisor

if TYPE_CHECKING:
    from llmstudiod.daemon.interface import Interface

LAST_MOMENT_S = 1.0
SETTLE_S = 0.05
LIVE_AFTER_S = 3.0
MAX_ADMIN_BODY = 2 << 20

logger = logging.getLogger("llmstudiod")


class Application:
    """The daemon without its process: what main.py runs, and what the tests run in theirs."""

    def __init__(self, config: Path, environment: Mapping[str, str] | None, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        state = os.environ.get("STATE_DIRECTORY")
        state_dir = Path(state.partition(":")[0]) if state and environment is None else None
        self.files = ConfigFiles(config, environment, state_dir)
        settings = self.loaded.settings
        self._helper = None if choose_launcher(settings) == "subprocess" else PrivilegedClient(settings.launcher_socket)
        self.launcher, program = _launcher(settings, self._helper)
        self._measure_machine: Callable[[], Machine] | None = None
        self._database = state_dir / "state.db" if state_dir else None
        self.state = StateDb(self._database, tables=usage_log.TABLES, retired=usage_log.RETIRED)
        learning = Learning(self.state, self.machine)
        self.planner = Planner(settings, self.launcher, program, measure=self.machine, learning=learning)
        self.pools = Pools()
        self.supervisor = Supervisor(
            scheduler=Scheduler(max_instances=settings.max_instances, chance=random.random),
            launcher=self.launcher,
            planner=self.planner,
            upstreams=self.pools,
            pulse=lambda unit: pulse(unit.pid),
            clock=clock,
            measure=self._measure_memory,
        )
        self.history = History(self.state, clock)
        self.supervisor.observe(self.history.observe)
        listing = Listing(self.supervisor, created=int(time.time()))
        self._figures = Figures()
        self.usage = UsageLog(self.state, self._figures.add, keep_s=settings.usage_keep)
        self.meter = Meter(self.usage.note)
        self._sessions = Sessions(self.state, lambda hashed: any(key.hash == hashed for key in self.keyring.admins()))
        own_names = frozenset({socket.gethostname().lower()})
        self.access = Access(Rules(), own_names=own_names, is_session=self._sessions.is_open)
        self._reloading = asyncio.Lock()
        self.keyring = Keyring(self.access, lambda: self.loaded.settings, self._helper, self._reloading)
        self._pins: frozenset[str] = frozenset()
        self._are_pins_read = False
        self._began_at = time.time()
        self._ports: list[int] = []
        self._listing = listing
        self._streams = Streams()
        self._events = Events(
            lambda: self._interface().live.snapshot(), self._streams, lambda model: self._interface().along(model)
        )
        self._built: Interface | None = None
        self.proxy = Proxy(
            self.supervisor,
            self.pools,
            listing,
            max_body=settings.max_body,
            wait_comment_interval_s=settings.wait_comment_interval,
            access=self.access,
            meter=self.meter,
            admin=TcpAdmin(
                access=self.access,
                sessions=self._sessions,
                admin_key=self.keyring.admin,
                has_route=self._has_admin_route,
                handle=self._handle_admin,
            ),
        )
        self.supervisor.observe(self._events.observe)
        self._model_files: Files = self.model_files(settings)
        self.keyring.read()
        self._put_in_force(load_catalogue(settings, self.files.found.recipes))
        self._servers: list[asyncio.Server] = []
        self._endpoint: EndpointServer | None = None
        self._admin_server: web.Server | None = None
        self.leftovers = Leftovers(
            self.launcher,
            self.supervisor,
            clock=clock,
            reload=self.reload,
            can_read_recipes=self._can_read_recipes,
        )

    @property
    def loaded(self) -> LoadedSettings:
        """The settings in force, with what is wrong in their files."""
        return self.files.found.settings

    def _interface(self) -> "Interface":
        """Return the admin interface; it is built now, unless it was before."""
        if self._built is None:
            from llmstudiod.adapters.recipe_writer import OwnRecipes  # slow to import, as is what follows
            from llmstudiod.daemon.interface import Interface, Parts

            writer = PrivilegedRecipes(self._helper) if self._helper else OwnRecipes(lambda: self.loaded.settings)
            parts = Parts(
                supervisor=self.supervisor,
                planner=self.planner,
                launcher=self.launcher,
                pools=self.pools,
                listing=self._listing,
                history=self.history,
                usage=self.usage,
                figures=self._figures,
                events=self._events,
                streams=self._streams,
                sessions=self._sessions,
                writer=writer,
                measure=self.machine,
                settings=lambda: self.loaded,
                faults=self._faults,
                ports=lambda: self._ports,
                clock=self._clock,
                keys=self.keyring.keys,
                needs_key=lambda: self.access.rules.needs_key,
                database=self._database,
                reread_keys=self.keyring.reread,
                put_keys=self._put_keys,
                pin=self._pin,
                reload=self.reload,
                began_at=self._began_at,
            )
            self._built = Interface(parts)
        return self._built

    async def keep_live(self) -> None:
        """Keep those who read the events up to date, and measure what charts and sums need; there is no hurry."""
        await asyncio.sleep(LIVE_AFTER_S)
        await asyncio.to_thread(importlib.import_module, "llmstudiod.daemon.interface")
        await self._interface().live.keep()

    async def _has_admin_route(self, request: web.Request) -> bool:
        return await self._interface().has_route(request)

    async def _handle_admin(self, request: web.BaseRequest) -> web.StreamResponse:
        assert isinstance(request, web.Request)
        return await self._interface().handle(request)

    def _faults(self) -> list[Fault]:
        return [*self.loaded.faults, *self.keyring.faults(), *self.supervisor.catalogue.faults]

    async def _pin(self, model: str, is_pinned: bool) -> None:  # noqa: FBT001 - a callback
        """Keep a model loaded, or not any more; it lasts until the daemon's state is cleared."""
        self._pins = self._pins | {model} if is_pinned else self._pins - {model}
        self.supervisor.pin(self._pins)
        if is_pinned:
            await asyncio.to_thread(self.state.put, "pins", model, {"at": time.time()})
        else:
            await asyncio.to_thread(self.state.delete, "pins", model)

    @contextlib.asynccontextmanager
    async def serving(self, listeners: Listeners) -> AsyncIterator[None]:
        """Serve the sockets for as long as the context lasts."""
        loop = asyncio.get_running_loop()
        fast_path = FastPath(
            self.supervisor, self.pools, FORWARDED_POSTS, max_body=lambda: self.proxy.max_body, access=self.access,
            meter=self.meter,
        )  # fmt: skip
        admin = web.Server(
            self._handle_admin, request_factory=_application_request, access_log=None, handler_cancellation=True
        )
        self._admin_server = admin
        endpoint = EndpointServer(
            self.proxy.handle,
            fast_path=fast_path,
            after_loss=self.proxy.after_fast_loss,
            request_factory=_application_request,
        )
        self._endpoint = endpoint
        self._ports = sorted({sock.getsockname()[1] for sock in listeners.http})
        for sock in listeners.http:
            # asyncio listens again, and its own default would cut the backlog down to 100.
            self._servers.append(await loop.create_server(endpoint, sock=sock, backlog=BACKLOG))
        # Not create_unix_server: from Python 3.13 on it removes the socket's file at the end, which is systemd's.
        admin_servers = [await loop.create_server(admin, sock=sock, backlog=BACKLOG) for sock in listeners.admin]
        try:
            yield
        finally:
            logging.getLogger("aiohttp.server").addFilter(_is_worth_telling)
            for server in (*self._servers, *admin_servers):
                server.close()
            await endpoint.shutdown(1.0)
            await admin.shutdown(LAST_MOMENT_S)
            if self._built is not None:
                await self._built.close()
            await self.launcher.close()
            for shown in self.supervisor.views():
                self.history.totals(shown)
            await asyncio.to_thread(self.history.flush)
            await asyncio.to_thread(self.usage.close)
            await asyncio.to_thread(self.state.close)

    async def _can_read_recipes(self) -> bool:
        return await asyncio.to_thread(os.access, self.loaded.settings.recipes_dir, os.R_OK | os.X_OK)

    async def _tell_failed(self) -> None:
        """Find out what failed while no daemon was there to see it."""
        for model, end in await self.launcher.find_failed():
            failure = explain_exit(result=end.result, code=end.code, signal=end.signal, lines=end.lines)
            self.supervisor.post(UnitFoundFailed(self._clock(), model, failure))

    async def take_over(self) -> None:
        """Go on with what an earlier daemon left; before the first request, which may want its place."""
        await self.leftovers.adopt()
        if any(shown.is_resident for shown in self.supervisor.views()):
            await self._read_pins()

    async def _read_pins(self) -> None:
        if self._are_pins_read:
            return
        self._are_pins_read = True
        self._pins |= frozenset(await asyncio.to_thread(self.state.all, "pins"))
        self.supervisor.pin(self._pins)

    async def after_start(self) -> None:
        """What need not be done before the first answer: pins, stories, the binary, models to be loaded at once."""
        if not self.files.is_from_snapshot:
            await asyncio.to_thread(self.files.write_snapshot)
        await self._read_pins()
        await asyncio.to_thread(self.usage.started, self._began_at)
        stories = await asyncio.to_thread(self.history.read)
        self.supervisor.post(StoriesRead(self._clock(), stories, self.history.failures()))
        await self._tell_failed()
        try:
            binary = await self.planner.binary()
        except LlmstudioError as error:
            logger.error("no model can be served: %s (%s)", error.message, error.hint)  # noqa: TRY400 - no bug
        else:
            logger.info("llama-server: %s (%s), from %s", binary.version, " ".join(binary.argv), binary.source)
            if binary.is_engine:
                logger.info("the embedded engine is in use: CPU only; install llama-server to use a GPU")
        for model, entry in self.supervisor.catalogue.entries.items():
            if entry.recipe.preload or model in self._pins:
                self.supervisor.start_load(model)

    async def reload(self) -> None:
        """Read settings and recipes again; models whose recipe did not change go on running."""
        async with self._reloading:
            await self._reload()
        self.leftovers.recipes_were_read()

    async def _reload(self) -> None:
        await asyncio.to_thread(self.files.reread)
        await asyncio.to_thread(self.keyring.read)
        settings, recipes = self.loaded.settings, self.files.found.recipes
        self.planner.use_settings(settings)
        self.usage.keep_s = settings.usage_keep
        self.proxy.max_body = settings.max_body
        self.proxy.wait_comment_interval_s = settings.wait_comment_interval
        logging.getLogger().setLevel(settings.log_level.upper())
        self._model_files, catalogue = await in_own_thread(
            lambda: (self.model_files(settings), load_catalogue(settings, recipes))
        )
        self._put_in_force(catalogue)
        self._tell_reloaded()
        await asyncio.to_thread(self.files.write_snapshot)

    def _tell_reloaded(self) -> None:
        self._events.publish("reloaded", {"models": len(self.supervisor.catalogue.entries)})

    def _put_in_force(self, catalogue: Catalogue) -> None:
        settings = self.loaded.settings
        self.supervisor.use_catalogue(catalogue, lifecycle_defaults(settings), max_instances=settings.max_instances)
        for group, member in strangers(settings.groups, catalogue.entries):
            logger.warning("groups: %s: there is no model '%s'", group, member)
        warnings = [warning for entry in catalogue.entries.values() for warning in entry.warnings]
        for fault in (*self.loaded.faults, *catalogue.faults, *warnings):
            logger.log(logging.WARNING if fault.severity is Severity.WARNING else logging.ERROR, "%s", fault)
        logger.info(
            "%s, %s left out",
            counted(len(catalogue.entries), "model"),
            counted(len(catalogue.faulty()), "faulty recipe"),
        )

    def machine(self) -> Machine:
        """Measure GPUs and RAM. Blocks; runs in a thread."""
        if self._measure_machine is None:
            from llmstudiod.adapters.devices import Devices  # slow to import: nobody waits for it at a start

            self._measure_machine = Devices(models_are_units=self.launcher.outlives_us).measure
        return self._measure_machine()

    def _measure_memory(self, at: float) -> Memory | None:
        """Return what models may use now. Blocks; runs in a thread."""
        reserved = self.loaded.settings.reserved_memory
        memory = measure_memory(at, models_are_units=self.launcher.outlives_us, reserved=reserved["ram"])
        return memory and with_gpus(memory, self.planner.gpus(), reserved)

    async def _put_keys(self, keys: tuple[Key, ...]) -> None:
        await self.keyring.put(keys)
        self._tell_reloaded()

    async def stop(self) -> None:
        """Take no new connections and let what is in flight end; stop the models where they cannot outlive us."""
        self._streams.close()
        await self._stop_accepting()
        if self.launcher.outlives_us:
            within_s = self.loaded.settings.drain_timeout
            if self._endpoint is not None:
                await self._endpoint.drain(within_s=within_s)
            await self.supervisor.leave(within_s=LAST_MOMENT_S)
        else:
            await self.supervisor.shut_down()

    async def _stop_accepting(self) -> None:
        """Leave new connections to the next daemon: they wait in the sockets, which are systemd's.

        A server that is closed drops what it has just accepted (asyncio's `Server._attach` insists on being open), so
        it stops listening first, and is closed when its last connections are made.
        """
        loop = asyncio.get_running_loop()
        for server in self._servers:
            for sock in server.sockets:
                loop.remove_reader(sock.fileno())
        await asyncio.sleep(SETTLE_S)
        for server in self._servers:
            server.close()

    def is_unused(self) -> bool:
        """Whether no model runs, none is to come back by itself, and nobody is connected."""
        views = self.supervisor.views()
        is_down = all(shown.state is State.STOPPED or _stays_down(shown) for shown in views)
        n_open = len(self._endpoint.connections) if self._endpoint else 0
        n_open += len(self._admin_server.connections) if self._admin_server else 0
        is_alone = not n_open and not self.leftovers.any_unknown
        return is_down and is_alone and not any(shown.queued for shown in views)

    def config_watch(self) -> FileWatch:
        """Return what notices that settings, recipes or keys are others than those in force."""
        return FileWatch(
            lambda: {**self.files.now(), **self.keyring.file_now()},
            lambda: {**self.files.known(), **self.keyring.file_known()},
        )

    def model_watch(self) -> FileWatch:
        """Return what notices that the GGUFs in the model directories are others than when they were read."""
        return FileWatch(lambda: self.model_files(self.loaded.settings), lambda: self._model_files)

    @staticmethod
    def model_files(settings: Settings) -> Files:
        """Return the GGUFs that are served without a recipe, as they are. Blocks."""
        return model_files(settings.model_dirs) if settings.auto_recipes else {}

    def status_line(self) -> str:
        """Return one line for ``systemctl status``."""
        views = self.supervisor.views()
        ready = [shown.id for shown in views if shown.state is State.READY]
        faults = len(self.supervisor.catalogue.faulty())
        told = f"; {counted(faults, 'fault')}" if faults else ""
        return f"{counted(len(views), 'model')}; ready: {', '.join(ready) or 'none'}{told}"


def _application_request(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> web.Request:
    """Return a request that an aiohttp application takes; the endpoint's own routes need no more than its base."""
    loop = asyncio.get_running_loop()
    return web.Request(message, payload, protocol, writer, task, loop, client_max_size=MAX_ADMIN_BODY)


def _is_worth_telling(record: logging.LogRecord) -> bool:
    """Keep quiet of a race in aiohttp: a handler that ends in the very moment in which the time to wait for it is over.

    Seen in 3.11.16: ``RequestHandler._handle_request`` sets the result of a future that `shutdown` has just cancelled.
    """
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, asyncio.InvalidStateError)


def _stays_down(shown: InstanceView) -> bool:
    return shown.state is State.FAILED and shown.spec.restart is not Restart.ALWAYS


def choose_launcher(settings: Settings) -> Literal["systemd", "subprocess"]:
    """Return the launcher that the settings ask for, or the one that works here.

    Raises:
        ConfigError: systemd is asked for, and cannot be used.
    """
    why_not = systemd.is_usable(settings.launcher_socket)
    if settings.launcher == "systemd" and why_not:
        raise ConfigError(f"launcher: systemd cannot be used: {why_not}", hint="set `launcher: auto`")
    return "subprocess" if settings.launcher == "subprocess" or why_not else "systemd"


def _launcher(settings: Settings, helper: PrivilegedClient | None) -> tuple[Launcher, Program]:
    """Return the launcher, and whom it asks about llama-server."""
    if helper is None:
        return SubprocessLauncher(Path(settings.runtime_dir)), LocalProgram(settings, os.environ)
    return systemd.SystemdLauncher(helper), PrivilegedProgram(helper)
