"""Measures the machine: GPUs of all vendors, and RAM. Nothing is remembered from one measurement to the next."""

import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from llmstudiod.adapters.host_memory import read_host_memory
from llmstudiod.adapters.nvml import Nvml, Reading
from llmstudiod.adapters.sysfs_gpus import read_sysfs_gpus
from llmstudiod.core.devices import HostMemory, Machine

PATIENCE_S = 10.0
"""How long NVIDIA's driver may take. Without its persistence mode it wakes each GPU first, for about a second."""


class Devices:
    """Measures on request; whoever asks does so in a thread. ``root`` stands for /, for tests."""

    def __init__(
        self, *, models_are_units: bool = True, root: Path = Path("/"), patience_s: float = PATIENCE_S
    ) -> None:
        self._models_are_units = models_are_units
        self._root = root
        self._patience_s = patience_s
        self._nvml = Nvml(root)
        self._nvml_is_free = threading.Lock()

    def measure(self) -> Machine:
        """Return what there is now. Blocks for milliseconds; the first time, with NVIDIA's GPUs, for a second."""
        host = read_host_memory(self._root, models_are_units=self._models_are_units)
        nvidia = self._nvidia(host)
        others = [replace(device, index=nvidia.count + device.index) for device in read_sysfs_gpus(self._root, host)]
        return Machine(host, (*nvidia.devices, *others), nvidia.faults)

    def _nvidia(self, host: HostMemory) -> Reading:
        """Return what NVML tells, one question at a time.

        When a GPU falls off the bus, a call into the driver may never return. So each reading has a thread that can be
        left behind, which neither the caller nor the end of the process waits for.
        """
        stuck = f"NVIDIA's driver did not answer within {self._patience_s:.0f} s; `dmesg` tells why (Xid)"
        if not self._nvml_is_free.acquire(timeout=self._patience_s):
            return Reading(faults=(stuck,))
        answer: Future[Reading] = Future()
        threading.Thread(target=self._read, args=(host, answer), name="nvml", daemon=True).start()
        try:
            return answer.result(self._patience_s)
        except TimeoutError:
            return Reading(faults=(stuck,))

    def _read(self, host: HostMemory, answer: Future[Reading]) -> None:
        try:
            answer.set_result(self._nvml.read(host))
        except BaseException as error:  # noqa: BLE001 - a bug belongs to whoever asked, who raises it
            answer.set_exception(error)
        finally:
            self._nvml_is_free.release()
