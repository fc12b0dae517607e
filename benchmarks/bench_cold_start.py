"""What a cold start through the daemon costs over starting the same server by hand with the same flags.

Both begin with nothing and end with a whole chat answer. Interleaved rounds, medians.

    python benchmarks/bench_cold_start.py [--rounds 7]            here: plain processes, whatever server is found
    python benchmarks/bench_cold_start.py --booted [--rounds 7]   in a booted Debian host: units, Debian's llama-server

In the host the project is installed as its package does it, and llmstudio-launcher starts the units; it leaves after a
minute without work, so both are measured: asleep, and awake.
"""

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve()
CHAT = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "model": "bench"})
SETTINGS = """\
recipes_dir: {home}/recipes.d
model_dirs: [{home}]
runtime_dir: {home}/run
admin_socket: {home}/admin.sock
listen: ["127.0.0.1:{port}"]
"""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--booted", action="store_true", help="measure in a booted Debian host (needs root)")
    parser.add_argument("--installed", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.booted:
        return _in_a_host(arguments.rounds)
    home = Path(tempfile.mkdtemp(prefix="cold-"))
    try:
        if arguments.installed:
            return _measure(Site(8080, Path("/run/llmstudio/admin.sock"), home), arguments.rounds)
        from llmstudiod.demo.tiny_gguf import write_tiny_gguf

        write_tiny_gguf(home / "bench.gguf")
        site = Site(_free_port(), home / "admin.sock", home)
        config = home / "llmstudiod.yaml"
        config.write_text(SETTINGS.format(home=home, port=site.port))
        with _daemon(config, home):
            return _measure(site, arguments.rounds)
    finally:
        shutil.rmtree(home, ignore_errors=True)


class Site(NamedTuple):
    """A daemon that runs, and a directory to work in."""

    port: int
    admin: Path
    home: Path


def _measure(site: Site, rounds: int) -> int:
    _ask(_tcp(site.port))  # the first start also asks the binary what it can do
    plan = _admin(site, "GET", "/explain/bench")
    ways = ["awake", "asleep"] if plan["launcher"] == "systemd" else [""]
    times: dict[str, list[float]] = {name: [] for name in ("by hand", *ways)}
    for number in range(rounds):
        times["by hand"].append(_by_hand(plan, site.home))
        for way in ways:
            times[way].append(_through(site, is_asleep=way == "asleep"))
        told = ", ".join(f"{name or 'llmstudiod'} {values[-1] * 1e3:.0f} ms" for name, values in times.items())
        print(f"round {number + 1}: {told}")
    print(f"\n{plan['launcher']} launcher, llama-server {plan['llama_server']['version']}, medians of {rounds}")
    hand_ms = statistics.median(times.pop("by hand")) * 1e3
    print(f"  by hand                        {hand_ms:6.0f} ms")
    for way, values in times.items():
        through_ms = statistics.median(values) * 1e3
        name = f"llmstudiod{', launcher ' + way if way else ''}"
        print(f"  {name:<30} {through_ms:6.0f} ms   {through_ms - hand_ms:+.0f} ms")
    return 0


def _through(site: Site, *, is_asleep: bool) -> float:
    """Return the seconds from a request for a cold model to its answer."""
    _admin(site, "POST", "/evict/bench")
    if is_asleep:
        subprocess.run(["systemctl", "stop", "llmstudio-launcher.service"], check=True)
    began = time.perf_counter()
    _ask(_tcp(site.port))
    return time.perf_counter() - began


def _by_hand(plan: dict[str, Any], home: Path) -> float:
    """Start the server with the plan's own command line, but its own socket; return seconds until the answer."""
    inside = {file["inside"]: file["path"] for file in plan["files"]}
    path = str(home / "hand.sock")
    argv = [path if word == plan["socket"] else inside.get(word, word) for word in plan["argv"]]
    Path(path).unlink(missing_ok=True)
    began = time.perf_counter()
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while not _is_healthy(path):
                time.sleep(0.005)
                if server.poll() is not None:
                    raise SystemExit(f"ended: {argv}")
            _ask(_unix(path))
            return time.perf_counter() - began
        finally:
            server.send_signal(signal.SIGKILL)


def _is_healthy(path: str) -> bool:
    try:
        connection = _unix(path)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def _ask(connection: http.client.HTTPConnection) -> None:
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", CHAT, {"Content-Type": "application/json"})
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise SystemExit(f"status {response.status}: {body.decode(errors='replace')}")


def _tcp(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=60)


def _unix(path: str) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("localhost", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(path)
    return connection


def _admin(site: Site, method: str, path: str) -> dict[str, Any]:
    with contextlib.closing(_unix(str(site.admin))) as connection:
        connection.request(method, path)
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
        return answer


@contextlib.contextmanager
def _daemon(config: Path, home: Path) -> Iterator[None]:
    argv = [sys.executable, "-m", "llmstudiod.daemon.main", "--config", str(config)]
    daemon = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not (home / "admin.sock").exists():
            if time.monotonic() > deadline or daemon.poll() is not None:
                raise SystemExit("the daemon did not start")
            time.sleep(0.02)
        yield
    finally:
        daemon.terminate()
        daemon.wait(timeout=30)


def _in_a_host(rounds: int) -> int:
    """Run this script inside a booted host, with Debian's Python and llama-server."""
    sys.path.insert(0, str(HERE.parent.parent))
    from llmstudiod.demo.tiny_gguf import write_tiny_gguf
    from tests.system.conftest import install
    from tests.system.host import Host, build_base, missing

    if reason := missing():
        print(reason, file=sys.stderr)
        return 1
    build_base()
    with Host() as host, tempfile.TemporaryDirectory() as directory:
        model = Path(directory, "bench.gguf")
        write_tiny_gguf(model)
        install(host)
        host.put(model, "/var/lib/llmstudio/models/bench.gguf")
        host.put(HERE, "/root/bench.py")
        host.run("systemctl", "start", "llmstudiod.service")
        argv = ("python3", "/root/bench.py", "--rounds", str(rounds), "--installed")
        print(host.run(*argv, timeout=300).stdout)
    return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    sys.exit(main())
