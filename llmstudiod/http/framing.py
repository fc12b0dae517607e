"""Where an HTTP/1.1 response ends: parses its head, and watches its body pass without rebuilding it.

Strict on purpose: what is not understood is an error, never repaired, since two readers that disagree on where a
message ends is how requests are smuggled. Source: RFC 9112, sections 4 to 7.
"""

import re
from dataclasses import dataclass
from enum import Enum

MAX_HEAD_BYTES = 64 << 10
MAX_CHUNK_LINE = 256

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5]\d{2})(?: ([^\r\n]*))?")
_HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\r\n\0]*)")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?")


class FramingError(Exception):
    """The upstream sent what is no HTTP/1.1 response."""


class Body(Enum):
    """How a response's body is delimited."""

    NONE = "none"
    LENGTH = "length"
    CHUNKED = "chunked"
    CLOSE = "close"


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Status and headers, names in lower case; ``length`` counts for `Body.LENGTH`."""

    status: int
    reason: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: Body
    length: int
    is_keep_alive: bool

    def get(self, name: bytes) -> bytes:
        """Return the first value of a header, or nothing."""
        return next((value for key, value in self.headers if key == name), b"")


def parse_head(head: bytes, *, is_head_request: bool = False) -> ResponseHead:
    """Return the head in ``head``, which ends before the empty line.

    Raises:
        FramingError: It is not a response's head, or it is ambiguous.
    """
    status_line, *lines = head.split(b"\r\n")
    match = _STATUS_LINE.fullmatch(status_line)
    if match is None:
        raise FramingError(f"expected a status line, found {status_line[:60]!r}")
    headers = []
    for line in lines:
        header = _HEADER.fullmatch(line)
        if header is None:
            raise FramingError(f"expected a header, found {line[:60]!r}")
        headers.append((header.group(1).lower(), header.group(2).rstrip(b" \t")))
    status = int(match.group(2))
    body, length = _delimiter(status, headers, is_head_request=is_head_request)
    connection = b",".join(value for name, value in headers if name == b"connection").lower()
    is_keep_alive = match.group(1) == b"1" and b"close" not in connection and body is not Body.CLOSE
    return ResponseHead(status, match.group(3) or b"", tuple(headers), body, length, is_keep_alive)


def _delimiter(status: int, headers: list[tuple[bytes, bytes]], *, is_head_request: bool) -> tuple[Body, int]:
    lengths = [value for name, value in headers if name == b"content-length"]
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if codings and (lengths or codings != [b"chunked"]):
        raise FramingError(f"ambiguous framing: transfer-encoding {codings!r}, content-length {lengths!r}")
    if len(lengths) > 1 or (lengths and not re.fullmatch(rb"\d{1,15}", lengths[0])):
        raise FramingError(f"expected one content-length, found {lengths!r}")
    if is_head_request or status < 200 or status in {204, 304}:
        return Body.NONE, 0
    if codings:
        return Body.CHUNKED, 0
    if lengths:
        return (Body.LENGTH if int(lengths[0]) else Body.NONE), int(lengths[0])
    return Body.CLOSE, 0


class ChunkWatcher:
    """Follows a chunked body through the pieces in which it arrives; ``is_done`` after the last one."""

    __slots__ = ("_in_trailer", "_left", "_line", "is_done")

    def __init__(self) -> None:
        self.is_done = False
        self._left = 0  # bytes still to come of the present chunk and its line end
        self._line = b""  # the part of a size or trailer line that has come so far
        self._in_trailer = False

    @property
    def is_between_chunks(self) -> bool:
        """Whether a whole chunk of somebody else's could be put here."""
        return not (self._left or self._line or self._in_trailer or self.is_done)

    def feed(self, data: bytes, payload: list[bytes] | None = None) -> int:
        """Take the next piece; append the body's own bytes to ``payload``; return how much belongs to this body.

        Raises:
            FramingError: This is not a chunked body.
        """
        position, size = 0, len(data)
        while position < size and not self.is_done:
            if self._left:
                position += self._skip(data, position, payload)
                continue
            end = data.find(b"\n", position)
            if end < 0:
                self._line += data[position:]
                if len(self._line) > MAX_CHUNK_LINE:
                    raise FramingError("a chunk's size line is too long")
                return size
            line = self._line + data[position : end + 1]
            self._line = b""
            position = end + 1
            self._take_line(line)
        return position

    def _skip(self, data: bytes, position: int, payload: list[bytes] | None) -> int:
        taken = min(self._left, len(data) - position)
        if payload is not None and self._left > 2:
            payload.append(data[position : position + min(taken, self._left - 2)])
        line_end = self._left - 2  # where the chunk's line end begins, counted from here; below 0: it has begun before
        start = max(line_end, 0)
        if taken > start and data[position + start : position + taken] != b"\r\n"[start - line_end : taken - line_end]:
            raise FramingError("a chunk is longer than its size line says")
        self._left -= taken
        return taken

    def _take_line(self, line: bytes) -> None:
        if len(line) > MAX_CHUNK_LINE or not line.endswith(b"\r\n"):
            raise FramingError(f"expected a chunk's size, found {line[:40]!r}")
        if self._in_trailer:
            self.is_done = line == b"\r\n"
            return
        match = _CHUNK_SIZE.fullmatch(line, 0, len(line) - 2)
        if match is None:
            raise FramingError(f"expected a chunk's size, found {line[:40]!r}")
        length = int(match.group(1), 16)
        if length:
            self._left = length + 2
        else:
            self._in_trailer = True


def chunk(payload: bytes) -> bytes:
    r"""Return ``payload`` as one chunk; nothing for nothing, since an empty chunk would end the body.

    >>> chunk(b"hello")
    b'5\r\nhello\r\n'
    """
    return b"%x\r\n%s\r\n" % (len(payload), payload) if payload else b""


LAST_CHUNK = b"0\r\n\r\n"
