"""A server on a Unix socket that answers as a test tells it to, byte by byte, and remembers what it was sent.

To the supervisor's probes it is a ready llama-server. Every other request goes to ``script``, which has the connection
for itself until it returns: then the next request is read from the same connection, unless the script has closed it.
"""

import asyncio
import json
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from socket import SO_LINGER, SOL_SOCKET

PROBE = b"host: llmstudio"
"""What llmstudiod.adapters.probe sends and the proxy never does."""

SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: text/event-stream\r\nKeep-Alive: timeout=5, max=100\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    """Return ``data`` as one chunk; nothing becomes the last one."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(text: str) -> bytes:
    """Return one event of a stream, in a chunk of its own as llama-server sends it."""
    return chunk(f"data: {text}\n\n".encode())


def answer(body: bytes = b"{}", *, status: bytes = b"200 OK", headers: bytes = b"") -> bytes:
    """Return a whole answer with a length."""
    head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % (status, len(body))
    return head + headers + b"\r\n" + body


@dataclass
class Received:
    """One request as it came."""

    head: bytes
    body: bytes = b""
    connection: int = 0

    @property
    def line(self) -> str:
        """The request line without the version."""
        return self.head.split(b"\r\n")[0].decode("latin-1").removesuffix(" HTTP/1.1")

    @property
    def headers(self) -> list[tuple[str, str]]:
        """Names in lower case, in the order in which they came."""
        lines = self.head.decode("latin-1").split("\r\n")[1:-2]
        return [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]

    def header(self, name: str) -> str | None:
        """Return the only value of a header."""
        values = [value for key, value in self.headers if key == name]
        assert len(values) <= 1, values
        return values[0] if values else None


@dataclass
class Call:
    """One request in the hands of a script."""

    received: Received
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    is_open: bool = True

    async def read_body(self) -> bytes:
        """Read the body, which has a length: the proxy sends no chunks."""
        assert self.received.header("transfer-encoding") is None
        length = int(self.received.header("content-length") or 0)
        if not self.received.body and length:
            self.received.body = await self.reader.readexactly(length)
        return self.received.body

    async def send(self, data: bytes) -> None:
        """Write and wait until the proxy takes it."""
        self.writer.write(data)
        await self.writer.drain()

    def close(self) -> None:
        """End the connection after what was written."""
        self.is_open = False
        self.writer.close()

    def die(self) -> None:
        """End the connection at once, as a killed process does."""
        self.is_open = False
        self.writer.transport.abort()

    async def client_gone(self) -> None:
        """Return when the proxy has closed the connection."""
        try:
            assert await self.reader.read(1) == b"", "the proxy has sent more than the request"
        except ConnectionError:
            pass
        self.is_open = False


Script = Callable[[Call], Awaitable[None]]


async def say_hello(call: Call) -> None:
    """Answer with the request's own model in a small JSON object."""
    await call.send(answer(b'{"said":"hello"}'))


@dataclass
class FakeUpstream:
    """Listens at one socket; ``requests`` and ``connections`` leave the probes out."""

    alias: str
    n_parallel: int = 4
    n_ctx: int = 4096
    script: Script = say_hello
    is_ready: bool = True
    props_status: bytes = b"200 OK"
    reads_body_first: bool = True
    requests: list[Received] = field(default_factory=list)
    connections: int = 0
    faults: list[BaseException] = field(default_factory=list)
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def listen(self, socket_path: str) -> None:
        """Begin to serve."""
        self._server = await asyncio.start_unix_server(self._serve, socket_path, limit=1 << 20)

    def stop(self) -> None:
        """Close the socket and cut every connection, as the end of a process does."""
        if self._server is not None:
            self._server.close()
        self.drop_connections()

    def drop_connections(self) -> None:
        """Cut every connection and go on listening."""
        for writer in list(self._writers):
            writer.transport.abort()

    @property
    def open_connections(self) -> int:
        """How many connections are open now."""
        return len(self._writers)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._serve_connection(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except Exception as error:  # noqa: BLE001 - the test looks at it, also where no client waits for an answer
            self.faults.append(error)
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = 0
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if PROBE in head.lower():
                await self._answer_probe(head, writer)
                return
            if not number:
                self.connections += 1
                number = self.connections
            call = Call(Received(head, connection=number), reader, writer)
            self.requests.append(call.received)
            if self.reads_body_first:
                await call.read_body()
            await self.script(call)
            if not call.is_open:
                return

    async def _answer_probe(self, head: bytes, writer: asyncio.StreamWriter) -> None:
        props = {"model_alias": self.alias, "total_slots": self.n_parallel}
        props["default_generation_settings"] = {"n_ctx": self.n_ctx}
        is_props = head.startswith(b"GET /props ")
        body = json.dumps(props).encode() if is_props else b"{}"
        status = (self.props_status if is_props else b"200 OK") if self.is_ready else b"503 Service Unavailable"
        writer.write(answer(body, status=status, headers=b"Connection: close\r\n"))
        await writer.drain()


def reset_on_close(writer: asyncio.StreamWriter) -> None:
    """Let a TCP client end its connection with a reset instead of an orderly close."""
    writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
