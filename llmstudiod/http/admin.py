"""The admin interface on the Unix socket: what runs, load and unload, recipes, plans, logs.

Paths and field names are those of vllm-studio's controller, whose clients go on working; ours stand beside them.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from llmstudiod import __version__
from llmstudiod.adapters.planner import Plan, Planner
from llmstudiod.core.errors import AccessDeniedError, BadRequestError, LlmstudioError, NotFoundError
from llmstudiod.core.lifecycle import InstanceView, State
from llmstudiod.core.recipe import Fault, RecipeEntry
from llmstudiod.core.settings import LoadedSettings
from llmstudiod.http.admin_gpus import AdminGpus, preview_answer
from llmstudiod.http.admin_keys import AdminKeys
from llmstudiod.http.answers import error_headers, json_bytes, json_response
from llmstudiod.http.listing import Listing
from llmstudiod.http.peer import ADMIN_GROUP, peer_of
from llmstudiod.launchers.base import Launcher
from llmstudiod.supervisor import Supervisor

logger = logging.getLogger(__name__)

OLD_WORDS = {
    State.STOPPED: "stopped",
    State.STARTING: "starting",
    State.LOADING: "starting",
    State.READY: "running",
    State.DRAINING: "running",
    State.STOPPING: "stopped",
    State.FAILED: "error",
}
"""Our states in vllm-studio's words."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

OPEN_TO_ALL = frozenset({"/health", "/status", "/instances"})
"""What the setting ``open_status`` lets everybody on the machine read."""
MAX_LINES = 20_000
MAX_WAIT_S = 3600.0


