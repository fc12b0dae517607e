"""A bar on the terminal while a model is loaded, drawn from the daemon's events in a thread of its own."""

import contextlib
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
    if not sys.stderr.isatty():
        yield
        return
    is_over = threading.Event()
    threading.Thread(target=_draw, args=(client, model, is_over), daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        sys.stderr.write(CLEAR)
        sys.stderr.flush()


def _draw(client: Client, model: str, is_over: threading.Event) -> None:
    names = {model}
    with contextlib.suppress(LlmstudioError, OSError, ValueError):
        for event in client.events("events"):
            if is_over.is_set():
                return
            data = event["data"]
            if not isinstance(data, dict) or data.get("recipe_id") not in names or "stage" not in data:
                names |= {item["id"] for item in data.get("instances", ()) if model in (item["id"], item["name"])}
                continue
            sys.stderr.write(CLEAR + bar_line(data, shutil.get_terminal_size().columns))
            sys.stderr.flush()


def bar_line(data: dict[str, Any], columns: int) -> str:
    """Return a line that fits, such as ``tiny ▕██████      ▏  43 % loading tensors``."""
    share = data.get("progress")
    filled = round(CELLS * share) if share else 0
    told = f"{share:4.0%}" if share else "    "
    line = f"{data['recipe_id']} ▕{'█' * filled}{' ' * (CELLS - filled)}▏ {told} {data.get('message') or data['stage']}"
    return line[: max(10, columns - 1)]
