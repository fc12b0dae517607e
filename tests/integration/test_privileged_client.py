"""How the daemon asks its launcher, which may die at any moment and is started again by its socket."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from llmstudiod.core.command import ServerBinary
from llmstudiod.core.errors import LauncherError
from llmstudiod.core.launcher_protocol import Act, Request, Verb
from llmstudiod.core.settings import Settings
from llmstudiod.launchers.privileged import TRIES, PrivilegedClient, PrivilegedProgram

GOOD = b'{"fine": true}\n'
BINARY = ServerBinary(("/usr/bin/llama-server",), "PATH", "1", frozenset({"--model"}))


@asynccontextmanager
async def launcher(directory: Path, answers: Sequence[bytes]) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A launcher's socket that gives one answer after the other, then none; and what it was asked."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        if line:  # a connection may be made ahead of its use
            asked.append(line)
            writer.write(answers[len(asked) - 1] if len(asked) <= len(answers) else b"")
        writer.close()

    path = str(directory / "launcher.sock")
    server = await asyncio.start_unix_server(serve, path)
    try:
        yield path, asked
    finally:
        server.close()


@pytest.mark.parametrize("answers", [[GOOD], [b"", GOOD], [b"", b"", GOOD], [b'{"fi', GOOD]])
async def test_asked_again_when_it_dies_before_it_has_answered(tmp_path: Path, answers: list[bytes]) -> None:
    """Half an answer is none; each try asks the same."""
    async with launcher(tmp_path, answers) as (path, asked):
        assert await PrivilegedClient(path).ask(Act(Verb.PROBE)) == {"fine": True}
        assert len(asked) == len(answers)
        assert len(set(asked)) == 1


@pytest.mark.parametrize("answers", [[], [b'{"fi'] * TRIES])
async def test_given_up_in_the_end(tmp_path: Path, answers: list[bytes]) -> None:
    """The error says that nobody answers, and where to look."""
    async with launcher(tmp_path, answers) as (path, asked):
        with pytest.raises(LauncherError, match="does not answer") as caught:
            await PrivilegedClient(path).ask(Act(Verb.PROBE))
        assert len(asked) == TRIES
        assert "llmstudio-launcher" in str(caught.value.hint)


async def test_an_error_is_not_asked_for_twice(tmp_path: Path) -> None:
    """What the launcher says is its answer."""
    told = {"error": {"kind": "launcher", "message": "no", "hint": "so it is", "details": {}}}
    async with launcher(tmp_path, [json.dumps(told).encode() + b"\n", GOOD]) as (path, asked):
        with pytest.raises(LauncherError, match="no"):
            await PrivilegedClient(path).ask(Act(Verb.PROBE))
        assert len(asked) == 1


class Helper:
    """A launcher whose settings are changed while it looks for the binary."""

    def __init__(self) -> None:
        self.program = PrivilegedProgram(self)
        self.n_asked = 0

    def wake(self) -> None:
        """Nothing to start."""

    def close(self) -> None:
        """Nothing to give up."""

    async def ask(self, request: Request) -> dict[str, Any]:
        """Answer late."""
        assert request == Act(Verb.PROBE)
        self.n_asked += 1
        if self.n_asked == 1:
            self.program.use_settings(Settings())
        return {"binary": asdict(BINARY)}


async def test_settings_that_change_while_the_binary_is_sought() -> None:
    """Whoever asked gets what was found; whoever asks next has it sought anew, once."""
    helper = Helper()
    assert await helper.program.binary() == BINARY
    assert await helper.program.binary() == BINARY
    assert await helper.program.binary() == BINARY
    assert helper.n_asked == 2
