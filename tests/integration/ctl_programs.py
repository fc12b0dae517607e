"""llmstudioctl as a program: with an editor, on a terminal, and before a daemon that has something to show."""

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from llmstudiod.demo.tiny_gguf import write_tiny_gguf
from tests.integration.running_daemon import RunningDaemon, running_daemon

BY_HAND = "# the small one, for tests\nid: hand\nmodel_path: {path}\nmax_model_len: 512  # enough\n"


@contextmanager
def daemon_with_recipe(tmp_path: Path) -> Iterator[RunningDaemon]:
    """A daemon with one GGUF without a recipe (`tiny`) and a recipe that a person wrote (`hand`)."""
    for name in ("models", "recipes.d", "state"):
        (tmp_path / name).mkdir()
    write_tiny_gguf(tmp_path / "models" / "tiny.gguf")
    write_tiny_gguf(tmp_path / "models" / "other.gguf")  # a GGUF with a recipe is not listed a second time
    (tmp_path / "recipes.d" / "hand.yaml").write_text(BY_HAND.format(path=tmp_path / "models" / "other.gguf"))
    with running_daemon(tmp_path, state_directory=tmp_path / "state") as running:
        yield running


@dataclass(slots=True)
class Terminal:
    """A program on a terminal of its own."""

    process: subprocess.Popen[bytes]
    descriptor: int
    text: str = field(default="")

    def has(self, words: str) -> bool:
        """Read what is there, and tell whether the words were among all that was shown."""
        try:
            self.text += os.read(self.descriptor, 65536).decode(errors="replace")
        except (BlockingIOError, OSError):  # EIO: the program has ended
            pass
        return words in self.text


@contextmanager
def on_terminal(daemon: RunningDaemon, *words: str, **variables: str) -> Iterator[Terminal]:
    """Run llmstudioctl on a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    argv = [sys.executable, "-m", "llmstudiod.ctl.main", "--socket", daemon.admin.socket_path, *words]
    environment = {**os.environ, "COLUMNS": "100", "LINES": "30", "TERM": "xterm", **variables}
    environment = {name: value for name, value in environment.items() if value}
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def editor(tmp_path: Path, script: str) -> dict[str, str]:
    """Return an environment whose editor is a shell script that gets the file as $1."""
    path = tmp_path / "editor"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {**os.environ, "EDITOR": str(path), "VISUAL": "", "TMPDIR": str(tmp_path)}


def ctl(
    daemon: RunningDaemon, *words: str, env: dict[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run llmstudioctl with an environment or something on its standard input."""
    argv = [sys.executable, "-m", "llmstudiod.ctl.main", "--socket", daemon.admin.socket_path, *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, env=env, input=stdin)
