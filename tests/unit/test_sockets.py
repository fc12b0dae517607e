"""The daemon serves what systemd hands over, and opens by itself only what is missing."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmstudiod.core.errors import ConfigError
from llmstudiod.daemon import sockets


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Two TCP sockets, one Unix socket and a pipe at consecutive descriptors, as systemd would leave them."""
    made = [socket.socket(), socket.socket(socket.AF_INET6), socket.socket(socket.AF_UNIX)]
    first = 200
    read_end, write_end = os.pipe()
    numbers = [os.dup2(fd, first + index) for index, fd in enumerate([*(s.fileno() for s in made), read_end])]
    monkeypatch.setattr(sockets, "FIRST_FD", first)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", str(len(numbers)))
    monkeypatch.setenv("LISTEN_FDNAMES", "http:http:admin:stray")
    yield numbers
    for sock in made:
        sock.close()
    for number in (read_end, write_end):
        os.close(number)


def test_inherited_sockets_are_told_apart_by_name(handed_over: list[int]) -> None:
    """Both of one .socket's addresses share its name; what is no socket is told and left alone."""
    listeners = sockets.inherited()
    assert [sock.fileno() for sock in listeners.http] == handed_over[:2]
    assert [sock.fileno() for sock in listeners.admin] == handed_over[2:3]
    assert len(listeners.notes) == 1
    assert "LISTEN_FDS" not in os.environ
    assert not any(os.get_inheritable(number) for number in handed_over)
    for sock in (*listeners.http, *listeners.admin):
        sock.close()
    os.close(handed_over[3])


def test_sockets_of_another_process_are_not_taken(handed_over: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """LISTEN_PID names who they are for; a child of a socket-activated service must not take them."""
    monkeypatch.setenv("LISTEN_PID", "1")
    listeners = sockets.inherited()
    assert not listeners.http
    assert "LISTEN_PID" not in os.environ
    for number in handed_over:
        os.close(number)


def test_missing_sockets_are_opened(tmp_path: Path) -> None:
    """Without systemd the daemon listens by itself; the admin socket is for its own user alone."""
    path = tmp_path / "run" / "admin.sock"
    listeners = sockets.open_missing(sockets.Listeners(), addresses=["127.0.0.1:0"], admin_path=str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    assert listeners.http[0].getsockname()[0] == "127.0.0.1"
    for sock in (*listeners.http, *listeners.admin):
        sock.close()


def test_endpoint_is_left_to_systemd_where_it_hands_over_the_admin_socket(tmp_path: Path) -> None:
    """Its socket could not listen: what `listen` says is not opened in its place, and the way out is told."""
    with socket.socket(socket.AF_UNIX) as admin:
        handed = sockets.Listeners(admin=[admin])
        listeners = sockets.open_missing(handed, addresses=["127.0.0.1:0"], admin_path=str(tmp_path / "a.sock"))
        assert (listeners.http, listeners.admin) == ([], [admin])
        assert "systemctl restart llmstudiod" in listeners.notes[0]
    assert not (tmp_path / "a.sock").exists()


def test_one_bad_address_is_told_and_the_others_serve(tmp_path: Path) -> None:
    """A host without ::1 still has 127.0.0.1."""
    addresses = ["[2001:db8::1]:0", "nonsense", "127.0.0.1:99999", "127.0.0.1:0"]
    listeners = sockets.open_missing(sockets.Listeners(), addresses=addresses, admin_path=str(tmp_path / "a.sock"))
    assert len(listeners.http) == 1
    assert len(listeners.notes) == 3
    for sock in (*listeners.http, *listeners.admin):
        sock.close()


def test_taken_port_is_told_with_the_next_step(tmp_path: Path) -> None:
    """Nothing to serve is the one reason not to start."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"cannot listen on any address: .*Address already in use") as caught:
            sockets.open_missing(sockets.Listeners(), addresses=[address], admin_path=str(tmp_path / "a.sock"))
    assert "listen" in str(caught.value.hint)


def test_stale_admin_socket_is_replaced_and_a_served_one_is_not(tmp_path: Path) -> None:
    """A file left by a daemon that was killed is no obstacle; a daemon that runs is."""
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    listeners = sockets.open_missing(sockets.Listeners(), addresses=["127.0.0.1:0"], admin_path=str(path))
    with pytest.raises(ConfigError, match="already serves"):
        sockets.open_missing(sockets.Listeners(http=listeners.http), addresses=[], admin_path=str(path))
    for sock in (*listeners.http, *listeners.admin):
        sock.close()


def test_nobody_finds_an_admin_socket_that_does_not_listen_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for the path is not refused in the moment between bind(2) and listen(2)."""
    path = tmp_path / "admin.sock"
    found: list[bool] = []

    class Watched(socket.socket):
        def listen(self, backlog: int = 0) -> None:
            found.append(path.exists())
            super().listen(backlog)

    monkeypatch.setattr(socket, "socket", Watched)
    handed = sockets.Listeners(http=[socket.socket()])
    listeners = sockets.open_missing(handed, addresses=[], admin_path=str(path))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert found == [False]
    assert list(tmp_path.iterdir()) == [path]
    for sock in (*listeners.http, *listeners.admin):
        sock.close()


def test_admin_path_too_long_is_told(tmp_path: Path) -> None:
    """A Unix socket's path has 107 bytes at most; bind(2) only says that it is too long."""
    with pytest.raises(ConfigError, match="AF_UNIX path too long") as caught:
        sockets.open_missing(
            sockets.Listeners(), addresses=["127.0.0.1:0"], admin_path=str(tmp_path / ("x" * 120) / "admin.sock")
        )
    assert "107" in str(caught.value.hint)
