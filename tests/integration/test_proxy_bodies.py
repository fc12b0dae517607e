"""Request bodies in every dress: chunked, compressed, announced, large, too large, malformed."""

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.integration.fake_upstream import Call, answer
from tests.integration.house import CHAT, House, eventually, open_house

ASK = {"model": "tiny"}
LIMIT = 1 << 20
PART = b"\r\nContent-Disposition:" + b";name=models" * 300 + b"\r\n"


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """Takes large bodies."""
    async with open_house(tmp_path) as house:
        yield house


@pytest.fixture
async def strict(tmp_path: Path) -> AsyncIterator[House]:
    """Takes bodies of up to 1 MiB."""
    async with open_house(tmp_path, max_body=LIMIT) as house:
        yield house


def post(headers: str, path: str = CHAT) -> bytes:
    """Return the head of a POST."""
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode()


def chunked(body: bytes, size: int) -> bytes:
    """Return ``body`` in chunks of ``size``."""
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x;x=y\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_chunked_body(house: House, size: int) -> None:
    """The model gets the body with a length."""
    body = json.dumps(ASK | {"x": "y" * 500}).encode()
    client = await house.connect()
    for _ in range(2):
        await client.send(post("Transfer-Encoding: chunked\r\n") + chunked(body, size))
        assert (await client.answer()).status == 200
    assert [received.body for received in house.tiny.requests] == [body, body]
    assert house.tiny.requests[0].header("content-length") == str(len(body))


@pytest.mark.parametrize(
    ("coding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)], ids=["gzip", "deflate"]
)
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_compressed_body(house: House, coding: str, compress: Callable[[bytes], bytes], is_chunked: bool) -> None:
    """The model gets the body as it was before it was compressed."""
    body = json.dumps(ASK | {"x": "y" * 100_000}).encode()
    sent = compress(body)
    client = await house.connect()
    framing = "Transfer-Encoding: chunked\r\n" if is_chunked else f"Content-Length: {len(sent)}\r\n"
    head = post(f"Content-Encoding: {coding}\r\n{framing}")
    await client.send(head + (chunked(sent, 50) if is_chunked else sent))
    assert (await client.answer()).status == 200
    (received,) = house.tiny.requests
    assert received.body == body
    assert received.header("content-encoding") is None


async def test_expect_100_continue(house: House) -> None:
    """A client that asks first is told to go on, and only once."""
    client = await house.connect()
    for _ in range(2):
        await client.send(post("Content-Length: 16\r\nExpect: 100-continue\r\n"))
        assert (await client.head()).raw == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b'{"model":"tiny"}')
        assert (await client.answer()).json == {"said": "hello"}


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", "", "nonsense"])
async def test_json_under_any_content_type(house: House, content_type: str) -> None:
    """``curl -d`` says form-urlencoded and means JSON."""
    assert (await house.post(ASK, headers=f"Content-Type: {content_type}\r\n")).status == 200
    assert house.tiny.requests[0].body == b'{"model": "tiny"}'


async def test_large_body_arrives_intact(house: House) -> None:
    """30 MB go through, at the pace at which the model reads."""
    image = "".join(f"{number:08x}" for number in range(30 << 17))
    body = json.dumps({"messages": [{"content": image}], "model": "tiny"}).encode()
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await go_on.wait()
        assert await call.read_body() == body
        await call.send(answer())

    house.tiny.script, house.tiny.reads_body_first = script, False
    client = await house.connect()
    async with asyncio.TaskGroup() as group:
        _ = group.create_task(client.post(body))
        await eventually(lambda: house.tiny.requests)
        assert (await house.get("/health")).status == 200
        go_on.set()
    assert (await client.answer()).status == 200


async def test_answer_before_the_whole_request_was_sent(house: House) -> None:
    """An early answer reaches the client, and the connection with the rest of the body in it is not used again."""

    async def script(call: Call) -> None:
        await call.send(answer(b"early", status=b"400 Bad Request"))
        await gone(call)

    async def polite(call: Call) -> None:
        await call.read_body()
        await call.send(answer(b"polite"))

    house.tiny.script, house.tiny.reads_body_first = script, False
    client = await house.connect()
    await client.post(ASK | {"x": "y" * (20 << 20)})
    assert (await client.answer()).body == b"early"
    house.tiny.script = polite
    for _ in range(3):
        await client.post(ASK)
        assert (await client.answer()).body == b"polite"
    assert [received.body for received in house.tiny.requests[1:]] == [b'{"model": "tiny"}'] * 3


async def gone(call: Call) -> None:
    """Read whatever still comes, up to the end of the connection."""
    try:
        while await call.reader.read(1 << 20):
            pass
    except ConnectionError:
        pass
    call.is_open = False


# Too large


async def test_content_length_over_the_limit(strict: House) -> None:
    """Refused by its announcement, before a byte of it was sent."""
    client = await strict.connect()
    await client.send(post(f"Content-Length: {LIMIT + 1}\r\nExpect: 100-continue\r\n"))
    reply = await client.answer()
    assert (reply.status, reply.error["kind"], reply.error["code"]) == (413, "body_too_large", "body_too_large")
    assert strict.launcher.starts == []


