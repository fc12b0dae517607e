"""What NVIDIA's driver tells of its GPUs through NVML, by the bindings of pynvml. Both may be missing.

Called by one thread at a time. The library stays initialised: that takes up to a second for each GPU, and nothing else
is kept from one reading to the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmstudiod.adapters.gpu_processes import describe_process
from llmstudiod.core.devices import Device, DeviceProcess, HostMemory

_LIBRARY = "libnvidia-ml.so.1"

# Numbers of nvml.h; the bindings have them too, but they are needed to tell why there are none.
_UNINITIALIZED, _NOT_SUPPORTED, _NO_PERMISSION, _DRIVER_NOT_LOADED, _LOST, _MISMATCH = 1, 3, 4, 9, 15, 18

_RELOADED = frozenset({_UNINITIALIZED, _LOST, _MISMATCH})
"""After these the library has to be initialised anew: the driver was reloaded, or a GPU was reset."""

_NEXT_STEP = {
    _NO_PERMISSION: "llmstudiod may not open /dev/nvidiactl; `ls -l /dev/nvidia*` shows who may",
    _DRIVER_NOT_LOADED: "NVIDIA's driver is not loaded: `modprobe nvidia`, then `systemctl restart llmstudiod`; "
    "`dmesg` tells why it cannot be loaded",
    _MISMATCH: "NVIDIA's driver and its library are of different versions, as after an upgrade: restart the machine, "
    "or reload the driver and `systemctl restart llmstudiod`",
}


@dataclass(frozen=True, slots=True)
class Reading:
    """What was found, and what could not be measured, in sentences. ``count`` GPUs have the numbers below it."""

    devices: tuple[Device, ...] = ()
    faults: tuple[str, ...] = ()
    count: int = 0


class _UnusableError(Exception):
    """NVML cannot be used; the text is the reason and the next step."""


class _Answers:
    """Asks the bindings. Each call may fail on its own: it answers None, and why is kept."""

    def __init__(self, nvml: Any) -> None:  # noqa: ANN401 - the bindings have no types
        self._nvml = nvml
        self.errors: dict[str, int] = {}
        self.last_error = 0

    def ask(self, name: str, *arguments: object) -> Any:  # noqa: ANN401 - NVML's structures have no types
        """Return the answer of a function of the bindings."""
        try:
            return getattr(self._nvml, name)(*arguments)
        except self._nvml.NVMLError as error:
            self.last_error = int(error.value)
        except (AttributeError, ValueError, OSError):
            self.last_error = _NOT_SUPPORTED  # bindings that are older than the function, or a name that is no text
        self.errors[name] = self.last_error
        return None

    def text(self, name: str, *arguments: object) -> str | None:
        """Return an answer that is a text; old bindings give bytes."""
        value = self.ask(name, *arguments)
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


class Nvml:
    """NVIDIA's GPUs. ``root`` stands for /, from which /proc and /sys are read."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._bindings: Any = None  # once they are initialised

    def read(self, host: HostMemory) -> Reading:
        """Return every GPU; nothing and no fault where there is evidently none. Blocks for a second the first time."""
        try:
            bindings = self._initialised()
        except _UnusableError as error:
            return (
                Reading(faults=(f"the NVIDIA GPUs cannot be measured: {error}",)) if self._is_evident() else Reading()
            )
        main = _Answers(bindings)
        count = main.ask("nvmlDeviceGetCount")
        gpus = [_Gpu(_Answers(bindings), number, self._root) for number in range(count or 0)]
        if count is None:
            reading = Reading(faults=(_failed("the NVIDIA GPUs cannot be counted", bindings, main.last_error),))
        else:
            reading = _reading(gpus, host, bindings)
        errors = {code for answers in (main, *(gpu.answers for gpu in gpus)) for code in answers.errors.values()}
        if errors & _RELOADED:
            self._bindings = None
            main.ask("nvmlShutdown")
        return reading

    def _initialised(self) -> Any:  # noqa: ANN401
        if self._bindings is not None:
            return self._bindings
        import ctypes  # not needed to start

        try:
            ctypes.CDLL(_LIBRARY)  # first, since the bindings take 4 MB, and most machines have no such GPU
        except OSError as error:
            raise _UnusableError(f"{error}; install the driver's libraries (Debian: libnvidia-ml1)") from error
        try:
            import pynvml
        except ImportError as error:
            raise _UnusableError(
                "Python's module pynvml is missing; install python3-pynvml (Debian, section contrib), "
                "or nvidia-ml-py with pip"
            ) from error
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise _UnusableError(_NEXT_STEP.get(error.value) or f"{error}; `nvidia-smi` tells more") from error
        self._bindings = pynvml
        return pynvml

    def _is_evident(self) -> bool:
        """Return whether there is an NVIDIA GPU: its driver is loaded, or it is on the bus."""
        if (self._root / "proc/driver/nvidia").exists():
            return True
        devices = (self._root / "sys/bus/pci/devices").glob("*")
        # Class 03 is a display controller: a card's sound and NVIDIA's bridges are devices too.
        return any(_text(at / "vendor") == "0x10de" and _text(at / "class").startswith("0x03") for at in devices)


