"""Who is at the other end of the admin socket, and what they may: the kernel vouches for it."""

import grp
import os
import pwd
import socket
import struct
from dataclasses import dataclass

ADMIN_GROUP = "llmstudio-admin"
_SO_PEERGROUPS = 59  # asm-generic/socket.h; Linux 4.13
_MAX_GROUPS = 256  # as many as Python asks the kernel for at most


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that connected, as it was then."""

    uid: int
    gids: frozenset[int]

    def may_administer(self) -> bool:
        """Whether it is root, the daemon's own user, or a member of the group of administrators."""
        return self.uid in {0, os.geteuid()} or admin_gid() in self.gids

    def name(self) -> str:
        """Return its user's name, or number where it has none. Blocks."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)


def peer_of(sock: socket.socket) -> Peer:
    """Return who connected to a Unix socket. Source: unix(7), SO_PEERCRED and SO_PEERGROUPS."""
    _, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MAX_GROUPS)
    except OSError:
        raw = b""
    return Peer(uid, frozenset({gid, *struct.unpack(f"{len(raw) // 4}I", raw)}))


def admin_gid() -> int:
    """Return the administrators' group, or a number that nobody has."""
    try:
        return grp.getgrnam(ADMIN_GROUP).gr_gid
    except KeyError:
        return -1
