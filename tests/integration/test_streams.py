"""Event streams over real connections: how they end, and what a reader that does not read costs the others."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from llmstudiod.http.events import Events
from llmstudiod.http.streams import Streams, Write, event_bytes
from tests.integration.house import eventually

LARGE = "x" * 100_000


@web.middleware
async def _errors_answered(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Answer a bug as the admin interface does."""
    try:
        return await handler(request)
    except Exception:  # noqa: BLE001 - the outermost edge of a request
        return web.json_response({}, status=500)


class Place:
    """A server with the events, and a stream that has as much to say as anybody takes."""

    def __init__(self) -> None:
        self.streams = Streams(write_s=0.3)
        self.events = Events(dict, self.streams)
        self.port = 0
        self.flood: Exception | None = None
        self.runner: web.AppRunner | None = None

    async def _flood(self, request: web.Request) -> web.StreamResponse:
        async def copy(write: object) -> None:
            assert callable(write)
            while True:
                if self.flood is not None:
                    raise self.flood
                await write(event_bytes("log", {"line": LARGE}))

        return await self.streams.answer(request, copy)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Place"]:
        """Serve for as long as the context lasts."""
        app = web.Application(middlewares=[_errors_answered])
        app.add_routes([*self.events.routes(), web.get("/flood", self._flood)])
        runner = self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            await runner.cleanup()

    async def connect(self, path: str, *, method: str = "GET", last: str = "") -> tuple[asyncio.StreamReader, object]:
        """Return a reader that takes little into its buffers."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 10)
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: {last}\r\n\r\n"
        writer.write(head.encode())
        return reader, writer


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    """A server of its own."""
    async with Place().serving() as place:
        yield place


async def is_cut(reader: asyncio.StreamReader) -> bool:
    """Whether a connection ends in the middle of its stream."""
    tail = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := await reader.read(1 << 16):
            tail = (tail + piece)[-5:]
    return tail != b"0\r\n\r\n"


async def test_slow_reader_over_tcp_harms_nobody(place: Place) -> None:
    """One that does not read is dropped, connection and all; another one gets every event."""
    reader, _ = await place.connect("/events")
    await reader.readuntil(b"event: snapshot")
    other, writer = await asyncio.open_connection("127.0.0.1", place.port, limit=1 << 20)
    writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await other.readuntil(b"event: snapshot")
    n_sent = 0
    async with asyncio.timeout(20):
        while len(place.streams) == 2:
            n_sent += 1
            place.events.publish("transition", {"n": n_sent, "text": LARGE})
            await other.readuntil(b'"n":%d,' % n_sent)
            await other.readuntil(LARGE.encode())
        assert place.events.n_subscribers == 1
        assert await is_cut(reader)
    place.events.publish("transition", {"n": 0})
    await other.readuntil(b'"n":0}')
    writer.close()


async def test_stream_that_nobody_reads_ends(place: Place) -> None:
    """Whatever it tells: the limit is that of all streams."""
    reader, _ = await place.connect("/flood")
    async with asyncio.timeout(10):
        await reader.readuntil(b"event: log")
        await eventually(lambda: len(place.streams) == 0)
        assert await is_cut(reader)


async def test_stop_does_not_wait_for_who_does_not_read(place: Place) -> None:
    """It has a moment for the end, which others take."""
    place.streams._write_s = 60.0
    reader, _ = await place.connect("/flood")
    await reader.readuntil(b"event: log")
    await asyncio.sleep(0.2)  # until the buffers of both sides are full
    async with asyncio.timeout(10):
        place.streams.close()
        assert place.runner is not None
        server = place.runner.server
        assert server is not None
        await eventually(lambda: not server.connections)
        assert await is_cut(reader)


@pytest.mark.parametrize("path", ["/events", "/flood"])
async def test_head_has_no_body(place: Place, path: str) -> None:
    """And the connection is free for the next request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", place.port)
    request = f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"
    writer.write((request + "GET /events/stats HTTP/1.1\r\nHost: localhost\r\n\r\n").encode())
    async with asyncio.timeout(5):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"text/event-stream" in head
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_number_of_an_event_may_be_nonsense(place: Place) -> None:
    """Whatever stands after our own mark."""
    reader, _ = await place.connect("/events", last=f"{place.events._boot}-{'9' * 5000}")
    async with asyncio.timeout(5):
        await reader.readuntil(b"event: snapshot")


async def test_part_that_fails_ends_no_other(place: Place) -> None:
    """It is told, with no word of the bug itself; the events go on, and so do the other parts."""
    is_late = asyncio.Event()

    async def broken(write: Write) -> None:
        raise KeyError("secret")

    async def good(write: Write) -> None:
        await is_late.wait()
        await write(event_bytes("log", {"line": "late"}))

    place.events._along = lambda _: (broken, good)
    reader, _ = await place.connect("/events?model=a")
    async with asyncio.timeout(10):
        await reader.readuntil(b"event: snapshot")
        told = await reader.readuntil(b'"kind":"internal"')
        assert b"event: failure" in told
        assert b"secret" not in told
        is_late.set()
        await reader.readuntil(b'"line":"late"')
        place.events.publish("transition", {"n": 7})
        await reader.readuntil(b'"n":7}')
    assert len(place.streams) == 1


async def test_stream_that_fails_is_cut_off(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Its head is sent, so there is no other answer than its end; the log has the traceback."""
    place.flood = KeyError("a bug")
    reader, _ = await place.connect("/flood")
    async with asyncio.timeout(10):
        text = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := await reader.read(1 << 16):
                text += piece
    assert (text.count(b"HTTP/1.1"), text.endswith(b"0\r\n\r\n")) == (1, False)
    assert "KeyError: 'a bug'" in caplog.text
