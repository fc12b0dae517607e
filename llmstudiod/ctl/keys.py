"""``llmstudioctl key``: make, list and revoke the endpoint's API keys."""

import argparse
import json
import sys
import time
from typing import Any

from llmstudiod.ctl import show
from llmstudiod.ctl.client import Client


def add(client: Client, arguments: argparse.Namespace) -> int:
    """Make a key and tell its secret, once."""
    wanted: dict[str, Any] = {
        "name": arguments.name,
        "admin": arguments.admin,
        "metrics": arguments.metrics,
        "models": None if arguments.models is None else [name for part in arguments.models for name in part.split(",")],
        "expires": arguments.expires,
    }
    key = client.post("keys", body=wanted)
    for warning in key["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(key, ensure_ascii=False, indent=2))
        return 0
    print(key["secret"])
    print("this is the key; it is shown this once, and only its hash is kept", file=sys.stderr)
    return 0


def listing(client: Client, arguments: argparse.Namespace) -> int:
    """List the keys, without their secrets."""
    keys = client.get("keys")["keys"]
    if arguments.json:
        print(json.dumps(keys, ensure_ascii=False, indent=2))
    elif keys:
        header = ("NAME", "MAY", "CREATED", "LAST MODEL USE", "EXPIRES", "MODELS")
        print(show.table(header, [_row(key) for key in keys]))
    else:
        print("no keys: the endpoint is open to the programs of this machine")
    return 0


def revoke(client: Client, arguments: argparse.Namespace) -> int:
    """Take a key away; requests that come later are refused."""
    answer = client.delete("keys", arguments.name)
    for warning in answer["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(json.dumps(answer) if arguments.json else f"'{arguments.name}' is revoked")
    return 0


def _row(key: dict[str, Any]) -> list[str]:
    rights = ["use", *(right for right in ("admin", "metrics") if key[right])]
    expires = "never" if key["expires"] is None else _date(key["expires"])
    if key["expires"] is not None and key["expires"] <= time.time():
        expires += " (over)"
    used = "never" if key["last_used"] is None else f"{show.ago(key['last_used'])} ago"
    return [key["name"], ",".join(rights), _date(key["created"]), used, expires, ", ".join(key["models"] or ["all"])]


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(at))
