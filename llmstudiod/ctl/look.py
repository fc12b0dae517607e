"""``llmstudioctl list``, ``status``, ``watch`` and the like: what looks, and changes nothing."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from llmstudiod import __version__
from llmstudiod.core.errors import DaemonUnreachableError, LlmstudioError
from llmstudiod.ctl import show
from llmstudiod.ctl.client import AnswerError, Client
from llmstudiod.ctl.following import lasting_events, lasting_lines, tell_loss
from llmstudiod.ctl.show import print_json, tell_faults


def listing(client: Client, arguments: argparse.Namespace) -> int:
    """List the models."""
    status = client.get("status")
    if arguments.json:
        return print_json(status["instances"])
    if status["instances"]:
        header = ("MODEL", "STATE", "SINCE", "REQUESTS", "CONTEXT", "")
        print(show.table(header, show.model_rows(status["instances"]), state_column=1))
    else:
        print(_where_models_go(client))
    tell_faults(status["faults"])
    return 0


def _where_models_go(client: Client) -> str:
    try:
        settings = client.get("config")["settings"]
    except AnswerError:  # with open_status everybody may list, and not more
        return "no models yet"
    places = f"a GGUF into {settings['model_dirs'][0]}" if settings["model_dirs"] else "a recipe there"
    return f"no models yet: put {places}, or a recipe into {settings['recipes_dir']};\nit is noticed within ten seconds"


def status(client: Client, arguments: argparse.Namespace) -> int:
    """Show the daemon, or one model with its story."""
    if arguments.model:
        item = client.get("instances", arguments.model)
        if arguments.json:
            return print_json(item)
        print(show.status_text(item))
        return 0
    status = client.get("status")
    if arguments.json:
        return print_json(status)
    binary = status["llama_server"]
    port = f"port {status['inference_port']}"
    if status["inference_port"] is None:
        port = "no endpoint (`systemctl status llmstudiod.socket` tells why)"
    print(f"llmstudiod {status['version']}, {port}, launcher {status['launcher']}")
    if "error" in binary:
        print(f"llama-server: {binary['error']}")
        if binary["hint"]:
            print(f"hint: {binary['hint']}")
    else:
        print(f"llama-server {binary['version']} ({shlex.join(binary['command'])}, from {binary['source']})")
        print(f"devices: {', '.join(binary['devices']) or 'CPU only'}")
    print()
    return listing(client, arguments)


def watch(client: Client, arguments: argparse.Namespace) -> int:
    """Print what happens, as it happens."""
    for event in lasting_events(client, on_loss=tell_loss):
        if arguments.json:
            print(json.dumps(event, ensure_ascii=False), flush=True)
        elif line := show.event_line(event):
            print(line, flush=True)
    return 0


def logs(client: Client, arguments: argparse.Namespace) -> int:
    """Show a model's log."""
    if not arguments.follow:
        answer = client.get("logs", arguments.model)
        lines = answer["logs"][-arguments.lines :] if arguments.lines > 0 else []
        if arguments.json:
            return print_json({**answer, "logs": lines, "content": "\n".join(lines)})
        for line in lines:
            print(line)
        if not answer["logs"]:
            print(f"'{answer['id']}' has no log: it has not been started, or its log is gone", file=sys.stderr)
        return 0
    for event in lasting_lines(client, arguments.model, limit=max(0, arguments.lines), on_loss=tell_loss):
        line = json.dumps(event, ensure_ascii=False) if arguments.json else event["data"]["line"]
        print(line, flush=True)
    return 0


def check(client: Client, arguments: argparse.Namespace) -> int:
    """Tell what is wrong with files, or with what is loaded."""
    faults = _check_files(arguments.file) if arguments.file else _check_daemon(client)
    is_faulty = any(fault["severity"] == "fault" for fault in faults)
    if arguments.json:
        print_json(faults)
    else:
        for fault in faults:
            place = ":".join(str(part) for part in (fault["file"], fault["line"]) if part)
            word = "warning: " if fault["severity"] == "warning" else ""
            key = f"{fault['key']}: " if fault["key"] else ""
            print(f"{place}: {word}{key}{fault['message']}" if place else f"{word}{key}{fault['message']}")
            if fault["hint"]:
                print(f"    hint: {fault['hint']}")
        print("faults were found" if is_faulty else "no faults", file=sys.stderr)
    return 3 if is_faulty else 0


def _check_files(files: list[Path]) -> list[dict[str, Any]]:
    """Check files as the one who asks, with or without a daemon."""
    from llmstudiod.ctl.check import check_files  # slow to import, and needed here alone

    return [
        {name: getattr(note, name) for name in ("file", "line", "key", "message", "hint")}
        | {"severity": str(note.severity)}
        for note in check_files(files)
    ]


def _check_daemon(client: Client) -> list[dict[str, Any]]:
    """Return the faults of what is loaded, and whatever keeps each model from being started."""
    faults = list(client.get("status")["faults"])
    for recipe in client.get("recipes"):
        faults += recipe["warnings"]
        try:
            client.get("explain", recipe["id"])
        except DaemonUnreachableError:
            raise
        except AnswerError as error:
            place = {"file": recipe["file"] or recipe["model_path"], "line": None, "key": recipe["id"]}
            faults.append({**place, "message": error.message, "hint": error.hint, "severity": "fault"})
    return faults


def version(client: Client, arguments: argparse.Namespace) -> int:
    """Show the versions of the programs."""
    versions: dict[str, Any] = {"llmstudioctl": __version__, "llmstudiod": None, "llama_server": None}
    why_not = dict.fromkeys(versions, "not reachable")
    try:
        told = client.get("status")
        versions |= {"llmstudiod": told["version"], "llama_server": told["llama_server"].get("version")}
        why_not["llama_server"] = "not found"
    except LlmstudioError as error:  # the version of this program can be told without a daemon
        if getattr(error, "answer_kind", error.kind) == "access_denied":
            why_not = dict.fromkeys(versions, "you may not ask")
    if arguments.json:
        return print_json(versions)
    for name, version in versions.items():
        print(f"{name} {version or why_not[name]}")
    return 0
