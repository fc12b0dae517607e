"""``llmstudioctl top``: what the models do, as they do it; one picture where nobody looks at a terminal."""

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from typing import Any

from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.units import counted, format_bytes
from llmstudiod.ctl import show
from llmstudiod.ctl.client import Client
from llmstudiod.ctl.following import lasting_events

HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
ORDER = ("ready", "loading", "starting", "draining", "stopping", "failed", "stopped")


def command(client: Client, arguments: argparse.Namespace) -> int:
    """Show the picture once, or again and again until `q` or an interrupt."""
    if arguments.once or arguments.json or not show.has_screen():
        status, machine = client.get("status"), client.get("gpus")
        if arguments.json:
            print(json.dumps({"instances": status["instances"], "gpus": machine}, ensure_ascii=False, indent=2))
        else:
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            print("\n".join(picture({item["id"]: item for item in status["instances"]}, machine, 10_000, width)))
        return 0
    view = _View(client)
    with _screen() as woken:
        threading.Thread(target=view.follow, daemon=True).start()
        while view.error is None:
            view.draw()
            if _quits(woken, view.changed):
                return 0
    raise view.error


class _View:
    """What is shown: one thread follows the events, another one draws."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._instances: dict[str, Any] = {}
        self._machine: dict[str, Any] | None = client.get("gpus")
        self._is_lost = False
        self.error: LlmstudioError | None = None
        self.changed, self._wake = os.pipe()

    def follow(self) -> None:
        """Take the events until there are none any more, which is `error`."""
        try:
            for event in lasting_events(self._client, on_loss=self._lose):
                with self._lock:
                    is_new = self._take(event["data"]) or self._is_lost
                    self._is_lost = False
                if is_new:
                    os.write(self._wake, b".")
        except LlmstudioError as error:
            self.error = error
            os.write(self._wake, b".")

    def draw(self) -> None:
        """Draw it all, within the screen as it is now."""
        size = shutil.get_terminal_size()
        with self._lock:
            lines = picture(self._instances, self._machine, size.lines - 1, size.columns, is_lost=self._is_lost)
        sys.stdout.write(HOME + "".join(f"{line}{CLEAR_LINE}\n" for line in lines) + CLEAR_BELOW)
        sys.stdout.flush()

    def _lose(self) -> None:
        with self._lock:
            self._is_lost = True
        os.write(self._wake, b".")

    def _take(self, data: dict[str, Any]) -> bool:
        if "gpus" in data:
            self._machine = data
        elif "instances" in data:
            if "removed" not in data:
                self._instances.clear()
            self._instances |= {item["id"]: item for item in data["instances"]}
            for model in data.get("removed", ()):
                self._instances.pop(model, None)
        elif "recipe_id" in data and data["recipe_id"] in self._instances:
            self._instances[data["recipe_id"]] |= {"progress": data["progress"], "stage": data["message"]}
        else:
            return False
        return True


@contextlib.contextmanager
def _screen() -> Iterator[int]:
    """Take the terminal over: keys come at once and are not shown; what becomes readable tells of a new size."""
    keyboard = sys.stdin.fileno() if sys.stdin.isatty() else None
    before = termios.tcgetattr(keyboard) if keyboard is not None else None
    resized, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGWINCH, lambda *_: os.write(wake, b"."))
    sys.stdout.write(ENTER)
    try:
        if keyboard is not None:
            tty.setcbreak(keyboard)
        yield resized
    finally:
        signal.signal(signal.SIGWINCH, signal.SIG_DFL)
        if keyboard is not None and before is not None:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
        sys.stdout.write(LEAVE)
        sys.stdout.flush()


def _quits(*woken: int) -> bool:
    """Wait until there is something to draw; return whether somebody has typed `q` instead."""
    keyboard = [sys.stdin.fileno()] if sys.stdin.isatty() else []
    ready, _, _ = select.select([*woken, *keyboard], [], [])
    typed = b"".join(os.read(descriptor, 4096) for descriptor in ready if descriptor in keyboard)
    for descriptor in set(ready) - set(keyboard):
        os.read(descriptor, 4096)
    return b"q" in typed.lower()


def picture(
    instances: dict[str, Any],
    machine: dict[str, Any] | None,
    height: int,
    width: int | None = None,
    *,
    is_lost: bool = False,
) -> list[str]:
    """Return the lines: the devices, then the models, those that do something first. ``width`` None: of any length."""
    up = [item for item in instances.values() if item["state"] not in {"stopped", "failed"}]
    n_requests = sum(item["in_flight"] for item in up)
    lines = [f"llmstudiod: {counted(len(instances), 'model')}, {len(up)} loaded, {counted(n_requests, 'request')}"]
    if is_lost:
        lines[0] = "the daemon has ended the stream; waiting for the next one …"
    if machine is not None:
        lines += [_gpu_line(gpu) for gpu in machine["gpus"]]
        host = machine["host"]
        lines.append(_bar("RAM", host["memory_used"], host["memory_total"]))
    lines = [show.cut(line, width) for line in lines]
    rows = sorted(instances.values(), key=lambda item: (ORDER.index(item["state"]), item["id"]))
    room = max(1, height - len(lines) - 3)
    header = ("MODEL", "STATE", "SINCE", "REQUESTS", "TOKENS/S", "FIRST", "MEMORY", "")
    lines += ["", *show.table(header, [_row(item) for item in rows[:room]], state_column=1).split("\n")]
    if len(rows) > room:
        lines.append(f"and {len(rows) - room} more")
    return lines


def _row(item: dict[str, Any]) -> list[str]:
    measured = item["memory"]["measured"]
    return [
        item["id"],
        item["state"],
        show.ago(item["since"]) if item["state"] != "stopped" else "",
        f"{item['in_flight']}" + (f"+{item['queued']}" if item["queued"] else ""),
        "" if item["tokens_per_second"] is None else f"{item['tokens_per_second']:.1f}",
        "" if item["ttft_ms"] is None else f"{item['ttft_ms']:.0f} ms",
        format_bytes(measured) if measured else "",
        show.note(item),
    ]


def _gpu_line(gpu: dict[str, Any]) -> str:
    facts = [
        f"{gpu[name]:.0f} {unit}"
        for name, unit in (("utilization", "%"), ("temperature", "°C"), ("power_draw", "W"))
        if gpu[name] is not None
    ]
    return _bar(f"GPU {gpu['index']}", gpu["memory_used"], gpu["memory_total"]) + "  " + "  ".join(facts)


def _bar(name: str, used: int | None, total: int | None) -> str:
    if not total:
        return name
    filled = round(20 * (used or 0) / total)
    return f"{name:<6} ▕{'█' * filled}{' ' * (20 - filled)}▏ {format_bytes(used or 0)} of {format_bytes(total)}"
