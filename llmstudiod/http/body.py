"""What the proxy must know of a request's body: which model, whether it streams, how long it may get.

Small bodies are parsed, which also finds malformed JSON before a model is started for it. Large ones (images are tens
of MB) are scanned at their top level only: parsing would hold them twice and block every other request meanwhile.
"""

import json
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from llmstudiod.core.errors import BadRequestError

PARSE_UP_TO = 1 << 20
TEMPLATE_TOKENS = 256

Bytes = bytes | bytearray

# Possessive: a text of 20 MB full of escapes would otherwise cost a second and 100 bytes of memory for each of them.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_NESTED = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{}\[\]]', re.DOTALL)
_SCALAR = re.compile(rb"-?[0-9.eE+-]+|true|false|null")
_SPACE = re.compile(rb"[ \t\r\n]*")
_MEDIA = (b"image_url", b"input_audio", b'"image"', b"multimodal_data")
_WANTED = frozenset({"model", "stream", "max_tokens", "max_completion_tokens", "n_predict", "n", "n_cmpl"})
_ONE = (None, 1)
_LIMITS = ("max_completion_tokens", "max_tokens", "n_predict")
_decode_text = json.JSONDecoder().decode
_PART_HEADER = re.compile(rb"\r\nContent-Disposition:([^\r\n]*)\r\n", re.IGNORECASE)
_NAMES_MODEL = re.compile(rb';[ \t]*name="?model"?[ \t]*(?:;|$)', re.IGNORECASE)


class RequestFacts(NamedTuple):
    """What was read off a body; ``values`` holds what `cost_tokens` needs of it."""

    model: str | None
    is_stream: bool = False
    values: Mapping[str, Any] = MappingProxyType({})


def read_json_facts(body: Bytes, *, parse_up_to: int = PARSE_UP_TO) -> RequestFacts:
    """Return the facts of a JSON body; one of more than ``parse_up_to`` bytes is scanned.

    Raises:
        BadRequestError: It is not a JSON object, or ``model`` is no text.
    """
    values = _parse(body) if len(body) <= parse_up_to else dict(_scan(body))
    model = values.get("model")
    if model is not None and not isinstance(model, str):
        raise BadRequestError(f"model: expected the name of a model, found {json.dumps(model)[:80]}")
    return RequestFacts(model or None, values.get("stream") is True, values)


def read_multipart_facts(body: Bytes) -> RequestFacts:
    """Return the model named by the field ``model`` of a multipart body."""
    match = next((found for found in _PART_HEADER.finditer(body) if _NAMES_MODEL.search(found.group(1))), None)
    if match is None:
        return RequestFacts(None)
    start = body.find(b"\r\n\r\n", match.end() - 2)
    end = body.find(b"\r\n--", start + 4)
    if start < 0 or end < 0:
        raise BadRequestError("the multipart body ends in the middle of the field 'model'")
    return RequestFacts(body[start + 4 : end].decode(errors="replace").strip() or None)


def cost_tokens(facts: RequestFacts, body: Bytes) -> int | None:
    """Return a bound on the context that the request may use, or None: all that a slot has.

    A token stands for at least one byte of the body, and for each one generated.

    What the chat template adds is in no body, hence the allowance; what an image or a sound becomes, nobody can tell.
    """
    get = facts.values.get
    limit = -1
    for name in _LIMITS:
        value = get(name)
        if isinstance(value, int):
            if value < 0:
                return None
            limit = max(limit, value)
    if limit < 0 or get("n") not in _ONE or get("n_cmpl") not in _ONE or len(body) > PARSE_UP_TO:
        return None
    if any(word in body for word in _MEDIA):
        return None
    return TEMPLATE_TOKENS + len(body) + limit


def _parse(body: Bytes) -> dict[str, Any]:
    try:
        values = _decode_text(str(body, "utf-8"))
    except json.JSONDecodeError as error:
        raise BadRequestError(
            f"the body is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}",
            hint="see that position of the request's body",
        ) from None
    except (ValueError, RecursionError) as error:  # no UTF-8, an integer of thousands of digits, deep nesting
        raise BadRequestError(f"the body is not valid JSON: {type(error).__name__}") from None
    if not isinstance(values, dict):
        raise BadRequestError(f"expected a JSON object, found {type(values).__name__}")
    return values


def _scan(body: Bytes) -> Iterator[tuple[str, Any]]:
    """Yield the wanted top-level keys with their values, the last of a repeated one last, as JSON parsers have it."""
    position = _after_space(body, 0)
    if body[position : position + 1] != b"{":
        raise BadRequestError("expected a JSON object")
    position = _after_space(body, position + 1)
    if body[position : position + 1] == b"}":
        _expect_end(body, position + 1)
        return
    while True:
        key_match = _STRING.match(body, position)
        if key_match is None:
            raise _not_json(position)
        position = _after_space(body, key_match.end())
        if body[position : position + 1] != b":":
            raise _not_json(position)
        start = _after_space(body, position + 1)
        end = _value_end(body, start)
        key = _decode(key_match.group(), key_match.start())
        if key in _WANTED:
            yield key, _decode(body[start:end], start)
        position = _after_space(body, end)
        separator = body[position : position + 1]
        if separator == b"}":
            _expect_end(body, position + 1)
            return
        if separator != b",":
            raise _not_json(position)
        position = _after_space(body, position + 1)


def _value_end(body: Bytes, start: int) -> int:
    first = body[start : start + 1]
    if first in (b"{", b"["):
        depth = 0
        for token in _NESTED.finditer(body, start):
            text = token.group()
            if text in (b"{", b"["):
                depth += 1
            elif text in (b"}", b"]"):
                depth -= 1
                if not depth:
                    return token.end()
        raise _not_json(len(body))
    match = (_STRING if first == b'"' else _SCALAR).match(body, start)
    if match is None:
        raise _not_json(start)
    return match.end()


def _after_space(body: Bytes, position: int) -> int:
    match = _SPACE.match(body, position)
    assert match is not None
    return match.end()


def _expect_end(body: Bytes, position: int) -> None:
    if _after_space(body, position) != len(body):
        raise _not_json(position)


def _decode(text: Bytes, position: int) -> Any:  # noqa: ANN401 - JSON holds anything
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _not_json(position) from None


def _not_json(position: int) -> BadRequestError:
    return BadRequestError(f"the body is not valid JSON at byte {position}", hint="see that position of the body")
