"""The admin interface: what runs, load and unload, plans; and the other parts' routes.

Paths and field names are those of vllm-studio's controller, whose clients go on working; ours stand beside them.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from llmstudiod import __version__
from llmstudiod.adapters.planner import Planner
from llmstudiod.core.errors import (
    AccessDeniedError,
    BadRequestError,
    BodyTooLargeError,
    ConflictError,
    LlmstudioError,
    MethodNotAllowedError,
    NotFoundError,
)
from llmstudiod.core.lifecycle import InstanceView, State
from llmstudiod.core.recipe import Fault
from llmstudiod.core.settings import LoadedSettings
from llmstudiod.core.units import counted, format_bytes
from llmstudiod.http.admin_answers import error_answer, fault_answer, old_config, plan_answer, recipe_answer
from llmstudiod.http.admin_gpus import preview_answer
from llmstudiod.http.answers import error_headers, json_response
from llmstudiod.http.instances import Instances
from llmstudiod.http.listing import Listing
from llmstudiod.http.peer import ADMIN_GROUP, peer_of
from llmstudiod.http.query import truth
from llmstudiod.http.sessions import CODE_S, Sessions
from llmstudiod.launchers.base import Launcher
from llmstudiod.supervisor import Supervisor

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

OPEN_TO_ALL = frozenset({"/health", "/status", "/instances"})
"""What the setting ``open_status`` lets everybody on the machine read."""
MAX_WAIT_S = 3600.0
MAX_BODY = 2 << 20


class Routes(Protocol):
    """A part of the interface."""

    def routes(self) -> list[web.RouteDef]:
        """Return its routes."""


class Admin:
    """Handles the requests of the admin socket, and of TCP where somebody has signed in."""

    def __init__(
        self,
        *,
        supervisor: Supervisor,
        planner: Planner,
        launcher: Launcher,
        listing: Listing,
        instances: Instances,
        settings: Callable[[], LoadedSettings],
        ports: Callable[[], list[int]],
        clock: Callable[[], float],
        faults: Callable[[], list[Fault]],
        sessions: Sessions,
        needs_key: Callable[[], bool],
        database: Path | None,
        pin: Callable[[str, bool], Awaitable[None]],
        reload: Callable[[], Awaitable[None]],
        parts: Sequence[Routes],
    ) -> None:
        self._instances = instances
        self._faults = faults
        self._sessions = sessions
        self._needs_key = needs_key
        self._database = database
        self._pin_model = pin
        self._reload = reload
        self._parts = parts
        self._supervisor = supervisor
        self._planner = planner
        self._launcher = launcher
        self._listing = listing
        self._settings = settings
        self._ports = ports
        self._clock = clock
        self.application = self._application()

    async def has_route(self, request: web.Request) -> bool:
        """Whether there is something at a request's path."""
        error = (await self.application.router.resolve(request)).http_exception
        return error is None or error.status == 405

    def _application(self) -> web.Application:
        app = web.Application(middlewares=[_errors, self._peer_rights], client_max_size=MAX_BODY)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/status", self._status),
                web.get("/config", self._config),
                web.get("/api/spec", self._spec),
                web.post("/instances/{id}/stop", self._evict_one),
                web.post("/instances/{id}/restart", self._restart),
                web.post("/instances/{id}/reset", self._reset),
                web.post("/instances/{id}/pin", self._pin),
                web.post("/instances/{id}/unpin", self._unpin),
                web.post("/launch/{id}", self._launch),
                web.post("/launch/{id}/cancel", self._cancel),
                web.post("/evict", self._evict_all),
                web.post("/evict/{id}", self._evict_one),
                web.get("/wait-ready", self._wait_ready),
                web.get("/explain/{id}", self._explain),
                web.post("/api/models/unload", self._evict_all),
                web.post("/api/models/unload/{id}", self._evict_one),
                web.post("/web/code", self._code),
                web.post("/web/sign-out", self._sign_out_all),
                web.post("/reload", self._reload_all),
                *(route for part in (self._instances, *self._parts) for route in part.routes()),
            ]
        )
        return app

    @web.middleware
    async def _peer_rights(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let administrators in, and others where they may look."""
        sock = request.transport.get_extra_info("socket") if request.transport else None
        if sock is None:
            raise AccessDeniedError("the connection is gone")
        if _is_local(request):  # whoever came by TCP has shown a session or a key before this
            peer = peer_of(sock)
            may_look = request.method == "GET" and request.path in OPEN_TO_ALL and self._settings().settings.open_status
            if not may_look and not peer.may_administer():
                hint = (
                    f"use sudo, or join the group {ADMIN_GROUP} (`usermod -aG {ADMIN_GROUP} NAME`, then log in again)"
                )
                raise AccessDeniedError(
                    f"user {await asyncio.to_thread(peer.name)} may not administer llmstudiod", hint=hint
                )
        return await handler(request)

    # Reading

    async def _health(self, _: web.Request) -> web.Response:
        return json_response(self._listing.health())

    async def _status(self, _: web.Request) -> web.Response:
        return json_response(await self.status())

    async def status(self) -> dict[str, Any]:
        """Return the answer of ``GET /status``."""
        views = self._supervisor.views()
        ready = next((shown for shown in views if shown.state is State.READY), None)
        launching = next((shown.id for shown in views if shown.state in {State.STARTING, State.LOADING}), None)
        return {
            "version": __version__,
            "running": ready is not None,
            "process": self._process(ready) if ready else None,
            "inference_port": next(iter(self._ports()), None),
            "ports": self._ports(),
            "launching": launching,
            "launcher": self._launcher.name,
            "llama_server": await self._binary(),
            "instances": self._instances.all(),
            "counts": self._supervisor.counts(),
            "faults": [fault_answer(fault) for fault in self._faults()],
        }

    async def status_event(self) -> dict[str, Any]:
        """Return vllm-studio's ``status`` event: the status without the instances, which have their own."""
        told = await self.status()
        return {name: value for name, value in told.items() if name != "instances"}

    def _process(self, shown: InstanceView) -> dict[str, Any]:
        entry = self._supervisor.catalogue.entries.get(shown.id)
        unit = self._supervisor.unit_of(shown.id)
        return {
            "pid": unit.pid if unit else None,
            "backend": entry.recipe.backend if entry else None,
            "model_path": entry.recipe.model_path if entry else None,
            "port": next(iter(self._ports()), None),
            "served_model_name": entry.recipe.alias if entry else None,
        }

    async def _binary(self) -> dict[str, Any]:
        try:
            binary = await self._planner.binary()
        except LlmstudioError as error:
            return {"error": error.message, "hint": error.hint}
        return {
            "command": list(binary.argv),
            "version": binary.version,
            "source": binary.source,
            "devices": list(binary.devices),
            "is_embedded": binary.is_engine,
        }

    async def _config(self, _: web.Request) -> web.Response:
        loaded = self._settings()
        settings = {name: getattr(loaded.settings, name) for name in type(loaded.settings).__dataclass_fields__}
        faults = [fault_answer(fault) for fault in loaded.faults]
        old = old_config(
            loaded.settings,
            self._ports(),
            self._supervisor.views(),
            needs_key=self._needs_key(),
            database=self._database,
        )
        return json_response({"settings": settings, "sources": dict(loaded.sources), "faults": faults, **old})

    async def _spec(self, _: web.Request) -> web.Response:
        """Answer the description of this interface."""
        from llmstudiod.http.spec import openapi  # slow to import: nobody waits for it at a start

        return json_response(await asyncio.to_thread(openapi))

    async def _reload_all(self, _: web.Request) -> web.Response:
        """Read settings, recipes and keys again; they are read by themselves too, a moment after they have changed."""
        await self._reload()
        faults = [fault_answer(fault) for fault in self._faults()]
        message = f"everything is read again: {counted(len(self._supervisor.catalogue.entries), 'model')}"
        return json_response({"success": True, "message": message, "faults": faults})

    async def _code(self, request: web.Request) -> web.Response:
        """Make a one-time code for the page; only whoever is at the machine may, by the Unix socket."""
        if not _is_local(request):
            raise AccessDeniedError("a code is made at the machine", hint="`llmstudioctl web`")
        code = self._sessions.new_code()
        ports = self._ports()
        urls = [f"http://localhost:{port}/#code={code}" for port in ports]
        return json_response({"code": code, "urls": urls, "expires_in_s": CODE_S})

    async def _sign_out_all(self, _: web.Request) -> web.Response:
        """End every session of the page."""
        await asyncio.to_thread(self._sessions.close_all)
        return json_response({"success": True, "message": "everybody is signed out of the page"})

    # Recipes and plans

    async def _explain(self, request: web.Request) -> web.Response:
        model = self._model(request)
        entry = self._supervisor.catalogue.entries[model]
        wish, _ = await self._planner.vet(entry, is_thorough=truth(request, "dry_run"))
        found = await self._supervisor.preview(model, wish)
        plan = await self._planner.plan(entry, found.placement if found else None)
        command = await self._launcher.show(plan.request)
        told = {
            "recipe": recipe_answer(entry, self._supervisor.view(model)),
            **plan_answer(plan, launcher=self._launcher.name),
            "placement": found and preview_answer(found, wish),
            "systemd_run": command,
        }
        return json_response(told)

    def _model(self, request: web.Request) -> str:
        return self._supervisor.catalogue.resolve(request.match_info["id"])

    # Steering

    async def _launch(self, request: web.Request) -> web.Response:
        model = self._model(request)
        if not truth(request, "wait", default=True):
            self._supervisor.start_load(model)
            return json_response({"success": True, "message": f"'{model}' is being loaded"}, status=202)
        try:
            await self._supervisor.load(model)
        except LlmstudioError as error:
            return json_response({"success": False, **error_answer(error)}, status=503, headers=error_headers(error))
        unit = self._supervisor.unit_of(model)
        return json_response(
            {"success": True, "pid": unit.pid if unit else None, "message": f"'{model}' is ready", "log_file": None}
        )

    async def _cancel(self, request: web.Request) -> web.Response:
        model = self._model(request)
        await self._supervisor.cancel(model)
        return json_response({"success": True, "message": f"the load of '{model}' was cancelled"})

    async def _restart(self, request: web.Request) -> web.Response:
        """Unload a model when its requests are answered, and load it again."""
        model = self._model(request)
        await self._supervisor.unload(model)
        return await self._launch(request)

    async def _pin(self, request: web.Request) -> web.Response:
        """Never evict or idle-unload a model from now on; load it if it is not loaded."""
        model = self._model(request)
        await self._pin_model(model, True)
        self._supervisor.start_load(model)
        return json_response({"success": True, "message": f"'{model}' is pinned: it stays loaded until it is unpinned"})

    async def _unpin(self, request: web.Request) -> web.Response:
        model = self._model(request)
        if self._supervisor.catalogue.entries[model].recipe.pinned:
            hint = "take `pinned: true` out of the recipe"
            raise ConflictError(f"'{model}' is pinned by its recipe", hint=hint)
        shown = self._supervisor.view(model)
        was_pinned = shown is not None and shown.spec.is_pinned
        await self._pin_model(model, False)
        told = "is not pinned any more" if was_pinned else "was not pinned"
        return json_response({"success": True, "message": f"'{model}' {told}"})

    async def _reset(self, request: web.Request) -> web.Response:
        """Forget a model's failures, also the unit that systemd keeps as failed."""
        model = self._model(request)
        shown = self._supervisor.view(model)
        has_failed = shown is not None and shown.state is State.FAILED
        if has_failed:
            await self._launcher.stop(model, is_forced=False)
        await self._supervisor.reset(model)
        has_any = shown is not None and shown.failures
        told = "may be started again" if has_failed or has_any else "has not failed: there is nothing to forget"
        return json_response({"success": True, "message": f"'{model}' {told}"})

    async def _evict_one(self, request: web.Request) -> web.Response:
        model = self._model(request)
        shown, unit = self._supervisor.view(model), self._supervisor.unit_of(model)
        was_up = shown is not None and shown.state not in {State.STOPPED, State.FAILED}
        await self._supervisor.unload(model, is_forced=_is_forced(request))
        return json_response({"success": True, "evicted_pid": unit.pid if unit and was_up else None})

    async def _evict_all(self, request: web.Request) -> web.Response:
        running = [shown.id for shown in self._supervisor.views() if shown.state not in {State.STOPPED, State.FAILED}]
        pids = [unit.pid for model in running if (unit := self._supervisor.unit_of(model))]
        is_forced = _is_forced(request)
        await asyncio.gather(*(self._supervisor.unload(model, is_forced=is_forced) for model in running))
        return json_response({"success": True, "evicted_pid": pids[0] if pids else None, "evicted": running})

    async def _wait_ready(self, request: web.Request) -> web.Response:
        try:
            timeout_s = min(MAX_WAIT_S, max(0.0, float(request.query.get("timeout", "300"))))
        except ValueError:
            raise BadRequestError(f"timeout: expected seconds, found '{request.query['timeout'][:40]}'") from None
        began = self._clock()
        try:
            async with asyncio.timeout(timeout_s):
                while not any(shown.state is State.READY for shown in self._supervisor.views()):
                    await self._supervisor.changed()
        except TimeoutError:
            elapsed = round(self._clock() - began, 3)
            return json_response({"ready": False, "elapsed": elapsed, "error": "no model became ready"})
        return json_response({"ready": True, "elapsed": round(self._clock() - began, 3)})


def _is_forced(request: web.Request) -> bool:
    return truth(request, "force")


def _is_local(request: web.Request) -> bool:
    sock = request.transport.get_extra_info("socket") if request.transport else None
    return sock is not None and sock.family == socket.AF_UNIX


def _of_aiohttp(request: web.Request, error: web.HTTPException) -> LlmstudioError:
    """Return what aiohttp has refused in our words."""
    asked = f"{request.method[:20]} {request.path[:200]}"
    match error:
        case web.HTTPNotFound():
            return NotFoundError(f"there is no route {asked}", hint="GET /api/spec describes those that there are")
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            return MethodNotAllowedError(f"expected {allowed}, found {asked}", details={"allow": allowed})
        case web.HTTPRequestEntityTooLarge():
            return BodyTooLargeError(f"the body is over {format_bytes(MAX_BODY)}")
        case _:
            return BadRequestError(error.reason)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn errors into this interface's envelope; a bug is logged with its traceback and told as 500."""
    try:
        return await handler(request)
    except LlmstudioError as error:
        return json_response(error_answer(error), status=error.status, headers=error_headers(error))
    except web.HTTPException as error:
        told = _of_aiohttp(request, error)
        return json_response(error_answer(told), status=error.status, headers=error_headers(told))
    except Exception:
        logger.exception("%s %s: internal error", request.method, request.path)
        return json_response({"detail": "Internal Server Error", "kind": "internal", "hint": None}, status=500)
