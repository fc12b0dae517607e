"""A bar on the terminal while a model is loaded, drawn from the daemon's events in a thread of its own."""

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from typing import Any

from llmstudiod.core.errors import LlmstudioError
from llmstudiod.ctl.client import Client

CELLS = 24
CLEAR = "\r\x1b[K"


@contextlib.contextmanager
def load_progress(client: Client, model: str) -> Iterator[None]:
    """Show how far a model's load is, for as long as the block runs; on a terminal alone."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield
        return
    line = _Line()
    threading.Thread(target=_draw, args=(client, model, line), daemon=True).start()
    try:
        yield
    finally:
        line.end()


class _Line:
    """The terminal's last line: drawn in one thread, ended for good in another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # without it, a line that is just being drawn comes after the end
        self._is_over = False

    def draw(self, text: str) -> bool:
        """Show a text in place of the last one; return whether there is still a line to draw on."""
        with self._lock:
            if not self._is_over:
                sys.stderr.write(CLEAR + text)
                sys.stderr.flush()
            return not self._is_over

    def end(self) -> None:
        """Clear the line, and leave it to others."""
        with self._lock:
            self._is_over = True
            sys.stderr.write(CLEAR)
            sys.stderr.flush()


def _draw(client: Client, model: str, line: _Line) -> None:
    names = {model}
    with contextlib.suppress(LlmstudioError, OSError, ValueError):
        for event in client.events("events"):
            data = event["data"]
            if not isinstance(data, dict) or data.get("recipe_id") not in names or "stage" not in data:
                names |= {item["id"] for item in data.get("instances", ()) if model in (item["id"], item["name"])}
                continue
            if not line.draw(bar_line(data, shutil.get_terminal_size().columns)):
                return


def bar_line(data: dict[str, Any], columns: int) -> str:
    """Return a line that fits, such as ``tiny ▕██████      ▏  43 % loading tensors``."""
    share = data.get("progress")
    filled = round(CELLS * share) if share else 0
    told = f"{share:4.0%}" if share else "    "
    line = f"{data['recipe_id']} ▕{'█' * filled}{' ' * (CELLS - filled)}▏ {told} {data.get('message') or data['stage']}"
    return line[: max(10, columns - 1)]
