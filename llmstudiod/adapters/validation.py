"""Checks plain values against a frozen dataclass with pydantic, and words what is wrong for people."""

import functools
import re
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from llmstudiod.adapters.yaml_lines import Document, Path_
from llmstudiod.core.recipe import Fault

T = TypeVar("T")


def validate(
    kind: type[T], values: Mapping[str, Any], *, document: Document, path: Path_ = (), origins: Mapping[str, Path_]
) -> T | list[Fault]:
    """Return ``values`` as a ``kind``, or one fault for each field that does not fit.

    ``origins`` maps a field to the path under which its value stands in the file, where that is not its own name.
    """
    try:
        checked: T = _adapter(cast("Any", kind)).validate_python(dict(values))
    except ValidationError as error:
        problems: dict[str, list[dict[str, Any]]] = {}
        for item in error.errors(include_url=False, include_context=False):
            problems.setdefault(str(item["loc"][0]) if item["loc"] else "", []).append(dict(item))
    else:
        return checked
    faults = []
    for name, items in problems.items():
        place = origins.get(name, (*path, name))
        found = values.get(name)
        faults.append(
            Fault(
                _wording(items, found, is_missing=items[0]["type"] == "missing"),
                file=document.file,
                line=document.line(place),
                key=".".join(str(part) for part in place[len(path) :]) or name,
            )
        )
    return faults


@functools.lru_cache(maxsize=8)
def _adapter(kind: Any) -> TypeAdapter[Any]:  # noqa: ANN401 - a class
    return TypeAdapter(kind)


def _wording(items: list[dict[str, Any]], found: object, *, is_missing: bool) -> str:
    if is_missing:
        return "expected a value, found none"
    wanted = " or ".join(dict.fromkeys(_expected(item) for item in items))
    return f"expected {wanted}, found {shorten(found)}"


def _expected(item: dict[str, Any]) -> str:
    text = re.sub(r"^Input should be (a valid )?", "", str(item["msg"]))
    text = {"string": "text", "boolean": "true or false", "integer": "a whole number", "tuple": "a list"}.get(
        text, text
    )
    return text.removesuffix(", unable to parse string as an integer").removesuffix(
        ", unable to parse string as a number"
    )


def shorten(value: object, *, limit: int = 80) -> str:
    """Return ``repr(value)``, cut so that a message stays a sentence."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
