"""Connections to an upstream: kept, retired in time, and never the cause of an error or of a request done twice."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llmstudiod.http.relay import IDLE_LIMIT_S, USES_LIMIT
from llmstudiod.launchers.base import Exit
from tests.integration.fake_upstream import SSE_HEAD, Call, answer, chunk, event
from tests.integration.house import House, eventually, open_house

ASK = {"model": "tiny"}


@pytest.fixture(params=[False, True], ids=["usual way", "fast path"])
async def warm(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    """The first model is ready; connections are used alike on both ways."""
    async with open_house(tmp_path, has_fast_path=request.param) as house:
        await house.warm_up()
        yield house


def connections_of(house: House) -> list[int]:
    """Return which connection each request came on."""
    return [received.connection for received in house.tiny.requests]


async def test_connection_is_used_again(warm: House) -> None:
    """Requests that follow each other share one connection, also from different clients."""
    for _ in range(3):
        assert (await warm.post(ASK)).status == 200
    client = await warm.connect()
    for _ in range(3):
        await client.post(ASK)
        assert (await client.answer()).status == 200
    assert connections_of(warm) == [1] * 6


async def test_connection_is_retired_after_its_uses(warm: House) -> None:
    """llama-server closes after 100 requests; nothing of ours comes near that."""
    client = await warm.connect()
    for _ in range(USES_LIMIT + 10):
        await client.post(ASK)
        assert (await client.answer()).status == 200
    assert connections_of(warm) == [1] * USES_LIMIT + [2] * 10
    assert USES_LIMIT < 100


async def test_connection_is_retired_after_a_rest(warm: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-server closes after 5 s of rest; an older connection is not tried."""
    assert IDLE_LIMIT_S < 5
    assert (await warm.post(ASK)).status == 200
    monkeypatch.setattr("llmstudiod.http.relay.IDLE_LIMIT_S", 0.0)  # instead of a rest of 4 s
    assert (await warm.post(ASK)).status == 200
    assert connections_of(warm) == [1, 2]
    await eventually(lambda: warm.tiny.open_connections == 1)


async def test_each_stream_has_a_connection(warm: House) -> None:
    """What runs at the same time does not share a connection; what was opened is used again."""
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await call.send(SSE_HEAD + event("one"))
        await go_on.wait()
        await call.send(chunk(b""))

    warm.tiny.script = script
    clients = [await warm.connect() for _ in range(4)]
    for client in clients:
        await client.post(ASK)
        await client.head()
    assert sorted(connections_of(warm)) == [1, 2, 3, 4]
    go_on.set()
    for client in clients:
        while await client.read_chunk():
            pass
    for _ in range(4):
        assert (await warm.post(ASK)).status == 200
    assert warm.tiny.connections == 4


async def test_connection_closed_while_it_rests(warm: House) -> None:
    """The upstream's close is seen, and the next request takes a fresh connection."""
    assert (await warm.post(ASK)).status == 200
    warm.tiny.drop_connections()
    await eventually(lambda: warm.tiny.open_connections == 0)
    assert (await warm.post(ASK)).status == 200
    assert connections_of(warm) == [1, 2]


async def test_connection_closed_under_our_hands(warm: House) -> None:
    """A request that meets the close of a reused connection is sent once more, on a fresh one."""

    async def script(call: Call) -> None:
        if call.received.connection == 1 and len(warm.tiny.requests) > 1:
            call.die()
        else:
            await call.send(answer())

    warm.tiny.script = script
    client = await warm.connect()
    for _ in range(3):
        await client.post(ASK)
        assert (await client.answer()).status == 200
    assert connections_of(warm) == [1, 1, 2, 2]
    assert {received.body for received in warm.tiny.requests} == {b'{"model": "tiny"}'}


async def test_request_is_sent_twice_at_most(warm: House) -> None:
    """However many connections lie ready, a request that is dropped twice is given up."""
    go_on = asyncio.Event()

    async def hold(call: Call) -> None:
        await go_on.wait()
        await call.send(answer())

    async def drop(call: Call) -> None:
        call.die()

    warm.tiny.script = hold
    clients = [await warm.connect() for _ in range(4)]
    for client in clients:
        await client.post(ASK)
    await eventually(lambda: len(warm.tiny.requests) == 4)
    go_on.set()
    for client in clients:
        assert (await client.answer()).status == 200
    warm.tiny.script = drop
    reply = await warm.post(ASK)
    assert (reply.status, reply.error["kind"]) == (502, "upstream_crashed")
    assert len(warm.tiny.requests) == 6


async def test_request_dropped_by_a_fresh_connection_is_not_repeated(warm: House) -> None:
    """A fresh connection that dies has most likely taken the request."""
    warm.tiny.drop_connections()
    await eventually(lambda: warm.tiny.open_connections == 0)

    async def drop(call: Call) -> None:
        call.die()

    warm.tiny.script = drop
    assert (await warm.post(ASK)).status == 502
    assert len(warm.tiny.requests) == 1


@pytest.mark.parametrize("seen", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n", SSE_HEAD])
async def test_request_is_not_repeated_once_anything_was_answered(warm: House, seen: bytes) -> None:
    """A byte of an answer means that the request was at work."""
    assert (await warm.post(ASK)).status == 200

    async def script(call: Call) -> None:
        await call.send(seen)
        await asyncio.sleep(0.01)
        call.die()

    warm.tiny.script = script
    client = await warm.connect()
    await client.post(ASK)
    assert (await client.head()).status == (200 if seen == SSE_HEAD else 502)
    assert connections_of(warm) == [1, 1]


async def test_bytes_while_it_rests_end_a_connection(warm: House) -> None:
    """What nobody asked for is nobody's answer."""

    async def script(call: Call) -> None:
        await call.send(answer(b"[1]"))
        await asyncio.sleep(0.02)
        await call.send(answer(b"evil"))

    warm.tiny.script = script
    assert (await warm.post(ASK)).body == b"[1]"
    await eventually(lambda: warm.tiny.open_connections == 0)
    assert (await warm.post(ASK)).body == b"[1]"


async def test_connection_goes_on_after_back_pressure(warm: House) -> None:
    """A connection that was held back for a slow client reads again for the next one."""
    big = b"z" * (16 << 20)

    async def script(call: Call) -> None:
        await call.send(answer(big))

    warm.tiny.script = script
    slow = await warm.connect(limit=1 << 12)
    await slow.post(ASK)
    await eventually(lambda: warm.tiny.requests)
    await asyncio.sleep(0.1)
    assert (await slow.answer()).body == big
    for _ in range(2):
        assert (await warm.post(ASK)).body == big
    assert set(connections_of(warm)) == {1}


async def test_connections_end_with_the_run(warm: House) -> None:
    """A model that was unloaded and loaded again is not spoken to over old connections."""
    assert (await warm.post(ASK)).status == 200
    await warm.supervisor.unload("tiny")
    await eventually(lambda: warm.tiny.open_connections == 0)
    assert (await warm.post(ASK)).status == 200
    assert connections_of(warm) == [1, 2]


async def test_crash_between_requests(warm: House) -> None:
    """A model that died while it rested comes back for the next request; when it dies again, not at once."""
    for _ in range(2):
        assert (await warm.post(ASK)).status == 200
        warm.launcher.die("tiny", Exit("signal", signal=11))
        await eventually(lambda: warm.state() == "failed")
    reply = await warm.post(ASK)
    assert (reply.status, reply.error["kind"]) == (503, "backing_off")
    assert "signal 11" in reply.error["message"]
