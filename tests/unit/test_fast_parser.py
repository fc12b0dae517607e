"""The strict parser takes only what aiohttp's parser reads in the very same way."""

import asyncio

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmstudiod.http.fast_parser import MAX_HEAD_BYTES, FastRequest, Verdict, parse_request

BODY = b'{"model":"m"}'
SIMPLE = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:8080\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
)


def read_by_aiohttp(data: bytes) -> list[tuple[str, str, bytes, bool]] | None:
    """Return method, path, body and completeness of each message; None when aiohttp refuses them."""
    loop = asyncio.new_event_loop()
    try:
        protocol = BaseProtocol(loop)
        parser = HttpRequestParser(protocol, loop, 1 << 20, max_line_size=32 << 10, max_field_size=32 << 10)
        try:
            messages, _, tail = parser.feed_data(data)
        except HttpProcessingError:
            return None
        found = [(m.method, m.path, b"".join(getattr(p, "_buffer", ())), p.is_eof()) for m, p in messages]
        return [*found, ("", "", bytes(tail), False)] if tail else found
    finally:
        loop.close()


def check(data: bytes) -> None:
    """Hold that whatever the strict parser says of ``data`` is also what aiohttp says."""
    verdict = parse_request(data)
    if isinstance(verdict, FastRequest):
        assert read_by_aiohttp(data) == [("POST", verdict.head.path, data[verdict.body_start :], True)]
    elif verdict is Verdict.WHOLE:
        messages = read_by_aiohttp(data)
        assert messages is not None
        assert len(messages) == 1
        assert messages[0][3]


def test_simple_post_is_taken() -> None:
    """A whole POST with a content-length is what this parser is for."""
    request = parse_request(SIMPLE)
    assert isinstance(request, FastRequest)
    assert request.head.path == "/v1/chat/completions"
    assert SIMPLE[request.body_start :] == BODY
    assert dict(request.head.headers)[b"Content-Type"] == b"application/json"
    check(SIMPLE)


@pytest.mark.parametrize("cut", range(len(b"POST /"), len(SIMPLE)))
def test_beginning_of_a_request_waits_for_the_rest(cut: int) -> None:
    """However a request is cut, nothing of it is given to the other parser before it is whole."""
    assert parse_request(SIMPLE[:cut]) is Verdict.MORE


def test_body_over_the_operators_limit() -> None:
    """It is not gathered, however small the limit: the full parser's way refuses it."""
    assert isinstance(parse_request(SIMPLE, max_body=len(BODY)), FastRequest)
    assert parse_request(SIMPLE, max_body=len(BODY) - 1) is Verdict.UNSURE
    assert parse_request(SIMPLE[:-1], max_body=len(BODY) - 1) is Verdict.UNSURE


UNUSUAL = {
    "two lengths": SIMPLE.replace(b"Host", b"Content-Length: 13\r\nHost"),
    "signed length": SIMPLE.replace(b"Length: 13", b"Length: +13"),
    "list of lengths": SIMPLE.replace(b"Length: 13", b"Length: 13, 13"),
    "length and chunks": SIMPLE.replace(b"Host", b"Transfer-Encoding: chunked\r\nHost"),
    "chunks": SIMPLE.replace(b"Content-Length: 13", b"Transfer-Encoding: chunked"),
    "no length": SIMPLE.replace(b"Content-Length: 13\r\n", b""),
    "no host": SIMPLE.replace(b"Host: localhost:8080\r\n", b""),
    "one header twice": SIMPLE.replace(b"Host", b"X-A: 1\r\nX-A: 2\r\nHost"),
    "two hosts": SIMPLE.replace(b"Host", b"Host: other\r\nHost"),
    "space before the colon": SIMPLE.replace(b"Length:", b"Length :"),
    "folded header": SIMPLE.replace(b"Host: localhost", b"Host: local\r\n host"),
    "bare line feeds": SIMPLE.replace(b"\r\n", b"\n"),
    "one bare line feed": SIMPLE.replace(b"8080\r\n", b"8080\n"),
    "bare carriage return": SIMPLE.replace(b"8080", b"80\r80"),
    "a NUL": SIMPLE.replace(b"8080", b"80\x0080"),
    "expects 100": SIMPLE.replace(b"Host", b"Expect: 100-continue\r\nHost"),
    "multipart": SIMPLE.replace(b"application/json", b"multipart/form-data; boundary=x"),
    "compressed": SIMPLE.replace(b"Host", b"Content-Encoding: gzip\r\nHost"),
    "upgrade": SIMPLE.replace(b"Host", b"Upgrade: websocket\r\nHost"),
    "wants to close": SIMPLE.replace(b"Host", b"Connection: close\r\nHost"),
    "HTTP/1.0": SIMPLE.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "query": SIMPLE.replace(b"completions HTTP", b"completions?model=m HTTP"),
    "absolute target": SIMPLE.replace(b"POST /v1", b"POST http://localhost/v1"),
    "percent-escape": SIMPLE.replace(b"/v1/chat", b"/v1/%63hat"),
    "two spaces": SIMPLE.replace(b"POST /", b"POST  /"),
    "another method": SIMPLE.replace(b"POST", b"PUT"),
    "more than one request": SIMPLE + b"GET / HTTP/1.1\r\n",
    "many headers": SIMPLE.replace(b"Host", b"".join(b"X-%d: a\r\n" % n for n in range(99)) + b"Host"),
    "huge body": SIMPLE.replace(b"Length: 13", b"Length: 999999"),
    "endless head": b"POST /v1/x HTTP/1.1\r\nA: " + b"a" * MAX_HEAD_BYTES,
    "line end before the request": b"\r\n" + SIMPLE,
}


