"""Small programs that answer the daemon's questions as llama-server does, or fail to."""

import textwrap
from pathlib import Path

# Refuses --bad as llama.cpp's parser does, and counts its calls in a file beside it.
GOOD = """
    case "$*" in
        --version) echo "version: 11669 (abc)"; echo "built with cc" ;;
        --completion-bash) echo 'local opts="--model --n-gpu-layers"' ;;
        --help) printf -- '-m,    --model FNAME       model path\\n--offline                  no network\\n' ;;
        --list-devices) printf 'Available devices:\\n  CUDA0: A (81000 MiB, 80000 MiB free)\\n' ;;
        *"--bad"*) echo "noise"; echo "error: invalid argument: --bad" >&2; exit 1 ;;
        *" --version") echo "version: 11669 (abc)" ;;
    esac
"""


def write_program(path: Path, body: str = GOOD, *, mode: int = 0o755) -> Path:
    """Write a shell script that notes each command line in ``<path>.calls`` and then does ``body``."""
    script = f'#!/bin/sh\nprintf "%s\\n" "$*" >> {path}.calls\n' + textwrap.dedent(body)
    path.write_text(script)
    path.chmod(mode)
    return path


def calls(path: Path) -> list[str]:
    """Return the command lines with which the program was called."""
    record = Path(f"{path}.calls")
    return record.read_text().splitlines() if record.exists() else []
