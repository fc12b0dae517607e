"""llmstudio-launcher: takes one request a connection from its socket, and leaves when there was none for a minute.

systemd starts it with its listening socket, which only the daemon's user may open; who connects is asked again here.
"""

import json
import logging
import os
import pwd
import select
import socket
import struct
import sys
import threading
from pathlib import Path
from typing import Any

from llmstudiod.core.errors import AccessDeniedError, BadRequestError, LlmstudioError
from llmstudiod.core.launcher_protocol import MAX_REQUEST_BYTES, parse_request
from llmstudiod.core.settings import DEFAULT_FILE
from llmstudiod.privileged.store import Store
from llmstudiod.privileged.units import Units

IDLE_S = 60.0
READ_TIMEOUT_S = 10.0
MAX_AT_ONCE = 64
DAEMON_USER = "llmstudio"
FIRST_FD = 3  # sd_listen_fds(3)

logger = logging.getLogger("llmstudio-launcher")


def serve(listener: socket.socket, units: Units, *, uids: frozenset[int], idle_s: float = IDLE_S) -> None:
    """Answer requests, each in a thread of its own; return when nothing was asked for ``idle_s``."""
    threads: list[threading.Thread] = []
    while True:
        is_asked, _, _ = select.select([listener], [], [], idle_s)
        threads = [thread for thread in threads if thread.is_alive()]
        if not is_asked and not threads:
            return  # a connection that comes now waits in the socket, and systemd starts us again
        if not is_asked:
            continue
        connection, _ = listener.accept()
        if len(threads) >= MAX_AT_ONCE:
            threads[0].join()
        thread = threading.Thread(target=_answer, args=(connection, units, uids), daemon=True)
        thread.start()
        threads.append(thread)


def _answer(connection: socket.socket, units: Units, uids: frozenset[int]) -> None:
    with connection:
        connection.settimeout(READ_TIMEOUT_S)
        try:
            answer = _performed(connection, units, uids)
        except LlmstudioError as error:
            logger.info("refused or failed: %s", error.message)
            told = {"kind": error.kind, "message": error.message, "hint": error.hint, "details": error.details}
            answer = {"error": told}
        except OSError as error:
            answer = {"error": {"kind": "launcher", "message": str(error), "hint": None, "details": {}}}
        except Exception:  # a bug must not take the others' requests down
            logger.exception("internal error")
            answer = {"error": {"kind": "internal", "message": "an internal error", "hint": None, "details": {}}}
        try:
            connection.sendall(json.dumps(answer).encode() + b"\n")
        except OSError as error:
            logger.info("the answer was not wanted any more: %s", error)


def _performed(connection: socket.socket, units: Units, uids: frozenset[int]) -> dict[str, Any]:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    if uid not in uids:
        raise AccessDeniedError(f"uid {uid} may not ask llmstudio-launcher for anything")
    request = parse_request(_line(connection))
    return units.perform(request)


def _line(connection: socket.socket) -> bytes:
    received = bytearray()
    while b"\n" not in received and len(received) <= MAX_REQUEST_BYTES:
        part = connection.recv(1 << 16)
        if not part:
            break
        received += part
    line, end, rest = bytes(received).partition(b"\n")
    if not end or rest:
        raise BadRequestError("expected one line that ends in a line break")
    return line


def main() -> int:
    """Serve the socket that systemd hands over; return the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    if os.environ.get("LISTEN_FDS") != "1":
        logger.error("llmstudio-launcher is started by systemd, by its socket llmstudio-launcher.socket")
        return 2
    state = os.environ.get("STATE_DIRECTORY", "/var/lib/llmstudio-launcher")
    uids = frozenset({0, pwd.getpwnam(DAEMON_USER).pw_uid})
    with socket.socket(fileno=FIRST_FD) as listener:
        serve(listener, Units(Store(DEFAULT_FILE, Path(state))), uids=uids)
    return 0


if __name__ == "__main__":
    sys.exit(main())
