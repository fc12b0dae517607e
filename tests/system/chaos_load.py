"""The load of the chaos test: many kinds of requests, and what became of each."""

import asyncio
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .daemon import BASE_URL  # noqa: TID252

PATIENCE_S = 120.0
CHATTERS = ("ada", "bob", "cyd", "dot")
EMBEDDER = "eve"
BROKEN = "broken"
KINDS = {
    "chat": 18, "stream": 14, "story": 3, "leave": 4, "embed": 8, "tokenize": 34, "models": 8, "health": 8,
    "unknown": 2, "broken": 1,
}  # fmt: skip
STEADY = {"chat": 2, "stream": 1, "tokenize": 6, "models": 3, "health": 3}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. Times in seconds of the monotonic clock.

    ``word``: ``ok``; ``retried``: ok on a new connection, after one at rest was closed; ``told``: an error of ours that
    says why; ``left``: the client went away; ``lost``: the connection ended without an answer; ``stuck``: no end within
    `PATIENCE_S`; ``odd``: anything else.
    """

    kind: str
    model: str
    began: float
    ended: float
    word: str
    why: str = ""


@dataclass(slots=True)
class Load:
    """Clients that ask until they are told to stop; ``outcomes`` grows with each answer."""

    seed: int
    clients: int = 7
    steady: int = 3  # of these, how many ask one model only, again and again
    pause_s: float = 0.01
    models: tuple[str, ...] = CHATTERS
    kinds: Mapping[str, int] = field(default_factory=lambda: KINDS)
    outcomes: list[Outcome] = field(default_factory=list)
    is_over: bool = False
    in_flight: dict[int, tuple[str, str, float]] = field(default_factory=dict)

    async def run(self) -> None:
        """Ask until ``is_over``."""
        async with asyncio.TaskGroup() as group:
            for number in range(self.clients):
                group.create_task(self._client(number))

    async def _client(self, number: int) -> None:
        dice = random.Random(self.seed * 1000 + number)
        count = 0
        while not self.is_over:
            # A few requests on kept connections, then new ones.
            timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
            async with aiohttp.ClientSession(timeout=timeout, trace_configs=[_tracing()]) as session:
                for _ in range(dice.randrange(1, 25)):
                    if self.is_over:
                        return
                    kind, model = self._draw(dice, is_steady=number < self.steady)
                    ticket = number * 1_000_000 + count
                    count += 1
                    self.in_flight[ticket] = (kind, model, time.monotonic())
                    self.outcomes.append(await one(session, kind, model, dice))
                    del self.in_flight[ticket]
                    await asyncio.sleep(dice.random() * self.pause_s)

    def _draw(self, dice: random.Random, *, is_steady: bool) -> tuple[str, str]:
        """Return a kind of request and a model. Who is steady never waits for a place that somebody else has."""
        kinds = STEADY if is_steady else self.kinds
        kind = dice.choices(list(kinds), list(kinds.values()))[0]
        # One model is asked for all the time, the others now and then.
        model = self.models[0] if is_steady else dice.choices(self.models, (12, 3, 2, 1)[: len(self.models)])[0]
        return kind, {"embed": EMBEDDER, "broken": BROKEN}.get(kind, model)


def _tracing() -> aiohttp.TraceConfig:
    """Return what notes whether a request went out on a connection that had been used before."""

    async def reused(_: aiohttp.ClientSession, context: Any, __: object) -> None:
        context.trace_request_ctx["reused"] = True

    tracing = aiohttp.TraceConfig()
    tracing.on_connection_reuseconn.append(reused)
    return tracing


async def one(session: aiohttp.ClientSession, kind: str, model: str, dice: random.Random) -> Outcome:
    """Send one request and judge what comes back."""
    began = time.monotonic()
    word, why = "odd", ""
    context: dict[str, bool] = {}
    try:
        try:
            word, why = await _ask(session, kind, model, dice, context)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError) as error:
            # A server may close a connection that is at rest, and then a client has to ask again on a new one, as
            # every HTTP client does; that race is part of HTTP/1.1 (RFC 9112, 9.3.1 and 9.5).
            if not context.get("reused"):
                raise
            word, why = await _ask(session, kind, model, dice, context)
            word, why = ("retried", repr(error)) if word == "ok" else (word, why)
    except TimeoutError:
        word, why = "stuck", f"no end within {PATIENCE_S:.0f} s"
    except (aiohttp.ClientError, ConnectionError) as error:
        word, why = "lost", repr(error)
    except (ValueError, LookupError, TypeError) as error:
        word, why = "odd", repr(error)
    return Outcome(kind, model, began, time.monotonic(), word, why)


async def _ask(
    session: aiohttp.ClientSession, kind: str, model: str, dice: random.Random, context: dict[str, bool]
) -> tuple[str, str]:
    match kind:
        case "models" | "health":
            async with session.get(
                f"{BASE_URL}/{'v1/models' if kind == 'models' else 'health'}", trace_request_ctx=context
            ) as answer:
                return _judge(answer.status, await answer.text(), needs=("data" if kind == "models" else "status"))
        case "tokenize":
            body: dict[str, Any] = {"model": model, "content": "a bird in the hand"}
            async with session.post(f"{BASE_URL}/tokenize", json=body, trace_request_ctx=context) as answer:
                return _judge(answer.status, await answer.text(), needs="tokens")
        case "embed":
            body = {"model": model, "input": "a bird"}
            async with session.post(f"{BASE_URL}/v1/embeddings", json=body, trace_request_ctx=context) as answer:
                return _judge(answer.status, await answer.text(), needs="data")
    body = {"model": "nobody" if kind == "unknown" else model, "messages": [{"role": "user", "content": "a bird"}]}
    body |= {"max_tokens": 300 if kind in {"story", "leave"} else dice.randrange(1, 24)}
    if kind in {"story", "leave"}:
        body["ignore_eos"] = True
    if kind not in {"stream", "story", "leave"}:
        async with session.post(f"{BASE_URL}/v1/chat/completions", json=body, trace_request_ctx=context) as answer:
            text = await answer.text()
        if kind == "unknown":
            return ("told", "") if answer.status == 404 else ("odd", f"{answer.status}: {text[:200]}")
        return _judge(answer.status, text, needs="choices")
    async with session.post(
        f"{BASE_URL}/v1/chat/completions", json=body | {"stream": True}, trace_request_ctx=context
    ) as answer:
        if answer.status != 200:
            return _judge(answer.status, await answer.text(), needs="choices")
        if kind == "leave":
            async with asyncio.timeout(PATIENCE_S):
                await answer.content.readany()
                answer.close()
            return "left", ""
        return _judge_stream(await answer.text())


def _judge(status: int, text: str, *, needs: str) -> tuple[str, str]:
    """Return what a whole answer is worth."""
    told = json.loads(text)
    if status == 200:
        return ("ok", "") if needs in told else ("odd", f"200 without {needs}: {text[:200]}")
    return _told(status, told)


def _told(status: int, answer: dict[str, Any]) -> tuple[str, str]:
    error = answer.get("error", {})
    kind, message = error.get("kind"), error.get("message")
    if not kind or not message or kind == "internal":
        return "odd", f"{status}: {json.dumps(answer)[:300]}"
    return "told", f"{kind}: {message}"


def _judge_stream(text: str) -> tuple[str, str]:
    """Return what a stream is worth: it ends with [DONE], or with an error that says why."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if not events:
        return "odd", f"a stream without an event: {text[-200:]!r}"
    if events[-1] == "[DONE]":
        return "ok", ""
    last = json.loads(events[-1])
    return _told(200, last) if "error" in last else ("lost", f"the stream ends with {events[-1][-200:]!r}")
