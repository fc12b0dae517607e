"""Event streams of ours: begun in one way, and ended, so that nobody holds the daemon up and no credential lives on.

A stream ends when its reader has left or does not read, when the key or session that opened it counts no more, and
when the daemon stops.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from aiohttp import web

from llmstudiod.http.answers import json_bytes

HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Server": "llmstudiod",
}
WRITE_S = 30.0
END_S = 2.0
LOOK_S = 1.0
STILL_COUNTS = "llmstudio_still_counts"
"""Where a request keeps a function: whether what let it in would still do so. Those of the admin socket have none."""

logger = logging.getLogger(__name__)

Write = Callable[[bytes], Awaitable[None]]


class Streams:
    """The streams that are open. ``write_s``: how long a reader may take until it has read what was written."""

    def __init__(self, *, write_s: float = WRITE_S) -> None:
        self._write_s = write_s
        self._scopes: set[asyncio.Timeout] = set()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._scopes)

    def close(self) -> None:
        """End every stream, and those to come; their readers come back to the next daemon."""
        self._is_closed = True
        for scope in self._scopes:
            _end_now(scope)

    async def answer(self, request: web.Request, copy: Callable[[Write], Awaitable[None]]) -> web.StreamResponse:
        """Answer with a stream of what ``copy`` writes; to a HEAD with its head alone."""
        response = web.StreamResponse(headers=HEADERS)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        reader = _Reader(request, response, self._write_s)
        await self._run(request, copy(reader.write))
        await reader.end()
        return response

    async def _run(self, request: web.Request, work: Awaitable[None]) -> None:
        """Do the work until it is done, its reader has left, or the stream is to end.

        What fails in a way that nobody has told cuts the connection: an answer of its own cannot follow a head that
        is sent already, and an end that looks like any other would hide it.
        """
        scope = asyncio.timeout(0 if self._is_closed else None)
        try:
            async with scope:
                self._scopes.add(scope)
                look = _Look(scope, request.get(STILL_COUNTS))
                try:
                    await work
                finally:
                    look.stop()
                    self._scopes.discard(scope)
        except ConnectionError:
            pass
        except Exception as error:
            if not (isinstance(error, TimeoutError) and scope.expired()):
                logger.exception("a stream has failed: %s", request.path)
                _cut(request)


class _Reader:
    """Who reads a stream; ``is_behind``: has not read all that was written, as far as the buffers do not hold it."""

    def __init__(self, request: web.Request, response: web.StreamResponse, write_s: float) -> None:
        self._request = request
        self._response = response
        self._write_s = write_s
        self._writing = asyncio.Lock()
        self.is_behind = False

    async def write(self, data: bytes) -> None:
        """Write a part of the stream, and wait until there is room for the next."""
        async with self._writing:
            self.is_behind = True
            try:
                async with asyncio.timeout(self._write_s):
                    await self._response.write(data)
            except TimeoutError:
                raise ConnectionAbortedError("the reader does not read") from None
            self.is_behind = False

    async def end(self) -> None:
        """Tell that the stream is over, to whoever takes it in a moment; drop the connection of anybody else.

        After a write that was given up aiohttp cannot wait for the reader any more: its future for that is cancelled
        and kept (3.14.5, ``BaseProtocol._drain_helper``), and the next wait ends in a CancelledError of nobody's.
        """
        try:
            if not self.is_behind:
                async with asyncio.timeout(END_S):
                    await self._response.write_eof()
                return
        except (TimeoutError, ConnectionError):
            pass
        _cut(self._request)


class _Look:
    """Looks every so often whether what opened a stream still counts, and ends the stream when it does not.

    Keys and sessions end in many ways (revoked, expired, signed out, a file that was changed), so it asks again.
    """

    def __init__(self, scope: asyncio.Timeout, still_counts: Callable[[], bool] | None) -> None:
        self._scope = scope
        self._still_counts = still_counts
        self._timer: asyncio.TimerHandle | None = None
        self._again()

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _again(self) -> None:
        if self._still_counts is not None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def _look(self) -> None:
        if self._still_counts is not None and not self._still_counts():
            _end_now(self._scope)
        else:
            self._again()


def _cut(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _end_now(scope: asyncio.Timeout) -> None:
    if not scope.expired():
        scope.reschedule(asyncio.get_running_loop().time())


def event_bytes(name: str, data: object, number: str | None = None) -> bytes:
    """Return a server-sent event in vllm-studio's form; one without a number does not move ``Last-Event-ID``."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    first = f"id: {number}\n" if number is not None else ""
    return f"{first}event: {name}\n".encode() + b"data: " + json_bytes({"data": data, "timestamp": stamp}) + b"\n\n"
