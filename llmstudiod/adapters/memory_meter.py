"""What the scheduler plans with: the memory that the machine has for models, and how much of it is free.

Read before every start, and so without psutil, whose import alone takes 30 ms of the first one.
"""

import os
from pathlib import Path

from llmstudiod.adapters.host_memory import cgroup_limit
from llmstudiod.core.ledger import Memory
from llmstudiod.core.placement import Room
from llmstudiod.core.sharing import RESERVED


def total_ram_bytes() -> int:
    """Return the RAM of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure_memory(
    at: float, *, models_are_units: bool, reserved: int = RESERVED["ram"], root: Path = Path("/")
) -> Memory | None:
    """Return what there is and what is free, less what is left to others; None where the kernel does not tell.

    Source: proc_meminfo(5). A limit that systemd or a container sets above the models counts as what there is.
    """
    try:
        lines = (root / "proc/meminfo").read_text("ascii").splitlines()
        values = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
        total, available = values["MemTotal"], values["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    limit = cgroup_limit(root, models_are_units=models_are_units)
    if limit is not None:
        total, available = min(total, limit), min(available, limit)
    if reserved == RESERVED["ram"]:  # nobody has said otherwise, and it would be too much of a small machine
        reserved = min(reserved, total // 8)
    return Memory(at, Room(total - reserved), Room(available - reserved))
