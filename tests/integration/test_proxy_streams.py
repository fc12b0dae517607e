"""What a client sees while it waits, while an answer streams, and when somebody leaves in the middle."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from llmstudiod.core.errors import LauncherError
from llmstudiod.core.lifecycle import State
from llmstudiod.http.relay import MAX_COLLECTED
from llmstudiod.launchers.base import Exit
from tests.integration.fake_upstream import SSE_HEAD, Call, answer, chunk, event, reset_on_close
from tests.integration.house import Answer, Client, House, eventually, open_house

ASK = {"model": "tiny"}
STREAM = ASK | {"stream": True}
ABORT_WITHIN_S = 0.1
CRASH = Exit("core-dump", signal=6, lines=("CUDA error: an illegal memory access --bad",))
REFUSAL = Exit("exit-code", code=1, lines=("error: invalid argument: --bad",))
SOON = 0.05


@pytest.fixture(params=[False, True], ids=["usual way", "fast path"])
async def warm(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    """The first model is ready; what a client sees is the same on both ways."""
    async with open_house(tmp_path, has_fast_path=request.param) as house:
        await house.warm_up()
        yield house


@pytest.fixture
async def cold(tmp_path: Path) -> AsyncIterator[House]:
    """Nothing is loaded, /health holds back, and waiting clients are told every 50 ms."""
    async with open_house(tmp_path, wait_comment_interval_s=SOON) as house:
        house.tiny.is_ready = False
        yield house


async def post_and_read_head(house: House, value: object = STREAM, path: str = "/v1/chat/completions") -> Client:
    """Return a client that has read the head of a stream."""
    client = await house.connect()
    await client.post(value, path)
    head = await client.head()
    assert (head.status, head.header("content-type")) == (200, "text/event-stream")
    return client


async def read_comment(client: Client) -> str:
    """Return the text of one comment."""
    data = await client.read_chunk()
    assert data.startswith(b": ")
    assert data.endswith(b"\n\n")
    return data[2:-2].decode()


async def read_error(client: Client) -> dict[str, Any]:
    """Return the error that ends a stream, after any comments; the connection closes without [DONE]."""
    data = b": "
    while data.startswith(b": "):
        data = await client.read_chunk()
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    assert await client.read_chunk() == b""
    assert await client.is_closed()
    return Answer(200, [], data[6:-2], b"").error


# Streaming


async def test_events_arrive_as_they_are_sent(warm: House) -> None:
    """The first event is with the client before the second is produced."""
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await call.send(SSE_HEAD)
        for number in range(3):
            await call.send(event(str(number)))
            await go_on.wait()
            go_on.clear()
        await call.send(chunk(b""))

    warm.tiny.script = script
    client = await post_and_read_head(warm)
    for number in range(3):
        assert await client.read_chunk() == f"data: {number}\n\n".encode()
        assert warm.in_flight() == 1
        go_on.set()
    assert await client.read_chunk() == b""
    await eventually(lambda: warm.in_flight() == 0)


async def test_pieces_of_a_length_arrive_as_they_are_sent(warm: House) -> None:
    """A body with a length is not gathered either."""
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\none")
        await go_on.wait()
        await call.send(b"two")

    warm.tiny.script = script
    client = await warm.connect()
    await client.post(ASK)
    assert (await client.head()).header("content-length") == "6"
    assert await client.reader.readexactly(3) == b"one"
    go_on.set()
    assert await client.reader.readexactly(3) == b"two"


@pytest.mark.parametrize("step", [1, 7, 64])
async def test_answer_in_any_pieces(warm: House, step: int) -> None:
    """However the upstream's bytes are cut, head and body arrive whole, and the connection stays usable."""
    wire = SSE_HEAD + event("one") + event("two") + chunk(b"")

    async def script(call: Call) -> None:
        for start in range(0, len(wire), step):
            await call.send(wire[start : start + step])
            await asyncio.sleep(0)

    warm.tiny.script = script
    client = await warm.connect()
    for _ in range(3):
        await client.post(STREAM)
        assert (await client.answer()).body == b"data: one\n\ndata: two\n\n"


