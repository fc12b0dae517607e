"""The endpoint on a real TCP socket with its real supervisor, before fake upstreams; and clients that speak raw HTTP.

`open_house` fails the test that logs an error, leaves an exception to the event loop, or loses a request's place.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmstudiod.adapters.proc import Pulse
from llmstudiod.adapters.usage_log import Served
from llmstudiod.core.catalogue import build_catalogue
from llmstudiod.core.lifecycle import State
from llmstudiod.core.model_spec import LifecycleDefaults
from llmstudiod.core.recipe import Recipe, RecipeEntry
from llmstudiod.core.scheduler import Scheduler
from llmstudiod.http.access import Access, Rules
from llmstudiod.http.client import EndpointServer
from llmstudiod.http.fast_path import FastPath
from llmstudiod.http.listing import Listing
from llmstudiod.http.meter import Meter
from llmstudiod.http.proxy import FORWARDED_POSTS, Proxy
from llmstudiod.http.relay import Pools
from llmstudiod.supervisor import Supervisor
from tests.integration.fake_launcher import FakeLauncher, FakePlanner
from tests.integration.fake_upstream import FakeUpstream

MAX_BODY = 48 << 20
DEADLINE_S = 10.0
CHAT = "/v1/chat/completions"
ENVELOPE = {"message", "type", "code", "param", "hint", "kind"}


async def eventually(is_true: Callable[[], object], *, within_s: float = DEADLINE_S) -> None:
    """Return once the condition holds; the one place where the tests look at the clock."""
    deadline = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.002)


@dataclass
class Answer:
    """What a client read: the head, and the body without its framing."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    raw: bytes

    def header(self, name: str) -> str | None:
        """Return the only value of a header."""
        values = [value for key, value in self.headers if key == name]
        assert len(values) <= 1, values
        return values[0] if values else None

    @property
    def json(self) -> Any:
        """The body's value."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error in OpenAI's envelope, whole."""
        value = self.json
        assert set(value) == {"error"}
        error: dict[str, Any] = value["error"]
        assert set(error) >= ENVELOPE
        assert error["message"]
        return error


class Client:
    """A client that sees and sends every byte; its reading of HTTP is its own, not the daemon's."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Write bytes."""
        self.writer.write(data)
        await self.writer.drain()

    async def post(self, value: object, path: str = CHAT, *, headers: str = "", version: str = "1.1") -> None:
        """Send a request with a JSON body, or with the bytes given."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        lines = f"POST {path} HTTP/{version}\r\nHost: x\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        await self.send(lines.encode() + body)

    async def get(self, path: str, *, method: str = "GET", headers: str = "") -> Answer:
        """Send a request without a body and read the answer."""
        await self.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
        return await self.answer(is_head=method == "HEAD")

    async def head(self) -> Answer:
        """Read up to the body, which remains to be read."""
        async with asyncio.timeout(DEADLINE_S):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        assert first.startswith("HTTP/")
        return Answer(int(first.split(" ")[1]), headers, b"", raw)

    async def answer(self, *, is_head: bool = False) -> Answer:
        """Read a whole answer; IncompleteReadError when it is cut off."""
        found = await self.head()
        async with asyncio.timeout(DEADLINE_S):
            if is_head or found.status in {204, 304}:
                pass
            elif found.header("transfer-encoding") == "chunked":
                assert found.header("content-length") is None
                while piece := await self.read_chunk():
                    found.body += piece
            elif (length := found.header("content-length")) is not None:
                found.body = await self.reader.readexactly(int(length))
            else:
                assert found.header("connection") == "close"
                found.body = await self.reader.read()
        return found

    async def read_chunk(self) -> bytes:
        """Read one chunk of the body; nothing is the last one."""
        async with asyncio.timeout(DEADLINE_S):
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(size + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    async def is_closed(self) -> bool:
        """Wait for the end of the connection; whether nothing more came before it."""
        async with asyncio.timeout(DEADLINE_S):
            try:
                return await self.reader.read() == b""
            except ConnectionError:
                return True

    async def is_reset_or_cut(self) -> bool:
        """Wait for the end of the connection, whatever comes before it."""
        async with asyncio.timeout(DEADLINE_S):
            with contextlib.suppress(ConnectionError):
                await self.reader.read()
        return True

    def close(self) -> None:
        """Leave."""
        self.writer.close()


@dataclass
class House:
    """Everything that a test may touch."""

    launcher: FakeLauncher
    supervisor: Supervisor
    pools: Pools
    proxy: Proxy
    endpoint: EndpointServer
    port: int
    planner: FakePlanner
    served: list[Served] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    _clients: list[Client] = field(default_factory=list)

    @property
    def tiny(self) -> FakeUpstream:
        """The upstream of the model that most tests use."""
        return self.launcher.upstreams["tiny"]

    async def connect(self, *, limit: int = 1 << 20) -> Client:
        """Return a client with a connection of its own."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=limit)
        client = Client(reader, writer)
        self._clients.append(client)
        return client

    async def post(self, value: object, path: str = CHAT, *, headers: str = "") -> Answer:
        """Send one request on a fresh connection and return the answer."""
        client = await self.connect()
        await client.post(value, path, headers=headers)
        try:
            return await client.answer()
        finally:
            client.close()

    async def get(self, path: str, *, method: str = "GET", headers: str = "") -> Answer:
        """Send one request without a body on a fresh connection and return the answer."""
        client = await self.connect()
        try:
            return await client.get(path, method=method, headers=headers)
        finally:
            client.close()

    async def warm_up(self, model: str = "tiny") -> None:
        """Load the model and lay a connection ready, which is what the fast path needs."""
        await self.supervisor.load(model)
        shown = self.supervisor.view(model)
        pool = self.pools.get(model, shown.run) if shown else None
        assert pool is not None
        pool.give_back(await pool.connect())

    def in_flight(self, model: str = "tiny") -> int:
        """Return how many requests hold a place in the model."""
        shown = self.supervisor.view(model)
        return shown.in_flight if shown else 0

    def queued(self, model: str = "tiny") -> int:
        """Return how many requests wait for the model."""
        shown = self.supervisor.view(model)
        return shown.queued if shown else 0

    def state(self, model: str = "tiny") -> State | None:
        """Return the model's state."""
        shown = self.supervisor.view(model)
        return shown.state if shown else None

    async def close(self) -> None:
        """Disconnect every client and see that nobody holds a place any more."""
        for client in self._clients:
            client.close()
        views = self.supervisor.views
        await eventually(lambda: not any(shown.in_flight or shown.queued for shown in views()))
        self.faults += [repr(fault) for upstream in self.launcher.upstreams.values() for fault in upstream.faults]


