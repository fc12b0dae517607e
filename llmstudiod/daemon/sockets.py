"""The sockets that the daemon serves: handed over by systemd, by name, or opened by itself."""

import os
import re
import socket
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from llmstudiod.core.errors import ConfigError

FIRST_FD = 3
BACKLOG = 4096
NO_ENDPOINT = (
    "systemd has handed over no socket for the endpoint: no request is served, the admin interface alone is; "
    "`systemctl status llmstudiod.socket` tells why (is the port taken?); "
    "free the port, or choose another with `systemctl edit llmstudiod.socket`, then `systemctl restart llmstudiod`"
)


@dataclass(slots=True)
class Listeners:
    """Listening sockets: ``http`` for the endpoint, ``admin`` for administration."""

    http: list[socket.socket] = field(default_factory=list)
    admin: list[socket.socket] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def inherited() -> Listeners:
    """Return the sockets that systemd hands over, and keep them from our children. Source: sd_listen_fds(3)."""
    listeners = Listeners()
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    count = os.environ.get("LISTEN_FDS", "")
    is_ours = os.environ.get("LISTEN_PID", "") == str(os.getpid())
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"):
        os.environ.pop(name, None)
    if not (is_ours and count.isdigit()):
        return listeners
    for index in range(int(count)):
        fd = FIRST_FD + index
        os.set_inheritable(fd, False)
        name = names[index] if index < len(names) else ""
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            listeners.notes.append(f"fd {fd} ('{name}') is no socket; ignored")
            continue
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        if name == "admin" or (name != "http" and sock.family == socket.AF_UNIX):
            listeners.admin.append(sock)
        else:
            listeners.http.append(sock)
    return listeners


def open_missing(listeners: Listeners, *, addresses: Iterable[str], admin_path: str) -> Listeners:
    """Open what systemd has not handed over.

    Where it has handed over the admin socket alone, the endpoint's is left to it as well: the addresses of
    llmstudiod.socket count, not ours, and the service has no network in which it could listen.

    Raises:
        ConfigError: None of the addresses can be listened on.
    """
    if listeners.admin and not listeners.http:
        listeners.notes.append(NO_ENDPOINT)
    elif not listeners.http:
        failures = []
        for address in addresses:
            try:
                listeners.http.append(_listen_tcp(address))
            except (OSError, ConfigError) as error:
                failures.append(f"{address}: {getattr(error, 'strerror', None) or error}")
        listeners.notes += [f"cannot listen on {failure}" for failure in failures]
        if not listeners.http:
            raise ConfigError(
                f"cannot listen on any address: {'; '.join(failures) or 'none is configured'}",
                hint="is another server running there? set `listen` to another port",
            )
    if not listeners.admin:
        listeners.admin.append(_listen_unix(Path(admin_path)))
    return listeners


def _listen_tcp(address: str) -> socket.socket:
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:]+)\]|([0-9.]+)):(\d{1,5})", address)
    if match is None or int(match[3]) > 65535:
        raise ConfigError("expected an address such as 127.0.0.1:8080 or [::1]:8080")
    family = socket.AF_INET6 if match[1] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((match[1] or match[2], int(match[3])))
        sock.setblocking(False)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _listen_unix(path: Path) -> socket.socket:
    """Listen before the path is there: whoever finds it is not refused between ``bind`` and ``listen``."""
    if _is_served(path):
        raise ConfigError(f"another daemon already serves '{path}'", hint="stop it, or set admin_socket")
    unready = path.with_name(f"~{path.name[1:]}")  # no longer than the path itself
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unready.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            sock.bind(str(unready))
        finally:
            os.umask(mask)
        sock.setblocking(False)
        sock.listen(BACKLOG)
        unready.replace(path)
    except OSError as error:
        raise ConfigError(
            f"cannot open the admin socket '{path}': {error.strerror or error}",
            hint="set admin_socket to a path of at most 107 bytes that the daemon may write",
        ) from error
    return sock


def _is_served(path: Path) -> bool:
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
