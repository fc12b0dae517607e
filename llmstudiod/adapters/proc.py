"""What /proc tells of a loading server: whether anything moves."""

from pathlib import Path


def progress_mark(pid: int) -> tuple[str, ...]:
    """Return a value that changes while a process takes memory or reads files; the same value twice: it stands still.

    Its CPU time does not count, or a server that spins for ever would look alive. Source: proc(5), statm and io.
    """
    marks = []
    for name in ("statm", "io"):
        try:
            marks.append(Path(f"/proc/{pid}/{name}").read_text("ascii"))
        except OSError:
            marks.append("")
    return tuple(marks)


def anonymous_bytes(pid: int) -> int | None:
    """Return the memory that a process has for itself, mapped files left out. Source: proc(5), status, RssAnon."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
