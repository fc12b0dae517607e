"""Where an HTTP/1.1 response ends: heads good and hostile, and chunked bodies in any cut."""

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstudiod.http.framing import LAST_CHUNK, Body, ChunkWatcher, FramingError, chunk, parse_head

OK = b"HTTP/1.1 200 OK\r\n"


# Heads


@pytest.mark.parametrize(
    ("head", "body", "length", "is_keep_alive"),
    [
        (OK + b"Content-Length: 5", Body.LENGTH, 5, True),
        (OK + b"Content-Length: 0", Body.NONE, 0, True),
        (OK + b"Content-Length:5", Body.LENGTH, 5, True),
        (OK + b"content-length: \t 5 \t", Body.LENGTH, 5, True),
        (OK + b"Transfer-Encoding: chunked", Body.CHUNKED, 0, True),
        (OK + b"Transfer-Encoding: Chunked", Body.CHUNKED, 0, True),
        (OK + b"X-Y: z", Body.CLOSE, 0, False),
        (b"HTTP/1.1 200", Body.CLOSE, 0, False),
        (b"HTTP/1.1 200 ", Body.CLOSE, 0, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5", Body.LENGTH, 5, False),
        (OK + b"Connection: close\r\nContent-Length: 5", Body.LENGTH, 5, False),
        (OK + b"Connection: Foo\r\nConnection: Close\r\nContent-Length: 5", Body.LENGTH, 5, False),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 5", Body.NONE, 0, True),
        (b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked", Body.NONE, 0, True),
        (b"HTTP/1.1 100 Continue", Body.NONE, 0, True),
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2", Body.LENGTH, 2, True),
    ],
)
def test_delimiter_of_a_good_head(head: bytes, body: Body, length: int, is_keep_alive: bool) -> None:
    """The head alone says how the body ends and whether the connection can be used again."""
    parsed = parse_head(head)
    assert (parsed.body, parsed.length, parsed.is_keep_alive) == (body, length, is_keep_alive)


def test_answer_to_head_has_no_body() -> None:
    """The length told in answer to HEAD is what a GET would have brought."""
    parsed = parse_head(OK + b"Content-Length: 5", is_head_request=True)
    assert parsed.body is Body.NONE
    assert parsed.get(b"content-length") == b"5"


def test_parts_of_a_head() -> None:
    """Names are in lower case, values and the reason as they came, repeated headers all there."""
    parsed = parse_head(b"HTTP/1.1 404 Not  Found\r\nX-A: 1: 2\r\nx-a: \xff\r\nEmpty:")
    assert (parsed.status, parsed.reason) == (404, b"Not  Found")
    assert parsed.headers == ((b"x-a", b"1: 2"), (b"x-a", b"\xff"), (b"empty", b""))
    assert parsed.get(b"x-a") == b"1: 2"
    assert parsed.get(b"absent") == b""


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\r\nHTTP/1.1 200 OK",
        b" HTTP/1.1 200 OK",
        b"http/1.1 200 OK",
        b"HTTP/2.0 200 OK",
        b"HTTP/1.2 200 OK",
        b"HTTP/1.1  200 OK",
        b"HTTP/1.1 20 OK",
        b"HTTP/1.1 2000 OK",
        b"HTTP/1.1 -20 OK",
        b"HTTP/1.1 000 OK",
        b"HTTP/1.1 099 OK",
        b"HTTP/1.1 999 OK",
        b"HTTP/1.1 200OK",
        b"HTTP/1.1 \xb2\xb0\xb0 OK",
        b"HTTP/1.1 200 OK\nContent-Length: 5",
        b"HTTP/1.1 200 OK\rContent-Length: 5",
        b"ICY 200 OK",
        b"POST /v1/completions HTTP/1.1",
        OK + b"Content-Length: 5\r\nContent-Length: 5",
        OK + b"Content-Length: 5\r\nContent-Length: 6",
        OK + b"Content-Length: 5, 5",
        OK + b"Content-Length: +5",
        OK + b"Content-Length: -5",
        OK + b"Content-Length: 0x5",
        OK + b"Content-Length: 5 5",
        OK + b"Content-Length:",
        OK + b"Content-Length: \xb2",
        OK + b"Content-Length: " + b"9" * 16,
        OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        OK + b"Transfer-Encoding: gzip, chunked",
        OK + b"Transfer-Encoding: identity",
        OK + b"Transfer-Encoding: chunked, identity",
        OK + b"Transfer-Encoding: \x0bchunked",
        OK + b"Transfer-Encoding:",
        OK + b"X-A: 1\r\n continued",
        OK + b"X-A: 1\r\n\tcontinued",
        OK + b" X-A: 1",
        OK + b"X-A : 1",
        OK + b"X A: 1",
        OK + b": 1",
        OK + b"no colon",
        OK + b"X-A: 1\nX-B: 2",
        OK + b"X-A: 1\rX-B: 2",
        OK + b"X-A: \0",
        OK + b"X\0A: 1",
        OK + b"X-A: 1\r\n\r\nX-B: 2",
        OK + b"X-\xe9: 1",
    ],
)
def test_hostile_head_is_refused(head: bytes) -> None:
    """What two readers could understand differently is an error, never repaired."""
    with pytest.raises(FramingError):
        parse_head(head)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_head_or_an_error(noise: bytes) -> None:
    """Nothing but FramingError comes out of a head, whatever it holds."""
    for head in (noise, OK + noise):
        try:
            parsed = parse_head(head)
        except FramingError:
            continue
        assert all(b"\r" not in value and b"\n" not in value for _, value in parsed.headers)


