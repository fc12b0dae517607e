"""How much memory the machine has for models, and how much of it is free. Source: proc_meminfo(5)."""

import os
from pathlib import Path

from llmstudiod.core.ledger import Memory
from llmstudiod.core.placement import Room

RESERVED_RAM_BYTES = 1 << 30


def total_ram_bytes() -> int:
    """Return the RAM of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure_memory(at: float, *, meminfo: Path = Path("/proc/meminfo")) -> Memory | None:
    """Return what there is and what is free, less what is left to others; None where the kernel does not tell."""
    try:
        lines = meminfo.read_text("ascii").splitlines()
        values = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
        total, available = values["MemTotal"], values["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    reserved = min(RESERVED_RAM_BYTES, total // 8)
    return Memory(at, Room(total - reserved), Room(available - reserved))
