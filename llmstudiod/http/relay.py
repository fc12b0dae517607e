"""The data path: raw bytes from a model's Unix socket to the client's connection, with back-pressure both ways.

aiohttp has parsed the request. The response's head is rewritten, its body relayed as it comes while its framing is
watched, so that the connection can be used again. Five to eight times the requests of a proxy that rebuilds both.

llama-server closes a connection after 5.0 s of rest or 100 requests; ours retire before that, and a request that got
no byte of an answer from a reused connection is sent once more on a fresh one.
"""

import asyncio
import functools
import socket
from collections.abc import Callable, Sequence
from enum import Enum
from typing import cast

from llmstudiod.http.framing import (
    LAST_CHUNK,
    MAX_HEAD_BYTES,
    Body,
    ChunkWatcher,
    FramingError,
    ResponseHead,
    chunk,
    parse_head,
)

IDLE_LIMIT_S = 4.0
USES_LIMIT = 90
WRITE_SLICE = 256 << 10
MAX_COLLECTED = 1 << 20
"""Bytes of an answer that are kept to be told as an event; one of which more is held is too long for that."""
CONNECT_DELAYS_S = (0.001, 0.002, 0.005, 0.01, 0.02, *[0.05] * 80)
MAX_LINE_BYTES = 8 << 10
MAX_FIELDS = 100
"""llama-server answers a head with a longer line, or with more fields, by an empty 400, or not at all.

Source: cpp-httplib, CPPHTTPLIB_HEADER_MAX_LENGTH, CPPHTTPLIB_REQUEST_URI_MAX_LENGTH, CPPHTTPLIB_HEADER_MAX_COUNT.
"""

HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te"}
    | {b"trailer", b"transfer-encoding", b"upgrade"}
)
"""Source: RFC 9110, section 7.6.1."""

_DROPPED = HOP_BY_HOP | {b"server", b"content-length"}


class Outcome(Enum):
    """How an exchange ended."""

    COMPLETE = "complete"
    UPSTREAM_LOST = "upstream lost"


class Connection(asyncio.Protocol):
    """One keep-alive connection to an upstream; serves one exchange at a time."""

    __slots__ = ("_pool", "_writable", "exchange", "idle_since", "transport", "uses")

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._writable: asyncio.Future[None] | None = None
        self.transport: asyncio.Transport | None = None
        self.exchange: Exchange | None = None
        self.uses = 0
        self.idle_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Pass bytes to the exchange; bytes that nobody asked for end the connection."""
        if self.exchange is not None:
            self.exchange.upstream_sent(data)
        else:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Tell whoever depends on it."""
        self.transport = None
        self._pool.forget(self)
        self.resume_writing()
        if self.exchange is not None:
            self.exchange.upstream_lost()

    def pause_writing(self) -> None:
        """The upstream reads slower than the request's body comes."""
        self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """The upstream has caught up."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    async def send(self, head: bytes, body: bytes | bytearray) -> None:
        """Write a request; a large body goes in slices, at the upstream's pace."""
        if self.transport is None:
            return
        if len(body) <= WRITE_SLICE:
            self.transport.write(head + body if body else head)
            return
        self.transport.write(head)
        view = memoryview(body)
        for start in range(0, len(view), WRITE_SLICE):
            if self._writable is not None:
                await self._writable
            if self.transport is None:
                return
            self.transport.write(view[start : start + WRITE_SLICE])

    def abort(self) -> None:
        """Close at once; llama-server frees the slot within some 25 ms."""
        if self.transport is not None:
            self.transport.abort()


