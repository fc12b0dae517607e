"""What /proc tells of a server: whether anything moves, and how far its load is."""

import os
from dataclasses import dataclass
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Pulse:
    """A process at one moment. ``mark`` is another one whenever it has taken or touched memory, or read a file.

    ``resident`` in bytes, mapped files included; ``cpu_s`` in seconds; both None where the process is not to be seen.
    """

    mark: tuple[str, ...] = ()
    resident: int | None = None
    cpu_s: float | None = None
    is_stopped: bool = False


def pulse(pid: int) -> Pulse:
    """Return what can be seen of a process. Source: proc(5): statm, io, stat.

    ``io`` is for its own user and root alone, so of a model's unit only memory and page faults are seen. CPU time is no
    part of the mark, or a server that spins for ever would look alive while it loads.
    """
    statm, io, stat = (_read(pid, name) for name in ("statm", "io", "stat"))
    resident = cpu_s = None
    is_stopped = False
    faults = ""
    try:
        resident = int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")
        fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
        is_stopped = fields[0] in {"T", "t"}
        faults = f"{fields[7]} {fields[9]}"
        cpu_s = (int(fields[11]) + int(fields[12])) * _TICK_S
    except (IndexError, ValueError):
        pass
    return Pulse((statm, io, faults), resident, cpu_s, is_stopped)


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text("ascii", errors="replace")
    except OSError:
        return ""


def anonymous_bytes(pid: int) -> int | None:
    """Return the memory that a process has for itself, mapped files left out. Source: proc(5), status, RssAnon."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
