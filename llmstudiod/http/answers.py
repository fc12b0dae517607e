"""The answers that we make ourselves, and the envelopes of errors: OpenAI's, Anthropic's, and the admin interface's."""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from aiohttp import web

from llmstudiod.core.errors import LlmstudioError


def json_bytes(value: object) -> bytes:
    """Return ``value`` as compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def json_response(value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return a JSON answer."""
    own = {"Server": "llmstudiod", **(headers or {})}  # aiohttp would tell its own version and Python's
    return web.Response(body=json_bytes(value), status=status, content_type="application/json", headers=own)


def is_anthropic(path: str) -> bool:
    """Whether clients of this path speak Anthropic's language."""
    return path.startswith("/v1/messages")


def envelope(error: LlmstudioError, *, path: str) -> dict[str, Any]:
    """Return the error in the form that clients of ``path`` expect."""
    inner: dict[str, Any] = {
        "message": error.message,
        "type": error.openai_type,
        "code": error.kind,
        "param": "model" if error.kind == "model_not_found" else None,
        "hint": error.hint,
        "kind": error.kind,
    }
    for name in ("failure", "lines"):
        if error.details.get(name):
            inner[name] = error.details[name]
    if is_anthropic(path):
        kinds = {
            400: "invalid_request_error",
            403: "permission_error",
            404: "not_found_error",
            413: "request_too_large",
            431: "invalid_request_error",
        }
        inner["type"] = kinds.get(error.status, "rate_limit_error" if error.status == 429 else "api_error")
        return {"type": "error", "error": inner}
    return {"error": inner}


def error_headers(error: LlmstudioError) -> dict[str, str]:
    """Return the headers that go with an error."""
    headers = {"Allow": str(error.details["allow"])} if "allow" in error.details else {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    return headers


def error_response(error: LlmstudioError, *, path: str) -> web.Response:
    """Return an error as an answer of the OpenAI endpoint."""
    return json_response(envelope(error, path=path), status=error.status, headers=error_headers(error))


def error_event(error: LlmstudioError, *, path: str) -> bytes:
    """Return an error as the last event of a stream that had already begun."""
    name = b"event: error\n" if is_anthropic(path) else b""
    return name + b"data: " + json_bytes(envelope(error, path=path)) + b"\n\n"


def raw_error(error: LlmstudioError, *, path: str) -> bytes:
    """Return an error as the bytes of a whole HTTP response that closes its connection."""
    body = json_bytes(envelope(error, path=path))
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in (headers | error_headers(error)).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
