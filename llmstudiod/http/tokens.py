"""Counting and splitting of tokens as vllm-studio answered it, from llama-server's own routes: nothing is generated."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

from aiohttp import ClientError, ClientSession, ClientTimeout, UnixConnector, web

from llmstudiod.core.errors import BadRequestError, UpstreamCrashedError
from llmstudiod.http.answers import json_response
from llmstudiod.http.body import PARSE_UP_TO

ROUTES = frozenset({"/v1/tokenize", "/v1/detokenize", "/v1/count-tokens", "/v1/tokenize-chat-completions"})
TIMEOUT_S = 60.0
_JSON = {"Content-Type": "application/json"}

Found = TypeVar("Found")
Given = TypeVar("Given")


async def answer(path: str, body: bytes | bytearray, *, socket_path: str, n_ctx: int | None) -> web.Response:
    """Return the answer of one of `ROUTES`.

    Raises:
        BadRequestError: A field is missing, or the upstream refuses the request.
        UpstreamCrashedError: The upstream does not answer.
    """
    try:
        request = await _off_loop(len(body), json.loads, body)
    except (ValueError, RecursionError) as error:  # a large body was only scanned so far
        raise BadRequestError(f"the body is not valid JSON: {error}") from None
    model = request.get("model")
    connector = UnixConnector(path=socket_path)
    async with ClientSession(connector=connector, timeout=ClientTimeout(total=TIMEOUT_S)) as session:
        ask = _Upstream(session, size=len(body))
        if path == "/v1/tokenize":
            ids = await ask.tokens(request)
            value = {"tokens": ids, "count": len(ids), "max_model_len": n_ctx, "model": model}
            return await _off_loop(len(body), json_response, value)
        if path == "/v1/detokenize":
            text = await ask.post("/detokenize", {"tokens": _field(request, "tokens")}, "content", str)
            return await _off_loop(len(body), json_response, {"prompt": text, "text": text, "model": model})
        if path == "/v1/count-tokens":
            return json_response({"num_tokens": len(await ask.tokens(request)), "model": model})
        messages, tools = _field(request, "messages"), request.get("tools")
        plain = await ask.chat_tokens({"messages": messages})
        whole = await ask.chat_tokens({"messages": messages, "tools": tools}) if tools else plain
        breakdown = {"messages": plain, "tools": whole - plain}
        return json_response({"input_tokens": whole, "breakdown": breakdown, "model": model})


async def split(text: str, *, socket_path: str) -> list[int]:
    """Return a text's tokens, as the model's own server splits it.

    Raises:
        BadRequestError: The upstream refuses to.
        UpstreamCrashedError: It does not answer.
    """
    connector = UnixConnector(path=socket_path)
    async with ClientSession(connector=connector, timeout=ClientTimeout(total=TIMEOUT_S)) as session:
        return await _Upstream(session, size=len(text)).tokens({"prompt": text})


async def _off_loop(size: int, function: Callable[[Given], Found], value: Given) -> Found:
    """Return ``function(value)``; where ``size`` bytes of JSON take their time, others are served meanwhile."""
    return function(value) if size <= PARSE_UP_TO else await asyncio.to_thread(function, value)


class _Upstream:
    """Asks llama-server; ``size`` is the length of the request's body, which says how much there is to write."""

    def __init__(self, session: ClientSession, *, size: int) -> None:
        self._session = session
        self._size = size

    async def post(self, path: str, value: dict[str, Any], name: str, kind: type[Found]) -> Found:
        """Return the field ``name`` of the answer."""
        data = await _off_loop(self._size, _encode, value)
        try:
            async with self._session.post(f"http://localhost{path}", data=data, headers=_JSON) as response:
                answered = await response.read()
                found = await _off_loop(len(answered), json.loads, answered or b"null")
                if response.status >= 400:
                    raise BadRequestError(f"llama-server refuses the request: {_message(found)}")
        except (ClientError, ValueError, RecursionError, TimeoutError) as error:
            raise UpstreamCrashedError(f"the model's server does not answer: {error}") from error
        value_found = found.get(name) if isinstance(found, dict) else None
        if not isinstance(value_found, kind):
            raise UpstreamCrashedError(f"the model's server answers {path} without '{name}'")
        return value_found

    async def tokens(self, request: dict[str, Any]) -> list[int]:
        prompt: str | None
        if "messages" in request:
            prompt = await self.post("/apply-template", {"messages": request["messages"]}, "prompt", str)
        else:
            prompt = next((request[name] for name in ("prompt", "text", "content") if name in request), None)
            if not isinstance(prompt, str):
                raise BadRequestError("prompt: expected a text under prompt, text or content, found none")
        found: list[int] = await self.post("/tokenize", {"content": prompt, "add_special": True}, "tokens", list)
        return found

    async def chat_tokens(self, request: dict[str, Any]) -> int:
        return await self.post("/v1/chat/completions/input_tokens", request, "input_tokens", int)


def _encode(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value).encode()
    except RecursionError as error:  # what could just be read may be too deep to be written
        raise BadRequestError(f"the body is not valid JSON: {error}") from None


def _message(found: Any) -> str:  # noqa: ANN401 - JSON holds anything
    """Return the words of an error, in llama-server's form or any other."""
    error = found.get("error") if isinstance(found, dict) else None
    return str(error.get("message", "") if isinstance(error, dict) else error or "")[:500]


def _field(request: dict[str, Any], name: str) -> Any:  # noqa: ANN401 - JSON holds anything
    if name not in request:
        raise BadRequestError(f"{name}: expected a list, found none")
    return request[name]