class Pool:
    """The connections to one run of one model."""

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path
        self.time = asyncio.get_running_loop().time  # asking for the loop costs a system call on Python 3.11
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self.is_closed = False
        self._laying: asyncio.Task[None] | None = None

    def take_idle(self) -> Connection | None:
        """Return a connection that is surely still open on the other side, the most recently used first."""
        now = self.time()
        while self._idle:
            connection = self._idle.pop()
            if connection.transport is not None and now - connection.idle_since < IDLE_LIMIT_S:
                return connection
            connection.abort()
        return None

    async def connect(self) -> Connection:
        """Return a fresh connection.

        Raises:
            OSError: Nobody listens at the socket, or nobody accepts.
        """
        sock = await _connected(self.socket_path)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_unix_connection(lambda: Connection(self), sock=sock)
        self._all.add(connection)
        if self.is_closed:
            connection.abort()
        return connection

    def give_back(self, connection: Connection) -> None:
        """Keep a connection for the next request, unless it has served its time."""
        if self.is_closed or connection.uses >= USES_LIMIT:
            connection.abort()
            self._lay_ready()
            return
        connection.idle_since = self.time()
        self._idle.append(connection)

    def _lay_ready(self) -> None:
        """Open a connection in the place of one that has served its time, so that no request has to wait for it."""
        if not self.is_closed and self._laying is None:
            self._laying = asyncio.get_running_loop().create_task(self._lay())

    async def _lay(self) -> None:
        try:
            self.give_back(await self.connect())
        except OSError:
            pass  # the next request finds out why
        finally:
            self._laying = None

    def drop_idle(self) -> None:
        """Close what is not in use."""
        while self._idle:
            self._idle.pop().abort()

    def forget(self, connection: Connection) -> None:
        """Drop a connection that is closed."""
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Cut everything; llama-server does not obey SIGTERM while a request is pending."""
        self.is_closed = True
        if self._laying is not None:
            self._laying.cancel()
        for connection in list(self._all):
            connection.abort()


async def _connected(path: str) -> socket.socket:
    """Return a socket connected to ``path``; waits a while when more connections than its backlog holds are waiting.

    asyncio's own way takes EAGAIN, which a Unix socket with a full backlog says, for a connection under way.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        for delay_s in CONNECT_DELAYS_S:
            try:
                sock.connect(path)
            except BlockingIOError:
                await asyncio.sleep(delay_s)
            else:
                return sock
        raise TimeoutError(f"nobody accepts connections at {path}")  # noqa: TRY301 - the socket is closed in one place
    except BaseException:
        sock.close()
        raise


class Pools:
    """The pools of all running models, opened and closed by the supervisor."""

    def __init__(self) -> None:
        self._pools: dict[tuple[str, int], Pool] = {}

    def open(self, model: str, run: int, socket_path: str) -> None:
        """Allow connections to this run's socket."""
        self._pools[model, run] = Pool(socket_path)

    def close(self, model: str, run: int) -> None:
        """Cut every connection of this run."""
        pool = self._pools.pop((model, run), None)
        if pool is not None:
            pool.close()

    def get(self, model: str, run: int) -> Pool | None:
        """Return the pool of a run, or None when that run is over."""
        return self._pools.get((model, run))


