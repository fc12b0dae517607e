"""Counting and splitting of tokens as vllm-studio answered it, from llama-server's own routes: nothing is generated."""

import json
from typing import Any, TypeVar

from aiohttp import ClientError, ClientSession, ClientTimeout, UnixConnector, web

from llmstudiod.core.errors import BadRequestError, UpstreamCrashedError
from llmstudiod.http.answers import json_response

ROUTES = frozenset({"/v1/tokenize", "/v1/detokenize", "/v1/count-tokens", "/v1/tokenize-chat-completions"})
TIMEOUT_S = 60.0

Found = TypeVar("Found")


async def answer(path: str, body: bytes | bytearray, *, socket_path: str, n_ctx: int | None) -> web.Response:
    """Return the answer of one of `ROUTES`.

    Raises:
        BadRequestError: A field is missing, or the upstream refuses the request.
        UpstreamCrashedError: The upstream does not answer.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:  # a large body was only scanned so far
        raise BadRequestError(f"the body is not valid JSON: {error}") from None
    model = request.get("model")
    connector = UnixConnector(path=socket_path)
    async with ClientSession(connector=connector, timeout=ClientTimeout(total=TIMEOUT_S)) as session:
        ask = _Upstream(session)
        if path == "/v1/tokenize":
            ids = await ask.tokens(request)
            return json_response({"tokens": ids, "count": len(ids), "max_model_len": n_ctx, "model": model})
        if path == "/v1/detokenize":
            text = await ask.post("/detokenize", {"tokens": _field(request, "tokens")}, "content", str)
            return json_response({"prompt": text, "text": text, "model": model})
        if path == "/v1/count-tokens":
            return json_response({"num_tokens": len(await ask.tokens(request)), "model": model})
        messages, tools = _field(request, "messages"), request.get("tools")
        plain = await ask.chat_tokens({"messages": messages})
        whole = await ask.chat_tokens({"messages": messages, "tools": tools}) if tools else plain
        breakdown = {"messages": plain, "tools": whole - plain}
        return json_response({"input_tokens": whole, "breakdown": breakdown, "model": model})


class _Upstream:
    """Asks llama-server."""

    def __init__(self, session: ClientSession) -> None:
        self._session = session

    async def post(self, path: str, value: dict[str, Any], name: str, kind: type[Found]) -> Found:
        """Return the field ``name`` of the answer."""
        try:
            async with self._session.post(f"http://localhost{path}", json=value) as response:
                found = await response.json(content_type=None)
                if response.status >= 400:
                    raise BadRequestError(f"llama-server refuses the request: {_message(found)}")
        except (ClientError, ValueError, TimeoutError) as error:
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


def _message(found: Any) -> str:  # noqa: ANN401 - JSON holds anything
    """Return the words of an error, in llama-server's form or any other."""
    error = found.get("error") if isinstance(found, dict) else None
    return str(error.get("message", "") if isinstance(error, dict) else error or "")[:500]


def _field(request: dict[str, Any], name: str) -> Any:  # noqa: ANN401 - JSON holds anything
    if name not in request:
        raise BadRequestError(f"{name}: expected a list, found none")
    return request[name]
