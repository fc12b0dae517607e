"""Asks an upstream whether it is ready, and who it is. One short connection a question; not the data path."""

import asyncio
import json
import socket
from dataclasses import dataclass
from typing import Any

from llmstudiod.core.lifecycle import UpstreamFacts

FIRST_PAUSE_S = 0.01
LONGEST_PAUSE_S = 0.25
ANSWER_TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 4 << 20
FOREIGN = "somebody who does not speak llama-server's language"
NOT_IMPLEMENTED = 501  # of a question to a server for embeddings alone, or for none


@dataclass(frozen=True, slots=True)
class NotOurs:
    """Somebody answers at the socket who is not the model that we started."""

    alias: str


async def wait_ready(socket_path: str, *, alias: str | None) -> UpstreamFacts | NotOurs:
    """Return what the server says of itself once /health and /props answer 200; waits for as long as it takes.

    ``alias`` is the name by which it must know itself; None: any will do.
    The caller bounds the wait: by the process's end, by the stall rule, by cancelling.
    """
    pause = FIRST_PAUSE_S
    while True:
        status, _ = await get(socket_path, "/health")
        if status == 200:
            status, body = await get(socket_path, "/props")
            if status == 200:
                return _facts(body, alias)
            if 400 <= status < 500:  # llama-server has this path
                return NotOurs(FOREIGN)
        await asyncio.sleep(pause)
        pause = min(pause * 1.3, LONGEST_PAUSE_S)


def _facts(body: bytes, alias: str | None) -> UpstreamFacts | NotOurs:
    try:
        props = json.loads(body)
        found = str(props.get("model_alias", alias))
        settings = props.get("default_generation_settings", {})
        facts = UpstreamFacts(n_parallel=int(props.get("total_slots", 1)), n_ctx=int(settings.get("n_ctx", 0)))
    except (ValueError, RecursionError, TypeError, AttributeError):
        return NotOurs(FOREIGN)
    return facts if alias in {None, found} else NotOurs(found)


def is_deserted(socket_path: str) -> bool:
    """Whether nobody listens there. At once: a connection to a Unix socket is made, or it is not."""
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        try:
            client.connect(socket_path)
        except (FileNotFoundError, ConnectionRefusedError):
            return True
        except OSError:  # as many wait as may wait
            return False
    return False


async def get(socket_path: str, path: str) -> tuple[int, bytes]:
    """Return status and body; status 0 means that nobody answers yet."""
    return await ask(socket_path, path, None, within_s=ANSWER_TIMEOUT_S)


async def ask(socket_path: str, path: str, sent: bytes | None, *, within_s: float) -> tuple[int, bytes]:
    """Return status and body of a GET, or of a POST of JSON; status 0 means that nobody answers in time."""
    method, about = (
        ("GET", "") if sent is None else ("POST", f"Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n")
    )
    try:
        async with asyncio.timeout(within_s):
            reader, writer = await asyncio.open_unix_connection(socket_path, limit=MAX_ANSWER_BYTES)
            try:
                head = f"{method} {path} HTTP/1.1\r\nHost: llmstudio\r\nConnection: close\r\n{about}\r\n"
                writer.write(head.encode() + (sent or b""))
                answer = await reader.readuntil(b"\r\n\r\n")
                body = b""
                while len(body) < MAX_ANSWER_BYTES and (part := await reader.read(MAX_ANSWER_BYTES)):
                    body += part
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return 0, b""
    try:
        return int(answer.split(None, 2)[1]), body
    except (IndexError, ValueError):
        return 0, b""


@dataclass(frozen=True, slots=True)
class SlotsSeen:
    """How far each slot is, and how many do nothing; ``progress`` None where the server does not tell."""

    progress: tuple[tuple[int, int, int], ...] | None  # task, tokens of its prompt done, tokens produced
    n_free: int


async def slots(socket_path: str) -> SlotsSeen | None:
    """Return what /slots says, or None where it does not answer in time. Source: llama-server's README, GET /slots.

    An answer that tells nothing is one too: /slots may be switched off (501), and is answered without the main loop.
    """
    status, body = await get(socket_path, "/slots")
    if not status:
        return None
    try:
        told = json.loads(body) if status == 200 else None
        if not isinstance(told, list):
            return SlotsSeen(None, 0)
        progress = tuple(
            (_number(slot, "id_task"), _number(slot, "n_prompt_tokens_processed"), _decoded(slot)) for slot in told
        )
        return SlotsSeen(progress, sum(not slot.get("is_processing") for slot in told))
    except (ValueError, RecursionError, TypeError, AttributeError):
        return None


async def slot_table(socket_path: str) -> list[dict[str, Any]] | None:
    """Return each slot for people, or None where /slots does not answer: no prompts, no words."""
    status, body = await get(socket_path, "/slots")
    try:
        told = json.loads(body) if status == 200 else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(told, list) or not all(isinstance(slot, dict) for slot in told):
        return None
    return [
        {
            "id": _number(slot, "id"),
            "is_busy": bool(slot.get("is_processing")),
            "n_ctx": _number(slot, "n_ctx"),
            "n_prompt": _number(slot, "n_prompt_tokens_processed"),
            "n_decoded": _decoded(slot),
        }
        for slot in told
    ]


def _number(slot: dict[str, Any], name: str) -> int:
    value = slot.get(name)
    return value if isinstance(value, int) else 0


def _decoded(slot: dict[str, Any]) -> int:
    tokens = slot.get("next_token")
    parts = tokens if isinstance(tokens, list) else [tokens]
    return sum(_number(part, "n_decoded") for part in parts if isinstance(part, dict))


async def produces_a_token(socket_path: str, *, is_embedding: bool, within_s: float) -> bool:
    """Return whether the server computes: one token, or one embedding, asked for with as little as possible.

    ``is_embedding`` says which to ask for first; it may be that of another recipe than the server was started with.
    """
    questions = [
        ("/completion", {"prompt": "a", "n_predict": 1, "cache_prompt": False}),
        ("/embedding", {"content": "a"}),
    ]
    for path, body in reversed(questions) if is_embedding else questions:
        status, _ = await ask(socket_path, path, json.dumps(body).encode(), within_s=within_s)
        if status != NOT_IMPLEMENTED:
            return 0 < status < 500
    return True  # it has no such question; that it says so is all there is
