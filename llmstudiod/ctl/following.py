"""Event streams that outlive the daemon: it may be restarted, upgraded or killed while somebody reads along."""

import functools
import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from llmstudiod.core.errors import DaemonUnreachableError
from llmstudiod.ctl.client import AnswerError, Client

PATIENCE_S = 10.0
PAUSE_S = 0.5
MAX_LINES = 2000
_TAIL = 20


def lasting_events(client: Client, *, on_loss: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """Yield the daemon's events; where the stream ends, go on with the next one, and with what was missed meanwhile.

    ``on_loss`` is called when the stream has ended.

    Raises:
        AnswerError: The daemon refuses.
        DaemonUnreachableError: There is none, or no other one came within ten seconds.
    """
    last_id: str | None = None
    stream = client.events("events")
    while True:
        is_new = False
        for event in stream:
            last_id, is_new = event.get("id", last_id), True
            yield event
        if is_new:
            on_loss()
        stream = _again(functools.partial(client.events, "events", last_id=last_id))


def lasting_lines(client: Client, model: str, *, limit: int, on_loss: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """Yield the events of a model's log, the last ``limit`` lines first; see `lasting_events`.

    A line has no number: after a loss those are told that follow what was seen last.
    """
    seen: deque[str] = deque(maxlen=_TAIL)
    stream = client.events("logs", model, "stream", query=f"limit={limit}")
    while True:
        for event in stream:
            if event.get("event") == "failure":
                raise AnswerError(503, event["data"])
            seen.append(event["data"]["line"])
            yield event
        on_loss()
        stream = _again(functools.partial(_resumed, client, model, list(seen)))


def tell_loss() -> None:
    """Say on a terminal that the stream has ended."""
    if sys.stderr.isatty():
        print("the daemon has ended the stream; waiting for the next one …", file=sys.stderr)


def after(lines: list[str], seen: list[str]) -> list[str]:
    """Return the lines that follow what was seen last; all of them where none of that is among them.

    >>> after(["a", "b", "a", "c"], ["x", "b", "a"])
    ['c']
    >>> after(["c"], ["a", "b"])
    ['c']
    """
    for length in range(len(seen), 0, -1):
        tail = seen[-length:]
        for end in range(len(lines), length - 1, -1):
            if lines[end - length : end] == tail:
                return lines[end:]
    return lines


def _resumed(client: Client, model: str, seen: list[str]) -> Iterator[dict[str, Any]]:
    """Return the stream of a log from the line on that follows what was seen last.

    Where its earlier lines end it does not tell. So many as there were before it began are among them in any case,
    and what was seen is among these; all that comes later is new, whether it is an earlier line or not.
    """
    if not seen:
        return client.events("logs", model, "stream", query="limit=0")
    n_there = len(client.get("logs", model, query=f"limit={MAX_LINES}")["logs"])
    stream = client.events("logs", model, "stream", query=f"limit={MAX_LINES}")
    lines: list[str] = []
    for event in itertools.islice(stream, n_there):
        if event.get("event") == "failure":
            stream = itertools.chain([event], stream)
            break
        lines.append(event["data"]["line"])
    missed = ({"event": "log", "data": {"line": line}} for line in after(lines, seen))
    return itertools.chain(missed, stream)


def _again(ask: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Return a stream that has begun; a daemon that is just being started is waited for."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        time.sleep(PAUSE_S)
        try:
            return ask()
        except DaemonUnreachableError:
            if time.monotonic() > deadline:
                raise
