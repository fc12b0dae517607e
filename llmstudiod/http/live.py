"""What those who read the events along are told every so often: what the models do, the GPUs, the metrics.

Nobody reading, nothing is measured but the models' memory, twice a minute, for the last hour's chart.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from llmstudiod.http.events import Events
from llmstudiod.http.figures import Figures
from llmstudiod.http.instances import Instances

LOOK_S, MEASURE_S = 1.0, 5.0
SAMPLE_S = 30.0

logger = logging.getLogger(__name__)

Tell = Callable[[], Awaitable[dict[str, Any]]]


class Live:
    """Publishes ``instances`` (those that have changed), and vllm-studio's ``status``, ``gpu`` and ``metrics``."""

    def __init__(
        self,
        *,
        events: Events,
        instances: Instances,
        figures: Figures,
        status: Tell,
        gpus: Tell,
        metrics: Tell,
        add_energy: Callable[[float], None],
    ) -> None:
        self._add_energy = add_energy
        self._gpus = gpus
        self._events = events
        self._instances = instances
        self._figures = figures
        self._tellers: dict[str, Tell] = {"status": status, "metrics": metrics}
        self._told: dict[str, dict[str, Any]] = {}

    async def keep(self) -> None:
        """Tell, for as long as the daemon runs."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._repeat(LOOK_S, self._tell_instances))
            tasks.create_task(self._repeat(MEASURE_S, self._tell_measured))
            tasks.create_task(self._sample())

    async def _repeat(self, period_s: float, tell: Callable[[], Awaitable[None]]) -> None:
        while True:
            await self._events.wanted()
            try:
                await tell()
            except Exception:  # the events are worth less than the daemon
                logger.exception("what the events tell could not be found out")
            await asyncio.sleep(period_s)

    async def _sample(self) -> None:
        """Measure what the charts and the sum of energy need, while a model runs."""
        while True:
            await asyncio.sleep(SAMPLE_S)
            if not self._instances.any_up():
                continue
            try:
                watts = sum(gpu["power_draw"] or 0 for gpu in (await self._measure())["gpus"])
            except Exception:
                logger.exception("what the models take could not be measured")
                continue
            if watts:
                await asyncio.to_thread(self._add_energy, watts * SAMPLE_S / 3600)

    def snapshot(self) -> dict[str, Any]:
        """Return what a new reader sees; the first one is told afterwards what differs from it."""
        items = self._instances.all()
        if not self._events.n_subscribers:
            self._told = {item["id"]: _without_clock(item) for item in items}
        return {"instances": items}

    async def _tell_instances(self) -> None:
        shown = {item["id"]: item for item in self._instances.all()}
        changed = [item for model, item in shown.items() if _without_clock(item) != self._told.get(model)]
        removed = sorted(self._told.keys() - shown.keys())
        self._told = {model: _without_clock(item) for model, item in shown.items()}
        if changed or removed:
            self._events.mention("instances", {"instances": changed, "removed": removed})

    async def _measure(self) -> dict[str, Any]:
        """Return what is told of the GPUs, and note what models hold of them and of RAM."""
        machine = await self._gpus()
        self._figures.add_memory(await self._instances.measure(), on_gpus(machine))
        return machine

    async def _tell_measured(self) -> None:
        self._events.mention("gpu", await self._measure())
        for name, tell in self._tellers.items():
            self._events.mention(name, await tell())


def on_gpus(machine: dict[str, Any]) -> dict[str, int]:
    """Return what each model holds of all GPUs, in bytes, where the driver tells.

    >>> on_gpus({"gpus": [{"processes": [{"model": "a", "memory_used": 3}, {"model": None, "memory_used": 4}]}]})
    {'a': 3}
    """
    held: dict[str, int] = {}
    for process in (each for gpu in machine["gpus"] for each in gpu["processes"]):
        if process["model"] and process["memory_used"]:
            held[process["model"]] = held.get(process["model"], 0) + process["memory_used"]
    return held


def _without_clock(item: dict[str, Any]) -> dict[str, Any]:
    """Moments are told in the wall's time, made from the monotonic clock: they tremble by a millisecond."""
    return item | {name: round(item[name]) for name in ("since", "idle_since", "retry_at") if item[name] is not None}