class _Faults(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._faults = faults

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self._faults.append(self.format(record))


DEFAULT_RECIPES = (
    Recipe(id="tiny", model_path="tiny.gguf", served_model_name="org/Tiny", aliases=("gpt-4o",), max_model_len=2048),
    Recipe(id="other", model_path="other.gguf"),
    Recipe(id="hidden", model_path="hidden.gguf", unlisted=True),
)


ANYBODY = Rules(allowed_hosts=frozenset({"*"}), cors_origins=frozenset({"*"}))


@contextlib.asynccontextmanager
async def open_house(
    directory: Path,
    *,
    recipes: tuple[Recipe, ...] = DEFAULT_RECIPES,
    max_queue: int = 64,
    wait_comment_interval_s: float = 5.0,
    max_body: int = MAX_BODY,
    has_fast_path: bool = True,
    rules: Rules = ANYBODY,
) -> AsyncIterator[House]:
    """Serve for as long as the context lasts; models are loaded by the first request, or by `House.warm_up`."""
    loop = asyncio.get_running_loop()
    launcher = FakeLauncher(directory)
    launcher.upstreams = {recipe.id: FakeUpstream(recipe.alias) for recipe in recipes}
    pools, planner = Pools(), FakePlanner(launcher)
    supervisor = Supervisor(
        scheduler=Scheduler(),
        launcher=launcher,
        planner=planner,
        upstreams=pools,
        pulse=lambda _: Pulse(),
        clock=loop.time,
    )
    catalogue = build_catalogue([RecipeEntry(recipe, file=f"{recipe.id}.yaml", line=1) for recipe in recipes])
    supervisor.use_catalogue(catalogue, LifecycleDefaults(max_queue=max_queue), max_instances=0)
    access = Access(rules, own_names=frozenset(), is_session=lambda _: False)
    listing = Listing(supervisor, created=1_700_000_000)
    served: list[Served] = []
    meter = Meter(served.append)
    proxy = Proxy(
        supervisor, pools, listing, max_body=max_body, wait_comment_interval_s=wait_comment_interval_s, access=access,
        meter=meter,
    )  # fmt: skip
    fast_path = FastPath(
        supervisor, pools, FORWARDED_POSTS, max_body=lambda: proxy.max_body, access=access, meter=meter
    )
    endpoint_path = fast_path if has_fast_path else None
    endpoint = EndpointServer(proxy.handle, fast_path=endpoint_path, after_loss=proxy.after_fast_loss)
    server = await loop.create_server(endpoint, "127.0.0.1", 0)
    house = House(launcher, supervisor, pools, proxy, endpoint, server.sockets[0].getsockname()[1], planner, served)
    loop.set_exception_handler(lambda _, context: house.faults.append(f"{context['message']}: {context}"))
    handler = _Faults(house.faults)
    logging.getLogger().addHandler(handler)
    try:
        yield house
        await house.close()
    finally:
        logging.getLogger().removeHandler(handler)
        server.close()
        await endpoint.shutdown(1.0)
        async with asyncio.timeout(DEADLINE_S):
            await supervisor.shut_down()
        await launcher.close()
    assert house.faults == []
