"""What models really need: asked of llama-server in a dry run, read from its log and from the GPUs, and kept.

It corrects the estimate of the same file, settings and build the next time. Blocks; runs in threads.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace

from llmstudiod.adapters.state_db import StateDb
from llmstudiod.core.devices import Machine
from llmstudiod.core.learned import (
    AS_ESTIMATED,
    DRY_RUN,
    LAST_RUN,
    Correction,
    Told,
    correction,
    told_by_breakdown,
    told_by_log,
)
from llmstudiod.core.memory import Run, output_bytes
from llmstudiod.core.placement import Placement, Wish, needs

_LEARNED, _HOLDINGS = "learned", "holdings"


class Learning:
    """Corrections by key: `llmstudiod.core.needs.memory_key`."""

    def __init__(self, state: StateDb, measure: Callable[[], Machine] | None) -> None:
        self._state = state
        self._measure = measure
        self._found: dict[str, Correction] = {}  # by this daemon; it need not be on the disk yet

    def known(self, key: str) -> Correction:
        """Return what is known of a model, `AS_ESTIMATED` where nothing is."""
        if (found := self._found.get(key)) is not None:
            return found
        values = self._state.get(_LEARNED, key)
        try:
            return Correction.from_dict(values) if values else AS_ESTIMATED
        except (TypeError, ValueError):
            return AS_ESTIMATED

    def after_dry_run(self, key: str, wish: Wish, n_devices: int, output: Iterable[str]) -> Correction | None:
        """Take what a dry run told, or return None where it did not tell. ``n_devices``: the GPUs that it may use."""
        logits = output_bytes(wish.shape, wish.run)
        told = next(filter(None, (told_by_breakdown(line, output=logits) for line in output)), None)
        if told is None:
            return None
        layers = wish.all_layers if wish.n_gpu_layers is None else wish.n_gpu_layers
        run = replace(wish.run, n_gpu_layers=layers if n_devices else 0, proportions=(1.0,) * n_devices)
        return self._keep(key, _correction(wish, run, told, DRY_RUN))

    def after_load(
        self, key: str, wish: Wish, placement: Placement, log: Iterable[str], *, pid: int, used: int | None
    ) -> Correction | None:
        """Take what a loaded model's log and the GPUs tell. ``used``: bytes of RAM that it has for itself."""
        told = told_by_log(log)
        if told is None:
            return None
        found = _correction(wish, placement.run, told, LAST_RUN)
        found = replace(found, runtime=self._runtime(placement, told, pid))
        if used is not None:
            host = needs(replace(wish, correction=found), placement.run).host
            found = replace(found, host=max(0, used - host.total - placement.estimate.repacked))
        return self._keep(key, found)

    def remember(self, invocation_id: str, placement: Placement) -> Future[None]:
        """Have it kept where a unit's model lies, for a daemon that finds the unit running; never waits."""
        return self._state.put_soon(_HOLDINGS, invocation_id, placement.as_dict())

    def recall(self, invocation_id: str) -> Placement | None:
        """Return where a unit's model lies, or None where that is not known."""
        values = self._state.get(_HOLDINGS, invocation_id)
        try:
            return Placement.from_dict(values) if values else None
        except (TypeError, ValueError, KeyError):
            return None

    def remember_warnings(self, invocation_id: str, warnings: Iterable[str]) -> None:
        """Keep what a unit's load told, for a daemon that finds it when those lines have scrolled away."""
        self._state.put_soon(_HOLDINGS, f"{invocation_id}/warnings", {"warnings": list(warnings)})

    def recall_warnings(self, invocation_id: str) -> tuple[str, ...] | None:
        """Return what a unit's load told, or None where that is not known."""
        values = self._state.get(_HOLDINGS, f"{invocation_id}/warnings")
        found = values.get("warnings") if values else None
        return tuple(map(str, found)) if isinstance(found, list) else None

    def forget(self, invocation_id: str) -> None:
        """Give up what was kept of a unit, which has ended; never waits."""
        for key in (invocation_id, f"{invocation_id}/warnings"):
            self._state.delete_soon(_HOLDINGS, key)

    def _runtime(self, placement: Placement, told: Told, pid: int) -> int | None:
        """Return the most that a process has on one of its GPUs beside its buffers."""
        if not placement.gpus or self._measure is None:
            return None
        devices = {device.uuid: device for device in self._measure().devices}
        beside = []
        for number, uuid in enumerate(placement.uuids):
            device, buffers = devices.get(uuid), told.devices.get(f"CUDA{number}")
            used = [each.used for each in device.processes if each.pid == pid] if device else []
            if buffers is not None and used and used[0] is not None and used[0] >= buffers:
                beside.append(used[0] - buffers)
        return max(beside, default=None)

    def _keep(self, key: str, found: Correction) -> Correction:
        self._found[key] = found
        self._state.put_soon(_LEARNED, key, found.as_dict())
        return found


def _correction(wish: Wish, run: Run, told: Told, source: str) -> Correction:
    return correction(needs(replace(wish, correction=AS_ESTIMATED), run), told, source=source)