async def test_many_streams_at_once(warm: House) -> None:
    """Streams do not mix."""
    warm.tiny.n_parallel = 64

    async def script(call: Call) -> None:
        number = json.loads(call.received.body)["number"]
        await call.send(SSE_HEAD)
        for step in range(20):
            await call.send(event(f"{number}.{step}"))
            await asyncio.sleep(0)
        await call.send(chunk(b""))

    warm.tiny.script = script
    answers = await asyncio.gather(*(warm.post(STREAM | {"number": number}) for number in range(40)))
    for number, reply in enumerate(answers):
        assert reply.body == b"".join(f"data: {number}.{step}\n\n".encode() for step in range(20))


# The client leaves


@pytest.mark.parametrize("is_reset", [False, True], ids=["close", "reset"])
@pytest.mark.parametrize("when", ["before the head", "after the head", "in the body"])
async def test_client_that_leaves_frees_the_slot(warm: House, when: str, is_reset: bool) -> None:
    """Upstream's connection is cut within 100 ms, and the place is free."""
    took_s: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()
    left_at = 0.0

    async def script(call: Call) -> None:
        sent = {"before the head": b"", "after the head": SSE_HEAD, "in the body": SSE_HEAD + event("one")}
        if sent[when]:
            await call.send(sent[when])
        await call.client_gone()
        took_s.set_result(loop.time() - left_at)

    warm.tiny.script = script
    client = await warm.connect()
    await client.post(STREAM)
    await eventually(lambda: warm.tiny.requests)
    if when != "before the head":
        await client.head()
    assert warm.in_flight() == 1
    left_at = loop.time()
    if is_reset:
        reset_on_close(client.writer)
    client.close()
    assert await asyncio.wait_for(took_s, 5) < ABORT_WITHIN_S
    await eventually(lambda: warm.in_flight() == 0, within_s=ABORT_WITHIN_S)


async def test_client_that_leaves_while_it_waits(cold: House) -> None:
    """Its place in the queue is given up; the load goes on for the next."""
    client = await cold.connect()
    await client.post(STREAM)
    await eventually(lambda: cold.queued() == 1)
    client.close()
    await eventually(lambda: cold.queued() == 0, within_s=ABORT_WITHIN_S)
    cold.tiny.is_ready = True
    await cold.supervisor.load("tiny")
    assert cold.tiny.requests == []


async def test_client_that_leaves_while_its_request_is_sent(warm: House) -> None:
    """A large body is not pressed into a model that nobody asks any more."""
    gone = asyncio.Event()

    async def script(call: Call) -> None:
        while await call.reader.read(1 << 20):
            pass
        call.is_open = False
        gone.set()

    warm.tiny.script = script
    warm.tiny.reads_body_first = False
    hold = asyncio.Event()

    async def stalled(call: Call) -> None:
        await hold.wait()
        await script(call)

    warm.tiny.script = stalled
    client = await warm.connect()
    await client.post(ASK | {"x": "y" * (20 << 20)})
    await eventually(lambda: warm.tiny.requests)
    client.close()
    await eventually(lambda: warm.in_flight() == 0)
    hold.set()
    await asyncio.wait_for(gone.wait(), 5)


# The upstream is lost


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 O", b"HTTP/1.1 100 Continue\r\n\r\n", b"NONSENSE\r\n\r\n"])
@pytest.mark.parametrize("ask", [ASK, STREAM])
async def test_crash_before_the_head(warm: House, sent: bytes, ask: dict[str, Any]) -> None:
    """The answer is 502 with the reason read from the process's end; the request is never tried again."""

    async def script(call: Call) -> None:
        if sent:
            await call.send(sent)
            await asyncio.sleep(0.01)
        warm.launcher.die("tiny", CRASH)
        call.is_open = False

    warm.tiny.script = script
    reply = await warm.post(ask)
    assert (reply.status, reply.error["kind"], reply.error["type"]) == (502, "upstream_crashed", "server_error")
    assert "--bad" in reply.error["message"]
    assert reply.error["failure"] == "gpu_error"
    assert reply.error["lines"] == ["CUDA error: an illegal memory access --bad"]
    assert len(warm.tiny.requests) == 1


