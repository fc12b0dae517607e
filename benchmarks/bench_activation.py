"""How long the connection waits that starts the daemon, beside importing aiohttp.web and nothing else.

A listening socket is handed over as systemd would, a client connects, the daemon is started, the client reads its
answer. Interleaved rounds, medians.

    python benchmarks/bench_activation.py [--rounds 7]
"""

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = """\
recipes_dir: {home}/recipes.d
model_dirs: [{home}/models]
runtime_dir: {home}/run
admin_socket: {home}/admin.sock
launcher: subprocess
"""
RECIPE = "id: model-{number}\nmodel_path: /models/model-{number}.gguf\nmax_model_len: 8192\nidle_timeout: 5m\n"
# What systemd does between fork and exec: the socket becomes fd 3, and the variables name this very process.
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3, inheritable=True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "http"}
os.execv(sys.executable, [sys.executable, "-m", "llmstudiod.daemon.main", "--config", sys.argv[2]])
"""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--recipes", type=int, default=20)
    arguments = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="activation-"))
    try:
        (home / "recipes.d").mkdir()
        for number in range(arguments.recipes):
            (home / "recipes.d" / f"model-{number}.yaml").write_text(RECIPE.format(number=number))
        config = home / "llmstudiod.yaml"
        config.write_text(SETTINGS.format(home=home))
        time.sleep(1.2)  # files that were only just written are read again at the next start
        print(f"first start, every recipe read and checked: {_first_answer(config) * 1e3:.0f} ms")
        time.sleep(0.5)
        imports, answers = [], []
        for number in range(arguments.rounds):
            imports.append(_timed(["-c", "import aiohttp.web"]))
            answers.append(_first_answer(config))
            print(f"round {number + 1}: import {imports[-1] * 1e3:6.0f} ms, first answer {answers[-1] * 1e3:6.0f} ms")
    finally:
        shutil.rmtree(home, ignore_errors=True)
    base, answer = statistics.median(imports), statistics.median(answers)
    print(f"\nmedians of {arguments.rounds} rounds, {arguments.recipes} recipes")
    print(f"  import aiohttp.web                   {base * 1e3:6.0f} ms   1.00 x")
    print(f"  GET /v1/models that starts llmstudiod {answer * 1e3:5.0f} ms   {answer / base:.2f} x")
    return 0


def _timed(words: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True)
    return time.perf_counter() - began


def _first_answer(config: Path) -> float:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        client = socket.create_connection(listener.getsockname(), timeout=30)
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        began = time.perf_counter()
        # A shell would cost more; a second interpreter costs its bare start, which is counted against us.
        daemon = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", ACTIVATE, str(listener.fileno()), str(config)],
            pass_fds=[listener.fileno()],
            stderr=subprocess.DEVNULL,
            env=os.environ | {"STATE_DIRECTORY": str(config.parent)},  # systemd sets it, for StateDirectory=
        )
        try:
            first = client.recv(65536)
            took = time.perf_counter() - began
        finally:
            daemon.terminate()
            daemon.wait(timeout=30)
            client.close()
    if not first.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"expected an answer, found {first[:80]!r}")
    return took


if __name__ == "__main__":
    sys.exit(main())
