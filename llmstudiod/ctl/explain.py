"""``llmstudioctl explain``: where a model would go, who would go for it, the sum, and the command line."""

import argparse
import json
import shlex
from typing import Any

from llmstudiod.core.units import counted, format_bytes
from llmstudiod.ctl import show
from llmstudiod.ctl.client import Client


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("model")
    parser.add_argument("--dry-run", action="store_true", help="let llama-server itself tell what it would need")


def command(client: Client, arguments: argparse.Namespace) -> int:
    """Ask the daemon, and show it."""
    plan = client.get("explain", arguments.model, query="dry_run=true" if arguments.dry_run else "")
    if arguments.json:
        print(json.dumps(plan, ensure_ascii=False, indent=2))
        return 0
    print(explain_text(plan))
    return 0


def explain_text(plan: dict[str, Any]) -> str:
    """Return the plan as people read it."""
    recipe, found = plan["recipe"], plan["placement"]
    lines = [
        f"{recipe['id']}: {recipe['model_path']}",
        f"recipe: {recipe['file'] or 'none (served with defaults)'}",
        f"context: {counted(plan['n_parallel'], 'slot')} of {plan['n_ctx']} tokens, {plan['n_ctx_total']} in all",
    ]
    place = found["place"] if found else None
    notes = [*plan["notes"], *(place["notes"] if place else [])]
    lines += [f"note: {note}" for note in notes]
    if found:
        lines += ["", *_placement(found)]
    estimate = place["estimate"] if place else plan["estimate"]
    if estimate:
        where = "" if place else ", with everything on the CPU"
        source = found["source"] if found else "the estimate"
        lines += ["", f"memory that it needs{where} (by {source}):", show.memory_table(estimate)]
        if estimate["prompt_cache"]:
            size = format_bytes(estimate["prompt_cache"])
            lines.append(f"and up to {size} of RAM for prompts of the past (cache_ram)")
    if found:
        lines += ["", "memory of this machine:", _account(found["memory"])]
    lines += ["", f"llama-server: {plan['llama_server']['version']}, from {plan['llama_server']['source']}"]
    environment = " ".join(f"{name}={shlex.quote(value)}" for name, value in plan["environment"].items())
    lines += ["", "command:", f"  {environment} {shlex.join(plan['argv'])}"]
    if plan["systemd_run"]:
        lines += ["", "unit:", f"  {shlex.join(plan['systemd_run'])}"]
    return "\n".join(lines)


def _placement(found: dict[str, Any]) -> list[str]:
    place = found["place"]
    if not found["is_planned"]:
        return ["placement: not planned, llama-server finds its place itself"]
    if found["error"]:
        return [f"placement: {found['error']}", f"hint: {found['hint']}"]
    if place is None and found["is_running"]:
        return ["placement: it runs, and where it lies is not known"]
    if place is None:
        return [f"placement: none yet, it would wait for {_names(found['waits_for']) or 'others'}"]
    parts = [f"{gpu['name']} ({gpu['layers']} layers, {format_bytes(gpu['memory'])})" for gpu in place["gpus"]]
    where = ", ".join(parts) or "the CPU"
    lines = [f"placement: {'it runs on' if found['is_running'] else 'it would go to'} {where}"]
    if found["evicts"]:
        lines.append(f"evicts: {_names(found['evicts'])}")
    return lines


def _names(models: list[str]) -> str:
    return ", ".join(models)


def _account(memory: list[dict[str, Any]]) -> str:
    """Return the table of who holds what."""
    rows = [
        [
            each["name"],
            format_bytes(each["total"]),
            format_bytes(each["free"]),
            format_bytes(each["others"]),
            ", ".join(f"{model['id']} {format_bytes(model['memory'])}" for model in each["models"]),
        ]
        for each in memory
    ]
    return show.table(("", "FOR MODELS", "FREE", "OTHERS USE", "PROMISED TO"), rows)
