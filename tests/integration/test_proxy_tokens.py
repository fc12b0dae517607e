"""Counting and splitting of tokens, in the forms that vllm-studio's clients know."""

import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from llmstudiod.launchers.base import Exit
from tests.integration.fake_upstream import Call, answer
from tests.integration.house import House, open_house

MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def llama_server(answers: Mapping[str, bytes]) -> Any:
    """Return a script that answers as llama-server's own routes do."""

    async def script(call: Call) -> None:
        path = call.received.line.split(" ")[1]
        asked = json.loads(call.received.body)
        if path in answers:
            found: bytes = answers[path]
        elif path == "/tokenize":
            assert asked["add_special"] is True
            found = json.dumps({"tokens": [ord(letter) for letter in asked["content"]]}).encode()
        elif path == "/detokenize":
            found = json.dumps({"content": "".join(map(chr, asked["tokens"]))}).encode()
        elif path == "/apply-template":
            found = json.dumps({"prompt": f"<{asked['messages'][0]['content']}>"}).encode()
        else:
            assert path == "/v1/chat/completions/input_tokens"
            found = json.dumps({"input_tokens": 25 if "tools" in asked else 10}).encode()
        await call.send(answer(found))

    return script


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """The first model answers like llama-server."""
    async with open_house(tmp_path) as house:
        house.tiny.script = llama_server({})
        yield house


