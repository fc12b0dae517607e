"""How much RAM there is, how much of it could be had, and the limit that systemd sets above our models."""

import os
from pathlib import Path

from llmstudiod.core.devices import HostMemory
from llmstudiod.core.unit import SLICE

_OUR_SLICE = "/llmstudio.slice"


def read_host_memory(root: Path, *, models_are_units: bool) -> HostMemory:
    """Return what the kernel tells of RAM, and the least ``memory.max`` of the cgroups in which our models run.

    ``models_are_units``: they run in their slice; otherwise in the daemon's own cgroup.
    """
    total, available = _total_and_available()
    return HostMemory(total, available, cgroup_limit(root, models_are_units=models_are_units))


def _total_and_available() -> tuple[int, int]:
    import psutil  # 10 ms that a start need not wait for

    try:
        memory = psutil.virtual_memory()
    except (OSError, ValueError, KeyError, RuntimeError):  # /proc/meminfo is hidden, as ProcSubset=pid does
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    return memory.total, memory.available


def cgroup_limit(root: Path, *, models_are_units: bool) -> int | None:
    """Return the least limit on the way from the root to the models; None where there is none, or no cgroup v2."""
    own = _own_cgroup(root)
    if own is None:
        return None
    before, found, _ = own.partition(_OUR_SLICE)
    cgroup = f"{before}{_OUR_SLICE}/{SLICE}" if models_are_units and found else own
    path, limits = root / "sys/fs/cgroup", []
    for part in ("", *cgroup.split("/")):
        # Outside of a container's own tree the path begins with "..", where nothing can be read.
        path = path / part if part != ".." else path
        if (limit := _number(path / "memory.max")) is not None:
            limits.append(limit)
    return min(limits, default=None)


def _own_cgroup(root: Path) -> str | None:
    """Return the path of the daemon's cgroup. Source: cgroups(7), /proc/PID/cgroup; v2 is the line of hierarchy 0."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    return next((line[3:] for line in lines if line.startswith("0::")), None)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):  # ValueError: the word "max", which is no limit
        return None
