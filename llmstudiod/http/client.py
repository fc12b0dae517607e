"""The client's side of the data path: aiohttp's connection, with what a raw relay needs to know of it."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.web_protocol import RequestHandler, RequestPayloadError

from llmstudiod.core.errors import BadRequestError, LlmstudioError
from llmstudiod.core.keys import Key
from llmstudiod.http.answers import error_response
from llmstudiod.http.fast_parser import FastRequest, Verdict, parse_request
from llmstudiod.http.fast_path import FastExchange, FastPath
from llmstudiod.http.framing import LAST_CHUNK, chunk
from llmstudiod.http.relay import Exchange

QUIET_S = 0.3
DRAIN_LOOK_S = 0.02
KEEPALIVE_S = 75.0  # aiohttp's own default is about an hour
GATHER_S = 10.0
"""How long a connection whose time of rest is over may go on with a request that comes in pieces."""
MAX_HELD_BYTES = 64 << 10
LOOKS = 4
RELIES_ON = ("_waiter", "_messages", "_next_keepalive_close_time", "_keepalive_handle", "_keepalive")
"""Private attributes of aiohttp's that the fast path needs; seen in 3.11.16 to 3.14.5."""

_ABSOLUTE = re.compile(r"https?://[^/?#]*", re.IGNORECASE)


class HeadTooLongError(BadRequestError):
    """A line of the request's head is longer than we, or the model's server, read."""

    status = 431


