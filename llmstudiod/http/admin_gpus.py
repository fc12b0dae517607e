"""GET /gpus of the admin interface: what the machine has, measured now, with vllm-studio's names of fields and ours."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llmstudiod.core.command import ServerBinary
from llmstudiod.core.devices import Device, DeviceProcess, Machine, with_listed
from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.lifecycle import InstanceView, State
from llmstudiod.core.placement import Wish
from llmstudiod.http.answers import json_response
from llmstudiod.supervisor import Supervisor

if TYPE_CHECKING:
    from llmstudiod.core.preview import Preview


class AdminGpus:
    """The route, mounted by the admin interface, which decides who may use it. ``measure`` blocks."""

    def __init__(
        self,
        measure: Callable[[], Machine],
        supervisor: Supervisor,
        binary: Callable[[], Awaitable[ServerBinary]],
    ) -> None:
        self._binary = binary
        self._measure = measure
        self._supervisor = supervisor

    def routes(self) -> list[web.RouteDef]:
        """Return the route."""
        return [web.get("/gpus", self._gpus)]

    async def _gpus(self, _: web.Request) -> web.Response:
        return json_response(await self.measured())

    async def measured(self) -> dict[str, Any]:
        """Return the answer of ``GET /gpus``."""
        machine = await asyncio.to_thread(self._measure)
        with contextlib.suppress(LlmstudioError):  # without a llama-server there are still GPUs
            found = await self._binary()
            listed = with_listed(machine.devices, found.devices, found.device_labels, found.device_bytes)
            machine = replace(machine, devices=listed)
        return machine_answer(machine, self._pids(), self._promised())

    async def held_by(self, shown: InstanceView) -> list[dict[str, Any]]:
        """Return what a model holds of each of its GPUs: estimated, and measured where the driver tells."""
        placement, unit = shown.placement, self._supervisor.unit_of(shown.id)
        if placement is None or not placement.gpus:
            return []
        machine = await asyncio.to_thread(self._measure)
        devices = {device.uuid: device for device in machine.devices}
        answer = []
        for uuid, share in zip(placement.uuids, placement.estimate.devices, strict=True):
            device = devices.get(uuid)
            processes = device.processes if device else ()
            ours = [each.used for each in processes if each.model == shown.id or (unit and each.pid == unit.pid)]
            known = [size for size in ours if size is not None]
            answer.append(
                {
                    "index": device.index if device else None,
                    "uuid": uuid,
                    "layers": share.layers,
                    "estimated": share.total,
                    "measured": sum(known) if known else None,
                }
            )
        return answer

    def _promised(self) -> dict[str, list[dict[str, Any]]]:
        """Return which models were promised how much of each GPU, by its UUID."""
        promised: dict[str, list[dict[str, Any]]] = {}
        for shown in self._supervisor.views():
            if shown.placement is None:
                continue
            for uuid, share in zip(shown.placement.uuids, shown.placement.estimate.devices, strict=True):
                entry = {"id": shown.id, "state": str(shown.state), "memory": share.total, "layers": share.layers}
                promised.setdefault(uuid, []).append(entry)
        return promised

    def _pids(self) -> dict[int, str]:
        """Return the models by the pids of their servers."""
        views = self._supervisor.views()
        up = [shown.id for shown in views if shown.state not in {State.STOPPED, State.FAILED}]
        return {unit.pid: model for model in up if (unit := self._supervisor.unit_of(model))}


def preview_answer(found: "Preview", wish: Wish | None) -> dict[str, Any]:
    """Return where a model would go, or lies, and the sum, as JSON holds it."""
    from llmstudiod.core.preview import placement_dict  # slow to import: nobody waits for it at a start

    source = wish.correction.source if wish else ""
    return {
        "is_planned": wish is not None,
        "is_running": found.is_running,
        "place": found.placement and placement_dict(found.placement, [each["name"] for each in found.account[:-1]]),
        "evicts": list(found.evicts),
        "waits_for": list(found.waits_for),
        "error": found.error.message if found.error else None,
        "hint": found.error.hint if found.error else None,
        "source": source or "the estimate",
        "memory": list(found.account),
    }


def machine_answer(
    machine: Machine, ours: Mapping[int, str], promised: Mapping[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Return the answer: sizes in bytes, watts, degrees Celsius and percents; null is what is not known.

    ``ours``: the models by their servers' pids, for those that run in no unit of their own. ``promised``: what models
    hold or may take, by the UUID of the GPU.
    """
    host = machine.host
    return {
        "count": len(machine.devices),
        "gpus": [_gpu(device, ours, promised.get(device.uuid or "", [])) for device in machine.devices],
        "host": {
            "memory_total": host.total,
            "memory_used": max(0, host.total - host.available),
            "memory_available": host.available,
            "memory_limit": host.limit,
        },
        "faults": list(machine.faults),
    }


def _gpu(device: Device, ours: Mapping[int, str], promised: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "index": device.index,
        "name": device.name,
        "memory_total": device.total,
        "memory_used": device.used,
        "memory_free": device.free,
        "utilization": device.utilization_percent,
        "temperature": device.temperature_c,
        "power_draw": device.power_w,
        "power_limit": device.power_limit_w,
        "uuid": device.uuid,
        "kind": device.kind,
        "minor": device.minor,
        "is_mig": device.is_mig,
        "shares_host_memory": device.shares_host_memory,
        "processes": [_process(process, ours) for process in device.processes],
        "promised": promised,
    }


def _process(process: DeviceProcess, ours: Mapping[int, str]) -> dict[str, Any]:
    model = process.model or ours.get(process.pid)
    return {"pid": process.pid, "name": process.name, "memory_used": process.used, "model": model}