class Admin:
    """Handles the requests of the admin socket."""

    def __init__(
        self,
        *,
        supervisor: Supervisor,
        planner: Planner,
        launcher: Launcher,
        listing: Listing,
        settings: Callable[[], LoadedSettings],
        ports: Callable[[], list[int]],
        clock: Callable[[], float],
        keys: AdminKeys,
        more_faults: Callable[[], list[Fault]],
        gpus: AdminGpus,
    ) -> None:
        self._gpus = gpus
        self._keys = keys
        self._more_faults = more_faults
        self._supervisor = supervisor
        self._planner = planner
        self._launcher = launcher
        self._listing = listing
        self._settings = settings
        self._ports = ports
        self._clock = clock

    def application(self) -> web.Application:
        """Return the routes."""
        app = web.Application(middlewares=[_errors, self._peer_rights])
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/status", self._status),
                web.get("/config", self._config),
                web.get("/instances", self._instances),
                web.get("/instances/{id}", self._instance),
                web.post("/instances/{id}/stop", self._evict_one),
                web.get("/recipes", self._recipes),
                web.get("/recipes/{id}", self._recipe),
                web.post("/launch/{id}", self._launch),
                web.post("/evict", self._evict_all),
                web.post("/evict/{id}", self._evict_one),
                web.get("/wait-ready", self._wait_ready),
                web.get("/explain/{id}", self._explain),
                web.get("/logs/{id}", self._logs),
                web.get("/logs/{id}/stream", self._log_stream),
                web.post("/api/models/unload", self._evict_all),
                web.post("/api/models/unload/{id}", self._evict_one),
                *self._keys.routes(),
                *self._gpus.routes(),
            ]
        )
        return app

    @web.middleware
    async def _peer_rights(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let administrators in, and others where they may look."""
        sock = request.transport.get_extra_info("socket") if request.transport else None
        if sock is None:
            raise AccessDeniedError("the connection is gone")
        if sock.family == socket.AF_UNIX:
            peer = peer_of(sock)
            may_look = request.method == "GET" and request.path in OPEN_TO_ALL and self._settings().settings.open_status
            if not may_look and not peer.may_administer():
                hint = (
                    f"use sudo, or join the group {ADMIN_GROUP} (`usermod -aG {ADMIN_GROUP} NAME`, then log in again)"
                )
                raise AccessDeniedError(f"user {peer.uid} may not administer llmstudiod", hint=hint)
        return await handler(request)

    # Reading

    async def _health(self, _: web.Request) -> web.Response:
        return json_response(self._listing.health())

    async def _status(self, _: web.Request) -> web.Response:
        views = self._supervisor.views()
        ready = next((shown for shown in views if shown.state is State.READY), None)
        launching = next((shown.id for shown in views if shown.state in {State.STARTING, State.LOADING}), None)
        return json_response(
            {
                "version": __version__,
                "running": ready is not None,
                "process": self._process(ready) if ready else None,
                "inference_port": next(iter(self._ports()), None),
                "ports": self._ports(),
                "launching": launching,
                "launcher": self._launcher.name,
                "llama_server": await self._binary(),
                "instances": [self._shown(shown, with_story=False) for shown in views],
                "faults": [_fault(fault) for fault in self._faults()],
            }
        )

    def _process(self, shown: InstanceView) -> dict[str, Any]:
        entry = self._supervisor.catalogue.entries.get(shown.id)
        unit = self._supervisor.unit_of(shown.id)
        return {
            "pid": unit.pid if unit else None,
            "backend": entry.recipe.backend if entry else None,
            "model_path": entry.recipe.model_path if entry else None,
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
        faults = [_fault(fault) for fault in loaded.faults]
        return json_response({"settings": settings, "sources": dict(loaded.sources), "faults": faults})

    async def _instances(self, _: web.Request) -> web.Response:
        views = self._supervisor.views()
        return json_response({"instances": [self._shown(shown, with_story=False) for shown in views]})

    async def _instance(self, request: web.Request) -> web.Response:
        shown = self._supervisor.view(self._model(request))
        if shown is None:
            raise NotFoundError(f"'{request.match_info['id']}' has no instance")
        unit, plan = self._supervisor.unit_of(shown.id), self._supervisor.plan_of(shown.id)
        estimated = plan.estimate.host_total if plan and plan.estimate else None
        if shown.placement is not None:
            estimated = shown.placement.estimate.host_total
        measured = await self._launcher.memory(unit) if unit and _is_up(shown) else None
        memory = {"estimated": estimated, "measured": measured}
        devices = await self._gpus.held_by(shown)
        return json_response({**self._shown(shown, with_story=True), "memory": memory, "devices": devices})

    def _shown(self, shown: InstanceView, *, with_story: bool) -> dict[str, Any]:
        entry = self._supervisor.catalogue.entries.get(shown.id)
        unit, plan = self._supervisor.unit_of(shown.id), self._supervisor.plan_of(shown.id)
        is_up = _is_up(shown)
        result: dict[str, Any] = {
            "id": shown.id,
            "name": (entry.recipe.name if entry else None) or shown.id,
            "state": str(shown.state),
            "since": self._wall(shown.since),
            "reason": shown.failure.message if shown.failure else (str(shown.stop_cause) if shown.stop_cause else None),
            "kind": shown.failure.kind if shown.failure else None,
            "hint": shown.failure.hint if shown.failure else None,
            "failures": shown.failures,
            "retry_at": self._wall(shown.retry_at) if shown.state is State.FAILED else None,
            "in_flight": shown.in_flight,
            "queued": shown.queued,
            "progress": shown.progress,
            "slots": shown.facts.n_parallel if shown.facts else None,
            "n_ctx": shown.facts.n_ctx if shown.facts else None,
            "idle_since": self._wall(shown.idle_since) if shown.state is State.READY else None,
            "is_stale": shown.is_stale,
            "unit": unit.name if unit and is_up else None,
            "pid": unit.pid if unit and is_up else None,
            "invocation_id": unit.invocation_id if unit and is_up else None,
        }
        if with_story:
            result["argv"] = list(plan.request.argv) if plan else None
            result["socket"] = plan.request.socket_path if plan else None
            result["sandbox"] = list(entry.recipe.sandbox.relaxations()) if entry else []
            placed = shown.placement.notes if shown.placement else ()
            result["notes"] = [*(plan.command.notes if plan else ()), *placed]
            result["last_lines"] = list(shown.failure.lines) if shown.failure else []
            result["warnings"] = [str(warning) for warning in entry.warnings] if entry else []
            result["story"] = [
                {"at": self._wall(step.at), "from": str(step.old), "to": str(step.new), "cause": step.cause}
                for step in shown.story
            ]
        return result

    def _wall(self, at: float) -> float:
        """Return a moment of the monotonic clock as seconds since 1970."""
        return round(time.time() - (self._clock() - at), 3)

    # Recipes and plans

    async def _recipes(self, _: web.Request) -> web.Response:
        return json_response([self._recipe_of(entry) for entry in self._supervisor.catalogue.entries.values()])

    async def _recipe(self, request: web.Request) -> web.Response:
        return json_response(self._recipe_of(self._supervisor.catalogue.entries[self._model(request)]))

    def _recipe_of(self, entry: RecipeEntry) -> dict[str, Any]:
        shown = self._supervisor.view(entry.recipe.id)
        state = shown.state if shown else State.STOPPED
        return {
            **entry.recipe.as_dict(),
            "name": entry.recipe.name or entry.recipe.id,
            "backend": entry.recipe.backend,
            "served_model_name": entry.recipe.alias,
            "status": OLD_WORDS[state],
            "state": str(state),
            "file": entry.file,
            "warnings": [_fault(fault) for fault in entry.warnings],
        }

    async def _explain(self, request: web.Request) -> web.Response:
        model = self._model(request)
        entry = self._supervisor.catalogue.entries[model]
        wish, _ = await self._planner.vet(entry, is_thorough=request.query.get("dry_run", "") in {"true", "1", "yes"})
        found = await self._supervisor.preview(model, wish)
        plan = await self._planner.plan(entry, found.placement if found else None)
        command = await self._launcher.show(plan.request)
        told = {
            "recipe": self._recipe_of(entry),
            **self._plan_of(plan),
            "placement": found and preview_answer(found, wish),
            "systemd_run": command,
        }
        return json_response(told)

    def _plan_of(self, plan: Plan) -> dict[str, Any]:
        context, request = plan.command.context, plan.request
        return {
            "argv": list(request.argv),
            "environment": dict(request.environment),
            "files": [{"path": file.host, "inside": file.inside} for file in request.files],
            "socket": request.socket_path,
            "n_ctx": context.n_ctx,
            "n_parallel": context.n_parallel,
            "n_ctx_total": context.n_ctx_total,
            "notes": list(plan.command.notes),
            "estimate": plan.estimate.as_dict() if plan.estimate else None,
            "llama_server": {"version": plan.binary.version, "source": plan.binary.source},
            "launcher": self._launcher.name,
        }

    def _faults(self) -> list[Fault]:
        return [*self._settings().faults, *self._more_faults(), *self._supervisor.catalogue.faults]

    def _model(self, request: web.Request) -> str:
        return self._supervisor.catalogue.resolve(request.match_info["id"])

    # Steering

    async def _launch(self, request: web.Request) -> web.Response:
        model = self._model(request)
        if request.query.get("wait", "true").lower() in {"false", "0", "no"}:
            self._supervisor.start_load(model)
            return json_response({"success": True, "message": f"'{model}' is being loaded"}, status=202)
        try:
            await self._supervisor.load(model)
        except LlmstudioError as error:
            return json_response({"success": False, **_detail(error)}, status=503, headers=error_headers(error))
        unit = self._supervisor.unit_of(model)
        return json_response(
            {"success": True, "pid": unit.pid if unit else None, "message": f"'{model}' is ready", "log_file": None}
        )

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

    # Logs

    async def _logs(self, request: web.Request) -> web.Response:
        model = self._model(request)
        lines = await self._launcher.lines(model, limit=_limit(request, default=2000))
        return json_response({"id": model, "logs": lines, "content": "\n".join(lines)})

    async def _log_stream(self, request: web.Request) -> web.StreamResponse:
        """Send the last lines, then every new one, until the reader goes; a slow one loses lines, nobody waits."""
        model, limit = self._model(request), _limit(request, default=50)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        async with contextlib.aclosing(self._launcher.follow(model, limit=limit)) as lines:  # type: ignore[type-var]
            async for line in lines:
                await response.write(_log_event(line))
        return response


def _is_up(shown: InstanceView) -> bool:
    return shown.state in {State.LOADING, State.READY, State.DRAINING, State.STOPPING}


def _log_event(line: str) -> bytes:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return b"event: log\ndata: " + json_bytes({"data": {"line": line}, "timestamp": stamp}) + b"\n\n"


def _limit(request: web.Request, *, default: int) -> int:
    text = request.query.get("limit", str(default))
    try:
        return min(MAX_LINES, max(0, int(text)))
    except ValueError:
        raise BadRequestError(f"limit: expected a number, found '{text[:40]}'") from None


def _is_forced(request: web.Request) -> bool:
    return request.query.get("force", "false").lower() in {"true", "1", "yes"}


def _fault(fault: Fault) -> dict[str, Any]:
    return {
        "file": fault.file,
        "line": fault.line,
        "key": fault.key,
        "recipe_id": fault.recipe_id,
        "message": fault.message,
        "hint": fault.hint,
        "severity": str(fault.severity),
    }


def _detail(error: LlmstudioError) -> dict[str, Any]:
    detail = {"detail": error.message, "kind": error.kind, "hint": error.hint}
    return detail | {name: error.details[name] for name in ("failure", "lines") if error.details.get(name)}


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn errors into this interface's envelope; a bug is logged with its traceback and told as 500."""
    try:
        return await handler(request)
    except LlmstudioError as error:
        return json_response(_detail(error), status=error.status, headers=error_headers(error))
    except web.HTTPException as error:
        kind = "not_found" if error.status == 404 else "bad_request"
        return json_response({"detail": error.reason, "kind": kind, "hint": None}, status=error.status)
    except Exception:
        logger.exception("%s %s: internal error", request.method, request.path)
        return json_response({"detail": "Internal Server Error", "kind": "internal", "hint": None}, status=500)
