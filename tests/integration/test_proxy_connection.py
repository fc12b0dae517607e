"""The client's connection: how long it may rest, what may be sent ahead on it, and what it needs of aiohttp."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp.web_protocol import RequestHandler

from llmstudiod.http.client import RELIES_ON, can_be_fast
from llmstudiod.http.fast_path import FastPath
from tests.integration.fake_upstream import SSE_HEAD, Call, answer, event
from tests.integration.house import House, eventually, open_house

ASK = {"model": "tiny"}
REST_S = 0.3


@pytest.fixture(params=[False, True], ids=["usual way", "fast path"])
async def warm(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    """The first model is ready; what a client sees is the same on both ways."""
    async with open_house(tmp_path, has_fast_path=request.param) as house:
        await house.warm_up()
        yield house


# Time of rest


@pytest.fixture(params=[False, True], ids=["usual way", "fast path"])
async def hasty(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[House]:
    """Closes connections that rest for a moment."""
    monkeypatch.setattr("llmstudiod.http.client.KEEPALIVE_S", REST_S)
    async with open_house(tmp_path, has_fast_path=request.param) as house:
        await house.warm_up()
        yield house


async def test_connection_is_closed_after_its_rest(hasty: House) -> None:
    """A request that took longer than a connection may rest does not let it rest for ever afterwards."""

    async def script(call: Call) -> None:
        await asyncio.sleep(2.5 * REST_S)
        await call.send(answer())

    hasty.tiny.script = script
    client = await hasty.connect()
    for _ in range(2):
        await client.post(ASK)
        assert (await client.answer()).status == 200
    assert await client.is_closed()


@pytest.mark.parametrize("gather_s", [0.0, 10.0], ids=["handed over", "gathered"])
async def test_request_that_comes_slowly_is_answered(
    hasty: House, monkeypatch: pytest.MonkeyPatch, gather_s: float
) -> None:
    """A connection on which a body is still coming does not rest."""
    monkeypatch.setattr("llmstudiod.http.client.GATHER_S", gather_s)
    client = await hasty.connect()
    await client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n{")
    for piece in (b'"model":', b'"tiny"', b"}"):
        await asyncio.sleep(0.8 * REST_S)
        await client.send(piece)
    assert (await client.answer()).json == {"said": "hello"}
    await client.post(ASK)
    assert (await client.answer()).json == {"said": "hello"}
    assert await client.is_closed()


@pytest.mark.parametrize("begin", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"])
async def test_head_that_never_ends_is_given_up(hasty: House, monkeypatch: pytest.MonkeyPatch, begin: bytes) -> None:
    """A client that says nothing, or begins a request and says no more, does not keep its connection."""
    monkeypatch.setattr("llmstudiod.http.client.GATHER_S", 2 * REST_S)
    client = await hasty.connect()
    await client.send(begin)
    assert await client.is_closed()


# Pipelining


async def test_client_that_sends_far_ahead_is_seen_to_leave(tmp_path: Path) -> None:
    """Nobody holds a place by filling the connection that tells of their leaving."""
    async with open_house(tmp_path) as house:
        await house.warm_up()

        async def script(call: Call) -> None:
            await call.send(SSE_HEAD + event("one"))
            await call.client_gone()

        house.tiny.script = script
        client = await house.connect()
        await client.post(ASK)
        assert (await client.head()).status == 200
        assert await client.read_chunk() == b"data: one\n\n"
        await client.send(b"x" * (80 << 10))
        await asyncio.sleep(0.05)
        client.close()
        await eventually(lambda: house.in_flight() == 0, within_s=1.0)


async def test_request_sent_ahead_of_a_lost_one_is_answered(warm: House) -> None:
    """A request that goes the usual way in the end takes those with it that were sent behind it."""
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        if len(warm.tiny.requests) == 1:
            await go_on.wait()
            call.die()
        else:
            await call.send(answer(call.received.body))

    warm.tiny.script = script
    client = await warm.connect()
    await client.post(ASK)
    await eventually(lambda: warm.tiny.requests)
    await client.post(ASK | {"x": "y" * (60 << 10)})
    await asyncio.sleep(0.05)
    go_on.set()
    assert (await client.answer()).json == ASK
    assert len((await client.answer()).body) > 60 << 10


# Another aiohttp


@pytest.mark.parametrize("missing", [*RELIES_ON, "_process_keepalive"])
def test_private_parts_of_aiohttp(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path is for an aiohttp that has all that it stands on."""
    connection = SimpleNamespace(**dict.fromkeys(RELIES_ON))
    assert can_be_fast(connection)
    if missing in RELIES_ON:
        delattr(connection, missing)
    else:
        monkeypatch.delattr(RequestHandler, missing)
    assert not can_be_fast(connection)


async def test_aiohttp_without_a_private_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An aiohttp that has renamed something costs the fast path, and nothing else."""
    monkeypatch.setattr("llmstudiod.http.client.RELIES_ON", (*RELIES_ON, "_renamed"))
    monkeypatch.setattr(FastPath, "start", None)
    async with open_house(tmp_path) as house:
        await house.warm_up()
        client = await house.connect()
        for _ in range(2):
            await client.post(ASK)
            assert (await client.answer()).json == {"said": "hello"}
