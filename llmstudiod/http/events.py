"""The event stream: what happens to the models, as server-sent events.

A subscriber first gets what it has missed since ``Last-Event-ID``, as far as that is still known, and a snapshot. Each
has a queue of its own; whoever does not read in time is cut off and may come back, and nobody else notices. Whoever
names a model gets its slots, its last hour and its log by the same stream: a browser has few connections to spend.
"""

import asyncio
import logging
import re
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from aiohttp import web

from llmstudiod.core.lifecycle import InstanceView, State, StopCause, Transition
from llmstudiod.http.answers import json_response
from llmstudiod.http.query import truth
from llmstudiod.http.streams import Streams, Write, event_bytes

logger = logging.getLogger(__name__)

KEPT = 1000
QUEUE = 500
PING_S = 15.0
_NUMBER = re.compile(r"[0-9]{1,18}")
_STAGES = {
    State.STARTING: "launching",
    State.LOADING: "waiting",
    State.READY: "ready",
    State.DRAINING: "evicting",
    State.STOPPING: "stopping",
    State.STOPPED: "stopped",
    State.FAILED: "error",
}


Copy = Callable[[Write], Coroutine[Any, Any, None]]
"""Writes a part of a stream for as long as it lasts."""


class Events:
    """Keeps the last events and passes new ones on.

    ``snapshot`` returns what a new subscriber sees first, ``along`` what else is told to one who names a model.
    """

    def __init__(
        self,
        snapshot: Callable[[], dict[str, Any]],
        streams: Streams,
        along: Callable[[str], Sequence[Copy]] = lambda _: (),
    ) -> None:
        self._along = along
        self._snapshot = snapshot
        self._streams = streams
        self._n_published = 0
        self._someone = asyncio.Event()
        self._boot = uuid.uuid4().hex[:8]
        self._number = 0
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=KEPT)
        self._queues: set[asyncio.Queue[bytes | None]] = set()

    def observe(self, model: str, step: Transition | None, shown: InstanceView | None) -> None:
        """Take what has happened to a model: a transition, or some progress."""
        if step is not None:
            failure = shown.failure if shown and step.new is State.FAILED else None
            told: dict[str, Any] = {"id": model, "from": str(step.old), "to": str(step.new), "cause": step.cause}
            if failure is not None:
                lines = list(failure.lines[-20:])
                told["failure"] = {
                    "kind": failure.kind,
                    "message": failure.message,
                    "hint": failure.hint,
                    "lines": lines,
                }
            self.publish("transition", told)
        if shown is None:
            return
        self.publish("launch_progress", _launch_progress(model, step, shown))
        if step is None and shown.warnings:
            self.publish("warning", {"id": model, "warnings": list(shown.warnings)})

    def routes(self) -> list[web.RouteDef]:
        """Return the routes."""
        return [web.get("/events", self.stream), web.get("/events/stats", self.stats)]

    @property
    def n_subscribers(self) -> int:
        """How many read along."""
        return len(self._queues)

    @property
    def n_published(self) -> int:
        """How many events there were."""
        return self._n_published

    async def wanted(self) -> None:
        """Return as soon as anybody reads along."""
        await self._someone.wait()

    def publish(self, name: str, data: dict[str, Any]) -> None:
        """Tell everybody, and whoever comes back and has missed it."""
        self._number += 1
        event = event_bytes(name, data, f"{self._boot}-{self._number}")
        self._kept.append((self._number, event))
        self._send(event)

    def mention(self, name: str, data: object) -> None:
        """Tell those who read along what is so now; the next such event makes up for one that was missed."""
        self._send(event_bytes(name, data, None))

    def _send(self, event: bytes) -> None:
        self._n_published += 1
        for queue in list(self._queues):
            if queue.full():
                self._queues.discard(queue)  # it ends when it has sent what it holds
                queue.get_nowait()
                queue.put_nowait(None)
            else:
                queue.put_nowait(event)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Send events until the subscriber goes."""
        last, model = request.headers.get("Last-Event-ID", ""), request.query.get("model")
        along = self._along(model) if model else ()
        first = partial(self._first, last, is_brief=truth(request, "brief"))
        return await self._streams.answer(request, lambda write: self._copy_all(first, along, write))

    async def stats(self, _: web.Request) -> web.Response:
        """Answer how many read along, in vllm-studio's words."""
        return json_response({"total_events_published": self._n_published, "channels": {"default": len(self._queues)}})

    async def _copy_all(self, first: Callable[[], list[bytes]], along: Sequence[Copy], write: Write) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                others = [group.create_task(_part(copy, write)) for copy in along]
                await self._copy(first, write)
                for other in others:
                    _ = other.cancel()
        except* ConnectionError as gone:
            raise ConnectionAbortedError("the reader has left") from gone

    async def _copy(self, first: Callable[[], list[bytes]], write: Write) -> None:
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUE)
        begin = first()  # in one step with the queue's beginning, so that nothing is missed in between
        self._queues.add(queue)
        self._someone.set()
        try:
            for event in begin:
                await write(event)
            while True:
                try:
                    async with asyncio.timeout(PING_S):
                        next_event = await queue.get()
                except TimeoutError:
                    next_event = b": still here\n\n"
                if next_event is None:
                    return
                await write(next_event)
        finally:
            self._queues.discard(queue)
            if not self._queues:
                self._someone.clear()

    def _first(self, last: str, *, is_brief: bool = False) -> list[bytes]:
        """Return what a subscriber must get first, who has seen everything up to ``last``.

        ``is_brief``: without the fields that say nothing, which is half of it.
        """
        missed: list[bytes] = []
        boot, _, number = last.rpartition("-")
        if boot == self._boot and _NUMBER.fullmatch(number):
            seen = int(number)
            if self._kept and self._kept[0][0] <= seen + 1:
                missed = [event for each, event in self._kept if each > seen]
        snapshot = self._snapshot()
        if is_brief:
            snapshot = {name: [_brief(item) for item in items] for name, items in snapshot.items()}
        return [*missed, event_bytes("snapshot", snapshot, f"{self._boot}-{self._number}")]