class Exchange:
    """One request and its response. ``write`` puts bytes into the client's connection.

    ``is_begun``: the client already has a head, since it was kept alive with comments; then an upstream's answer that
    is no event stream is collected for the caller instead of being relayed.

    ``began_at`` and ``first_at`` (0: not yet), by the loop's clock: when the request was sent, when its answer began.
    ``pieces``: the first and the last three pieces of the body, as they came: there an answer tells what it has cost.
    ``n_events``: about how many events of a stream have come, one for each token.
    """

    __slots__ = (
        "_buffer", "_connection", "_has_paused", "_is_client_paused", "_is_garbled", "_is_over", "_is_sending",
        "_left", "_on_done", "_watcher", "_write", "began_at", "client_is_http11", "collected", "first_at", "head",
        "is_begun", "is_head_request", "is_last", "n_events", "pieces", "pool", "sent_anything",
    )  # fmt: skip

    def __init__(
        self,
        pool: Pool,
        write: Callable[[bytes], None],
        *,
        client_is_http11: bool,
        is_begun: bool,
        is_head_request: bool,
        is_last: bool,
        on_done: Callable[[Outcome], None] = lambda _: None,
    ) -> None:
        self.pool = pool
        self.client_is_http11 = client_is_http11
        self.is_begun = is_begun
        self.is_head_request = is_head_request
        self.is_last = is_last
        self.head: ResponseHead | None = None
        self.collected: bytearray | None = None
        self.began_at = pool.time()
        self.first_at = 0.0
        self.pieces: tuple[bytes, bytes, bytes, bytes] = (b"", b"", b"", b"")
        self.n_events = 0
        self.sent_anything = False  # whether any byte of the upstream's answer was seen
        self._write = write
        self._connection: Connection | None = None
        self._on_done = on_done
        self._is_over = False
        self._is_sending = False
        self._buffer = b""
        self._left = 0
        self._watcher: ChunkWatcher | None = None
        self._has_paused = False
        self._is_client_paused = False
        self._is_garbled = False  # how much of the body has reached the client is not known

    def start_on(self, connection: Connection, request: bytes) -> None:
        """Send a small request on an open connection; ``on_done`` is called at the end. For callers without a task."""
        assert connection.transport is not None
        self._connection = connection
        connection.exchange = self
        connection.uses += 1
        connection.transport.write(request)

    def cut(self) -> None:
        """Cut the upstream off; ``on_done`` is not called any more."""
        self._is_over = True
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.exchange = None
            connection.abort()

    async def run(self, head: bytes, body: bytes | bytearray) -> Outcome:
        """Send the request and relay the answer; return how it ended. Cancelling cuts the upstream off."""
        is_retry = False
        try:
            while True:
                reused = None if is_retry else self.pool.take_idle()
                try:
                    connection = reused or await self.pool.connect()
                except OSError:
                    return Outcome.UPSTREAM_LOST
                outcome = await self._run_on(connection, head, body)
                if outcome is Outcome.UPSTREAM_LOST and reused is not None and not self.sent_anything:
                    self._is_over, is_retry = False, True
                    continue  # it was closed under our hands: nothing has been answered, so nothing is done twice
                return outcome
        finally:
            self.cut()

    async def _run_on(self, connection: Connection, head: bytes, body: bytes | bytearray) -> Outcome:
        if connection.transport is None:
            return Outcome.UPSTREAM_LOST
        done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

        def finish(outcome: Outcome) -> None:
            if not done.done():
                done.set_result(outcome)

        self._on_done = finish
        self._connection = connection
        connection.exchange = self
        connection.uses += 1
        self._has_paused = False
        if self._is_client_paused:
            self.client_paused()  # it was told before there was a connection to hold back
        self._is_sending = True
        try:
            await connection.send(head, body)
        finally:
            self._is_sending = False
        return await done

    # The upstream's side

    def upstream_sent(self, data: bytes) -> None:
        """Take what came from the upstream."""
        self.sent_anything = True
        try:
            if self.head is None:
                self._take_head(data)
            else:
                self._take_body(b"", data)
        except FramingError:
            self._is_garbled = True
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.exchange = None
                connection.abort()
            self._finish(Outcome.UPSTREAM_LOST)

    def upstream_lost(self) -> None:
        """The connection is gone: the end of a body without a length, the end of the exchange otherwise."""
        self._connection = None
        if self.head is not None and self.head.body is Body.CLOSE:
            if self.is_begun and self.collected is None and self.client_is_http11:
                self._write(LAST_CHUNK)
            self._finish(Outcome.COMPLETE)
            return
        if not self.sent_anything:
            self.pool.drop_idle()  # they are older than the one that was closed under our hands
        self._finish(Outcome.UPSTREAM_LOST)

    def _take_head(self, data: bytes) -> None:
        self._buffer += data
        while True:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD_BYTES:
                    raise FramingError("the head is too long")
                return
            head, client_head = _read_head(
                self._buffer[:end], self.is_head_request, self.client_is_http11, self.is_last
            )
            rest, self._buffer = self._buffer[end + 4 :], b""
            if head.status >= 200:
                break
            self._buffer = rest  # an interim answer such as 100 Continue is not the client's business
        self.head = head
        self.first_at = self.pool.time()
        self._left = head.length
        self._watcher = ChunkWatcher() if head.body is Body.CHUNKED else None
        if self.is_begun:
            is_stream = head.status == 200 and head.get(b"content-type").startswith(b"text/event-stream")
            self.collected = None if is_stream else bytearray()
            client_head = b""
        self.is_last = self.is_last or _ends_with_connection(head, self.client_is_http11)
        self._take_body(client_head, rest)

    def _take_body(self, head: bytes, data: bytes) -> None:
        """Relay a piece of the body (after ``head``, in the same write) and see whether it was the last."""
        assert self.head is not None
        kind = self.head.body
        first, _, last_but_two, last_but_one = self.pieces
        self.pieces = (first or data, last_but_two, last_but_one, data)
        self.n_events += data.count(b"data: {")
        is_over = kind is Body.NONE
        extra = b""
        payload: list[bytes] | None = None
        if is_over:
            data, extra = b"", data
        elif kind is Body.LENGTH:
            if len(data) > self._left:
                data, extra = data[: self._left], data[self._left :]
            self._left -= len(data)
            is_over = self._left == 0
        elif self._watcher is not None:
            payload = [] if self._is_rebuilt else None
            used = self._watcher.feed(data, payload)
            data, extra = (data[:used], data[used:]) if used != len(data) else (data, b"")
            is_over = self._watcher.is_done
        if self.collected is not None:
            if len(self.collected) <= MAX_COLLECTED:
                self.collected += b"".join(payload) if payload is not None else data
        else:
            out = self._encoded(data, payload, is_over=is_over)
            if head or out:
                self._write(head + out if head else out)
        if is_over or extra:
            self._complete(is_clean=not extra)

    @property
    def _is_rebuilt(self) -> bool:
        """Whether the body's chunks cannot simply be passed on."""
        return self.collected is not None or not self.client_is_http11

    def _encoded(self, data: bytes, payload: list[bytes] | None, *, is_over: bool) -> bytes:
        if payload is not None:  # an HTTP/1.0 client knows no chunks: its body ends with the connection
            return b"".join(payload)
        if self._watcher is None and self.is_begun and self.client_is_http11:
            return chunk(data) + (LAST_CHUNK if is_over else b"")  # we have promised chunks, the upstream sends none
        return data

    def _complete(self, *, is_clean: bool) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.exchange = None
            if connection.transport is not None:
                self._resume(connection.transport)
            # An answer that comes before the whole request was sent leaves the rest of it in the connection.
            if is_clean and self.head is not None and self.head.is_keep_alive and not self._is_sending:
                self.pool.give_back(connection)
            else:
                connection.abort()
        self._finish(Outcome.COMPLETE)

    def _finish(self, outcome: Outcome) -> None:
        if not self._is_over:
            self._is_over = True
            self._on_done(outcome)

    @property
    def can_take_event(self) -> bool:
        """Whether an event of ours can follow in the client's stream, after an upstream was lost in the middle."""
        if self.head is None or self.collected is not None:
            return self.is_begun
        if self._is_garbled or not self.head.get(b"content-type").startswith(b"text/event-stream"):
            return False
        # Without a watcher the body has a length, which no event of ours may exceed, unless we are making the chunks.
        return self.is_begun if self._watcher is None else self._watcher.is_between_chunks

    # The client's side

    def client_paused(self) -> None:
        """The client reads too slowly: let the upstream wait, and with it the model."""
        self._is_client_paused = True
        if self._connection is not None and self._connection.transport is not None:
            self._connection.transport.pause_reading()
            self._has_paused = True

    def client_resumed(self) -> None:
        """The client has caught up."""
        self._is_client_paused = False
        if self._connection is not None and self._connection.transport is not None:
            self._resume(self._connection.transport)

    def _resume(self, transport: asyncio.Transport) -> None:
        if self._has_paused:
            self._has_paused = False
            if not transport.is_closing():
                transport.resume_reading()