@pytest.mark.parametrize(
    ("path", "asked", "expected"),
    [
        ("/v1/tokenize", {"prompt": "ab"}, {"tokens": [97, 98], "count": 2, "max_model_len": 4096}),
        ("/v1/tokenize", {"text": "a"}, {"tokens": [97], "count": 1, "max_model_len": 4096}),
        ("/v1/tokenize", {"messages": MESSAGES}, {"tokens": [60, 104, 105, 62], "count": 4, "max_model_len": 4096}),
        ("/v1/detokenize", {"tokens": [97, 98]}, {"prompt": "ab", "text": "ab"}),
        ("/v1/count-tokens", {"text": "abc"}, {"num_tokens": 3}),
        ("/v1/count-tokens", {"messages": MESSAGES}, {"num_tokens": 4}),
        (
            "/v1/tokenize-chat-completions",
            {"messages": MESSAGES},
            {"input_tokens": 10, "breakdown": {"messages": 10, "tools": 0}},
        ),
        (
            "/v1/tokenize-chat-completions",
            {"messages": MESSAGES, "tools": TOOLS},
            {"input_tokens": 25, "breakdown": {"messages": 10, "tools": 15}},
        ),
    ],
)
async def test_answer(house: House, path: str, asked: dict[str, Any], expected: dict[str, Any]) -> None:
    """Each route answers as vllm-studio did; the model is loaded for it, and nothing is generated."""
    reply = await house.post(asked | {"model": "gpt-4o"}, path)
    assert (reply.status, reply.json) == (200, expected | {"model": "gpt-4o"})
    assert house.launcher.starts == ["tiny"]
    assert not any(" /v1/chat/completions?" in received.line + "?" for received in house.tiny.requests)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/tokenize", {}),
        ("/v1/tokenize", {"prompt": 1}),
        ("/v1/tokenize", {"prompt": ["a"]}),
        ("/v1/detokenize", {}),
        ("/v1/count-tokens", {}),
        ("/v1/tokenize-chat-completions", {}),
    ],
)
async def test_missing_field(house: House, path: str, asked: dict[str, Any]) -> None:
    """What is missing is named."""
    reply = await house.post(asked | {"model": "tiny"}, path)
    assert (reply.status, reply.error["kind"]) == (400, "bad_request")
    assert reply.error["message"].split(":")[0] in {"prompt", "tokens", "messages"}


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"model":1}', b'{"model":"tiny","prompt":' + b" " * (2 << 20)])
async def test_malformed_body(house: House, body: bytes) -> None:
    """What is no JSON is the client's error, at any length."""
    assert (await house.post(body, "/v1/tokenize")).status == 400


async def test_large_malformed_body(house: House) -> None:
    """A body so long that it was only scanned is parsed in the end, and refused."""
    body = b'{"model":"tiny","x":[1,,2],"prompt":"' + b"x" * (2 << 20) + b'"}'
    reply = await house.post(body, "/v1/tokenize")
    assert (reply.status, reply.error["kind"]) == (400, "bad_request")


async def test_unknown_model(house: House) -> None:
    """The model is looked up as everywhere."""
    assert (await house.post({"model": "nobody"}, "/v1/tokenize")).error["kind"] == "model_not_found"


@pytest.mark.parametrize(
    "error", [b'{"error":{"message":"too long","code":400}}', b'{"error":"too long"}', b'{"error":null}', b"[]"]
)
async def test_refusal_of_the_model(house: House, error: bytes) -> None:
    """The model's refusal is passed on in our envelope."""

    async def script(call: Call) -> None:
        await call.send(answer(error, status=b"400 Bad Request"))

    house.tiny.script = script
    reply = await house.post({"model": "tiny", "prompt": "x"}, "/v1/tokenize")
    assert (reply.status, reply.error["kind"]) == (400, "bad_request")
    assert ("too long" in reply.error["message"]) == (b"too long" in error)


@pytest.mark.parametrize(
    "odd", [b"", b"no JSON", b"[]", b"1", b'{"tokens":null}', b'{"tokens":5}', b'{"tokens":{}}', b"\xff"]
)
async def test_odd_answer_of_the_model(house: House, odd: bytes) -> None:
    """An upstream that answers nonsense is the upstream's fault, and no bug of ours."""
    house.tiny.script = llama_server({"/tokenize": odd})
    reply = await house.post({"model": "tiny", "prompt": "x"}, "/v1/tokenize")
    assert (reply.status, reply.error["kind"]) == (502, "upstream_crashed")


@pytest.mark.parametrize("odd", [b"{}", b'{"input_tokens":null}', b'{"input_tokens":"x"}', b'{"input_tokens":[]}'])
async def test_odd_count_of_the_model(house: House, odd: bytes) -> None:
    """A count that is none is not made up."""
    house.tiny.script = llama_server({"/v1/chat/completions/input_tokens": odd})
    reply = await house.post({"model": "tiny", "messages": MESSAGES}, "/v1/tokenize-chat-completions")
    assert (reply.status, reply.error["kind"]) == (502, "upstream_crashed")


async def test_model_that_dies(house: House) -> None:
    """A model that dies meanwhile is told as everywhere."""

    async def script(call: Call) -> None:
        house.launcher.die("tiny", Exit("signal", signal=9))
        call.is_open = False

    house.tiny.script = script
    reply = await house.post({"model": "tiny", "prompt": "x"}, "/v1/tokenize")
    assert (reply.status, reply.error["kind"]) == (502, "upstream_crashed")


@pytest.mark.parametrize("depth", [900, *range(950, 1000)])
async def test_deep_nesting_is_answered(house: House, depth: int) -> None:
    """Also where it could just be read, and is too deep to be written again."""

    async def script(call: Call) -> None:
        await call.send(answer(b'{"content": ""}'))

    house.tiny.script = script
    nested = b"[" * depth + b"]" * depth
    for body in (b'{"model":"tiny","tokens":%s}' % nested, b'{"model":%s}' % nested):
        reply = await house.post(body, "/v1/detokenize")
        assert reply.status in {200, 400}, reply.body


async def test_answer_that_is_nested_without_end_is_told(house: House) -> None:
    """A model's server may be broken in any way."""
    house.tiny.script = llama_server({"/tokenize": b'{"tokens":' + b"[" * 100_000})
    reply = await house.post({"model": "tiny", "prompt": "a"}, "/v1/tokenize")
    assert (reply.status, reply.error["kind"]) == (502, "upstream_crashed")
