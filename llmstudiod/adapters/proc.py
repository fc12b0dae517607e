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
