"""How answers look on a terminal: tables that fit it, colours only on one."""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from llmstudiod.core.units import format_bytes, format_duration

_COLOURS = {"ready": "32", "failed": "31", "loading": "33", "starting": "33", "draining": "33", "stopping": "33"}


def coloured(text: str, state: str) -> str:
    """Return ``text`` in the colour of a state, where colours are wanted."""
    code = _COLOURS.get(state)
    if code is None or not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, state_column: int | None = None) -> str:
    """Return a table with aligned columns; the last column gives way when the terminal is narrow."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    if sys.stdout.isatty():
        room = shutil.get_terminal_size().columns - sum(width + 2 for width in widths[:-1])
        widths[-1] = max(10, min(widths[-1], room))
    lines = []
    for number, row in enumerate((header, *rows)):
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)]
        if number and state_column is not None:
            cells[state_column] = coloured(cells[state_column], row[state_column])
        last = row[-1] if len(row[-1]) <= widths[-1] else row[-1][: widths[-1] - 1] + "…"
        lines.append("  ".join([*cells, last]).rstrip())
    return "\n".join(lines)


def memory_table(estimate: dict[str, Any]) -> str:
    """Return the terms of an estimate as a table: a column for each GPU and one for RAM."""
    host, devices = estimate["host"], estimate["devices"]
    names = [f"GPU {n}" if len(devices) > 1 else "GPU" for n in range(len(devices))]
    terms = [("weights", "weights"), ("KV cache", "kv"), ("buffers", "compute"), ("runtime", "runtime")]
    rows = [(name, [*(share[term] for share in devices), host[term]]) for name, term in terms]
    if host["repacked"]:
        rows.insert(1, ("weights in the CPU's order", [0] * len(devices) + [host["repacked"]]))
    cells = [[name, *(format_bytes(value) if value else "" for value in values)] for name, values in rows]
    cells.append(["total", *(format_bytes(share["total"]) for share in (*devices, host))])
    return table(["", *names, "RAM"], cells)


def model_rows(instances: list[dict[str, Any]]) -> list[list[str]]:
    """Return the rows of ``llmstudioctl list``."""
    return [
        [
            item["id"],
            item["state"],
            ago(item["since"]),
            f"{item['in_flight']}" + (f"+{item['queued']}" if item["queued"] else ""),
            "" if item["n_ctx"] is None else f"{item['slots']}x{item['n_ctx']}",
            note(item),
        ]
        for item in instances
    ]


def note(item: dict[str, Any]) -> str:
    """Return what is worth saying of an instance in a few words."""
    if item["state"] == "failed":
        return str(item["reason"] or "")
    if item["is_stale"]:
        return "its recipe changed; replaced when idle"
    if item["state"] in {"draining", "stopping"}:
        return str(item["reason"] or "")
    return str(item["unit"] or "")


def ago(since: float) -> str:
    """Return how long ago a moment was."""
    return format_duration(max(1.0, time.time() - since))


def clock(at: float) -> str:
    """Return a moment as people read it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def status_text(item: dict[str, Any]) -> str:
    """Return ``llmstudioctl status MODEL``."""
    lines = [f"{coloured('●', item['state'])} {item['id']} - {item['name']}"]

    def field(name: str, value: object) -> None:
        if value not in (None, "", []):
            lines.append(f"{name:>12}: {value}")

    field("state", f"{item['state']} since {clock(item['since'])} ({ago(item['since'])} ago)")
    field("reason", item["reason"])
    field("hint", item["hint"] if item["reason"] else None)
    if item["retry_at"]:
        field("next try", f"{clock(item['retry_at'])}, or `llmstudioctl load {item['id']}` now")
    field("requests", f"{item['in_flight']} in flight, {item['queued']} waiting")
    if item["n_ctx"]:
        field("context", f"{item['n_ctx']} tokens a request, {item['slots']} slots")
    measured, estimated = item["memory"]["measured"], item["memory"]["estimated"]
    if measured is not None:
        field(
            "memory",
            f"{format_bytes(measured)} of RAM" + (f", {format_bytes(estimated)} estimated" if estimated else ""),
        )
    for gpu in item.get("devices", ()):
        has = format_bytes(gpu["measured"]) if gpu["measured"] is not None else "not told"
        name = f"GPU {gpu['index']}" if gpu["index"] is not None else gpu["uuid"]
        field(name, f"{gpu['layers']} layers, {has}, {format_bytes(gpu['estimated'])} estimated")
    field("unit", f"{item['unit']} (pid {item['pid']})" if item["unit"] else None)
    field("socket", item["socket"] if item["unit"] else None)
    field("sandbox", f"relaxed: {', '.join(item['sandbox'])}" if item.get("sandbox") else None)
    for text in (*item["notes"], *item["warnings"]):
        field("note", text)
    if item["last_lines"]:
        lines += ["", "last lines:", *(f"  {line}" for line in item["last_lines"][-12:])]
    lines += ["", "story:"]
    lines += [f"  {clock(step['at'])}  {step['from']} -> {step['to']}: {step['cause']}" for step in item["story"]]
    return "\n".join(lines)
