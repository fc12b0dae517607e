"""Asks llama-server what it can do, and lets its own parser check a command line, as plain processes."""

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence

from llmstudiod.core.binary_answers import QUESTIONS, Answer, complaint, described
from llmstudiod.core.command import DRY_RUN_MARK, ServerBinary, dry_run
from llmstudiod.core.errors import BinaryError

PROBE_TIMEOUT_S = 20.0


async def probe_binary(binary: ServerBinary, *, timeout_s: float = PROBE_TIMEOUT_S) -> ServerBinary:
    """Return ``binary`` with its version, flags and devices. Takes some 30 ms.

    Raises:
        BinaryError: It does not run.
    """
    # Exceptions come as results, so that none of the four is still running when the first one's is raised.
    asked = (_run([*binary.argv, flag], timeout_s=timeout_s) for flag in QUESTIONS)
    results = await asyncio.gather(*asked, return_exceptions=True)
    answers: dict[str, Answer] = {}
    for question, result in zip(QUESTIONS, results, strict=True):
        if isinstance(result, BaseException):
            raise result
        answers[question] = result
    return described(binary, answers)


async def check_argv(
    argv: Sequence[str], environment: Mapping[str, str], *, timeout_s: float = PROBE_TIMEOUT_S
) -> str | None:
    """Return what the binary's own parser has against ``argv``, or None. Takes 10 to 40 ms, reads no model.

    Raises:
        BinaryError: It cannot be executed, or does not end.
    """
    return complaint(await _run([*argv, "--version"], environment, timeout_s=timeout_s))


async def dry_run_output(
    argv: Sequence[str], environment: Mapping[str, str], *, timeout_s: float = PROBE_TIMEOUT_S
) -> list[str]:
    """Return what a server prints until it tells what memory it would take; it is ended there.

    Raises:
        BinaryError: It cannot be executed.
    """
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="llmstudiod-") as directory:
        process = await _started(dry_run(argv, socket_path=f"{directory}/llama.sock"), environment)
        assert process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                while line := await process.stdout.readline():
                    lines.append(line.decode(errors="replace"))
                    if DRY_RUN_MARK in lines[-1]:
                        break
        except (TimeoutError, ValueError):  # nothing told in time, or a line without an end
            lines.append("it did not tell its memory")
        finally:
            await _kill(process)
    return lines


async def _started(argv: Sequence[str], environment: Mapping[str, str] | None) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
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


async def _run(
    argv: Sequence[str], environment: Mapping[str, str] | None = None, *, timeout_s: float
) -> tuple[int, str]:
    """Run a command to its end; return its exit code and all that it printed."""
    process = await _started(argv, environment)
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


def clean_environment() -> dict[str, str]:
    """Return the environment that children start from: nothing of ours that llama-server would read."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/nonexistent",
        "LC_ALL": "C.UTF-8",
        **({"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}),
    }
