"""``llmstudioctl top``: what the models do, as they do it; one picture where nobody looks at a terminal."""

import argparse
import json
import shutil
import sys
from typing import Any

from llmstudiod.core.units import counted, format_bytes
from llmstudiod.ctl import show
from llmstudiod.ctl.client import Client

HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
ORDER = ("ready", "loading", "starting", "draining", "stopping", "failed", "stopped")


def command(client: Client, arguments: argparse.Namespace) -> int:
    """Show the picture once, or again and again until interrupted."""
    if arguments.once or arguments.json or not sys.stdout.isatty():
        status, machine = client.get("status"), client.get("gpus")
        if arguments.json:
            print(json.dumps({"instances": status["instances"], "gpus": machine}, ensure_ascii=False, indent=2))
        else:
            print("\n".join(picture({item["id"]: item for item in status["instances"]}, machine, 10_000)))
        return 0
    sys.stdout.write(ENTER)
    try:
        _watch(client)
    finally:
        sys.stdout.write(LEAVE)
        sys.stdout.flush()
    print("the daemon has ended the stream", file=sys.stderr)
    return 8


def _watch(client: Client) -> None:
    instances: dict[str, Any] = {}
    machine: dict[str, Any] | None = client.get("gpus")
    for event in client.events("events"):
        data = event["data"]
        if "gpus" in data:
            machine = data
        elif "instances" in data:
            if "removed" not in data:
                instances.clear()
            instances |= {item["id"]: item for item in data["instances"]}
            for model in data.get("removed", ()):
                instances.pop(model, None)
        elif "recipe_id" in data and data["recipe_id"] in instances:
            instances[data["recipe_id"]] |= {"progress": data["progress"], "stage": data["message"]}
        else:
            continue
        lines = picture(instances, machine, shutil.get_terminal_size().lines - 1)
        sys.stdout.write(HOME + "".join(f"{line}{CLEAR_LINE}\n" for line in lines) + CLEAR_BELOW)
        sys.stdout.flush()


def picture(instances: dict[str, Any], machine: dict[str, Any] | None, height: int) -> list[str]:
    """Return the lines: the devices, then the models, those that do something first."""
    up = [item for item in instances.values() if item["state"] not in {"stopped", "failed"}]
    n_requests = sum(item["in_flight"] for item in up)
    lines = [f"llmstudiod: {counted(len(instances), 'model')}, {len(up)} loaded, {counted(n_requests, 'request')}"]
    if machine is not None:
        lines += [_gpu_line(gpu) for gpu in machine["gpus"]]
        host = machine["host"]
        lines.append(_bar("RAM", host["memory_used"], host["memory_total"]))
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
