"""The test host itself: what the other tests of this directory take for granted."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import openai
import pytest

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .host import Host, HostError, hosts  # noqa: TID252

REPOSITORY = Path(__file__).parent.parent.parent
SERVER = """\
import http.server, os, socketserver, sys

class Reply(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"object": "list", "data": [{"id": "inside", "object": "model", "created": 0, "owned_by": "host"}]}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self):
        return "client"

class UnixServer(socketserver.UnixStreamServer):
    pass

if sys.argv[1].startswith("/"):
    server = UnixServer(sys.argv[1], Reply)
else:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Reply)
os.write(1, b"listening\\n")
server.serve_forever()
"""


def traces(host: Host) -> list[str]:
    """What a host has on the machine now: its mounts, processes, cgroup and files."""
    found = [line for line in Path("/proc/self/mounts").read_text().splitlines() if host.name in line]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if host.name in (process / "cgroup").read_text() or host.name in (process / "mounts").read_text():
                found.append(f"{process}: {(process / 'cmdline').read_bytes()!r}")
        except OSError:
            continue  # it ended meanwhile
    found += [str(path) for path in Path("/sys/fs/cgroup").rglob(f"*{host.name}*")]
    return found + [str(path) for path in host.directory.parent.glob(host.name)]


@contextlib.contextmanager
def boot_in_another_process() -> Iterator[tuple[subprocess.Popen[str], Host]]:
    """Boot a host that belongs to a process of its own, and yield both."""
    code = "from tests.system.host import Host; host = Host().up(); print(host.name, flush=True); input()"
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, stdin=pipe, stdout=pipe) as owner:
        assert owner.stdout is not None
        host = Host(owner.stdout.readline().strip())
        try:
            assert host.run("true").returncode == 0
            yield owner, host
        finally:
            owner.kill()
            host.down()


def wait_until(condition: Callable[[], bool], *, timeout: float = 20) -> None:
    """Poll: the end of a process that is not our child cannot be waited for."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_systemd_is_pid_1_and_new_enough(host: Host) -> None:
    """PID 1 is a systemd of 254 or later, the oldest that the project supports, and nothing has failed."""
    assert host.run("cat", "/proc/1/comm").stdout == "systemd\n"
    assert int(host.run("systemctl", "--version").stdout.split()[1]) >= 254
    assert host.run("systemctl", "is-system-running").stdout == "running\n"


def test_a_transient_unit_runs_and_its_journal_is_read(host: Host) -> None:
    """systemd-run works, and `journal` returns what the unit said."""
    host.run("systemd-run", "--unit=greeter", "--wait", "echo", "hello from a unit")
    assert "hello from a unit" in host.journal("greeter").splitlines()


def test_llama_server_runs(host: Host) -> None:
    """llama-server starts from the base tree, and no service of its package's is there to take port 8080."""
    done = host.run("llama-server", "--version")
    assert "version:" in done.stdout + done.stderr
    assert host.run("systemctl", "list-unit-files", "--no-legend", "llama*", check=False).stdout == ""


def test_loopback_is_the_only_network(host: Host) -> None:
    """No other interface is there, and loopback is up."""
    names = [line.split()[0] for line in host.run("ip", "-brief", "address").stdout.splitlines()]
    assert names == ["lo"]
    assert "127.0.0.1/8" in host.run("ip", "-brief", "address").stdout


def test_a_failed_command_tells_all(host: Host) -> None:
    """The error has the command line, the status and the output."""
    with pytest.raises(HostError, match=r"(?s)sh -c 'echo why; exit 3'.*status 3.*why"):
        host.run("sh", "-c", "echo why; exit 3")


def test_a_command_that_times_out_is_killed_inside(host: Host) -> None:
    """Nothing of it goes on running in the host."""
    with pytest.raises(subprocess.TimeoutExpired):
        host.run("sleep", "1234", timeout=0.5)
    wait_until(lambda: host.run("pgrep", "--full", "sleep 1234", check=False).returncode == 1)


