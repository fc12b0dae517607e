"""Finds llama-server, asks it what it can do, and lets its own parser check a command line.

Found by the setting, ``LLAMA_SERVER_PATH``, ``PATH``, then the embedded engine: never by a recipe or over HTTP.
"""

import asyncio
import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmstudiod.core.command import ServerBinary
from llmstudiod.core.flags import parse_help_flags, parse_known_flags
from llmstudiod.errors import BinaryError

PROBE_TIMEOUT_S = 20.0
ENGINE = (sys.executable, "-m", "llmstudiod.engine")
INSTALL_HINT = (
    "install llama.cpp's llama-server (Debian: `apt install llama.cpp-tools`) or the embedded engine "
    "(`pip install 'llmstudiod[engine]'`), or set llama_server in llmstudiod.yaml"
)


def find_binary(setting: str | None, environment: Mapping[str, str]) -> ServerBinary:
    """Return the program to run, not yet asked anything.

    Raises:
        BinaryError: There is none, or the one that was named cannot be executed.
    """
    for source, path in (("llama_server", setting), ("LLAMA_SERVER_PATH", environment.get("LLAMA_SERVER_PATH"))):
        if path:
            return ServerBinary((_executable(path, source),), source)
    found = shutil.which("llama-server", path=environment.get("PATH", os.defpath))
    if found:
        return ServerBinary((str(Path(found).absolute()),), "PATH")
    if importlib.util.find_spec("xllamacpp") is not None:
        return ServerBinary(ENGINE, "the embedded engine", is_engine=True)
    raise BinaryError("there is no llama-server on this machine", hint=INSTALL_HINT)


def _executable(path: str, source: str) -> str:
    if not Path(path).is_absolute():
        hint = "write it from the root on, such as /usr/bin/llama-server"
        raise BinaryError(f"{source}: expected an absolute path, found '{path}'", hint=hint)
    # os.path, unlike Path, answers False where a directory may not be searched.
    if not os.path.isfile(path):  # noqa: PTH113
        raise BinaryError(f"{source}: expected a program, found no file '{path}'", hint=INSTALL_HINT)
    if not os.access(path, os.X_OK):
        hint = f"chmod +x {shlex.quote(path)}"
        raise BinaryError(f"{source}: expected a program, found '{path}', which is not executable", hint=hint)
    return path


async def probe_binary(binary: ServerBinary, *, timeout_s: float = PROBE_TIMEOUT_S) -> ServerBinary:
    """Return ``binary`` with its version, flags and devices. Takes some 30 ms.

    Raises:
        BinaryError: It does not run.
    """
    questions = ("--version", "--completion-bash", "--help", "--list-devices")
    # Exceptions come as results, so that none of the four is still running when the first one's is raised.
    asked = (_run([*binary.argv, flag], timeout_s=timeout_s) for flag in questions)
    results = await asyncio.gather(*asked, return_exceptions=True)
    answers = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        answers.append(result)
    version, completion, help_text, devices = answers
    if version[0] != 0:
        command = shlex.join([*binary.argv, "--version"])
        raise BinaryError(
            f"`{command}` {_ended(version[0])}: {_last_line(version[1]) or 'it printed nothing'}",
            hint="run it by hand: libraries may be missing, or it is built for another machine",
        )
    return ServerBinary(
        argv=binary.argv,
        source=binary.source,
        version=next((line for line in version[1].splitlines() if "version" in line), "").removeprefix("version: "),
        known_flags=parse_known_flags(completion[1]) | parse_help_flags(help_text[1]),
        devices=_devices(devices[1]),
        is_engine=binary.is_engine,
    )


async def check_argv(
    argv: Sequence[str], environment: Mapping[str, str], *, timeout_s: float = PROBE_TIMEOUT_S
) -> str | None:
    """Return what the binary's own parser has against ``argv``, or None. Takes 10 to 40 ms, reads no model.

    Raises:
        BinaryError: It cannot be executed, or does not end.
    """
    code, output = await _run([*argv, "--version"], environment, timeout_s=timeout_s)
    if code == 0:
        return None
    telling = [line for line in output.splitlines() if line.startswith(("error", "error while"))]
    return telling[0] if telling else _last_line(output) or f"it {_ended(code)}"


async def _run(
    argv: Sequence[str], environment: Mapping[str, str] | None = None, *, timeout_s: float
) -> tuple[int, str]:
    """Run a command to its end; return its exit code and all that it printed."""
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=clean_environment() | dict(environment or {}),
            start_new_session=True,
        )
    except OSError as error:
        hint = "is it built for this machine, and is what its first line names installed?"
        raise BinaryError(f"cannot run '{argv[0]}': {error.strerror}", hint=hint) from error
    is_done = False
    try:
        async with asyncio.timeout(timeout_s):
            output, _ = await process.communicate()
            is_done = True
    except TimeoutError:
        hint = "run it by hand; a driver that hangs holds it up too (look at `dmesg`)"
        raise BinaryError(f"`{argv[0]} … {argv[-1]}` did not end within {timeout_s:g} s", hint=hint) from None
    finally:
        if not is_done:
            await _kill(process)
    return process.returncode or 0, output.decode(errors="replace")


async def _kill(process: asyncio.subprocess.Process) -> None:
    """End a command that was given up, with whatever it started, which may be what holds the pipe open."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}"


def clean_environment() -> dict[str, str]:
    """Return the environment that children start from: nothing of ours that llama-server would read."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/nonexistent",
        "LC_ALL": "C.UTF-8",
        **({"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}),
    }


def _devices(text: str) -> tuple[str, ...]:
    lines = [line.strip() for line in text.splitlines() if line.startswith("  ")]
    return tuple(line.partition(":")[0] for line in lines if ":" in line)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""