class ClientConnection(RequestHandler):
    """aiohttp's request parser and state machine, with a short way past both (`llmstudiod.http.fast_path`).

    ``_is_plain``: all that aiohttp's parser was given were whole requests, so it is at the beginning of a message, and
    the next bytes may take the short way. It is lost, for good, with the first bytes of which that is not certain.
    """

    def __init__(
        self,
        manager: "EndpointServer",
        *,
        loop: asyncio.AbstractEventLoop,
        **arguments: Any,  # noqa: ANN401 - aiohttp's own
    ) -> None:
        super().__init__(manager, loop=loop, **arguments)
        self.exchange: Exchange | None = None
        self.has_begun = False  # whether the request under way in aiohttp has a part of its answer
        self.local_address = ""
        self.key: Key | None = None  # of the request under way in aiohttp
        self._touched_at = 0.0
        self._event_loop = loop
        self._endpoint = manager
        self._is_plain = manager.fast_path is not None and can_be_fast(self)
        self._fast: FastExchange | None = None
        self._gathered = b""  # the beginning of a request, or, while one is served, of the next
        self._gather_until = 0.0
        self._request_bytes = b""
        self._looks_left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let the time of rest begin."""
        super().connection_made(transport)
        address = transport.get_extra_info("sockname")
        self.local_address = str(address[0]) if isinstance(address, tuple) else ""
        self._touched_at = self._event_loop.time()
        if can_be_fast(self):
            self._rest()

    def data_received(self, data: bytes) -> None:
        """Serve a simple request at once; leave everything else to aiohttp."""
        self._touched_at = self._event_loop.time()
        if self._fast is not None:
            self._hold(data)
            return
        fast_path, held = self._endpoint.fast_path, self._gathered
        if fast_path is None:  # the daemon is stopping
            data, self._gathered = held + data, b""
        elif self._is_plain and data:  # aiohttp itself calls with nothing, to look at what it holds
            if held:
                data, self._gathered = held + data, b""
            verdict = parse_request(data, max_body=fast_path.max_body())
            if verdict is Verdict.MORE:
                if not held:
                    self._gather_until = self._event_loop.time() + GATHER_S
                self._gathered = data
                return
            if isinstance(verdict, FastRequest):
                if self._waiter is None and self._looks_left:
                    # aiohttp needs some turns of the loop to get over an answer that the client already has.
                    self._looks_left -= 1
                    self._gathered = data
                    self._event_loop.call_soon(self._look_again)
                    return
                # While aiohttp is busy, what comes is pipelined, and its place is in aiohttp's queue.
                if self._waiter is not None and not self._messages and self._start_fast(verdict, data):
                    return
            self._is_plain = verdict is not Verdict.UNSURE
        super().data_received(data)

    @property
    def is_draining(self) -> bool:
        """Whether this answer is the connection's last: the daemon is stopping."""
        return self._endpoint.is_draining

    def is_at_rest(self, now: float) -> bool:
        """Whether nothing has come for a while and nothing is being answered."""
        is_busy = self._fast is not None or self._gathered or self._current_request is not None or self._messages
        return not is_busy and now - self._touched_at >= QUIET_S

    def answered(self) -> None:
        """Note that the request under way in aiohttp has its whole answer."""
        self._looks_left = LOOKS
        self.has_begun = False

    def _look_again(self) -> None:
        data, self._gathered = self._gathered, b""
        if data and self.transport is not None:
            self.data_received(data)

    def _start_fast(self, request: FastRequest, data: bytes) -> bool:
        fast_path = self._endpoint.fast_path
        assert fast_path is not None
        self._fast = fast_path.start(self, request, data)
        if self._fast is None:
            return False
        self.exchange = self._fast.relay
        self._request_bytes = data
        if self.writing_paused:
            self.exchange.client_paused()
        return True

    def _hold(self, data: bytes) -> None:
        self._gathered += data
        if len(self._gathered) > MAX_HELD_BYTES and self.transport is not None:
            self.transport.abort()  # no client pipelines so much; were reading paused, nobody would see it leave

    def fast_done(self, *, is_last: bool) -> None:
        """Go on with the next request."""
        self._end_fast()
        if is_last:
            self.force_close()
        elif self._gathered:
            held, self._gathered = self._gathered, b""
            self.data_received(held)

    def fast_failed(self, *, is_untouched: bool) -> None:
        """Send the request the usual way, or, where the client has seen a part of an answer, end with the reason."""
        fast, data = self._fast, self._request_bytes
        assert fast is not None
        # A run that was stopped, or has died, took the request with it: sent again, it would start the model anew.
        if is_untouched and not fast.relay.pool.is_closed:
            self._end_fast()
            held, self._gathered = self._gathered, b""
            self._is_plain = not held
            super().data_received(data + held)
            return
        self.exchange = None  # ``_fast`` stays: what the client sends meanwhile must not be answered before this is
        self._endpoint.after_loss(self, fast)

    def _end_fast(self) -> None:
        self._fast = self.exchange = None
        self._request_bytes = b""
        self._rest()

    def _rest(self) -> None:
        """Let the time of rest begin anew. aiohttp 3.11 has none before the first request that it served itself."""
        self._keepalive = True
        self._next_keepalive_close_time = self._event_loop.time() + self.keepalive_timeout
        if self._keepalive_handle is None:
            self._keepalive_handle = self._event_loop.call_at(self._next_keepalive_close_time, self._process_keepalive)

    def _process_keepalive(self) -> None:
        """Close a connection at rest. aiohttp's timer calls this, and takes one on the fast path to be at rest."""
        now = self._event_loop.time()
        if self._fast is not None:
            self._next_keepalive_close_time = now + self.keepalive_timeout
        elif self._gathered and now < self._gather_until:
            self._next_keepalive_close_time = self._gather_until
        elif self._gathered:
            # With a whole head it is no connection at rest for aiohttp either, which waits for the body.
            data, self._gathered = self._gathered, b""
            self._is_plain = False
            super().data_received(data)
        super()._process_keepalive()

    def write(self, data: bytes) -> None:
        """Put bytes into the connection; that a client has gone is found out elsewhere."""
        transport = self.transport
        if transport is not None and not transport.is_closing():
            transport.write(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Cut the upstream off."""
        super().connection_lost(exc)
        fast, self._fast = self._fast, None
        if fast is not None:
            fast.client_lost()

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

    def log_exception(self, *args: Any, **kw: Any) -> None:  # noqa: ANN401 - aiohttp's own
        """Log bugs. A body that was broken on the way is none; aiohttp meets it again when it clears away the rest."""
        if not isinstance(kw.get("exc_info"), RequestPayloadError):
            super().log_exception(*args, **kw)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,  # noqa: ARG002 - aiohttp's signature
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what aiohttp's parser refuses, and bugs, in our own envelope; only bugs are logged."""
        error: LlmstudioError
        if isinstance(exc, LineTooLong):
            error = HeadTooLongError("a line of the request's head is too long")
        elif isinstance(exc, HttpProcessingError):
            reason = (message or "").partition("\n")[0].rstrip(":")
            error = BadRequestError(f"the request is not valid HTTP: {reason[:200]}")
        else:
            self.log_exception("internal error in %s %s", request.method, request.path[:200], exc_info=exc)
            error = LlmstudioError("an internal error", hint="see the daemon's log")
        if self.has_begun:
            if self.transport is not None:
                self.transport.abort()  # an orderly close would be the end of an answer without a length
            raise ConnectionError("an answer has already begun")
        response = error_response(error, path=origin_form(request.raw_path))
        response.force_close()
        return response


def can_be_fast(connection: object) -> bool:
    """Whether this aiohttp has the private parts that the fast path needs; without them all goes the usual way."""
    return hasattr(RequestHandler, "_process_keepalive") and all(hasattr(connection, name) for name in RELIES_ON)


def origin_form(target: str) -> str:
    """Return path and query of a request's target; servers must also take one with a scheme and an authority.

    Source: RFC 9112, section 3.2.2.

    >>> origin_form("http://localhost:8080/v1/models?x=y")
    '/v1/models?x=y'
    """
    absolute = _ABSOLUTE.match(target)
    if absolute is None:
        return target
    rest = target[absolute.end() :]
    return rest if rest.startswith("/") else f"/{rest}"


class EndpointServer(web.Server):
    """aiohttp's low-level server, making our connections.

    ``after_loss`` is called with a connection whose fast exchange lost its upstream in the middle of an answer.
    ``request_factory`` makes requests that an aiohttp application takes; without it they are plain ones.
    """

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        *,
        fast_path: FastPath | None,
        after_loss: Callable[[ClientConnection, FastExchange], None],
        request_factory: Callable[..., web.BaseRequest] | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._arguments = {"loop": loop, **connection_arguments()}
        super().__init__(
            handler, handler_cancellation=True, request_factory=cast("Any", request_factory), **self._arguments
        )
        self.fast_path = fast_path
        self.after_loss = after_loss
        self.is_draining = False

    async def drain(self, *, within_s: float) -> None:
        """Answer what comes on the connections that are open, each with its last answer; return when all are closed.

        A connection at rest is closed only when nothing has come for a moment: its client may just be asking.
        """
        self.is_draining = True
        self.fast_path = None
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within_s
        while self.connections and (now := loop.time()) < deadline:
            for connection in list(self.connections):
                if isinstance(connection, ClientConnection) and connection.is_at_rest(now):
                    connection.force_close()
            await asyncio.sleep(DRAIN_LOOK_S)

    def __call__(self) -> RequestHandler:
        """Return the protocol of a new connection."""
        return ClientConnection(self, **self._arguments)


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

    __slots__ = ("_connection", "_extra_head", "is_begun", "is_http11", "is_last")

    def __init__(
        self, connection: ClientConnection, *, is_http11: bool = True, is_last: bool = False, extra_head: bytes = b""
    ) -> None:
        self._connection = connection
        self._extra_head = extra_head  # lines of ours, for whoever writes the head
        self.is_http11 = is_http11
        self.is_last = is_last
        self.is_begun = False

    @classmethod
    def of(cls, request: web.BaseRequest, *, extra_headers: Mapping[str, str] | None = None) -> "ClientStream":
        """Return the stream to the client of ``request``; its answer's head gets the extra headers."""
        connection = cast("ClientConnection", request.protocol)
        is_last = not request.keep_alive or connection.is_draining
        extra = "".join(f"{name}: {value}\r\n" for name, value in (extra_headers or {}).items())
        return cls(connection, is_http11=request.version >= (1, 1), is_last=is_last, extra_head=extra.encode("latin-1"))

    def write(self, data: bytes) -> None:
        """Put bytes into the connection; that a client has gone is found out elsewhere."""
        self._connection.has_begun = True
        if self._extra_head:
            line, _, rest = data.partition(b"\r\n")
            data, self._extra_head = line + b"\r\n" + self._extra_head + rest, b""
        self._connection.write(data)

    def answered(self) -> None:
        """Note that the answer is complete."""
        self._connection.answered()

    def close(self) -> None:
        """Close the connection after what was written."""
        self._connection.force_close()

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


def connection_arguments() -> dict[str, Any]:
    """Return what aiohttp's connections need to know to stay out of the way."""
    return {
        "access_log": None,
        "keepalive_timeout": KEEPALIVE_S,
        # More than llama-server takes, for what goes no further: cookies and keys.
        "max_field_size": 32 << 10,
        "max_line_size": 32 << 10,
        "lingering_time": 2.0,
    }
