"""What the proxy must know of a request's body: which model, whether it streams, how long it may get.

Small bodies are parsed, which also finds malformed JSON before a model is started for it. Large ones (images are tens
of MB) are scanned at their top level only: parsing would hold them twice and block every other request meanwhile.

The scan is for a thread, and Python's lock is not released within a pattern: so every pattern takes a bounded piece,
and what costs a step of Python for each occurrence (keys, lists, objects, parts) is limited in number.
"""

import json
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from llmstudiod.core.errors import BadRequestError

PARSE_UP_TO = 1 << 20
TEMPLATE_TOKENS = 256
MAX_KEYS = 1000
MAX_NESTED = 1 << 20
"""Lists and objects of a large body; the longest honest batch of token lists has some ten thousand."""
MAX_PARTS = 1000
MAX_WANTED_BYTES = 4 << 10
"""Bytes of a key or value that we read; a longer one is skipped, or refused where it would have to be read."""

Bytes = bytes | bytearray

# Possessive or bounded: a text of 20 MB full of escapes would otherwise cost a second and 100 bytes of memory for each.
# The groups themselves are not possessive: Python before 3.11.5 does not step back from one that fails half-way.
_TEXT = re.compile(rb'[^"\\]{0,8192}+(?:\\.[^"\\]{0,8192}+){0,256}', re.DOTALL)
# Up to the next bracket, over strings of moderate length.
_FLAT = re.compile(
    rb'[^"\[\]{}]{0,8192}+(?:"[^"\\]{0,512}+(?:\\.[^"\\]{0,512}+){0,64}"[^"\[\]{}]{0,8192}+){0,128}', re.DOTALL
)
_QUOTE = ord('"')
_SCALAR = re.compile(rb"-?[0-9.eE+-]+|true|false|null")
_SPACE = re.compile(rb"[ \t\r\n]*")
_MEDIA = (b"image_url", b"input_audio", b'"image"', b"multimodal_data")
_WANTED = frozenset({"model", "stream", "max_tokens", "max_completion_tokens", "n_predict", "n", "n_cmpl"})
_ONE = (None, 1)
_LIMITS = ("max_completion_tokens", "max_tokens", "n_predict")
_decode_text = json.JSONDecoder().decode
_PART_HEADER = re.compile(rb"\r\nContent-Disposition:([^\r\n]{0,4096}+)\r\n", re.IGNORECASE)
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
    """Return the model named by the field ``model`` of a multipart body.

    Raises:
        BadRequestError: The body ends within that field, or has more than `MAX_PARTS` parts.
    """
    match = _model_part(body)
    if match is None:
        return RequestFacts(None)
    start = body.find(b"\r\n\r\n", match.end() - 2)
    end = body.find(b"\r\n--", start + 4)
    if start < 0 or end < 0:
        raise BadRequestError("the multipart body ends in the middle of the field 'model'")
    if end - start > MAX_WANTED_BYTES:
        raise BadRequestError(f"model: expected the name of a model, found {end - start} bytes")
    return RequestFacts(body[start + 4 : end].decode(errors="replace").strip() or None)


def _model_part(body: Bytes) -> re.Match[bytes] | None:
    for number, found in enumerate(_PART_HEADER.finditer(body)):
        if number == MAX_PARTS:
            raise BadRequestError(f"the form has more than {MAX_PARTS} parts")
        if _NAMES_MODEL.search(found.group(1)):
            return found
    return None


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
    skipper = _Skipper(body)
    position = _after(_SPACE, body, 0)
    if body[position : position + 1] != b"{":
        raise BadRequestError("expected a JSON object")
    position = _after(_SPACE, body, position + 1)
    if body[position : position + 1] == b"}":
        _expect_end(body, position + 1)
        return
    for _ in range(MAX_KEYS):
        key_end = _string_end(body, position)
        key = _decode(body[position:key_end], position) if key_end - position <= MAX_WANTED_BYTES else None
        position = _after(_SPACE, body, key_end)
        if body[position : position + 1] != b":":
            raise _not_json(position)
        start = _after(_SPACE, body, position + 1)
        end = skipper.value_end(start)
        if key in _WANTED:
            yield key, _wanted_value(key, body, start, end)
        position = _after(_SPACE, body, end)
        separator = body[position : position + 1]
        if separator == b"}":
            _expect_end(body, position + 1)
            return
        if separator != b",":
            raise _not_json(position)
        position = _after(_SPACE, body, position + 1)
    raise BadRequestError(f"the body has more than {MAX_KEYS} keys")


class _Skipper:
    """Finds where a value of a body ends; counts what it steps over, since each list and object costs time."""

    def __init__(self, body: Bytes) -> None:
        self._body = body
        self._nested = 0

    def value_end(self, start: int) -> int:
        """Return the position after the value at ``start``; brackets are counted, not paired: upstream parses."""
        body = self._body
        first = body[start : start + 1]
        if first == b'"':
            return _string_end(body, start)
        if first in (b"{", b"["):
            return self._nested_end(start)
        match = _SCALAR.match(body, start)
        if match is None:
            raise _not_json(start)
        return match.end()

    def _nested_end(self, start: int) -> int:
        body, depth, position = self._body, 0, start
        while position < len(body):
            byte = body[position]
            if byte == _QUOTE:  # too long for `_FLAT`
                position = _string_end(body, position)
            elif byte in b"[{":
                self._count()
                depth += 1
                position += 1
            elif byte in b"]}":
                depth -= 1
                position += 1
                if not depth:
                    return position
            position = _after(_FLAT, body, position)
        raise _not_json(len(body))

    def _count(self) -> None:
        self._nested += 1
        if self._nested > MAX_NESTED:
            raise BadRequestError(
                f"the body has more than {MAX_NESTED} lists and objects", hint="send it in several requests"
            )


def _string_end(body: Bytes, start: int) -> int:
    if body[start : start + 1] != b'"':
        raise _not_json(start)
    position = start + 1
    while True:
        end = _after(_TEXT, body, position)
        if body[end : end + 1] == b'"':
            return end + 1
        if end == position:  # the end of the body, with or without a backslash before it
            raise _not_json(start)
        position = end


def _after(pattern: re.Pattern[bytes], body: Bytes, position: int) -> int:
    """Return the position after ``pattern``, which matches anywhere, if only nothing."""
    match = pattern.match(body, position)
    assert match is not None
    return match.end()


def _expect_end(body: Bytes, position: int) -> None:
    if _after(_SPACE, body, position) != len(body):
        raise _not_json(position)


def _wanted_value(key: str, body: Bytes, start: int, end: int) -> Any:  # noqa: ANN401 - JSON holds anything
    if end - start > MAX_WANTED_BYTES:  # decoding could hold the whole body many times
        expected = "the name of a model" if key == "model" else "a short value"
        raise BadRequestError(f"{key}: expected {expected}, found {end - start} bytes")
    return _decode(body[start:end], start)


def _decode(text: Bytes, position: int) -> Any:  # noqa: ANN401 - JSON holds anything
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _not_json(position) from None


def _not_json(position: int) -> BadRequestError:
    return BadRequestError(f"the body is not valid JSON at byte {position}", hint="see that position of the body")
