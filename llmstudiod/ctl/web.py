"""``llmstudioctl web``: the page's address with a one-time code, opened where there is a desktop."""

import argparse
import json
import os
import shutil
import subprocess
import sys

from llmstudiod.core.errors import UnavailableError
from llmstudiod.ctl.client import Client


def command(client: Client, arguments: argparse.Namespace) -> int:
    """Print the address, and open it on a desktop; or end all sessions."""
    if arguments.sign_out:
        told = client.post("web", "sign-out")
        print(json.dumps(told) if arguments.json else told["message"])
        return 0
    answer = client.post("web", "code")
    if not answer["urls"]:
        raise UnavailableError("the endpoint has no port", hint="`systemctl status llmstudiod.socket` tells why")
    if arguments.json:
        print(json.dumps(answer))
        return 0
    url = answer["urls"][0]
    print(url)
    print("it signs in once, within ten minutes", file=sys.stderr)
    if os.environ.get("SSH_CONNECTION"):
        port = url.split(":")[2].split("/")[0]
        print(f"from another machine: ssh -L {port}:localhost:{port} {os.uname().nodename}", file=sys.stderr)
    elif not arguments.no_open and _has_desktop() and (opener := shutil.which("xdg-open")):
        subprocess.Popen([opener, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    return 0


def _has_desktop() -> bool:
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")) and os.geteuid() != 0
