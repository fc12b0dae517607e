"""Event streams of ours: begun in one way, and ended by the daemon when it stops, so that nobody holds it up."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from aiohttp import web

from llmstudiod.http.answers import json_bytes

HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Server": "llmstudiod",
}


class Streams:
    """The streams that are open."""

    def __init__(self) -> None:
        self._scopes: set[asyncio.Timeout] = set()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._scopes)

    def close(self) -> None:
        """End every stream, and those to come; their readers come back to the next daemon."""
        self._is_closed = True
        now = asyncio.get_running_loop().time()
        for scope in self._scopes:
            scope.reschedule(now)

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Write a stream until its work is done, its reader has left, or `close`."""
        try:
            async with asyncio.timeout(0 if self._is_closed else None) as scope:
                self._scopes.add(scope)
                try:
                    await work
                finally:
                    self._scopes.discard(scope)
        except ConnectionError:
            pass
        except TimeoutError:
            if not self._is_closed:
                raise


def event_bytes(name: str, data: object, number: str | None = None) -> bytes:
    """Return a server-sent event in vllm-studio's form; one without a number does not move ``Last-Event-ID``."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    first = f"id: {number}\n" if number is not None else ""
    return f"{first}event: {name}\n".encode() + b"data: " + json_bytes({"data": data, "timestamp": stamp}) + b"\n\n"


async def begin(request: web.Request) -> web.StreamResponse:
    """Return an event stream whose head was sent."""
    response = web.StreamResponse(headers=HEADERS)
    await response.prepare(request)
    return response
