"""JSON that is nested without end, where a program that we only read wrote it: it counts as what it is, no JSON."""

import asyncio
from pathlib import Path

from llmstudiod.adapters import probe
from llmstudiod.core.learned import told_by_breakdown
from llmstudiod.core.reasons import explain_exit
from llmstudiod.core.usage import NOTHING, spent

DEEP = "[" * 4000


def test_usage_of_an_answer() -> None:
    """It tells nothing."""
    assert spent(b'}],"usage":{"a":' + DEEP.encode()) == NOTHING


def test_lines_of_a_log() -> None:
    """They are shown as they are."""
    line = '{"type":' + DEEP
    assert explain_exit(result="exit-code", code=1, signal=None, lines=(line,)).lines == (line,)
    assert told_by_breakdown('{"fit_memory_breakdown":' + DEEP, output=0) is None


async def test_answers_of_a_probe(tmp_path: Path) -> None:
    """Whoever answers so is no llama-server."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(DEEP) + DEEP.encode())
        writer.close()

    path = str(tmp_path / "s")
    async with await asyncio.start_unix_server(serve, path):
        assert isinstance(await probe.wait_ready(path, alias="tiny"), probe.NotOurs)
        assert await probe.slots(path) is None
        assert await probe.slot_table(path) is None