async def test_crash_in_a_stream(warm: House) -> None:
    """A stream that has begun ends with an error event, and without [DONE]."""

    async def script(call: Call) -> None:
        await call.send(SSE_HEAD + event("one"))
        warm.launcher.die("tiny", CRASH)
        call.is_open = False

    warm.tiny.script = script
    client = await post_and_read_head(warm)
    assert await client.read_chunk() == b"data: one\n\n"
    error = await read_error(client)
    assert (error["kind"], error["failure"]) == ("upstream_crashed", "gpu_error")


async def test_request_sent_while_the_reason_is_sought(warm: House) -> None:
    """The end of a lost answer comes before anything else on its connection, and is the last."""

    async def script(call: Call) -> None:
        await call.send(SSE_HEAD + event("one"))
        call.die()

    warm.tiny.script = script
    client = await post_and_read_head(warm)
    assert await client.read_chunk() == b"data: one\n\n"
    await eventually(lambda: warm.tiny.open_connections == 0)
    await asyncio.sleep(0.05)
    await client.send(b"GET /running HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await read_error(client))["kind"] == "upstream_crashed"


async def test_crash_in_a_stream_of_anthropics(warm: House) -> None:
    """Clients of /v1/messages get an event named error in their own envelope."""

    async def script(call: Call) -> None:
        await call.send(SSE_HEAD + event("one"))
        warm.launcher.die("tiny", CRASH)
        call.is_open = False

    warm.tiny.script = script
    client = await post_and_read_head(warm, path="/v1/messages")
    assert await client.read_chunk() == b"data: one\n\n"
    data = await client.read_chunk()
    assert data.startswith(b'event: error\ndata: {"type":"error","error":{')
    assert await client.read_chunk() == b""
    assert await client.is_closed()


@pytest.mark.parametrize(
    "sent",
    [
        SSE_HEAD + b"100\r\ndata: on",
        SSE_HEAD + event("one") + b"1",
        SSE_HEAD + b"5\r\nhello",
        SSE_HEAD + b"5\r\nhello\r",
        SSE_HEAD + event("one") + b"0\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 99\r\n\r\ndata: one\n\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
    ],
)
async def test_crash_where_no_event_can_follow(warm: House, sent: bytes) -> None:
    """In the middle of a chunk or of a known length the connection is cut: what came is not the whole, and it shows."""

    async def script(call: Call) -> None:
        await call.send(sent)
        await asyncio.sleep(0.01)
        warm.launcher.die("tiny", CRASH)
        call.is_open = False

    warm.tiny.script = script
    client = await warm.connect()
    await client.post(STREAM)
    found = b""
    try:
        while piece := await client.reader.read(1 << 16):
            found += piece
    except ConnectionError:
        pass
    assert b"upstream_crashed" not in found
    assert not found.endswith(b"0\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 200 ")


async def test_garbled_chunk_takes_no_event(warm: House) -> None:
    """A chunk of which the client has a part stays a part: its rest came with what could not be followed."""

    async def script(call: Call) -> None:
        await call.send(SSE_HEAD + b"5\r\nhel")
        await asyncio.sleep(0.01)
        await call.send(b"lo\r\nzz\r\n")
        await call.client_gone()

    warm.tiny.script = script
    client = await post_and_read_head(warm)
    assert await client.reader.readexactly(6) == b"5\r\nhel"
    assert await client.is_closed()


@pytest.mark.parametrize("bad", [b"5\r\nhelloXX", b"zz\r\n", event("two") + b"-1\r\n"])
async def test_garbled_stream_is_cut(warm: House, bad: bytes) -> None:
    """A stream whose framing cannot be followed is cut, and so is the connection that it came from."""

    async def script(call: Call) -> None:
        await call.send(SSE_HEAD + event("one"))
        await asyncio.sleep(0.01)
        await call.send(bad)
        await call.client_gone()

    warm.tiny.script = script
    client = await post_and_read_head(warm)
    assert await client.read_chunk() == b"data: one\n\n"
    assert await client.is_reset_or_cut()
    await eventually(lambda: warm.tiny.open_connections == 0)


async def test_stream_of_an_http10_client_is_ended_by_an_event(warm: House) -> None:
    """Also without chunks the reason follows the last whole event."""

    async def script(call: Call) -> None:
        await call.send(SSE_HEAD + event("one"))
        await asyncio.sleep(0.01)
        warm.launcher.die("tiny", CRASH)
        call.is_open = False

    warm.tiny.script = script
    client = await warm.connect()
    await client.post(STREAM, version="1.0")
    reply = await client.answer()
    assert reply.body.startswith(b'data: one\n\ndata: {"error":{')
    assert reply.body.endswith(b"}}\n\n")


# Waiting for a load


async def test_waiting_stream_gets_comments_then_the_answer(cold: House) -> None:
    """A client that streams is told that it is not forgotten, then gets the model's stream on the same response."""

    async def script(call: Call) -> None:
        await call.send(SSE_HEAD + event("one"))
        await call.send(event("two") + chunk(b""))

    cold.tiny.script = script
    client = await post_and_read_head(cold)
    assert [await read_comment(client) for _ in range(3)] == ["loading tiny"] * 3
    cold.tiny.is_ready = True
    found = b""
    while piece := await client.read_chunk():
        found += b"" if piece.startswith(b": ") else piece
    assert found == b"data: one\n\ndata: two\n\n"
    await client.post(ASK)  # and the connection is still good
    assert (await client.head()).status == 200


@pytest.mark.parametrize("ask", [ASK, ASK | {"stream": False}])
async def test_waiting_request_without_a_stream_gets_none(cold: House, ask: dict[str, Any]) -> None:
    """Nothing may come before the head of a plain answer."""
    client = await cold.connect()
    await client.post(ask)
    await eventually(lambda: cold.queued() == 1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.reader.readexactly(1), 4 * SOON)
    cold.tiny.is_ready = True
    assert (await client.answer()).json == {"said": "hello"}


async def test_http10_client_waits_without_chunks(cold: House) -> None:
    """Comments and events come as plain bytes, ended by the end of the connection."""

    async def script(call: Call) -> None:
        await call.send(SSE_HEAD + event("one") + chunk(b""))

    cold.tiny.script = script
    client = await cold.connect()
    await client.post(STREAM, version="1.0")
    assert (await client.head()).header("connection") == "close"
    assert await client.reader.readuntil(b"\n\n") == b": loading tiny\n\n"
    cold.tiny.is_ready = True
    rest = await client.reader.read()
    assert rest.replace(b": loading tiny\n\n", b"") == b"data: one\n\n"


@pytest.mark.parametrize(
    ("head", "end"),
    [(b"Content-Length: 11\r\n", b""), (b"", b""), (b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n")],
    ids=["length", "close", "chunked"],
)
async def test_promised_chunks_are_kept(cold: House, head: bytes, end: bytes) -> None:
    """However the upstream frames its stream, the client gets the chunks that it was promised, up to the last."""

    async def script(call: Call) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + head + b"\r\n")
        for part in (b"data: ", b"one\n\n"):
            await call.send(chunk(part) if end else part)
            await asyncio.sleep(0.01)
        await call.send(end)
        if not head:
            call.close()

    cold.tiny.script = script
    client = await post_and_read_head(cold)
    await read_comment(client)
    cold.tiny.is_ready = True
    found = b""
    while piece := await client.read_chunk():
        found += b"" if piece.startswith(b": ") else piece
    assert found == b"data: one\n\n"


async def test_load_that_fails_at_once_is_a_status(cold: House) -> None:
    """Before anything was sent, a failure is the answer's status."""
    cold.launcher.start_error = LauncherError("cannot start 'tiny': no such unit", hint="look")
    reply = await cold.post(STREAM)
    assert (reply.status, reply.error["kind"], reply.error["hint"]) == (503, "load_failed", "look")
    again = await cold.post(STREAM)
    assert (again.status, again.error["kind"]) == (503, "backing_off")
    assert int(again.header("retry-after") or 0) >= 1


async def test_load_that_fails_later_is_a_status_without_a_stream(cold: House) -> None:
    """A client that does not stream gets the status, however long it has waited."""
    client = await cold.connect()
    await client.post(ASK)
    await eventually(lambda: cold.state() is State.LOADING)
    cold.launcher.die("tiny", REFUSAL)
    reply = await client.answer()
    assert (reply.status, reply.error["kind"], reply.error["failure"]) == (503, "load_failed", "bad_args")


async def test_load_that_fails_after_comments_is_an_event(cold: House) -> None:
    """Once a stream was begun, a failure is its last event."""
    client = await post_and_read_head(cold)
    await read_comment(client)
    cold.launcher.die("tiny", REFUSAL)
    error = await read_error(client)
    assert (error["kind"], error["failure"]) == ("load_failed", "bad_args")


@pytest.mark.parametrize("headers", [b"", b"Connection: close\r\n"])
async def test_error_of_the_model_after_comments_is_an_event(cold: House, headers: bytes) -> None:
    """The model's own refusal comes too late for a status: it becomes the last event, in one line."""

    async def script(call: Call) -> None:
        await call.send(answer(b'{"error":\r\n{"code":\n400}\r}', status=b"400 Bad Request", headers=headers))

    cold.tiny.script = script
    client = await post_and_read_head(cold)
    await read_comment(client)
    cold.tiny.is_ready = True
    data = b": "
    while data.startswith(b": "):
        data = await client.read_chunk()
    assert data == b'data: {"error": {"code": 400} }\n\n'
    assert await client.read_chunk() == b""
    assert await client.is_closed()


@pytest.mark.parametrize(
    "sent", [b"", b"HTTP/1.1 200 O", SSE_HEAD, b"HTTP/1.1 500 Oh\r\nContent-Length: 9\r\n\r\n{", b"NONSENSE\r\n\r\n"]
)
async def test_crash_after_comments_is_an_event(cold: House, sent: bytes) -> None:
    """Nothing of the model's answer has reached the client, so the reason can."""

    async def script(call: Call) -> None:
        await call.send(sent)
        await asyncio.sleep(0.01)
        cold.launcher.die("tiny", REFUSAL)
        call.is_open = False

    cold.tiny.script = script
    client = await post_and_read_head(cold)
    await read_comment(client)
    cold.tiny.is_ready = True
    assert (await read_error(client))["kind"] == "upstream_crashed"


@pytest.mark.parametrize("status", [b"400 Bad Request", b"200 OK"])
async def test_error_of_the_model_in_anthropics_stream(cold: House, status: bytes) -> None:
    """Anthropic's clients know an error by its event's name."""

    async def script(call: Call) -> None:
        await call.send(answer(b'{"type":"error"}', status=status))

    cold.tiny.script = script
    client = await post_and_read_head(cold, path="/v1/messages")
    await read_comment(client)
    cold.tiny.is_ready = True
    data = b": "
    while data.startswith(b": "):
        data = await client.read_chunk()
    assert data == (b"event: error\n" if status[:1] == b"4" else b"") + b'data: {"type":"error"}\n\n'


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("excess", [0, 1])
async def test_long_answer_to_a_stream_is_whole_or_an_error(cold: House, path: str, excess: int) -> None:
    """An answer that is no stream after all is never cut off in silence."""
    long = b'"' + b"x" * (MAX_COLLECTED + excess - 2) + b'"'

    async def script(call: Call) -> None:
        await call.send(answer(long))

    cold.tiny.script = script
    client = await cold.connect(limit=4 << 20)
    await client.post(STREAM, path)
    await client.head()
    await read_comment(client)
    cold.tiny.is_ready = True
    data = b": "
    while data.startswith(b": "):
        data = await client.read_chunk()
    if excess:
        assert data.startswith(b'event: error\ndata: {"type":' if path == "/v1/messages" else b'data: {"error":')
        assert b"is no stream" in data
    else:
        assert data == b"data: " + long + b"\n\n"
    assert await client.read_chunk() == b""
    assert await client.is_closed()


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/rerank?x=y", "/upstream/tiny/embedding", "/v1/messages/count_tokens"]
)
async def test_stream_where_nothing_can_stream_is_ignored(cold: House, path: str) -> None:
    """Embeddings come whole, and as JSON, whatever the client says."""
    long = b'"' + b"x" * (2 << 20) + b'"'

    async def script(call: Call) -> None:
        await call.send(answer(long))

    cold.tiny.script = script
    client = await cold.connect(limit=4 << 20)
    await client.post(STREAM, path)
    await eventually(lambda: cold.queued() == 1)
    await asyncio.sleep(2 * SOON)
    cold.tiny.is_ready = True
    reply = await client.answer()
    assert (reply.header("content-type"), reply.body) == ("application/json", long)


async def test_bug_after_the_head_writes_no_second_one(cold: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that a bug ends is cut: nothing of another answer appears in it."""
    texts = iter(["loading"])
    monkeypatch.setattr(cold.proxy, "_waiting_for", lambda _: next(texts))
    client = await post_and_read_head(cold)
    assert await read_comment(client) == "loading"
    found = b""
    with contextlib.suppress(ConnectionError):
        found = await client.reader.read()
    assert found == b""
    await eventually(lambda: cold.faults)
    assert "StopIteration" in cold.faults.pop()


async def test_bug_after_a_whole_answer_is_answered(warm: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written of an earlier answer does not keep a later one from being given."""
    client = await warm.connect()
    await client.post(ASK, "/v1/chat/completions?x=y")
    assert (await client.answer()).status == 200
    monkeypatch.setattr(warm.proxy, "_route", None)
    assert (await client.get("/health")).error["kind"] == "internal"
    await eventually(lambda: warm.faults)
    assert "TypeError" in warm.faults.pop()


async def test_waiting_for_a_slot_is_told(cold: House) -> None:
    """A model that is ready but busy is said to be so."""
    cold.tiny.is_ready, cold.tiny.n_parallel = True, 1
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await go_on.wait()
        await call.send(SSE_HEAD + chunk(b""))

    cold.tiny.script = script
    first = await cold.connect()
    await first.post(ASK)
    await eventually(lambda: cold.in_flight() == 1)
    second = await post_and_read_head(cold)
    assert await read_comment(second) == "waiting for a slot of tiny"
    assert (cold.in_flight(), cold.queued()) == (1, 1)
    go_on.set()
    assert (await first.head()).status == 200


# Unloading


async def test_unload_lets_a_stream_end(warm: House) -> None:
    """A drain waits for what is in flight, and admits nothing new to that run."""
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await call.send(SSE_HEAD + event("one"))
        await go_on.wait()
        await call.send(event("two") + chunk(b""))

    warm.tiny.script = script
    client = await post_and_read_head(warm)
    assert await client.read_chunk() == b"data: one\n\n"
    async with asyncio.TaskGroup() as group:
        unload = group.create_task(warm.supervisor.unload("tiny"))
        await eventually(lambda: warm.state() is State.DRAINING)
        assert not unload.done()
        go_on.set()
        assert await client.read_chunk() == b"data: two\n\n"
        assert await client.read_chunk() == b""
    assert warm.state() is State.STOPPED


async def test_forced_unload_cuts_with_an_event(warm: House) -> None:
    """Whoever is cut off is told by whom."""

    async def script(call: Call) -> None:
        await call.send(SSE_HEAD + event("one"))
        await call.client_gone()

    warm.tiny.script = script
    client = await post_and_read_head(warm)
    assert await client.read_chunk() == b"data: one\n\n"
    await warm.supervisor.unload("tiny", is_forced=True)
    error = await read_error(client)
    assert error["kind"] == "upstream_crashed"
    assert "unloaded on request" in error["message"]


async def test_forced_unload_before_the_head(warm: House) -> None:
    """The request is answered with the reason and not sent again."""

    async def script(call: Call) -> None:
        await call.client_gone()

    warm.tiny.script = script
    client = await warm.connect()
    await client.post(ASK)
    await eventually(lambda: warm.tiny.requests)
    await warm.supervisor.unload("tiny", is_forced=True)
    reply = await client.answer()
    assert reply.status in {502, 503}
    assert "unloaded on request" in reply.error["message"]
    assert len(warm.tiny.requests) == 1
    assert warm.launcher.starts == ["tiny"]


# Back-pressure

BOUND = 24 << 20
"""What may lie between a model and a client that does not read: the kernel's buffers on both sides, and ours."""


async def pump(call: Call, total: int, sent: list[int]) -> None:
    """Send a stream of ``total`` bytes as fast as it is taken; count what was."""
    call.writer.transport.set_write_buffer_limits(1 << 16)
    await call.send(SSE_HEAD)
    piece = chunk(b"x" * 65_000)
    while sent[0] < total:
        await call.send(piece)
        sent[0] += 65_000
    await call.send(chunk(b""))


async def has_settled(sent: list[int]) -> None:
    """Return when nothing more is taken for a while."""
    last = -1
    while sent[0] != last:
        last = sent[0]
        await asyncio.sleep(0.1)


async def test_slow_reader_holds_only_its_own_model_back(warm: House) -> None:
    """What a client does not read is not fetched; others are served meanwhile; then it gets every byte."""
    total, sent = 100_000_000, [0]

    async def script(call: Call) -> None:
        await (pump(call, total, sent) if b"stream" in call.received.body else call.send(answer()))

    warm.tiny.script = script
    slow = await warm.connect(limit=1 << 12)
    await slow.post(STREAM)
    await has_settled(sent)
    assert 0 < sent[0] < BOUND
    for _ in range(20):
        assert (await warm.post(ASK)).status == 200
    assert sent[0] < BOUND
    head = await slow.reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    received = 0
    while size := int(await slow.reader.readline(), 16):
        received += size
        await slow.reader.readexactly(size + 2)
    assert received == sent[0] >= total
    await slow.reader.readexactly(2)
    await slow.post(ASK)
    assert (await slow.answer()).body == b"{}"


async def test_pipelining_does_not_get_round_back_pressure(warm: House) -> None:
    """The second of two answers that nobody reads is held back like the first."""
    total, sent = 100_000_000, [0]
    first = b"y" * (8 << 20)

    async def script(call: Call) -> None:
        await (pump(call, total, sent) if b"stream" in call.received.body else call.send(answer(first)))

    warm.tiny.script = script
    slow = await warm.connect(limit=1 << 12)
    await slow.post(ASK)
    await slow.post(STREAM)
    await has_settled(sent)
    await asyncio.sleep(0.2)
    await has_settled(sent)
    assert sent[0] < BOUND
    assert (await slow.answer()).body == first


async def test_slow_reader_that_leaves_frees_the_slot(warm: House) -> None:
    """A client that goes away without reading does not hold its place."""
    sent = [0]

    async def script(call: Call) -> None:
        await pump(call, 100_000_000, sent)

    warm.tiny.script = script
    slow = await warm.connect(limit=1 << 12)
    await slow.post(STREAM)
    await has_settled(sent)
    reset_on_close(slow.writer)
    slow.close()
    await eventually(lambda: warm.in_flight() == 0)
