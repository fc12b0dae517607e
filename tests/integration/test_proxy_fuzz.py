"""Whatever bytes an upstream sends, the proxy survives, the client learns an end, and the next request works."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.fake_upstream import SSE_HEAD, Call, answer, chunk, event, say_hello
from tests.integration.house import House, open_house

ASK = {"model": "tiny"}
STREAM = ASK | {"stream": True}
ROUNDS = 150
SEEDS = (
    answer(b'{"x":1}'),
    answer(b'{"x":1}', status=b"500 Oh", headers=b"Connection: close\r\n"),
    SSE_HEAD + event("one") + event("two") + chunk(b""),
    b"HTTP/1.1 100 Continue\r\n\r\n" + SSE_HEAD + event("one") + b"0\r\nTrailer: x\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: one\n\n",
)
SPICE = (
    b"\r\n",
    b"\n",
    b"\0",
    b"\r\n\r\n",
    b"0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n",
    b"Content-Length: 5\r\n",
    b"ffff",
    b";",
)


def mutated(chance: random.Random) -> bytes:
    """Return an answer with some bytes changed, cut, doubled or moved; now and then plain noise."""
    wire = bytearray(chance.choice(SEEDS))
    if chance.random() < 0.1:
        return chance.randbytes(chance.randrange(200))
    for _ in range(chance.randrange(4)):
        place = chance.randrange(len(wire) + 1)
        match chance.randrange(5):
            case 0:
                wire[place : place + 1] = chance.randbytes(1)
            case 1:
                wire[place:place] = chance.choice(SPICE)
            case 2:
                del wire[place : place + chance.randrange(20)]
            case 3:
                wire[place:place] = wire[place : place + 30]
            case _:
                del wire[place:]
    return bytes(wire)


@pytest.fixture(params=[False, True], ids=["usual way", "fast path"])
async def warm(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    """The first model is ready. No process ends here, so there is nothing to wait for when a connection does."""
    monkeypatch.setattr("llmstudiod.http.proxy.WHY_TIMEOUT_S", 0.001)
    async with open_house(tmp_path, has_fast_path=request.param) as house:
        await house.warm_up()
        yield house


@pytest.mark.parametrize("seed", range(3))
async def test_any_bytes_of_an_upstream(warm: House, seed: int) -> None:
    """The client gets an answer or a cut, in a bounded time; `open_house` sees to it that no error was logged."""
    chance = random.Random(seed)

    async def script(call: Call) -> None:
        wire = mutated(chance)
        cut = chance.randrange(len(wire) + 1)
        await call.send(wire[:cut])
        await asyncio.sleep(0)
        await call.send(wire[cut:])
        call.close()

    for _ in range(ROUNDS):
        warm.tiny.script = script
        client = await warm.connect()
        await client.post(chance.choice((ASK, STREAM)), version=chance.choice(("1.0", "1.1")), headers=CLOSE)
        found = await read_all(client.reader)
        assert found == b"" or found.startswith(b"HTTP/1.")
        client.close()
        assert warm.in_flight() == 0
        warm.tiny.script = say_hello
        assert (await warm.post(ASK)).json == {"said": "hello"}


CLOSE = "Connection: close\r\n"


async def read_all(reader: asyncio.StreamReader) -> bytes:
    """Return everything up to the end of the connection, or up to its cut."""
    found = b""
    async with asyncio.timeout(10):
        try:
            while piece := await reader.read(1 << 16):
                found += piece
        except ConnectionError:
            pass
    return found


@pytest.mark.parametrize("seed", range(2))
async def test_any_bytes_on_a_kept_connection(warm: House, seed: int) -> None:
    """An upstream that goes on after nonsense, without closing, poisons nobody else's answer."""
    chance = random.Random(1000 + seed)
    secret = b"SECRET"

    async def script(call: Call) -> None:
        await call.send(mutated(chance) + answer(secret))
        await asyncio.sleep(0)
        if chance.random() < 0.5:
            call.close()

    for _ in range(ROUNDS):
        warm.tiny.script = script
        client = await warm.connect()
        await client.post(ASK)
        try:
            await asyncio.wait_for(client.reader.read(1 << 16), 0.02)
        except (TimeoutError, ConnectionError):
            pass
        client.close()
        warm.tiny.script = say_hello
        assert (await warm.post(ASK)).json == {"said": "hello"}


async def test_endless_head(warm: House) -> None:
    """A head without an end is given up before it fills the memory."""

    async def script(call: Call) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\n")
        for _ in range(10_000):
            await call.send(b"X-A: " + b"a" * 100 + b"\r\n")

    warm.tiny.script = script
    reply = await warm.post(ASK)
    assert (reply.status, reply.error["kind"]) == (502, "upstream_crashed")


async def test_endless_interim_answers(warm: House) -> None:
    """A flood of 100 Continue holds up nobody but the one who asked."""

    async def script(call: Call) -> None:
        for _ in range(5000):
            await call.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 10)
        await call.send(answer(b"[]"))

    warm.tiny.script = script
    assert (await warm.post(ASK)).body == b"[]"
