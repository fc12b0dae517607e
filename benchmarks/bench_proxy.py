"""Requests per second through the daemon, beside a plain aiohttp proxy and nothing at all, in one interleaved run.

Upstream: nginx on a Unix socket. Client: wrk. Small JSON answers, 16 connections. Only the ratios mean anything.

    python benchmarks/bench_proxy.py [--seconds 3] [--rounds 3] [--connections 16]
"""

import argparse
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

import psutil

from llmstudiod.demo.tiny_gguf import write_tiny_gguf

HERE = Path(__file__).parent
LUA = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = '{"model":"bench","messages":[{"role":"user","content":"Say something small, please."}],"max_tokens":16}'
"""
SETTINGS = """\
recipes_dir: {home}/recipes.d
model_dirs: [{home}/models]
runtime_dir: {home}/run
admin_socket: {home}/admin.sock
listen: ["127.0.0.1:{port}"]
launcher: subprocess
llama_server: {server}
"""


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=16)
    arguments = parser.parse_args()
    for tool in ("wrk", "nginx"):
        if shutil.which(tool) is None:
            print(f"{tool} is not installed; on Debian: apt install wrk nginx-light", file=sys.stderr)
            return 1
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        script = home / "chat.lua"
        script.write_text(LUA)
        ours, plain = _free_port(), _free_port()
        our_pid = stack.enter_context(_daemon(home, ours))
        upstream = home / "run" / "bench" / "llama.sock"
        plain_pid = stack.enter_context(
            _process([sys.executable, str(HERE / "plain_proxy.py"), str(plain), str(upstream)], plain)
        )
        subjects = [Subject("plain aiohttp proxy", plain, plain_pid), Subject("llmstudiod", ours, our_pid)]
        for number in range(arguments.rounds):
            for subject in subjects:
                subject.measure(script, seconds=arguments.seconds, connections=arguments.connections)
                print(f"round {number + 1}: {subject.name:<20} {subject.rates[-1]:>9,.0f} requests/s", flush=True)
    print(f"\nsmall JSON, {arguments.connections} connections, medians of {arguments.rounds} rounds")
    print(f"  {'':<20} {'requests/s':>12} {'':>8} {'CPU us a request':>18}")
    base_rate, base_cpu = subjects[0].medians()
    for subject in subjects:
        rate, cpu = subject.medians()
        print(f"  {subject.name:<20} {rate:>12,.0f} {rate / base_rate:>6.2f} x {cpu:>18,.0f} {base_cpu / cpu:>6.2f} x")
    return 0


@dataclass
class Subject:
    """A proxy under test."""

    name: str
    port: int
    pid: int
    rates: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)

    def measure(self, script: Path, *, seconds: int, connections: int) -> None:
        """Run one round."""
        before = _cpu_s(self.pid)
        rate = _wrk(script, self.port, seconds=seconds, connections=connections)
        self.rates.append(rate)
        self.cpu_us.append((_cpu_s(self.pid) - before) / (rate * seconds) * 1e6)

    def medians(self) -> tuple[float, float]:
        """Return requests per second and CPU microseconds a request."""
        return statistics.median(self.rates), statistics.median(self.cpu_us)


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@contextmanager
def _daemon(home: Path, port: int) -> Iterator[int]:
    (home / "recipes.d").mkdir()
    (home / "models").mkdir()
    write_tiny_gguf(home / "models" / "bench.gguf")
    config = home / "llmstudiod.yaml"
    config.write_text(SETTINGS.format(home=home, port=port, server=HERE / "nginx_server.py"))
    with _process([sys.executable, "-m", "llmstudiod.daemon.main", "--config", str(config)], port) as pid:
        with urlopen(f"http://127.0.0.1:{port}/props?model=bench", timeout=30) as answer:  # the first request loads it
            answer.read()
        yield pid


@contextmanager
def _process(argv: list[str], port: int) -> Iterator[int]:
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise SystemExit(f"did not start: {' '.join(argv)}") from None
                time.sleep(0.05)
        yield process.pid
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wrk(script: Path, port: int, *, seconds: int, connections: int) -> float:
    """Return requests per second; stops at any answer that is no success."""
    argv = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script)]
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    output = subprocess.run([*argv, url], check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in output or "Socket errors" in output:
        raise SystemExit(f"errors at port {port}:\n{output}")
    match = re.search(r"Requests/sec:\s+([\d.]+)", output)
    assert match is not None
    return float(match.group(1))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
