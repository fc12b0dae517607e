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
