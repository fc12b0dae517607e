"""``llmstudioctl gpus``: the GPUs with what is free, who uses them, and RAM."""

import argparse
import json
import sys
from typing import Any

from llmstudiod.core.units import format_bytes
from llmstudiod.ctl import show
from llmstudiod.ctl.client import Client

_BAR_CELLS = 10


def command(client: Client, arguments: argparse.Namespace) -> int:
    """Show what the daemon measures now."""
    answer = client.get("gpus")
    if arguments.json:
        print(json.dumps(answer, ensure_ascii=False, indent=2))
        return 0
    print(gpus_text(answer, with_bars=sys.stdout.isatty()))
    for fault in answer["faults"]:
        print(f"\n{fault}", file=sys.stderr)
    return 0


def gpus_text(answer: dict[str, Any], *, with_bars: bool) -> str:
    """Return the table, below each GPU its processes, and a line for RAM."""
    gpus, host = answer["gpus"], answer["host"]
    lines = ["no GPU was found"]
    if gpus:
        header = ("GPU", "NAME", "MEMORY", *(("",) if with_bars else ()), "UTIL", "TEMP", "POWER")
        head, *rows = show.table(header, [_row(gpu, with_bars=with_bars) for gpu in gpus]).split("\n")
        lines = [head]
        for gpu, row in zip(gpus, rows, strict=True):
            lines += [row, *(f"     {_process(process)}" for process in gpu["processes"])]
            lines += [f"     {_promise(each)}" for each in gpu["promised"]]
    lines += ["", _ram(host, with_bars=with_bars)]
    return "\n".join(lines)


def _row(gpu: dict[str, Any], *, with_bars: bool) -> list[str]:
    draw, limit = gpu["power_draw"], gpu["power_limit"]
    power = "" if draw is None else f"{draw:.0f} W" if limit is None else f"{draw:.0f} of {limit:.0f} W"
    return [
        str(gpu["index"]),
        gpu["name"] + (" (shares RAM)" if gpu["shares_host_memory"] else ""),
        _memory(gpu),
        *([_bar(gpu["memory_used"], gpu["memory_total"])] if with_bars else []),
        _with_unit(gpu["utilization"], "%"),
        _with_unit(gpu["temperature"], " °C"),
        power,
    ]


def _memory(gpu: dict[str, Any]) -> str:
    if gpu["memory_total"] is None:
        return "not known"
    used = "?" if gpu["memory_used"] is None else format_bytes(gpu["memory_used"])
    return f"{used} / {format_bytes(gpu['memory_total'])}"


def _ram(host: dict[str, Any], *, with_bars: bool) -> str:
    bar = f"  {_bar(host['memory_used'], host['memory_total'])}" if with_bars else ""
    limit = "" if host["memory_limit"] is None else f"; models may use {format_bytes(host['memory_limit'])} in all"
    used, total = format_bytes(host["memory_used"]), format_bytes(host["memory_total"])
    return f"RAM  {used} / {total}{bar}, {format_bytes(host['memory_available'])} available{limit}"


def _promise(each: dict[str, Any]) -> str:
    """Return what a model was promised, whatever it has taken of that yet."""
    return f"promised to {each['id']} ({each['state']}): {format_bytes(each['memory'])}, {each['layers']} layers"


def _process(process: dict[str, Any]) -> str:
    """Return who holds how much of a GPU."""
    held = "" if process["memory_used"] is None else f", {format_bytes(process['memory_used'])}"
    if process["model"] is not None:
        return f"model {process['model']}, pid {process['pid']}{held}"
    number = f"pid {process['pid']}"
    who = number if process["name"] == number else f"{process['name']}, {number}"
    return f"{who}{held}, not ours"


def _with_unit(value: int | None, unit: str) -> str:
    return "" if value is None else f"{value}{unit}"


def _bar(used: int | None, total: int | None) -> str:
    """Return how full something is.

    >>> _bar(3, 10)
    '███░░░░░░░'
    """
    if used is None or not total:
        return ""
    full = min(_BAR_CELLS, round(_BAR_CELLS * used / total))
    return "█" * full + "░" * (_BAR_CELLS - full)
