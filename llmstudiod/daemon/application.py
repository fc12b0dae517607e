"""Everything that makes the daemon, built once and passed in: settings, recipes, launcher, supervisor, servers."""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Literal

from aiohttp import web

from llmstudiod.adapters.key_file import is_credential, keys_path, read_keys, write_own_keys
from llmstudiod.adapters.learning import Learning
from llmstudiod.adapters.memory_meter import measure_memory
from llmstudiod.adapters.model_recipes import load_catalogue
from llmstudiod.adapters.planner import Planner
from llmstudiod.adapters.proc import progress_mark
from llmstudiod.adapters.program import LocalProgram, Program
from llmstudiod.adapters.snapshot import Configuration, read_snapshot, write_snapshot
from llmstudiod.adapters.state_db import StateDb
from llmstudiod.core.catalogue import Catalogue
from llmstudiod.core.devices import Machine
from llmstudiod.core.errors import ConfigError, LlmstudioError
from llmstudiod.core.gpus import with_gpus
from llmstudiod.core.keys import Key, write_keys
from llmstudiod.core.launcher_protocol import Verb, Write
from llmstudiod.core.ledger import Memory
from llmstudiod.core.lifecycle import State
from llmstudiod.core.model_spec import lifecycle_defaults
from llmstudiod.core.recipe import Fault, Severity
from llmstudiod.core.scheduler import Scheduler
from llmstudiod.core.settings import LoadedSettings, Settings
from llmstudiod.core.sharing import strangers
from llmstudiod.daemon.sockets import BACKLOG, Listeners
from llmstudiod.http.access import Access, Rules
from llmstudiod.http.admin import Admin
from llmstudiod.http.admin_gpus import AdminGpus
from llmstudiod.http.admin_keys import AdminKeys
from llmstudiod.http.client import EndpointServer
from llmstudiod.http.fast_path import FastPath
from llmstudiod.http.listing import Listing
from llmstudiod.http.proxy import FORWARDED_POSTS, Proxy
from llmstudiod.http.relay import Pools
from llmstudiod.launchers import systemd
from llmstudiod.launchers.base import Launcher
from llmstudiod.launchers.privileged import PrivilegedClient, PrivilegedProgram
from llmstudiod.launchers.subprocess import SubprocessLauncher
from llmstudiod.supervisor import Supervisor

LAST_MOMENT_S = 1.0
SETTLE_S = 0.05

logger = logging.getLogger("llmstudiod")


