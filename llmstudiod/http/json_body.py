"""Reads the JSON objects that requests to the admin interface hold; whatever is none is a `BadRequestError`.

What passes can be walked through, written as YAML or JSON, hashed and used as a path without another look.
"""

import json
from typing import Any

from llmstudiod.core.errors import BadRequestError

MAX_DEPTH = 64
"""Python's own parser and writers give up at different depths, near a thousand; no request needs ten."""
_TOO_DEEP = f"not valid JSON: expected at most {MAX_DEPTH} levels, found more"


def json_object(raw: bytes | bytearray, *, hint: str | None = None) -> dict[str, Any]:
    """Return the object that a body holds; ``hint`` goes with every fault.

    Raises:
        BadRequestError: It is none, is nested too deep, or has half of a surrogate pair, which is no text: neither a
            file's name nor a hash can be made of it. Source: RFC 8259, section 8.2.
    """
    try:
        values = json.loads(raw)
    except RecursionError:
        raise BadRequestError(_TOO_DEEP, hint=hint) from None
    except ValueError as error:
        raise BadRequestError(f"not valid JSON: {error}", hint=hint) from None
    if not isinstance(values, dict):
        raise BadRequestError(f"expected a JSON object, found {type(values).__name__}", hint=hint)
    if _depth_over(values, MAX_DEPTH):
        raise BadRequestError(_TOO_DEEP, hint=hint)
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        found = error.object[error.start]
        raise BadRequestError(f"not valid JSON: half of a surrogate pair: {found!a}", hint=hint) from None
    return values


def _depth_over(value: dict[str, Any], most: int) -> bool:
    level: list[Any] = [value]
    for _ in range(most):
        inner = (item for each in level for item in (each.values() if isinstance(each, dict) else each))
        level = [item for item in inner if isinstance(item, dict | list)]
    return bool(level)
