"""Asks an upstream whether it is ready, and who it is. One short connection a question; not the data path."""

import asyncio
import json
from dataclasses import dataclass

from llmstudiod.core.lifecycle import UpstreamFacts

FIRST_PAUSE_S = 0.01
LONGEST_PAUSE_S = 0.25
ANSWER_TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class NotOurs:
    """Somebody answers at the socket who is not the model that we started."""

    alias: str


async def wait_ready(socket_path: str, *, alias: str | None) -> UpstreamFacts | NotOurs:
    """Return what the server says of itself once /health answers 200; waits for as long as it takes.

    ``alias`` is the name by which it must know itself; None: any will do.
    The caller bounds the wait: by the process's end, by the stall rule, by cancelling.
    """
    pause = FIRST_PAUSE_S
    while True:
        status, _ = await get(socket_path, "/health")
        if status == 200:
            break
        await asyncio.sleep(pause)
        pause = min(pause * 1.3, LONGEST_PAUSE_S)
    status, body = await get(socket_path, "/props")
    try:
        props = json.loads(body) if status == 200 else {}
        found = str(props.get("model_alias", alias))
        settings = props.get("default_generation_settings", {})
        facts = UpstreamFacts(n_parallel=int(props.get("total_slots", 1)), n_ctx=int(settings.get("n_ctx", 0)))
    except (ValueError, TypeError, AttributeError):
        return NotOurs("somebody who does not speak llama-server's language")
    return facts if alias in {None, found} else NotOurs(found)


async def get(socket_path: str, path: str) -> tuple[int, bytes]:
    """Return status and body; status 0 means that nobody answers yet."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(socket_path, limit=MAX_ANSWER_BYTES)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: llmstudio\r\nConnection: close\r\n\r\n".encode())
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.read(MAX_ANSWER_BYTES)
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return 0, b""
    try:
        return int(head.split(None, 2)[1]), body
    except (IndexError, ValueError):
        return 0, b""