def test_files_go_in(host: Host, tmp_path: Path) -> None:
    """`put` copies a tree as root's, keeps links like /lib and adds to what is there; `write` makes one file."""
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/sub/file").write_text("first\n")
    host.put(tmp_path / "tree", "/lib/testtree")
    (tmp_path / "tree/sub/file").rename(tmp_path / "tree/sub/other")
    host.put(tmp_path / "tree", "/lib/testtree")
    assert host.run("ls", "/usr/lib/testtree/sub").stdout.split() == ["file", "other"]
    assert host.run("stat", "--format=%U", "/lib/testtree/sub/file").stdout == "root\n"
    host.write("/opt/some/script", "#!/bin/sh\necho ran\n", mode=0o755)
    assert host.run("/opt/some/script").stdout == "ran\n"


def test_a_bound_directory_shows_without_a_copy_and_read_only(host: Host, tmp_path: Path) -> None:
    """What the machine writes later shows inside, and the host cannot write there; single files work too."""
    host.bind(tmp_path, "/srv/models")
    (tmp_path / "later").write_text("seen\n")
    host.bind(tmp_path / "later", "/srv/one")
    assert host.run("cat", "/srv/models/later", "/srv/one").stdout == "seen\nseen\n"
    assert "Read-only" in host.run("touch", "/srv/models/x", check=False).stderr


async def test_clients_of_this_process_reach_a_port_inside(host: Host) -> None:
    """aiohttp, openai and a plain socket talk to a port of the host's, which is closed on the machine's side."""
    host.write("/opt/server.py", SERVER)
    with host.popen("python3", "/opt/server.py", "8099", stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        with host.network():
            async with aiohttp.ClientSession() as session, session.get("http://127.0.0.1:8099/v1/models") as reply:
                assert reply.status == 200
            async with openai.AsyncOpenAI(base_url="http://127.0.0.1:8099/v1", api_key="none") as client:
                assert [model.id async for model in client.models.list()] == ["inside"]
        with host.connect(("127.0.0.1", 8099)) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.0 200"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", 8099)).close()
        server.kill()


async def test_a_unix_socket_inside_is_reached_by_path(host: Host) -> None:
    """`path` leads to the socket, through the host's own absolute links (/var/run is one)."""
    host.write("/opt/server.py", SERVER)
    with host.popen("python3", "/opt/server.py", "/var/run/test.sock", stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        connector = aiohttp.UnixConnector(str(host.path("/var/run/test.sock")))
        async with aiohttp.ClientSession(connector=connector) as session, session.get("http://host/") as reply:
            assert (await reply.json())["data"][0]["id"] == "inside"
        server.kill()


def test_down_leaves_nothing(base_tree: Path) -> None:
    """After `down` there is no mount, process, cgroup or file of the host's, though a command was still running."""
    with Host() as host:
        assert traces(host)
        running = host.popen("sleep", "infinity")
        host.run("systemd-run", "--unit=held", "sleep", "infinity")
    assert running.wait(timeout=10) != 0
    assert traces(host) == []
    host.down()
    with pytest.raises(HostError, match="is up"):
        host.run("true")


def test_a_host_goes_with_its_killed_test_run(base_tree: Path) -> None:
    """The guard clears the host away when the process that made it is killed with SIGKILL."""
    with boot_in_another_process() as (owner, host):
        owner.kill()
        wait_until(lambda: traces(host) == [])


def test_the_next_start_removes_a_stale_host(base_tree: Path) -> None:
    """A host whose guard was killed as well is there until someone boots the next."""
    with boot_in_another_process() as (owner, host):
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if f"_guard\0{host.name}\0".encode() in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
        owner.kill()
        owner.wait()
        assert host.name in [one.name for one in hosts()]
        with Host():
            assert not host.directory.exists()
            wait_until(lambda: traces(host) == [])  # the last of its processes to go is not a child of ours


def test_the_project_is_installed(installed_host: Host) -> None:
    """The fixture puts the package where Debian's Python finds it, and the executables where the units expect them."""
    code = "import llmstudiod; print(llmstudiod.__file__)"
    found = installed_host.run("python3", "-I", "-c", code).stdout
    assert found == "/usr/lib/python3/dist-packages/llmstudiod/__init__.py\n"
    installed_host.run("test", "-x", "/usr/bin/llmstudioctl", "-a", "-x", "/usr/libexec/llmstudiod/llmstudiod")
