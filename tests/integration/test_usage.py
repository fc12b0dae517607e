"""What each request has cost is noted, on either way, and answered for later."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llmstudiod.core.usage import NOTHING, Spent, spent
from tests.integration.fake_upstream import SSE_HEAD, Call, answer, event
from tests.integration.house import House, eventually, open_house

ASK = {"model": "tiny"}
STREAM = ASK | {"stream": True}
TIMINGS = {"cache_n": 2, "prompt_n": 5, "prompt_ms": 10.0, "predicted_n": 7, "predicted_ms": 3.5}
SPENT = Spent(prompt=7, completion=7, cached=2, prompt_ms=10.0, completion_ms=3.5)


@pytest.fixture(params=[False, True], ids=["usual way", "fast path"])
async def warm(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    """The first model is ready."""
    async with open_house(tmp_path, has_fast_path=request.param) as house:
        await house.warm_up()
        house.served.clear()
        yield house


async def test_answer_is_noted_with_what_it_cost(warm: House) -> None:
    """Timings at the end of a whole answer."""

    async def script(call: Call) -> None:
        said = {"choices": [{"text": "x" * 5000}], "usage": {"prompt_tokens": 1}, "timings": TIMINGS}
        await call.send(answer(json.dumps(said).encode()))

    warm.tiny.script = script
    assert (await warm.post(ASK)).status == 200
    (served,) = warm.served
    assert (served.model, served.status, served.is_stream, served.key) == ("tiny", 200, False, "")
    assert spent(served.tail) == SPENT
    assert 0 < served.ttft_s <= served.duration_s < 5


async def test_stream_is_noted_with_what_it_cost(warm: House) -> None:
    """Timings in the last event, however the pieces come; the first token's time is that of the first."""

    async def script(call: Call) -> None:
        await call.send(SSE_HEAD + event("one"))
        await asyncio.sleep(0.1)
        await call.send(event(json.dumps({"choices": [], "timings": TIMINGS})))
        await asyncio.sleep(0.01)
        await call.send(event("[DONE]"))
        await asyncio.sleep(0.01)
        await call.send(b"0\r\n\r\n")

    warm.tiny.script = script
    assert (await warm.post(STREAM)).status == 200
    (served,) = warm.served
    assert (served.status, served.is_stream, spent(served.tail)) == (200, True, SPENT)
    assert served.duration_s - served.ttft_s > 0.1


ANTHROPIC = {"input_tokens": 1, "cache_read_input_tokens": 72, "cache_creation_input_tokens": 2}
BEGIN = {"type": "message_start", "message": {"id": "m" * 300, "usage": ANTHROPIC | {"output_tokens": 0}}}
END = {"type": "message_delta", "usage": {"output_tokens": 9}}


async def test_anthropics_counts(warm: House) -> None:
    """Its prompt is what was read and what was cached; a stream tells that at its beginning."""

    async def whole(call: Call) -> None:
        await call.send(answer(json.dumps({"content": [], "usage": ANTHROPIC | {"output_tokens": 9}}).encode()))

    async def stream(call: Call) -> None:
        await call.send(SSE_HEAD + event(json.dumps(BEGIN)))
        for _ in range(20):
            await call.send(event(json.dumps({"type": "content_block_delta", "delta": {"text": "x" * 300}})))
        await call.send(event(json.dumps(END)) + b"0\r\n\r\n")

    for script, asked in ((whole, ASK), (stream, STREAM)):
        warm.tiny.script = script
        warm.served.clear()
        assert (await warm.post(asked, "/v1/messages")).status == 200
        (served,) = warm.served
        assert spent(served.tail) == Spent(prompt=75, completion=9, cached=72)


@pytest.mark.parametrize("name", ["input_tokens", "prompt_tokens"])
def test_openais_counts(name: str) -> None:
    """Those of a prompt hold what was cached."""
    usage = {name: 73, f"{name}_details": {"cached_tokens": 72}, "output_tokens": 9}
    assert spent(json.dumps({"usage": usage}).encode()) == Spent(prompt=73, completion=9, cached=72)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/props?model=tiny"),
        ("GET", "/slots?model=tiny"),
        ("GET", "/upstream/tiny/health"),
        ("POST", "/upstream/tiny/tokenize"),
        ("POST", "/tokenize"),
        ("POST", "/v1/messages/count_tokens"),
    ],
)
async def test_what_computes_nothing_is_not_noted(warm: House, method: str, path: str) -> None:
    """A look at the slots is no request; one that computes is, by whatever way."""

    async def script(call: Call) -> None:
        await call.send(answer(b"{}"))

    warm.tiny.script = script
    asked = await (warm.post(ASK, path) if method == "POST" else warm.get(path))
    assert (asked.status, warm.served) == (200, [])
    assert (await warm.post(ASK, "/upstream/tiny/completion")).status == 200
    assert len(warm.served) == 1


async def test_client_that_leaves_is_noted(warm: House) -> None:
    """As 499, with what it had so far."""

    async def script(call: Call) -> None:
        await call.send(SSE_HEAD + event("one"))
        await asyncio.sleep(5)

    warm.tiny.script = script
    client = await warm.connect()
    await client.post(STREAM)
    await client.head()
    client.close()
    await eventually(lambda: bool(warm.served))
    assert (warm.served[0].status, spent(warm.served[0].tail)) == (499, NOTHING)


async def test_events_of_a_stream_are_counted(warm: House) -> None:
    """They are about the tokens that a client got who left before the end."""

    async def script(call: Call) -> None:
        await call.send(SSE_HEAD + event(json.dumps({"n": 0})) + event(json.dumps({"n": 1})))
        await call.send(event(json.dumps({"n": 2})))
        await asyncio.sleep(5)

    warm.tiny.script = script
    client = await warm.connect()
    await client.post(STREAM)
    await client.head()
    async with asyncio.timeout(5):
        while b'"n": 2' not in await client.read_chunk():
            pass
    client.close()
    await eventually(lambda: bool(warm.served))
    assert (warm.served[0].status, warm.served[0].n_events) == (499, 3)
