"""Who holds memory of a GPU: a process's name, and which model of ours it is, from /proc."""

import re
from collections.abc import Callable
from pathlib import Path

from llmstudiod.core.devices import DeviceProcess
from llmstudiod.core.unit import PREFIX

_UNIT = re.compile(rf"/{re.escape(PREFIX)}([^/\n]+)\.service(?:/|$)", re.MULTILINE)
_COMM_CHARS = 15
"""What the kernel keeps of a program's name. Source: proc_pid_comm(5), TASK_COMM_LEN."""


def describe_process(
    pid: int, used: int | None, *, root: Path, name_by_driver: Callable[[int], str | None]
) -> DeviceProcess:
    """Return who a process is. /proc may hide it, as another user's or another namespace's: then the driver is asked.

    A process that has ended meanwhile keeps its number for a name.
    """
    directory = root / "proc" / str(pid)
    name = _name(directory) or _plain((name_by_driver(pid) or "").rpartition("/")[2]) or f"pid {pid}"
    found = _UNIT.search(_text(directory / "cgroup"))
    return DeviceProcess(pid, name, used, found[1] if found else None)


def _name(directory: Path) -> str:
    """Return the program's name as ``ps`` shows it, and in full where the kernel has cut it off."""
    short = _text(directory / "comm").rstrip("\n")
    if len(short) == _COMM_CHARS:
        program = _text(directory / "cmdline").partition("\0")[0].rpartition("/")[2]
        short = program if program.startswith(short) else short
    return _plain(short)


def _plain(name: str) -> str:
    """Return a name that a terminal can be shown: programs choose theirs."""
    return "".join(char if char.isprintable() else "?" for char in name[:80])


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(4096)
    except OSError:
        return ""
