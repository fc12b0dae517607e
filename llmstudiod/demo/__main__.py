"""``make demo``: a tiny model, a recipe, the daemon, a streaming chat, and what happened. ``--serve`` serves on.

Everything is written below one directory; the daemon runs models as plain processes, so that an installed llmstudiod
and its units are left alone. The words of the reply are readable and mean nothing: the weights are random.
"""

import argparse
import ctypes
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.units import format_bytes
from llmstudiod.ctl.client import Client
from llmstudiod.demo.tiny_gguf import TinyModel, write_tiny_gguf

MODEL = "demo"
USUAL_PORT = 8080
START_TIMEOUT_S = 20.0

RECIPE = """\
# Written by `make demo`; a recipe needs no more than a model_path.
id: demo
name: Demonstration (random weights)
model_path: {model}
aliases: [gpt-4o-mini]   # an app that insists on a name of its own gets this model
max_model_len: 2048
max_num_seqs: 2
threads: 1
default: true
"""
SETTINGS = """\
recipes_dir: {home}/recipes.d
model_dirs: [{home}/models]
runtime_dir: {runtime}
admin_socket: {runtime}/admin.sock
listen: ["127.0.0.1:{port}"]
launcher: subprocess
"""


def main() -> int:
    """Run the tour; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m llmstudiod.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=Path(".demo"), help="where everything is written (default: .demo)")
    parser.add_argument("--serve", action="store_true", help="leave the daemon in the foreground")
    arguments = parser.parse_args()
    home: Path = arguments.home.resolve()
    # A Unix socket's path has 107 bytes at most, and a checkout may lie deep.
    runtime = Path(tempfile.mkdtemp(prefix="llmstudiod-"))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        port = _choose_port()
        config = _write_files(home, runtime, port)
        if arguments.serve:
            return _serve(config, port, runtime)
        return _tour(config, home, runtime, port)
    except LlmstudioError as error:
        print(f"demo: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, BrokenPipeError):
        sys.stderr.close()  # whoever read us has gone, or wants us gone: there is nothing to add
        return 130
    finally:
        shutil.rmtree(runtime, ignore_errors=True)


def _leave(number: int, _: object) -> None:
    """End in order: the daemon is stopped and the directory removed on the way out."""
    raise SystemExit(128 + number)


def _die_with_parent() -> None:
    """Let the daemon be told when we are gone, also by SIGKILL; runs in the child. Source: prctl(2)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)


def _choose_port() -> int:
    """Return 8080, or a free port, saying so, where 8080 is taken."""
    for port in (USUAL_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            chosen = int(probe.getsockname()[1])
            if chosen != USUAL_PORT:
                print(f"port {USUAL_PORT} is taken on this machine: using {chosen}")
            return chosen
    raise LlmstudioError("no port of 127.0.0.1 is free")


def _write_files(home: Path, runtime: Path, port: int) -> Path:
    for directory in ("models", "recipes.d", "state"):
        (home / directory).mkdir(parents=True, exist_ok=True)
    model = home / "models" / "demo.gguf"
    began = time.monotonic()
    size = write_tiny_gguf(model, TinyModel(name="Demonstration"))
    print(f"model   {model} ({format_bytes(size)} of random weights, {time.monotonic() - began:.1f} s)")
    recipe = home / "recipes.d" / "demo.yaml"
    recipe.write_text(RECIPE.format(model=model))
    print(f"recipe  {recipe}")
    config = home / "llmstudiod.yaml"
    config.write_text(SETTINGS.format(home=home, runtime=runtime, port=port))
    return config


def _daemon_argv(config: Path) -> list[str]:
    return [sys.executable, "-m", "llmstudiod.daemon.main", "--development", "--config", str(config)]


def _serve(config: Path, port: int, runtime: Path) -> int:
    print(f"\nendpoint http://127.0.0.1:{port}/v1   (Ctrl-C ends it)")
    print(f"try      curl http://127.0.0.1:{port}/v1/chat/completions -d '{{\"messages\": [{{\"role\": \"user\", "
          "\"content\": \"Hello\"}]}'")  # fmt: skip
    ctl = Path(sys.executable).with_name("llmstudioctl")
    print(f"         {ctl} --socket {runtime}/admin.sock status demo\n", flush=True)
    with subprocess.Popen(_daemon_argv(config), preexec_fn=_die_with_parent) as daemon:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: daemon.terminate())  # it drains; we only wait for it
        return daemon.wait()


