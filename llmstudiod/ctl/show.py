"""How answers look on a terminal: tables that fit it, colours only on one."""

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from llmstudiod.core.units import counted, format_bytes, format_duration

_LEAST = 10  # characters of a column
_NAME = 28  # of the first one, while another one has to give way
_COLOURS = {"ready": "32", "failed": "31", "loading": "33", "starting": "33", "draining": "33", "stopping": "33"}


def has_colours(stream: TextIO | None = None) -> bool:
    """Whether colours are wanted where something is printed: on a terminal that knows them, unless NO_COLOR."""
    return (stream or sys.stdout).isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def has_screen() -> bool:
    """Whether the cursor can be moved on what is printed to."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def coloured(text: str, state: str) -> str:
    """Return ``text`` in the colour of a state, where colours are wanted."""
    code = _COLOURS.get(state)
    return text if code is None or not has_colours() else f"\x1b[{code}m{text}\x1b[0m"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, state_column: int | None = None) -> str:
    """Return a table with aligned columns; on a terminal those that are empty are left out.

    On a narrow terminal a long first column gives way, then the last one, then the widest; and where that is not
    enough, the last ones are left out.
    """
    kept = list(range(len(header)))
    if sys.stdout.isatty() and rows:
        kept = [column for column in kept if any(row[column] for row in rows)]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in kept]
    if sys.stdout.isatty():
        widths = fitted(widths, shutil.get_terminal_size().columns)
    lines = []
    for number, row in enumerate((header, *rows)):
        told = [row[column] for column in kept[: len(widths)]]
        cells = [cut(cell, width).ljust(width) for cell, width in zip(told, widths, strict=True)]
        cells[-1] = cells[-1].rstrip()
        if number and state_column is not None and state_column in kept[: len(widths)]:
            place = kept.index(state_column)
            cells[place] = coloured(cells[place], row[state_column])
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def fitted(widths: Sequence[int], columns: int) -> list[int]:
    """Return the columns' widths so that all of them fit, two spaces apart; the last ones are left out if need be.

    >>> fitted([40, 8, 30], 80)
    [38, 8, 30]
    >>> fitted([40, 8, 90], 60)
    [28, 8, 20]
    >>> fitted([20, 8, 5, 8, 90], 40)
    [13, 8, 5, 8]
    >>> fitted([12, 7, 8, 8, 8, 8], 40)
    [11, 7, 8, 8]
    """
    found = list(widths)
    last = len(found) - 1
    for column, least in ((0, _NAME), (last, _LEAST)):
        found[column] = max(min(least, found[column]), found[column] - max(0, _excess(found, columns)))
    while len(found) > 1 and _excess(found, columns) > 0:
        longest = max(range(len(found)), key=found.__getitem__)
        if found[longest] - _excess(found, columns) >= _LEAST:
            found[longest] -= _excess(found, columns)
        else:
            found.pop()
    return found


def _excess(widths: Sequence[int], columns: int) -> int:
    return sum(widths) + 2 * (len(widths) - 1) - columns


def cut(text: str, width: int | None) -> str:
    """Return as much of a text as fits."""
    return text if width is None or len(text) <= width else text[: max(0, width - 1)] + "…"


def print_json(value: object) -> int:
    """Print an answer as JSON, a field a line; return the exit code."""
    print(json.dumps(value, ensure_ascii=False, indent=2))
    return 0


def tell_faults(faults: list[dict[str, Any]]) -> None:
    """Say on the standard error how many faults and warnings there are."""
    n_faults = sum(fault["severity"] == "fault" for fault in faults)
    told = [counted(n, word) for n, word in ((n_faults, "fault"), (len(faults) - n_faults, "warning")) if n]
    if told:
        print(f"\n{', '.join(told)}; `llmstudioctl check` tells them", file=sys.stderr)


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


def event_line(event: dict[str, Any]) -> str | None:
    """Return one line of ``llmstudioctl watch``, or None for what is told by another event."""
    data, at = event["data"], event["timestamp"][11:19]
    if "instances" in data:
        if "removed" in data:  # what has changed since, of which the transitions tell
            return None
        up = [f"{item['id']} ({item['state']})" for item in data["instances"] if item["state"] != "stopped"]
        return f"{at}  {', '.join(up) or 'no model is loaded'}"
    if "from" in data:
        hint = f" ({data['failure']['hint']})" if data.get("failure") and data["failure"]["hint"] else ""
        return f"{at}  {data['id']}: {coloured(data['to'], data['to'])}: {data['cause']}{hint}"
    if "warnings" in data:
        return f"{at}  {data['id']}: {'; '.join(data['warnings'])}"
    if "models" in data:
        return f"{at}  settings, recipes or keys have changed ({counted(data['models'], 'model')})"
    if data.get("stage") == "error" and data.get("kind"):
        hint = f" ({data['hint']})" if data["hint"] else ""
        return f"{at}  {data['recipe_id']}: {data['message']}{hint}"
    if data.get("stage") == "waiting" and data.get("progress"):
        return f"{at}  {data['recipe_id']}: {data['progress']:.0%} {data['message'] or ''}".rstrip()
    return None


def note(item: dict[str, Any]) -> str:
    """Return what is worth saying of an instance in a few words, and that it is pinned."""
    told = [*(["pinned"] if item["is_pinned"] else []), _note(item)]
    return ", ".join(filter(None, told))


def _note(item: dict[str, Any]) -> str:
    if item["state"] == "failed" or (item["is_refused"] and item["state"] == "stopped"):
        return str(item["reason"] or "")
    if item["state"] == "loading" and item["progress"]:
        return f"{item['progress']:.0%} {item['stage'] or ''}".rstrip()
    if item["alerts"]:
        return str(item["alerts"][0])
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
    field("pinned", "yes: it is neither evicted nor unloaded for idleness" if item["is_pinned"] else None)
    field("reason", item["reason"])
    field("hint", item["hint"] if item["reason"] else None)
    for name, text in _about_failure(item):
        field(name, text)
    for alert in item["alerts"]:
        field("warning", alert)
    if item["progress"]:
        field("progress", f"{item['progress']:.0%} {item['stage'] or ''}".rstrip())
    field("requests", f"{item['in_flight']} in flight, {item['queued']} waiting")
    if item["n_ctx"]:
        field("context", f"{item['n_ctx']} tokens a request, {counted(item['slots'], 'slot')}")
    told = [f"{count} {name if count != 1 else name[:-1]}" for name, count in item["totals"].items() if count]
    field("in all", ", ".join(told))
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


def _about_failure(item: dict[str, Any]) -> list[tuple[str, str]]:
    """Return when a failed model may be started again, and what lets it be started at once."""
    if item["state"] != "failed":
        return []
    again = f"`llmstudioctl reset {item['id']}` lets requests start it at once"
    if item["retry_at"] is None:
        return [("next try", f"none (restart: never); {again}")]
    load = f"`llmstudioctl load {item['id']}` now"
    if item["retry_at"] <= time.time():
        return [("next try", f"with the next request, or {load}")]
    told = [("next try", f"{clock(item['retry_at'])}, or {load}")]
    return [*told, ("failures", f"as many as restart_limit allows; {again}")] if item["is_exhausted"] else told