class Application:
    """The daemon without its process: what main.py runs, and what the tests run in theirs."""

    def __init__(self, config: Path, environment: Mapping[str, str] | None, *, clock: Callable[[], float]) -> None:
        self._config = config
        self._environment = environment
        state = os.environ.get("STATE_DIRECTORY")
        self._snapshot_dir = Path(state.partition(":")[0]) if state and environment is None else None
        found = read_snapshot(self._snapshot_dir, config) if self._snapshot_dir else None
        self._is_from_snapshot = found is not None
        self._read_began_ns = time.time_ns()
        found = found or _read(config, environment)
        self.loaded: LoadedSettings = found.settings
        settings = self.loaded.settings
        self._helper = None if choose_launcher(settings) == "subprocess" else PrivilegedClient(settings.launcher_socket)
        self.launcher, program = _launcher(settings, self._helper)
        self._measure_machine: Callable[[], Machine] | None = None
        self.state = StateDb(Path(state.partition(":")[0]) / "state.db" if self._snapshot_dir and state else None)
        learning = Learning(self.state, self.machine)
        self.planner = Planner(settings, self.launcher, program, measure=self.machine, learning=learning)
        self.pools = Pools()
        self.supervisor = Supervisor(
            scheduler=Scheduler(max_instances=settings.max_instances),
            launcher=self.launcher,
            planner=self.planner,
            upstreams=self.pools,
            progress_mark=lambda unit: progress_mark(unit.pid),
            clock=clock,
            measure=self._measure_memory,
        )
        listing = Listing(self.supervisor, created=int(time.time()))
        self._keys_error: ConfigError | None = None
        self.access = Access(Rules(), own_names=frozenset({socket.gethostname().lower()}))
        self.proxy = Proxy(
            self.supervisor,
            self.pools,
            listing,
            max_body=settings.max_body,
            wait_comment_interval_s=settings.wait_comment_interval,
            access=self.access,
        )
        keys = AdminKeys(
            keys=self._keys,
            put=self._put_keys,
            model_names=lambda: frozenset(self.supervisor.catalogue.ids_by_name),
        )
        self.admin = Admin(
            supervisor=self.supervisor,
            planner=self.planner,
            launcher=self.launcher,
            listing=listing,
            settings=lambda: self.loaded,
            ports=lambda: self._ports,
            clock=clock,
            keys=keys,
            more_faults=self._more_faults,
            gpus=AdminGpus(self.machine, self.supervisor, self.planner.binary),
        )
        self._put_in_force(found)
        self._servers: list[asyncio.Server] = []
        self._endpoint: EndpointServer | None = None
        self._strangers: list[str] = []
        self._ports: list[int] = []

    @contextlib.asynccontextmanager
    async def serving(self, listeners: Listeners) -> AsyncIterator[None]:
        """Serve the sockets for as long as the context lasts."""
        loop = asyncio.get_running_loop()
        fast_path = FastPath(
            self.supervisor, self.pools, FORWARDED_POSTS, max_body=lambda: self.proxy.max_body, access=self.access
        )
        endpoint = EndpointServer(self.proxy.handle, fast_path=fast_path, after_loss=self.proxy.after_fast_loss)
        self._endpoint = endpoint
        runner = web.AppRunner(self.admin.application(), access_log=None, handler_cancellation=True)
        await runner.setup()
        assert runner.server is not None
        self._ports = sorted({sock.getsockname()[1] for sock in listeners.http})
        for sock in listeners.http:
            # asyncio listens again, and its own default would cut the backlog down to 100.
            self._servers.append(await loop.create_server(endpoint, sock=sock, backlog=BACKLOG))
        # Not create_unix_server: from Python 3.13 on it removes the socket's file at the end, which is systemd's.
        admin_servers = [
            await loop.create_server(runner.server, sock=sock, backlog=BACKLOG) for sock in listeners.admin
        ]
        try:
            yield
        finally:
            for server in (*self._servers, *admin_servers):
                server.close()
            await endpoint.shutdown(1.0)
            await runner.cleanup()
            await self.launcher.close()
            await asyncio.to_thread(self.state.close)

    async def adopt(self) -> None:
        """Take over the servers that an earlier daemon left; before the first request, which would start them anew."""
        try:
            running = await self.launcher.find_running()
        except LlmstudioError as error:
            logger.error("%s", error)  # noqa: TRY400 - no bug
            return
        for found in running:
            if found.unit.model_id in self.supervisor.catalogue.entries:
                await self.supervisor.adopt(found)
            else:
                self._strangers.append(found.unit.model_id)

    async def after_start(self) -> None:
        """What need not be done before the first answer: leftovers, the binary, models to be loaded at once."""
        if not self._is_from_snapshot:
            await asyncio.to_thread(self._write_snapshot)
        for model in self._strangers:
            logger.warning("%s: it runs, but there is no such recipe any more: it is stopped", model)
            await self.launcher.stop(model, is_forced=False)
        try:
            binary = await self.planner.binary()
        except LlmstudioError as error:
            logger.error("no model can be served: %s (%s)", error.message, error.hint)  # noqa: TRY400 - no bug
        else:
            logger.info("llama-server: %s (%s), from %s", binary.version, " ".join(binary.argv), binary.source)
            if binary.is_engine:
                logger.info("the embedded engine is in use: CPU only; install llama-server to use a GPU")
        for model, entry in self.supervisor.catalogue.entries.items():
            if entry.recipe.preload:
                self.supervisor.start_load(model)

    async def reload(self) -> None:
        """Read settings and recipes again; models whose recipe did not change go on running."""
        self._read_began_ns = time.time_ns()
        found = await asyncio.to_thread(_read, self._config, self._environment)
        self.loaded = found.settings
        settings = found.settings.settings
        self.planner.use_settings(settings)
        self.proxy.max_body = settings.max_body
        self.proxy.wait_comment_interval_s = settings.wait_comment_interval
        logging.getLogger().setLevel(settings.log_level.upper())
        catalogue = await asyncio.to_thread(load_catalogue, settings, found.recipes)
        self._put_in_force(found, catalogue)
        await asyncio.to_thread(self._write_snapshot)

    def _put_in_force(self, found: Configuration, catalogue: Catalogue | None = None) -> None:
        settings = found.settings.settings
        self._found = found
        self.access.rules = self._rules(settings)
        catalogue = catalogue or load_catalogue(settings, found.recipes)
        self.supervisor.use_catalogue(catalogue, lifecycle_defaults(settings), max_instances=settings.max_instances)
        for group, member in strangers(settings.groups, catalogue.entries):
            logger.warning("groups: %s: there is no model '%s'", group, member)
        warnings = [warning for entry in catalogue.entries.values() for warning in entry.warnings]
        for fault in (*found.settings.faults, *catalogue.faults, *warnings):
            logger.log(logging.WARNING if fault.severity is Severity.WARNING else logging.ERROR, "%s", fault)
        logger.info("%d models, %d faulty recipes", len(catalogue.entries), len(catalogue.faulty()))

    def _rules(self, settings: Settings) -> Rules:
        """Return who may use the endpoint. A keys file that cannot be read lets nobody in, rather than everybody."""
        keys: tuple[Key, ...] | None = None
        self._keys_error = None
        try:
            keys = read_keys(keys_path(settings.keys_file))
        except ConfigError as error:
            self._keys_error = error
            logger.error("%s (%s)", error.message, error.hint)  # noqa: TRY400 - no bug
        return Rules(
            keys=keys,
            allowed_hosts=frozenset(name.lower() for name in settings.allowed_hosts),
            cors_origins=frozenset(settings.cors_origins),
            allows_open_listener=settings.allow_open_listener,
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

    def _keys(self) -> tuple[Key, ...]:
        """Return the keys in force; a ConfigError where their file is faulty: what it holds must not be lost."""
        if self._keys_error is not None:
            raise self._keys_error
        return self.access.rules.keys or ()

    def _more_faults(self) -> list[Fault]:
        error = self._keys_error
        return [] if error is None else [Fault(error.message, self.loaded.settings.keys_file, hint=error.hint)]

    async def _put_keys(self, keys: tuple[Key, ...]) -> None:
        """Replace all keys, by the launcher where there is one: the file is root's."""
        settings, text = self.loaded.settings, write_keys(keys)
        if is_credential(keys_path(settings.keys_file)):
            hint = "change what LoadCredential= of llmstudiod.service names, then `systemctl restart llmstudiod`"
            raise ConfigError(
                "the keys in force are systemd's credential 'keys', which is not ours to write", hint=hint
            )
        if self._helper is not None:
            await self._helper.ask(Write(Verb.PUT_KEYS, text=text))
        else:
            await asyncio.to_thread(write_own_keys, Path(settings.keys_file), text)
        self.access.rules = await asyncio.to_thread(self._rules, settings)

    def _write_snapshot(self) -> None:
        if self._snapshot_dir is not None:
            write_snapshot(self._snapshot_dir, self._config, self._found, began_ns=self._read_began_ns)

    async def stop(self) -> None:
        """Take no new connections and let what is in flight end; stop the models where they cannot outlive us."""
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

    def status_line(self) -> str:
        """Return one line for ``systemctl status``."""
        views = self.supervisor.views()
        ready = [shown.id for shown in views if shown.state is State.READY]
        faults = len(self.supervisor.catalogue.faulty())
        return f"{len(views)} models; ready: {', '.join(ready) or 'none'}" + (f"; {faults} faults" if faults else "")


def _read(config: Path, environment: Mapping[str, str] | None) -> Configuration:
    """Read and check all files. Slow to import and to run, which is why there is a snapshot."""
    from llmstudiod.adapters.recipe_files import load_recipes
    from llmstudiod.adapters.settings_file import load_settings

    settings = load_settings(config, environment)
    return Configuration(settings, load_recipes(Path(settings.settings.recipes_dir)))


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