async def test_body_at_the_limit(strict: House) -> None:
    """The limit itself is allowed."""
    body = b'{"model":"tiny"}'.ljust(LIMIT)
    assert (await strict.post(body)).status == 200
    assert (await strict.post(body + b" ")).status == 413


@pytest.mark.parametrize("has_fast_path", [False, True], ids=["usual way", "fast path"])
async def test_small_limit(tmp_path: Path, has_fast_path: bool) -> None:
    """A limit below what the fast path takes holds on both ways, and so does one that a reload brings."""
    async with open_house(tmp_path, max_body=1024, has_fast_path=has_fast_path) as house:
        await house.warm_up()
        client = await house.connect()
        for size, limit, status in ((1024, 1024, 200), (1500, 2000, 200), (1500, 1024, 413)):
            house.proxy.max_body = limit
            await client.post(b'{"model":"tiny"}'.ljust(size))
            assert (await client.answer()).status == status


async def test_chunked_body_over_the_limit(strict: House) -> None:
    """Refused as soon as it is too long, though its end is not in sight."""
    client = await strict.connect()
    await client.send(post("Transfer-Encoding: chunked\r\n"))
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    for _ in range(LIMIT // 0x10000 + 2):
        await client.send(piece)
    assert (await client.answer()).error["kind"] == "body_too_large"


@pytest.mark.parametrize("path", [CHAT, "/upstream/tiny/x", "/v1/tokenize", "/v1/messages"])
async def test_gzip_bomb(strict: House, path: str) -> None:
    """What counts is the size after decompression, and it is not decompressed to the end."""
    bomb = gzip.compress(b" " * (512 << 20), 1)
    client = await strict.connect()
    client.writer.write(post(f"Content-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n", path) + bomb)
    assert (await client.answer()).status == 413


# Hostile


@pytest.mark.parametrize(
    ("path", "headers", "begin", "piece", "end"),
    [
        (CHAT, "", b'{"x":[', b'"",', b'""],"model":"nobody"}'),
        (CHAT, "", b'{"model":"nobody","x":[', b"[],", b"[]]}"),
        (CHAT, "", b"{", b'"":1,', b'"model":"nobody"}'),
        ("/upstream/tiny/x", "", b'{"x":[', b'"",', b'""'),
        ("/v1/tokenize", "", b'{"x":[', b'"",', b'""],"model":"nobody"}'),
        ("/v1/audio/transcriptions", "Content-Type: multipart/form-data; boundary=b\r\n", b"", PART, b""),
    ],
    ids=["texts", "lists", "keys", "upstream", "tokens", "form"],
)
async def test_hostile_body_holds_up_nobody(
    house: House, path: str, headers: str, begin: bytes, piece: bytes, end: bytes
) -> None:
    """While a large body is looked through, others are served; when it is found out, it is refused."""
    body = begin + piece * ((40 << 20) // len(piece)) + end
    client = await house.connect()
    slowest_s = 0.0
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as group:
        _ = group.create_task(client.post(body, path, headers=headers))
        reading = group.create_task(client.answer())
        while not reading.done():
            began = loop.time()
            assert (await house.get("/health")).status == 200
            slowest_s = max(slowest_s, loop.time() - began)
    assert reading.result().status in {400, 404}
    assert slowest_s < 0.5
    assert house.launcher.starts == []


# Malformed


@pytest.mark.parametrize(
    "body", [b"", b"{", b"null", b"[]", b'{"model":1}', b"model=tiny", b'{"model":"tiny"} {}', b"\xff\xfe", b"[" * 9999]
)
async def test_malformed_json(house: House, body: bytes) -> None:
    """Refused before a model is started, in the envelope; the connection stays usable."""
    client = await house.connect()
    for _ in range(2):
        await client.post(body)
        reply = await client.answer()
        assert (reply.status, reply.error["kind"]) == (400, "bad_request")
    assert house.launcher.starts == []


@pytest.mark.parametrize(
    "request_bytes",
    [
        post("Content-Encoding: gzip\r\nContent-Length: 9\r\n") + b"no gzip!!",
        post("Content-Encoding: gzip\r\nContent-Length: 20\r\n") + gzip.compress(b'{"model":"tiny"}')[:20],
        post("Content-Encoding: deflate\r\nContent-Length: 9\r\n") + b"no zlib!!",
        post("Transfer-Encoding: chunked\r\n") + b"zz\r\n\r\n",
        post("Transfer-Encoding: chunked\r\n") + b"5\r\nhelloworld\r\n0\r\n\r\n",
        post("Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 50\r\n")
        + b'--b\r\nContent-Disposition: form-data; name="model"\r\n',
    ],
    ids=["gzip", "cut gzip", "deflate", "chunk size", "chunk end", "multipart"],
)
async def test_body_that_cannot_be_read(house: House, request_bytes: bytes) -> None:
    """A body broken on the way is the client's error, not ours."""
    client = await house.connect()
    await client.send(request_bytes)
    reply = await client.answer()
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")
    assert house.launcher.starts == []


async def test_client_that_leaves_in_its_body(house: House) -> None:
    """Nothing is started for half a request."""
    client = await house.connect()
    await client.send(post("Content-Length: 1000\r\n") + b'{"model":"tiny"')
    client.close()
    assert (await house.get("/health")).status == 200
    assert house.launcher.starts == []