class _Gpu:
    """One GPU while it is read: its handle, its place on the bus, and what NVML answered."""

    def __init__(self, answers: _Answers, number: int, root: Path) -> None:
        self.answers, self.number, self._root = answers, number, root
        self.handle = answers.ask("nvmlDeviceGetHandleByIndex", number)
        pci = None if self.handle is None else answers.ask("nvmlDeviceGetPciInfo", self.handle)
        self.place = None if pci is None else (int(pci.domain), int(pci.bus), int(pci.device))

    def device(self, host: HostMemory) -> Device:
        """Return the whole GPU, without an index."""
        ask, handle = self.answers.ask, self.handle
        rates, power = ask("nvmlDeviceGetUtilizationRates", handle), ask("nvmlDeviceGetPowerUsage", handle)
        limit = ask("nvmlDeviceGetPowerManagementLimit", handle)
        total, free, is_shared = self._memory(handle, host)
        return Device(
            index=self.number,
            name=self.answers.text("nvmlDeviceGetName", handle) or "NVIDIA GPU",
            kind="CUDA",
            uuid=self.answers.text("nvmlDeviceGetUUID", handle),
            total=total,
            free=free,
            minor=ask("nvmlDeviceGetMinorNumber", handle),
            shares_host_memory=is_shared,
            utilization_percent=None if rates is None else int(rates.gpu),
            temperature_c=ask("nvmlDeviceGetTemperature", handle, 0),
            power_w=None if power is None else power / 1000,
            power_limit_w=None if limit is None else limit / 1000,
            processes=self._processes(handle),
        )

    def parts(self, whole: Device) -> list[Device] | None:
        """Return the parts into which the GPU is divided (MIG); None where it is not.

        They have memory and processes of their own; utilisation and power are told of the whole alone.
        """
        ask = self.answers.ask
        mode = ask("nvmlDeviceGetMigMode", self.handle)
        if not mode or mode[0] != 1:
            return None
        found = []
        for number in range(ask("nvmlDeviceGetMaxMigDeviceCount", self.handle) or 0):
            part = ask("nvmlDeviceGetMigDeviceHandleByIndex", self.handle, number)
            if part is None:
                continue  # there is room for more parts than there are
            memory = ask("nvmlDeviceGetMemoryInfo", part)
            made = replace(
                whole,
                name=self.answers.text("nvmlDeviceGetName", part) or f"{whole.name} MIG",
                uuid=self.answers.text("nvmlDeviceGetUUID", part),
                total=None if memory is None else int(memory.total),
                free=None if memory is None else int(memory.free),
                is_mig=True,
                shares_host_memory=False,
                utilization_percent=None,
                power_w=None,
                power_limit_w=None,
                processes=self._processes(part),
            )
            found.append(made)
        return found

    def _memory(self, handle: object, host: HostMemory) -> tuple[int | None, int | None, bool]:
        """Return total and free bytes, and whether they are the host's: Grace, Orin and Spark have one memory.

        ``nvidia-smi`` shows those as [N/A].
        """
        name = "nvmlDeviceGetMemoryInfo"
        memory = self.answers.ask(name, handle)
        if memory is not None and memory.total:
            return int(memory.total), int(memory.free), False
        if memory is not None or self.answers.errors[name] == _NOT_SUPPORTED:
            return host.total, host.available, True
        return None, None, False

    def _processes(self, handle: object) -> tuple[DeviceProcess, ...]:
        """Return who computes and who draws, each once; a process may do both."""
        held: dict[int, int | None] = {}
        for name in ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v3"):
            for process in self.answers.ask(name, handle) or ():
                pid, used = int(process.pid), process.usedGpuMemory
                known = held.get(pid)
                held[pid] = used if known is None else max(known, used or 0)
        return tuple(
            describe_process(pid, used, root=self._root, name_by_driver=self._name_of) for pid, used in held.items()
        )

    def _name_of(self, pid: int) -> str | None:
        return self.answers.text("nvmlSystemGetProcessName", pid)


def _reading(gpus: Sequence[_Gpu], host: HostMemory, bindings: Any) -> Reading:  # noqa: ANN401
    """Return the devices, numbered as ``nvidia-smi`` numbers them; parts of divided GPUs after all whole ones.

    NVML counts in the order of the PCI bus, and says that nobody should rely on it. A GPU that cannot be asked where it
    is keeps the number that NVML has given it.
    """
    placed = [gpu for gpu in gpus if gpu.place is not None]
    numbers = [gpu.number for gpu in placed]
    for number, gpu in zip(numbers, sorted(placed, key=lambda gpu: gpu.place or ()), strict=True):
        gpu.number = number
    devices, parts, faults = [], [], []
    for gpu in sorted(gpus, key=lambda gpu: gpu.number):
        label = f"GPU {gpu.number}"
        if gpu.handle is None:
            faults.append(_failed(f"{label} cannot be used", bindings, gpu.answers.last_error))
            continue
        device = gpu.device(host)
        found, errors = gpu.parts(device), gpu.answers.errors
        if _LOST in errors.values():
            faults.append(_failed(f"{label} ({device.name}) cannot be used", bindings, _LOST))
        elif found is None:
            devices.append(device)
            if device.total is None:
                why = errors["nvmlDeviceGetMemoryInfo"]
                faults.append(_failed(f"the memory of {label} ({device.name}) cannot be measured", bindings, why))
        elif found:
            parts += found
        else:
            step = "`nvidia-smi mig -cgi … -C` makes parts, `nvidia-smi -mig 0` joins it again"
            faults.append(f"{label} ({device.name}) is in MIG mode and has no parts, so nothing can use it; {step}")
    numbered = [replace(part, index=len(gpus) + number) for number, part in enumerate(parts)]
    return Reading((*devices, *numbered), tuple(faults), len(gpus) + len(parts))


def _failed(what: str, bindings: Any, code: int) -> str:  # noqa: ANN401
    """Return a fault with NVML's reason and the next step."""
    step = "restart the machine or reset it with `nvidia-smi -r`; `dmesg` tells why (Xid)" if code == _LOST else None
    reason = _NEXT_STEP.get(code) or f"{bindings.NVMLError(code)}; {step or '`nvidia-smi` tells more'}"
    return f"{what}: {reason}"


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace").strip()
    except OSError:
        return ""