@pytest.mark.parametrize("data", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_unusual_goes_to_the_full_parser(data: bytes) -> None:
    """What is not plain is not taken, and everything that follows on this connection goes the same way."""
    assert parse_request(data) is Verdict.UNSURE


@pytest.mark.parametrize(
    ("data", "verdict"),
    [
        (b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", Verdict.WHOLE),
        (b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\nGET", Verdict.UNSURE),
        (b"GET /v1/models HTTP/1.1\r\nHost: x\r\n", Verdict.UNSURE),
        (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n", Verdict.UNSURE),
        (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\n\r\n", Verdict.UNSURE),
        (b"", Verdict.UNSURE),
    ],
)
def test_other_requests(data: bytes, verdict: Verdict) -> None:
    """A whole GET without a body leaves aiohttp's parser at the beginning of a message; nothing else surely does."""
    assert parse_request(data) is verdict
    check(data)


WORDS = st.sampled_from(
    [
        b"POST ", b"GET ", b"/v1/embeddings", b"/", b" HTTP/1.1", b" HTTP/1.0", b"\r\n", b"\n", b"\r", b":", b": ",
        b" ", b"\t", b"Host: a", b"Content-Length: 2", b"content-length:2", b"Content-Length: 0", b"{}", b"\r\n\r\n",
        b"Transfer-Encoding: chunked", b"Connection: keep-alive", b"Connection: close", b"X: \xff", b"\x00", b"A: b",
    ]
)  # fmt: skip
NAMES = st.sampled_from([b"Accept", b"User-Agent", b"X-A", b"x_b", b"Connection"])
VALUES = st.sampled_from([b"", b"*/*", b"keep-alive", b" a b ", b"\xe4"])
PLAIN_HEADERS = st.lists(st.tuples(NAMES, VALUES), max_size=4)


@settings(max_examples=400, deadline=None)
@given(st.lists(WORDS, max_size=14).map(b"".join))
@example(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}")
def test_word_salad_is_read_alike(data: bytes) -> None:
    """No sequence of fragments is taken that aiohttp reads otherwise."""
    check(data)


@settings(max_examples=300, deadline=None)
@given(PLAIN_HEADERS, st.binary(max_size=40), st.sampled_from(["/v1/embeddings", "/infill", "/a.b-c_d/e"]))
def test_plain_requests_are_read_alike(headers: list[tuple[bytes, bytes]], body: bytes, path: str) -> None:
    """Requests as clients write them are taken, and read as aiohttp reads them."""
    lines = [b"POST %s HTTP/1.1" % path.encode(), b"Host: a", *(b"%s: %s" % header for header in headers)]
    data = b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", body])
    check(data)
    are_plain = all(name != b"Connection" or value == b"keep-alive" for name, value in headers)
    if are_plain and len({name for name, _ in headers}) == len(headers):
        assert isinstance(parse_request(data), FastRequest)


@settings(max_examples=600, deadline=None)
@given(st.integers(0, len(SIMPLE) - 1), st.binary(max_size=3), st.integers(0, 4))
def test_mutations_are_read_alike(position: int, inserted: bytes, dropped: int) -> None:
    """No change of some bytes makes a request that the two parsers read in different ways."""
    check(SIMPLE[:position] + inserted + SIMPLE[position + dropped :])