async def _part(copy: Copy, write: Write) -> None:
    """Write a part of a stream; a bug in it ends that part alone, and is told."""
    try:
        await copy(write)
    except ConnectionError:
        raise
    except Exception:
        logger.exception("a part of an event stream has ended")
        told = {"detail": "an internal error, see the daemon's log", "kind": "internal", "hint": None}
        await write(event_bytes("failure", told))


def _brief(item: dict[str, Any]) -> dict[str, Any]:
    """Return an instance without what is null.

    >>> _brief({"id": "a", "reason": None, "memory": {"measured": None}, "failures": 0})
    {'id': 'a', 'failures': 0}
    """
    found = {name: _brief(value) if isinstance(value, dict) else value for name, value in item.items()}
    return {name: value for name, value in found.items() if value is not None and value != {}}


def _launch_progress(model: str, step: Transition | None, shown: InstanceView) -> dict[str, Any]:
    """Return vllm-studio's event. ``progress`` grows from 0 to 1 while a model is loaded, and is 0 elsewhere.

    A start that was refused is a stage ``error`` with ``kind`` and ``hint``; the model's state is what it was.
    """
    refused = shown.refused if step is None else None
    if refused is not None:
        told = {"recipe_id": model, "stage": "error", "progress": 0.0, "message": refused.message}
        return told | {"kind": refused.kind, "hint": refused.hint}
    stage = "cancelled" if shown.stop_cause is StopCause.CANCELLED else _STAGES[shown.state]
    loaded = {State.READY: 1.0, State.STARTING: shown.progress, State.LOADING: shown.progress}.get(shown.state)
    message = step.cause if step else shown.stage or ("" if shown.is_resident else str(shown.stop_cause or ""))
    return {"recipe_id": model, "stage": stage, "progress": loaded or 0.0, "message": message}
