"""What a machine has to place models on: GPUs and host memory, as they were measured. Plain values, in bytes."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceProcess:
    """A process that holds memory of a device; ``used`` None where the driver does not tell.

    ``model`` is the id of the model of ours to whose unit it belongs, None for another's.
    """

    pid: int
    name: str
    used: int | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU.

    ``index`` counts NVIDIA's in the order of the PCI bus, as ``nvidia-smi`` does, and others after them. It is no place
    in a list: the number of a lost GPU is missing, and so is that of a divided one, whose parts come after the whole
    ones. ``uuid`` is what CUDA_VISIBLE_DEVICES takes, for a MIG slice its own; None for other vendors. ``kind`` is the
    backend that llama.cpp drives it with: ``CUDA``, ``ROCm`` or ``Vulkan``.
    ``total`` and ``free`` are None where the driver does not tell. ``shares_host_memory``: it has no memory of its own,
    as integrated GPUs; what it takes is taken from RAM.
    """

    index: int
    name: str
    kind: str
    uuid: str | None = None
    total: int | None = None
    free: int | None = None
    minor: int | None = None
    is_mig: bool = False
    shares_host_memory: bool = False
    utilization_percent: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    processes: tuple[DeviceProcess, ...] = ()

    @property
    def used(self) -> int | None:
        """Return what is taken, by whomever; None where that is not known."""
        return None if self.total is None or self.free is None else max(0, self.total - self.free)

    @property
    def label(self) -> str:
        """Return the name by which people are told of it.

        >>> Device(0, "NVIDIA H100", "CUDA").label
        'GPU 0'
        """
        return f"GPU {self.index}"


@dataclass(frozen=True, slots=True)
class HostMemory:
    """RAM. ``available`` is what could be had without swapping, ``limit`` the least cgroup limit above our models."""

    total: int
    available: int
    limit: int | None = None


def with_listed(
    devices: Sequence[Device], names: Sequence[str], labels: Sequence[str], sizes: Sequence[int]
) -> tuple[Device, ...]:
    """Return the devices with those that llama-server lists (``Vulkan0``) and nobody else has found, as the last.

    The same GPU may be known by another backend's name, so only what it lists more than were found is added.
    """
    first = max((device.index for device in devices), default=-1) + 1
    missing = list(zip(names, labels, sizes, strict=False))[len(devices) :]  # an older launcher tells names alone
    more = [
        Device(first + number, label, name.rstrip("0123456789"), total=size or None)
        for number, (name, label, size) in enumerate(missing)
    ]
    return (*devices, *more)


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything that was measured, at one moment. ``faults`` say what could not be measured, in sentences."""

    host: HostMemory
    devices: tuple[Device, ...] = ()
    faults: tuple[str, ...] = ()
