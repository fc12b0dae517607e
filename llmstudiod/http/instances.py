"""How the admin interface shows instances: in lists, one with its story, and live, with what it does right now."""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

from llmstudiod.adapters import probe
from llmstudiod.core.errors import NotFoundError
from llmstudiod.core.lifecycle import InstanceView, State
from llmstudiod.core.recipe import Fault
from llmstudiod.http.admin_gpus import AdminGpus
from llmstudiod.http.answers import json_response
from llmstudiod.http.figures import Figures
from llmstudiod.http.streams import Streams, Write, event_bytes
from llmstudiod.launchers.base import Launcher
from llmstudiod.supervisor import Supervisor

LIVE_S = 1.0
UP = frozenset({State.LOADING, State.READY, State.DRAINING, State.STOPPING})


class Instances:
    """The routes below ``/instances`` that read."""

    def __init__(
        self,
        *,
        supervisor: Supervisor,
        launcher: Launcher,
        gpus: AdminGpus,
        figures: Figures,
        clock: Callable[[], float],
        faults: Callable[[], list[Fault]],
        totals: Callable[[InstanceView], dict[str, int]],
        streams: Streams,
    ) -> None:
        self._streams = streams
        self._supervisor = supervisor
        self._launcher = launcher
        self._gpus = gpus
        self._figures = figures
        self._clock = clock
        self._faults = faults
        self.totals = totals

    def routes(self) -> list[web.RouteDef]:
        """Return the routes."""
        return [
            web.get("/instances", self._list),
            web.get("/instances/{id}", self._one),
            web.get("/instances/{id}/history", self._history),
            web.get("/instances/{id}/slots", self._slots),
            web.get("/instances/{id}/live", self._live),
        ]

    def all(self) -> list[dict[str, Any]]:
        """Return every instance as lists show it."""
        return [self.shown(view) for view in self._supervisor.views()]

    async def _list(self, _: web.Request) -> web.Response:
        return json_response({"instances": self.all()})

    async def _one(self, request: web.Request) -> web.Response:
        shown = self._supervisor.view(self._supervisor.catalogue.resolve(request.match_info["id"]))
        if shown is None:
            raise NotFoundError(f"'{request.match_info['id']}' has no instance")
        return json_response(await self.whole(shown))

    async def _history(self, request: web.Request) -> web.Response:
        """Answer what a model did in the last hour, minute by minute."""
        model = self._supervisor.catalogue.resolve(request.match_info["id"])
        return json_response({"id": model, **self._figures.history(model)})

    async def _slots(self, request: web.Request) -> web.Response:
        """Answer what each slot does; the question is no request to the model."""
        model = self._supervisor.catalogue.resolve(request.match_info["id"])
        return json_response({"id": model, "slots": await self._slot_table(model)})

    async def _slot_table(self, model: str) -> list[dict[str, Any]]:
        shown = self._supervisor.view(model)
        if shown is None or shown.state is not State.READY:
            return []
        return await probe.slot_table(self._supervisor.socket_of(model)) or []

    async def kv_cache_usage(self, model: str) -> float:
        """Return which share of its slots' tokens a model's requests have taken, from 0 to 1."""
        slots = await self._slot_table(model)
        taken = sum(slot["n_prompt"] + slot["n_decoded"] for slot in slots if slot["is_busy"])
        room = sum(slot["n_ctx"] for slot in slots)
        return round(min(1.0, taken / room), 4) if room else 0.0

    async def _live(self, request: web.Request) -> web.StreamResponse:
        """Send what the slots do, and the last hour, whenever they change."""
        model = self._supervisor.catalogue.resolve(request.match_info["id"])
        return await self._streams.answer(request, lambda write: self.tell_live(model, write))

    async def tell_live(self, model: str, write: Write) -> None:
        """Write what the slots do, and the last hour, whenever they change."""
        told: dict[str, object] = {}
        while True:
            now = {"slots": await self._slot_table(model), "history": self._figures.history(model)}
            for name, value in now.items():
                if told.get(name) != value:
                    told[name] = value
                    await write(event_bytes(name, value))
            await asyncio.sleep(LIVE_S)

    async def whole(self, shown: InstanceView) -> dict[str, Any]:
        """Return all that is known of one instance."""
        unit = self._supervisor.unit_of(shown.id)
        measured = await self._launcher.memory(unit) if unit and shown.state in UP else None
        return {
            **self.shown(shown),
            **self._story(shown),
            "memory": {"estimated": self.estimated(shown), "measured": measured},
            "devices": await self._gpus.held_by(shown),
        }

    def estimated(self, shown: InstanceView) -> int | None:
        """Return the bytes of RAM that a running model was expected to take."""
        if shown.placement is not None:
            return shown.placement.estimate.host_total
        plan = self._supervisor.plan_of(shown.id)
        return plan.estimate.host_total if plan and plan.estimate else None

    def shown(self, shown: InstanceView) -> dict[str, Any]:
        """Return an instance as lists show it."""
        entry = self._supervisor.catalogue.entries.get(shown.id)
        unit = self._supervisor.unit_of(shown.id) if shown.state in UP else None
        recent = self._figures.recent(shown.id)
        why = shown.refused or shown.failure
        return {
            "id": shown.id,
            "name": (entry.recipe.name if entry else None) or shown.id,
            "state": str(shown.state),
            "since": self.wall(shown.since),
            "reason": why.message if why else (str(shown.stop_cause) if shown.stop_cause else None),
            "kind": why.kind if why else None,
            "hint": why.hint if why else None,
            "is_refused": shown.refused is not None,
            "failures": shown.failures,
            "retry_at": self._retry_at(shown),
            "is_exhausted": shown.is_exhausted,
            "is_pinned": shown.spec.is_pinned,
            "in_flight": shown.in_flight,
            "queued": shown.queued,
            "progress": shown.progress,
            "stage": shown.stage or None,
            "alerts": list(shown.warnings),
            "slots": shown.facts.n_parallel if shown.facts else None,
            "n_ctx": shown.facts.n_ctx if shown.facts else None,
            "idle_since": self.wall(shown.idle_since) if shown.state is State.READY else None,
            "is_stale": shown.is_stale,
            "tokens_per_second": recent.generation_tps,
            "prompt_tokens_per_second": recent.prompt_tps,
            "ttft_ms": recent.ttft_ms,
            "memory": {"estimated": self.estimated(shown), "measured": self._measured(shown)},
            "unit": unit.name if unit else None,
            "pid": unit.pid if unit else None,
            "invocation_id": unit.invocation_id if unit else None,
        }

    def _measured(self, shown: InstanceView) -> int | None:
        return self._figures.memory(shown.id) if shown.state in UP else None

    def _story(self, shown: InstanceView) -> dict[str, Any]:
        entry = self._supervisor.catalogue.entries.get(shown.id)
        plan = self._supervisor.plan_of(shown.id)
        placed = shown.placement.notes if shown.placement else ()
        about = [fault for fault in self._faults() if fault.recipe_id == shown.id]
        return {
            "totals": self.totals(shown),
            "argv": list(plan.request.argv) if plan else None,
            "socket": plan.request.socket_path if plan else None,
            "sandbox": list(entry.recipe.sandbox.relaxations()) if entry else [],
            "notes": [*(plan.command.notes if plan else ()), *placed],
            "last_lines": list(shown.failure.lines) if shown.failure else [],
            "warnings": [str(each) for each in (*(entry.warnings if entry else ()), *about)],
            "story": [
                {"at": self.wall(step.at), "from": str(step.old), "to": str(step.new), "cause": step.cause}
                for step in shown.story
            ],
        }

    def _retry_at(self, shown: InstanceView) -> float | None:
        """Return when a failed model may be started again; None: it has not failed, or stays down."""
        is_due = shown.state is State.FAILED and math.isfinite(shown.retry_at)
        return self.wall(shown.retry_at) if is_due else None

    def wall(self, at: float) -> float:
        """Return a moment of the monotonic clock as seconds since 1970."""
        return round(time.time() - (self._clock() - at), 3)

    def any_up(self) -> bool:
        """Whether a model runs."""
        return any(shown.state in UP for shown in self._supervisor.views())

    async def measure(self) -> dict[str, int]:
        """Return the RAM in bytes that each running model has now, where that is known."""
        up = [shown for shown in self._supervisor.views() if shown.state in UP]
        units = [unit for shown in up if (unit := self._supervisor.unit_of(shown.id)) is not None]
        sizes = await asyncio.gather(*(self._launcher.memory(unit) for unit in units))
        return {unit.model_id: size for unit, size in zip(units, sizes, strict=True) if size is not None}
