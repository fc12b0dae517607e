"""A daemon process of our own, with plain processes as models, for tests that look at it from outside."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmstudiod.ctl.client import Client

T = TypeVar("T")


@dataclass(slots=True)
class RunningDaemon:
    """A daemon, its files, and ways to ask it."""

    process: subprocess.Popen[bytes]
    home: Path
    port: int
    admin: Client

    @property
    def base_url(self) -> str:
        """The OpenAI endpoint."""
        return f"http://127.0.0.1:{self.port}/v1"

    def ctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run llmstudioctl to its end."""
        argv = [sys.executable, "-m", "llmstudiod.ctl.main", "--socket", self.admin.socket_path, *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)

    def put_recipe(self, recipe: Mapping[str, object], *, file: str | None = None) -> Path:
        """Write a recipe; it is in force after `reload`."""
        path = self.home / "recipes.d" / (file or f"{recipe['id']}.json")
        path.write_text(json.dumps(recipe))
        return path

    def reload(self) -> None:
        """Send SIGHUP, and return when the daemon has said that it read everything again."""
        before = self._times_read()
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self._times_read() > before)

    def _times_read(self) -> int:
        return len(re.findall(r"\b\d+ models?, \d+ faulty recipes? left out$", self.log(), re.MULTILINE))

    def log(self) -> str:
        """What the daemon has logged."""
        return (self.home / "log").read_text(errors="replace")

    def state(self, model: str) -> str:
        """The model's state."""
        return str(self.admin.get("instances", model)["state"])


def wait_until(condition: Callable[[], T], *, timeout_s: float = 15) -> T:
    """Return the first true value; what another process does cannot be awaited."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return value


@contextmanager
def running_daemon(home: Path, *, state_directory: Path | None = None, **settings: object) -> Iterator[RunningDaemon]:
    """Start a daemon with its files below ``home``, and end it with SIGTERM."""
    for name in ("models", "recipes.d"):
        (home / name).mkdir(exist_ok=True)
    # pytest's directories are deep, and a Unix socket's path has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="llmstudiod-") as runtime, (home / "log").open("ab") as log:
        values: dict[str, Any] = {
            "recipes_dir": str(home / "recipes.d"),
            "model_dirs": [str(home / "models")],
            "runtime_dir": runtime,
            "admin_socket": f"{runtime}/admin.sock",
            "listen": ["127.0.0.1:0"],
            "launcher": "subprocess",
            **settings,
        }
        config = home / "llmstudiod.yaml"
        config.write_text(json.dumps(values))
        environment = os.environ | ({"STATE_DIRECTORY": str(state_directory)} if state_directory else {})
        process = subprocess.Popen(
            [sys.executable, "-m", "llmstudiod.daemon.main", "--config", str(config)],
            stdout=log,
            stderr=log,
            env=environment,
        )
        try:
            admin = Client(str(values["admin_socket"]))
            wait_until(lambda: process.poll() is not None or Path(admin.socket_path).exists())
            assert process.poll() is None, (home / "log").read_text()
            port = wait_until(lambda: admin.get("status")["ports"])[0]
            yield RunningDaemon(process, home, port, admin)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
