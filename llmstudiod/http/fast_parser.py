"""A strict parser for the requests that come most: a small POST, whole, with nothing unusual about it.

It never repairs and never guesses. What it does not understand to the last byte goes to aiohttp's parser, unchanged;
so a request is read by one parser or by the other, and both must agree on where it ends (a test fuzzes that).
Source: RFC 9112, sections 3 to 6.
"""

import functools
import re
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

MAX_HEAD_BYTES = 8 << 10
MAX_BODY_BYTES = 256 << 10
MAX_FIELDS = 90
"""llama-server takes up to 100; what has more goes the usual way, which says so."""


class Verdict(Enum):
    """What to do with bytes that are no fast request."""

    MORE = "the rest is still to come"
    WHOLE = "one whole request for the full parser"
    UNSURE = "the full parser must see this and all that follows"


@dataclass(frozen=True, slots=True, eq=False)
class FastHead:
    """The head of a POST: its path, its headers as they came, and its body's length. One object for equal heads."""

    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    length: int


class FastRequest(NamedTuple):
    """A POST: its head, and where its body begins."""

    head: FastHead
    body_start: int


_HEAD = re.compile(
    rb"POST (/[A-Za-z0-9/_.-]*) HTTP/1\.1((?:\r\n[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*)*)"
)
_HEADER = re.compile(rb"\r\n([^:]+):[ \t]*([^\r\n]*)")
_BARE_GET = re.compile(rb"GET /[!-~]* HTTP/1\.1((?:\r\n[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*)*)\r\n\r\n")
_BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
_LENGTH = re.compile(rb"[0-9]{1,7}")
_UNUSUAL = frozenset(
    {b"transfer-encoding", b"expect", b"upgrade", b"content-encoding", b"trailer", b"te", b"proxy-connection"}
)


def parse_request(data: bytes, *, max_body: int = MAX_BODY_BYTES) -> FastRequest | Verdict:
    """Return the one request that ``data`` is, or what else to do with it; ``max_body`` is the operator's limit."""
    if not data.startswith(b"POST /"):
        return _judge_other(data)
    end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES)
    if end < 0:
        # A line that ends otherwise than in CRLF might be the end of the head for another reader.
        is_plain = len(data) < MAX_HEAD_BYTES and not _BARE_LINE_FEED.search(data)
        return Verdict.MORE if is_plain else Verdict.UNSURE
    head = _read_head(data[:end])
    if head is None or head.length > max_body:
        return Verdict.UNSURE
    missing = end + 4 + head.length - len(data)
    if missing:
        return Verdict.MORE if missing > 0 else Verdict.UNSURE
    return FastRequest(head, end + 4)


@functools.lru_cache(maxsize=512)
def _read_head(raw: bytes) -> FastHead | None:
    """Return the head, or None for anything unusual. A client's heads are mostly the same, so they are remembered."""
    match = _HEAD.fullmatch(raw)
    if match is None:
        return None
    headers = _HEADER.findall(match[2])
    length = _content_length(headers)
    if length is None or length > MAX_BODY_BYTES or len(headers) > MAX_FIELDS:
        return None
    return FastHead(match[1].decode("ascii"), tuple(headers), length)


def _content_length(headers: list[tuple[bytes, bytes]]) -> int | None:
    """Return the body's length, or None for anything unusual, of which most is not wrong."""
    values = {name.lower(): value for name, value in headers}
    if len(values) != len(headers) or not _UNUSUAL.isdisjoint(values) or b"host" not in values:
        return None
    if values.get(b"connection", b"keep-alive").lower() != b"keep-alive":
        return None
    if b"multipart" in values.get(b"content-type", b"").lower():
        return None
    length = values.get(b"content-length", b"")
    return int(length) if _LENGTH.fullmatch(length) else None


def _judge_other(data: bytes) -> Verdict:
    """Say whether the full parser is back at the beginning of a message after ``data``."""
    match = _BARE_GET.fullmatch(data) if len(data) < MAX_HEAD_BYTES else None
    if match is None:
        return Verdict.UNSURE
    names = {name.lower() for name, _ in _HEADER.findall(match[1])}
    return Verdict.UNSURE if names & (_UNUSUAL | {b"content-length"}) else Verdict.WHOLE
