"""GET /gpus of the admin interface: what the machine has, measured now, with vllm-studio's names of fields and ours."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from llmstudiod.core.devices import Device, DeviceProcess, Machine
from llmstudiod.core.lifecycle import State
from llmstudiod.http.answers import json_response
from llmstudiod.supervisor import Supervisor


class AdminGpus:
    """The route, mounted by the admin interface, which decides who may use it. ``measure`` blocks."""

    def __init__(self, measure: Callable[[], Machine], supervisor: Supervisor) -> None:
        self._measure = measure
        self._supervisor = supervisor

    def routes(self) -> list[web.RouteDef]:
        """Return the route."""
        return [web.get("/gpus", self._gpus)]

    async def _gpus(self, _: web.Request) -> web.Response:
        machine = await asyncio.to_thread(self._measure)
        return json_response(machine_answer(machine, self._pids()))

    def _pids(self) -> dict[int, str]:
        """Return the models by the pids of their servers."""
        views = self._supervisor.views()
        up = [shown.id for shown in views if shown.state not in {State.STOPPED, State.FAILED}]
        return {unit.pid: model for model in up if (unit := self._supervisor.unit_of(model))}


def machine_answer(machine: Machine, ours: Mapping[int, str]) -> dict[str, Any]:
    """Return the answer: sizes in bytes, watts, degrees Celsius and percents; null is what is not known.

    ``ours``: the models by their servers' pids, for those that run in no unit of their own.
    """
    host = machine.host
    return {
        "count": len(machine.devices),
        "gpus": [_gpu(device, ours) for device in machine.devices],
        "host": {
            "memory_total": host.total,
            "memory_used": max(0, host.total - host.available),
            "memory_available": host.available,
            "memory_limit": host.limit,
        },
        "faults": list(machine.faults),
    }


def _gpu(device: Device, ours: Mapping[int, str]) -> dict[str, Any]:
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
        "promised": [],
    }


def _process(process: DeviceProcess, ours: Mapping[int, str]) -> dict[str, Any]:
    model = process.model or ours.get(process.pid)
    return {"pid": process.pid, "name": process.name, "memory_used": process.used, "model": model}
