"""llmstudio-launcher: takes one request a connection from its socket, and leaves when there was none for a minute.

systemd starts it with its listening socket, which only the daemon's user may open; who connects is asked again here.
"""

import contextlib
import json
import os
import pwd
import select
import signal
import socket
import struct
import sys
import threading
from pathlib import Path
from typing import Any

from llmstudiod.core.errors import AccessDeniedError, BadRequestError, LauncherError, LlmstudioError
from llmstudiod.core.launcher_protocol import MAX_REQUEST_BYTES, parse_request
from llmstudiod.core.settings import DEFAULT_FILE
from llmstudiod.privileged.store import Store
from llmstudiod.privileged.units import Units

IDLE_S, MAX_AT_ONCE = 60.0, 64


def serve(listener: socket.socket, units: Units, *, uids: frozenset[int], idle_s: float = IDLE_S) -> None:
    """Answer requests, each in a thread of its own; return when nothing was asked for ``idle_s``."""
    threads: list[threading.Thread] = []
    while True:
        is_asked, _, _ = select.select([listener], [], [], idle_s)
        threads = [thread for thread in threads if thread.is_alive()]
        if not is_asked and not threads:
            return  # a connection that comes now waits in the socket, and systemd starts us again
        if is_asked:
            connection, _ = listener.accept()
            if len(threads) >= MAX_AT_ONCE:
                threads[0].join()
            threads.append(threading.Thread(target=_serve_one, args=(connection, units, uids)))
            threads[-1].start()


def _serve_one(connection: socket.socket, units: Units, uids: frozenset[int]) -> None:
    with connection:
        connection.settimeout(10.0)
        try:
            answer = _answer(connection, units, uids)
        except LlmstudioError as error:
            sys.stderr.write(f"refused or failed: {error.message!a}\n")  # importing logging takes longer than a request
            answer = {"error": error.as_dict()}
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not take the others' requests down
            sys.excepthook(type(error), error, error.__traceback__)
            answer = {"error": LauncherError(f"llmstudio-launcher failed: {error}").as_dict()}
        with contextlib.suppress(OSError):  # the answer may not be wanted any more
            connection.sendall(json.dumps(answer).encode() + b"\n")


def _answer(connection: socket.socket, units: Units, uids: frozenset[int]) -> dict[str, Any]:
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid not in uids:
        raise AccessDeniedError(f"uid {uid} may not ask llmstudio-launcher for anything")
    received = bytearray()
    while b"\n" not in received and len(received) <= MAX_REQUEST_BYTES and (part := connection.recv(1 << 16)):
        received += part
    line, end, rest = bytes(received).partition(b"\n")
    if not end or rest:
        raise BadRequestError(f"expected one line of at most {MAX_REQUEST_BYTES} bytes that ends in a line break")
    return units.perform(parse_request(line))


def main() -> int:
    """Serve the socket that systemd hands over; return the exit code."""
    if os.environ.get("LISTEN_FDS") != "1":
        sys.stderr.write("llmstudio-launcher is started by systemd, through llmstudio-launcher.socket\n")
        return 2
    store = Store(DEFAULT_FILE, Path(os.environ.get("STATE_DIRECTORY", "/var/lib/llmstudio-launcher")))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the threads end what they have begun
    with socket.socket(fileno=3) as listener:  # sd_listen_fds(3)
        serve(listener, Units(store), uids=frozenset({0, pwd.getpwnam("llmstudio").pw_uid}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