@functools.lru_cache(maxsize=512)
def _read_head(
    raw: bytes,
    is_head_request: bool,  # noqa: FBT001 - the cache wants positions
    is_http11: bool,  # noqa: FBT001
    is_last: bool,  # noqa: FBT001
) -> tuple[ResponseHead, bytes]:
    """Return a response's head and the one for the client. All streams of a model have the same: it is remembered.

    What concerns only our own connection to the upstream is left out. llama-server reflects any Origin with
    credentials, which would let any web page read the answers.
    """
    head = parse_head(raw, is_head_request=is_head_request)
    lines = [b"HTTP/1.1 %d %s" % (head.status, head.reason)]
    lines += [
        name + b": " + value
        for name, value in head.headers
        if name not in _DROPPED and not name.startswith(b"access-control-")
    ]
    if head.body is Body.CHUNKED and is_http11:
        lines.append(b"transfer-encoding: chunked")
    elif (length := head.get(b"content-length")) and head.status != 204:
        lines.append(b"content-length: " + length)
    if is_last or _ends_with_connection(head, is_http11):
        lines.append(b"connection: close")
    elif not is_http11:
        lines.append(b"connection: keep-alive")
    return head, b"\r\n".join(lines) + b"\r\n\r\n"


def _ends_with_connection(head: ResponseHead, is_http11: bool) -> bool:  # noqa: FBT001
    """Whether only the end of the connection can tell the client where the body ends."""
    return head.body is Body.CLOSE or (head.body is Body.CHUNKED and not is_http11)


def request_head(method: str, target: str, headers: Sequence[tuple[bytes, bytes]], length: int | None) -> bytes:
    """Return the head of the request to the upstream: the client's without what is only between it and us."""
    dropped = _NOT_FORWARDED | _named_by_connection(headers)
    lines = [f"{method} {target} HTTP/1.1".encode("utf-8", "surrogateescape"), b"host: localhost"]
    lines += [name + b": " + value for name, value in headers if name.lower() not in dropped]
    if length is not None:
        lines.append(b"content-length: %d" % length)
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _named_by_connection(headers: Sequence[tuple[bytes, bytes]]) -> set[bytes]:
    """Return the headers that the client itself says are for this connection only."""
    values = [value for name, value in headers if name.lower() == b"connection"]
    return {option.strip().lower() for value in values for option in value.split(b",")}


def is_head_too_long(head: bytes) -> bool:
    """Whether llama-server would refuse this request's head for its size."""
    _, *lines, _, _ = head.split(b"\r\n")
    return len(lines) > MAX_FIELDS or any(len(line) + 2 > MAX_LINE_BYTES for line in head.split(b"\r\n"))


_NOT_FORWARDED = HOP_BY_HOP | {
    b"host",
    b"content-length",
    b"content-encoding",  # the body was decompressed on the way in
    b"accept-encoding",
    b"expect",
    b"origin",
    b"referer",
    b"cookie",
    b"authorization",
    b"x-api-key",
    b"api-key",
    b"x-goog-api-key",
}