def _tour(config: Path, home: Path, runtime: Path, port: int) -> int:
    log_path = home / "daemon.log"
    with log_path.open("wb") as log:
        daemon = subprocess.Popen(  # a session of its own: Ctrl-C is ours, and we end it in order
            _daemon_argv(config), stdout=log, stderr=log, preexec_fn=_die_with_parent, start_new_session=True
        )
    try:
        admin = Client(str(runtime / "admin.sock"))
        began = time.monotonic()
        _await_daemon(admin, daemon, log_path)
        print(f"daemon  pid {daemon.pid}, serving http://127.0.0.1:{port}/v1 after {time.monotonic() - began:.2f} s")
        binary = admin.get("status")["llama_server"]
        kind = "the embedded engine, CPU only" if binary.get("is_embedded") else " ".join(binary.get("command", []))
        print(f"engine  {kind} ({binary.get('version') or binary.get('error')})\n")
        first_s, words, total_s = _chat(port)
        instance = admin.get("instances", MODEL)
        print(f"\nfirst word after {first_s * 1000:.0f} ms, the cold start of the model included; "
              f"{words} pieces in {total_s:.2f} s")  # fmt: skip
        print(f"model   {instance['state']}, {instance['unit']} with pid {instance['pid']}, "
              f"{instance['slots']} slots of {instance['n_ctx']} tokens")  # fmt: skip
        for step in instance["story"]:
            print(f"        {step['at'] - instance['story'][0]['at']:6.3f} s  {step['to']}: {step['cause']}")
    finally:
        code = _end(daemon)
    print(f"daemon  ended with exit code {code}; its log is {log_path}")
    print("\nnext: `make run` keeps it running; README.md tells how to install it for good")
    return 0 if code == 0 else 1


def _await_daemon(admin: Client, daemon: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and daemon.poll() is None:
        try:
            admin.get("health", timeout_s=5)
        except LlmstudioError:
            time.sleep(0.02)
        else:
            return
    print(log_path.read_text(errors="replace"), file=sys.stderr)
    raise LlmstudioError("the daemon did not start", hint=f"see {log_path}")


def _chat(port: int) -> tuple[float, int, float]:
    """Send one streaming chat, print the reply as it comes; return when it began, its pieces, and when it ended."""
    question = "Tell me something."
    body = json.dumps({"model": MODEL, "stream": True, "max_tokens": 60, "seed": 7,
                       "messages": [{"role": "user", "content": question}]})  # fmt: skip
    print(f"you     {question}\ndemo   ", end="", flush=True)
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        error = json.loads(response.read())["error"]
        print("\n".join(f"  | {line}" for line in ["", *error.get("lines", [])[-10:]]), file=sys.stderr)
        raise LlmstudioError(str(error["message"]), hint=error.get("hint"))
    first_s, pieces = 0.0, 0
    for raw in response:
        if not raw.startswith(b"data: ") or raw.startswith(b"data: [DONE]"):
            continue
        event: dict[str, Any] = json.loads(raw[6:])
        if "error" in event:
            raise LlmstudioError(str(event["error"]["message"]), hint=event["error"].get("hint"))
        text = event["choices"][0]["delta"].get("content") if event.get("choices") else None
        if text:
            first_s = first_s or time.monotonic() - began
            pieces += 1
            print(text, end="", flush=True)
    connection.close()
    print()
    return first_s, pieces, time.monotonic() - began


def _end(daemon: subprocess.Popen[bytes]) -> int:
    daemon.terminate()
    try:
        return daemon.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.kill(daemon.pid, signal.SIGKILL)
        return daemon.wait()


if __name__ == "__main__":
    sys.exit(main())