# Chunked bodies


@dataclass(frozen=True)
class Chunked:
    """A chunked body as it is sent, what it carries, and the places where it stands between two chunks."""

    wire: bytes
    payload: bytes
    boundaries: frozenset[int]


_VISIBLE = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20).map(str.encode)


@st.composite
def chunked_bodies(draw: st.DrawFn) -> Chunked:
    """Build a body from chunks of any size, with sizes in any spelling, extensions and trailers."""
    wire, payload, boundaries = b"", b"", {0}
    for data in draw(st.lists(st.binary(min_size=1, max_size=40), max_size=6)):
        size = draw(st.sampled_from([b"%x", b"%X", b"%04x", b"%010X"])) % len(data)
        extension = draw(st.one_of(st.just(b""), _VISIBLE.map(lambda name: b" ;" + name)))
        wire += size + extension + b"\r\n" + data + b"\r\n"
        payload += data
        boundaries.add(len(wire))
    wire += draw(st.sampled_from([b"0", b"000"])) + b"\r\n"
    for name, value in draw(st.lists(st.tuples(_VISIBLE, _VISIBLE), max_size=3)):
        wire += b"t" + name + b": " + value + b"\r\n"
    return Chunked(wire + b"\r\n", payload, frozenset(boundaries))


@st.composite
def cuts_of(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """Cut ``data`` anywhere."""
    cuts = sorted({0, len(data), *draw(st.lists(st.integers(0, len(data)), max_size=12))})
    return [data[start:end] for start, end in itertools.pairwise(cuts)]


@given(st.data(), chunked_bodies(), st.binary(max_size=30))
def test_chunked_body_in_any_cut(data: st.DataObject, body: Chunked, extra: bytes) -> None:
    """The payload arrives whole, the end is found to the byte, and what follows it is never taken."""
    watcher = ChunkWatcher()
    payload: list[bytes] = []
    consumed = 0
    for piece in data.draw(cuts_of(body.wire + extra)):
        used = watcher.feed(piece, payload)
        consumed += used
        assert watcher.is_between_chunks == (consumed in body.boundaries)
        if watcher.is_done:
            break
        assert used == len(piece)
    assert watcher.is_done
    assert consumed == len(body.wire)
    assert b"".join(payload) == body.payload
    assert watcher.feed(extra) == 0


@given(chunked_bodies())
def test_chunked_body_byte_by_byte(body: Chunked) -> None:
    """Every state of the watcher survives the smallest piece."""
    watcher = ChunkWatcher()
    payload: list[bytes] = []
    for index in range(len(body.wire)):
        assert not watcher.is_done
        assert watcher.is_between_chunks == (index in body.boundaries)
        assert watcher.feed(body.wire[index : index + 1], payload) == 1
    assert watcher.is_done
    assert b"".join(payload) == body.payload


@pytest.mark.parametrize(
    "wire",
    [
        b"\r\n",
        b"g\r\n",
        b"-1\r\nx\r\n",
        b"+1\r\nx\r\n",
        b"0x1\r\nx\r\n",
        b" 1\r\nx\r\n",
        b"1\nx\r\n",
        b"1\r\nx\n",
        b"1\r\nx\n\n",
        b"1\r\nxy\r\n",
        b"1\r\nxy\n",
        b"2\r\nx\r\n0\r\n\r\n",
        b"1_0\r\n" + b"x" * 16 + b"\r\n",
        b"1 1\r\nx\r\n",
        b"1;a\rb\r\nx\r\n",
        b"\xb9\r\nx\r\n",
        b"f" * 16 + b"\r\n",
        b"1;" + b"e" * 300 + b"\r\nx\r\n",
        b"1;" + b"e" * 300,
        b"0\n\n",
        b"0\r\nt: 1\n\r\n",
        b"0\r\nt: " + b"1" * 300 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
    ],
)
def test_malformed_chunks_are_refused(wire: bytes) -> None:
    """A size that is none, or a chunk longer than its size, is an error in one piece and byte by byte."""
    with pytest.raises(FramingError):
        ChunkWatcher().feed(wire)
    with pytest.raises(FramingError):
        feed_bytewise(ChunkWatcher(), wire)


def feed_bytewise(watcher: ChunkWatcher, wire: bytes) -> None:
    """Feed the smallest pieces."""
    for index in range(len(wire)):
        watcher.feed(wire[index : index + 1])


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_any_bytes_are_chunks_or_an_error(pieces: list[bytes]) -> None:
    """Nothing but FramingError comes out, and no piece is overdrawn."""
    watcher = ChunkWatcher()
    try:
        for piece in pieces:
            assert 0 <= watcher.feed(piece) <= len(piece)
    except FramingError:
        pass


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_chunk_writes_what_the_watcher_reads(payloads: list[bytes]) -> None:
    """Chunks of ours are read back as one body; an empty one is left out, since it would be the end."""
    watcher = ChunkWatcher()
    found: list[bytes] = []
    wire = b"".join(map(chunk, payloads)) + LAST_CHUNK
    assert watcher.feed(wire, found) == len(wire)
    assert watcher.is_done
    assert b"".join(found) == b"".join(payloads)
