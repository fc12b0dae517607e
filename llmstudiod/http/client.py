"""The client's side of the data path: aiohttp's connection, with what a raw relay needs to know of it."""

import asyncio
from typing import Any, cast

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from llmstudiod.http.framing import LAST_CHUNK, chunk
from llmstudiod.http.relay import Exchange

KEEPALIVE_S = 75.0  # aiohttp's own default is about an hour


class ClientConnection(RequestHandler):
    """aiohttp's request parser and state machine; tells the exchange under way when the client reads too slowly."""

    exchange: Exchange | None = None

    def pause_writing(self) -> None:
        """Hold the upstream back."""
        super().pause_writing()
        if self.exchange is not None:
            self.exchange.client_paused()

    def resume_writing(self) -> None:
        """Let the upstream go on."""
        super().resume_writing()
        if self.exchange is not None:
            self.exchange.client_resumed()


class EndpointServer(web.Server):
    """aiohttp's low-level server, making our connections."""

    def __call__(self) -> RequestHandler:
        """Return the protocol of a new connection."""
        return ClientConnection(self, loop=self._loop, **self._kwargs)


class Relayed:
    """What a handler returns when the answer was already written: aiohttp has only to go on with the connection."""

    __slots__ = ("keep_alive",)

    def __init__(self, *, keep_alive: bool) -> None:
        self.keep_alive = keep_alive

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing is left to prepare."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to write."""


class ClientStream:
    """Writes to one request's client, past aiohttp's response objects."""

    __slots__ = ("_connection", "is_begun", "is_http11", "is_last")

    def __init__(self, request: web.BaseRequest) -> None:
        self._connection = cast("ClientConnection", request.protocol)
        self.is_http11 = request.version >= (1, 1)
        self.is_last = not request.keep_alive
        self.is_begun = False

    def write(self, data: bytes) -> None:
        """Put bytes into the connection; a client that has gone is found out elsewhere."""
        transport = self._connection.transport
        if transport is not None and not transport.is_closing():
            transport.write(data)

    def attach(self, exchange: Exchange | None) -> None:
        """Connect the client's back-pressure with the upstream, or disconnect it."""
        self._connection.exchange = exchange
        if exchange is not None and self._connection.writing_paused:
            exchange.client_paused()

    def begin(self) -> None:
        """Send the head of an event stream before the upstream can."""
        if self.is_begun:
            return
        self.is_begun = True
        self.is_last = self.is_last or not self.is_http11
        lines = [
            "HTTP/1.1 200 OK",
            "content-type: text/event-stream",
            "cache-control: no-cache",
            "x-accel-buffering: no",
        ]
        lines += ["transfer-encoding: chunked"] if self.is_http11 else []
        lines += ["connection: close"] if self.is_last else []
        self.write(("\r\n".join(lines) + "\r\n\r\n").encode())

    def send_part(self, data: bytes) -> None:
        """Send a part of a stream that we have begun, or go on with one of the upstream's between its chunks."""
        self.write(chunk(data) if self.is_http11 else data)

    def comment(self, text: str) -> None:
        """Keep the client waiting with a line that every reader of event streams ignores."""
        self.begin()
        self.send_part(f": {text}\n\n".encode())

    def end(self) -> None:
        """End the stream, and the connection with it, so that nobody takes what came for the whole."""
        if self.is_http11:
            self.write(LAST_CHUNK)
        self.is_last = True

    def abort(self) -> None:
        """Cut the connection: the only way to say that a body of a known length will not be complete."""
        self.is_last = True
        transport = self._connection.transport
        if transport is not None:
            transport.abort()


async def read_body(request: web.BaseRequest, *, limit: int) -> bytes | bytearray | None:
    """Return the body, held once, or None when it is longer than ``limit`` bytes."""
    length = request.content_length
    if length is not None and length > limit:
        return None
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    content = request.content
    first: bytes = await content.readany()
    if content.at_eof():
        return first if len(first) <= limit else None
    body = bytearray(first)
    while not content.at_eof():
        body += await content.readany()
        if len(body) > limit:
            return None
        await asyncio.sleep(0)  # a client on the same machine can keep the buffer full for the whole body
    return body


def server_arguments() -> dict[str, Any]:
    """Return what aiohttp's server needs to know to stay out of the way."""
    return {
        "access_log": None,
        "keepalive_timeout": KEEPALIVE_S,
        "handler_cancellation": True,
        "max_field_size": 32 << 10,
        "max_line_size": 32 << 10,
        "lingering_time": 2.0,
    }
