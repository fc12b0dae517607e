"""One exchange and its pool before a fake upstream: the moments that a real client cannot be made to hit surely."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llmstudiod.http.relay import Exchange, Outcome, Pool, request_head
from tests.integration.fake_upstream import SSE_HEAD, Call, FakeUpstream, answer, chunk
from tests.integration.house import eventually

HEAD = request_head("POST", "/x", [], 0)
PIECE = chunk(b"x" * 65_000)
BOUND = 8 << 20


@pytest.fixture
async def upstream(tmp_path: Path) -> AsyncIterator[FakeUpstream]:
    """Listens."""
    upstream = FakeUpstream("tiny")
    await upstream.listen(str(tmp_path / "x.sock"))
    yield upstream
    upstream.stop()
    assert upstream.faults == []


@pytest.fixture
async def pool(tmp_path: Path, upstream: FakeUpstream) -> Pool:
    """Leads to the upstream."""
    return Pool(str(tmp_path / "x.sock"))


class Sink:
    """A client's end; ``pauses_after`` bytes it says, while it is being written to, that it can take no more."""

    def __init__(self, pool: Pool, *, pauses_after: int | None = None) -> None:
        self.received = b""
        self._pauses_after = pauses_after
        self.exchange = Exchange(
            pool, self.write, client_is_http11=True, is_begun=False, is_head_request=False, is_last=False
        )

    def write(self, data: bytes) -> None:
        """Take bytes as a transport does: all of them, and a pause is told at once."""
        self.received += data
        if self._pauses_after is not None and len(self.received) > self._pauses_after:
            self.exchange.client_paused()

    @property
    def body(self) -> bytes:
        """What came after the head."""
        return self.received.partition(b"\r\n\r\n")[2]


async def test_pause_before_there_is_a_connection(upstream: FakeUpstream, pool: Pool) -> None:
    """A client that is still busy with the answer before holds the next one back from its first byte."""
    sent = 0

    async def script(call: Call) -> None:
        nonlocal sent
        call.writer.transport.set_write_buffer_limits(1 << 16)
        await call.send(SSE_HEAD)
        for _ in range(400):
            await call.send(PIECE)
            sent += len(PIECE)
        await call.send(chunk(b""))

    upstream.script = script
    sink = Sink(pool)
    sink.exchange.client_paused()
    async with asyncio.TaskGroup() as group:
        run = group.create_task(sink.exchange.run(HEAD, b""))
        await eventually(lambda: sent)
        await asyncio.sleep(0.1)
        assert sent < BOUND
        assert sink.received == b""
        sink.exchange.client_resumed()
    assert run.result() is Outcome.COMPLETE
    assert sink.body == PIECE * 400 + chunk(b"")


async def test_answer_that_ends_in_a_pause_leaves_a_good_connection(upstream: FakeUpstream, pool: Pool) -> None:
    """The last bytes may be what makes a client pause; the connection reads on for the next request."""

    async def script(call: Call) -> None:
        await call.send(answer(b"y" * 1000))

    upstream.script = script
    for _ in range(3):
        sink = Sink(pool, pauses_after=500)
        async with asyncio.timeout(5):
            assert await sink.exchange.run(HEAD, b"") is Outcome.COMPLETE
        sink.exchange.client_resumed()
        assert sink.body == b"y" * 1000
    assert [received.connection for received in upstream.requests] == [1, 1, 1]


async def test_connection_given_back_meanwhile_is_not_used_for_a_retry(upstream: FakeUpstream, pool: Pool) -> None:
    """A second try goes over a fresh connection even when a used one has become free."""
    spare = await pool.connect()
    pool.give_back(await pool.connect())

    async def script(call: Call) -> None:
        if len(upstream.requests) == 1:
            call.die()
        else:
            await call.send(answer())

    upstream.script = script
    sink = Sink(pool)
    forget = pool.drop_idle

    def give_back_too() -> None:
        forget()
        pool.give_back(spare)

    pool.drop_idle = give_back_too  # type: ignore[method-assign] # another exchange ends at this very moment
    assert await sink.exchange.run(HEAD, b"") is Outcome.COMPLETE
    assert pool.take_idle() is not spare
    assert pool.take_idle() is spare


@pytest.mark.parametrize("body", [b"", b"z" * (8 << 20)], ids=["waiting", "sending"])
async def test_cancelling_cuts_the_upstream_off(upstream: FakeUpstream, pool: Pool, body: bytes) -> None:
    """A request that nobody wants any more holds no connection, wherever it stands."""
    upstream.reads_body_first = False
    stalled = asyncio.Event()

    async def script(call: Call) -> None:
        await stalled.wait()
        call.close()

    upstream.script = script
    sink = Sink(pool)
    run = asyncio.get_running_loop().create_task(sink.exchange.run(HEAD, body))
    await eventually(lambda: upstream.requests)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    stalled.set()
    assert pool.take_idle() is None
    await eventually(lambda: upstream.open_connections == 0)


async def test_nobody_listens(tmp_path: Path) -> None:
    """A socket that is not there is a lost upstream, not an exception."""
    sink = Sink(Pool(str(tmp_path / "none.sock")))
    assert await sink.exchange.run(HEAD, b"") is Outcome.UPSTREAM_LOST


def listening_full(path: Path) -> tuple[socket.socket, list[socket.socket]]:
    """Return a listener whose backlog is full, and the connections that fill it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.setblocking(False)
    listener.bind(str(path))
    listener.listen(1)
    waiting: list[socket.socket] = []
    while True:
        waiting.append(socket.socket(socket.AF_UNIX))
        waiting[-1].setblocking(False)
        try:
            waiting[-1].connect(str(path))
        except BlockingIOError:
            return listener, waiting


async def test_full_backlog_is_waited_for(tmp_path: Path) -> None:
    """A model's server that is slow to accept is not a lost one."""
    listener, waiting = listening_full(tmp_path / "full.sock")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.read(1):
            writer.write(answer(b"late"))
        writer.close()

    sink = Sink(Pool(str(tmp_path / "full.sock")))
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        run = group.create_task(sink.exchange.run(HEAD, b""))
        await asyncio.sleep(0.1)
        assert not run.done()
        for sock in waiting:
            sock.close()
        server = await asyncio.start_unix_server(serve, sock=listener)
    assert run.result() is Outcome.COMPLETE
    assert sink.body == b"late"
    server.close()


async def test_full_backlog_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that never accepts is a lost one."""
    monkeypatch.setattr("llmstudiod.http.relay.CONNECT_DELAYS_S", (0.001, 0.01))
    listener, waiting = listening_full(tmp_path / "full.sock")
    assert await Sink(Pool(str(tmp_path / "full.sock"))).exchange.run(HEAD, b"") is Outcome.UPSTREAM_LOST
    for sock in (listener, *waiting):
        sock.close()


async def test_closing_the_pool_ends_what_is_under_way(upstream: FakeUpstream, pool: Pool) -> None:
    """A run that is over answers nobody, and its pool opens nothing again."""

    async def script(call: Call) -> None:
        await call.client_gone()

    upstream.script = script
    pool.give_back(await pool.connect())
    sink = Sink(pool)
    async with asyncio.TaskGroup() as group:
        run = group.create_task(sink.exchange.run(HEAD, b""))
        await eventually(lambda: upstream.requests)
        pool.close()
    assert run.result() is Outcome.UPSTREAM_LOST
    assert len(upstream.requests) == 1
    assert await Sink(pool).exchange.run(HEAD, b"") is Outcome.UPSTREAM_LOST
    await eventually(lambda: upstream.open_connections == 0)
    assert len(upstream.requests) == 1
