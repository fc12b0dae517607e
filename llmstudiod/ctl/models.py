"""``llmstudioctl load``, ``unload`` and the like: what changes the state of models."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from llmstudiod.core.errors import BadRequestError
from llmstudiod.ctl.client import Client
from llmstudiod.ctl.progress import load_progress
from llmstudiod.ctl.show import print_json, tell_faults


def load(client: Client, arguments: argparse.Namespace) -> int:
    """Load a model, and wait until it is ready."""
    if arguments.no_wait:
        answer = client.post("launch", arguments.model, query="wait=false")
    else:
        with _going_on(arguments.model), load_progress(client, arguments.model):
            answer = client.post("launch", arguments.model)
    if arguments.json:
        return print_json(answer)
    print(answer["message"])
    return 0


def unload(client: Client, arguments: argparse.Namespace) -> int:
    """Unload a model, or all of them."""
    if bool(arguments.model) == arguments.all:
        raise BadRequestError("unload: expected either a model or --all", hint="`llmstudioctl list` lists the models")
    query = "force=true" if arguments.force else ""
    answer = client.post(*(("evict",) if arguments.all else ("evict", arguments.model)), query=query)
    if arguments.json:
        return print_json(answer)
    names = answer.get("evicted", [arguments.model]) if arguments.all else [arguments.model]
    if not arguments.all and answer["evicted_pid"] is None:
        names = []
    print(f"unloaded: {', '.join(names) or 'nothing was loaded'}")
    return 0


def restart(client: Client, arguments: argparse.Namespace) -> int:
    """Unload a model, and load it again."""
    with _going_on(arguments.model), load_progress(client, arguments.model):
        answer = client.post("instances", arguments.model, "restart")
    return _told(answer, arguments)


def pin(client: Client, arguments: argparse.Namespace) -> int:
    """Keep a model loaded."""
    return _told(client.post("instances", arguments.model, "pin"), arguments)


def unpin(client: Client, arguments: argparse.Namespace) -> int:
    """Let a model that was pinned go again."""
    return _told(client.post("instances", arguments.model, "unpin"), arguments)


def reload(client: Client, arguments: argparse.Namespace) -> int:
    """Have settings, recipes and keys read again."""
    answer = client.post("reload")
    if arguments.json:
        return print_json(answer)
    print(answer["message"])
    tell_faults(answer["faults"])
    return 3 if any(fault["severity"] == "fault" for fault in answer["faults"]) else 0


def cancel(client: Client, arguments: argparse.Namespace) -> int:
    """Give the load of a model up."""
    return _told(client.post("launch", arguments.model, "cancel"), arguments)


def reset(client: Client, arguments: argparse.Namespace) -> int:
    """Let a model that failed be started again."""
    return _told(client.post("instances", arguments.model, "reset"), arguments)


@contextlib.contextmanager
def _going_on(model: str) -> Iterator[None]:
    """Say what becomes of a load that is not waited for any more."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nthe load of '{model}' goes on; `llmstudioctl cancel {model}` gives it up", file=sys.stderr)
        raise


def _told(answer: dict[str, Any], arguments: argparse.Namespace) -> int:
    if arguments.json:
        return print_json(answer)
    print(answer["message"])
    return 0
