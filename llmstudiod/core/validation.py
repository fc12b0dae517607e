"""Checks plain values against a frozen dataclass with pydantic, and words what is wrong for people.

pydantic decides; the words come from the field's annotation, since its own are made for programmers.
"""

import functools
import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from llmstudiod.core.bounds import Ge, Interval, Len, MaxLen
from llmstudiod.core.recipe import Fault
from llmstudiod.core.yaml_lines import Document, Path_

T = TypeVar("T")

MAX_FAULTS = 20  # of one recipe; a list of a thousand wrong items is one mistake

_WORDS: Mapping[Any, str] = {int: "a whole number", float: "a number", str: "text"}


def validate(
    kind: type[T],
    values: Mapping[str, Any],
    *,
    document: Document,
    path: Path_ = (),
    origins: Mapping[str, Path_],
    words: Mapping[str, str] | None = None,
) -> T | list[Fault]:
    """Return ``values`` as a ``kind``, or one fault for each value that does not fit.

    ``origins`` maps a field to the path under which its value stands in the file, where that is not its own name.
    ``words`` says what a field wants where its annotation does not tell (a size that people write as ``64MiB``).
    """
    wrong: dict[Path_, None] = dict.fromkeys(_misplaced_bools(kind, values, ()))
    try:
        checked: T = _adapter(cast("Any", kind)).validate_python(dict(values))
    except ValidationError as error:
        for item in error.errors(include_url=False, include_context=False, include_input=False):
            wrong.setdefault(_place(values, item["loc"]))
    else:
        if not wrong:
            return checked
    return [
        _fault(place, kind, values, document=document, path=path, origins=origins, words=words or {})
        for place in list(wrong)[:MAX_FAULTS]
    ]


def _fault(
    place: Path_,
    kind: type[Any],
    values: Mapping[str, Any],
    *,
    document: Document,
    path: Path_,
    origins: Mapping[str, Path_],
    words: Mapping[str, str],
) -> Fault:
    name = str(place[0])
    in_file = (*origins.get(name, (*path, name)), *place[1:])
    annotation, found = _annotation(kind, place), _found(values, place)
    expected = words.get(".".join(str(part) for part in place)) or describe(annotation)
    is_bare = found.startswith(("the number", "true", "false")) and next(_members(annotation)) is str
    return Fault(
        f"expected {expected}, found {found}",
        file=document.file,
        line=document.line(in_file),
        key=".".join(str(part) for part in in_file[len(path) :]),
        hint="put quotes round it" if is_bare else None,
    )


@functools.lru_cache(maxsize=8)
def _adapter(kind: Any) -> TypeAdapter[Any]:  # noqa: ANN401 - a class
    return TypeAdapter(kind)


@functools.lru_cache(maxsize=8)
def _hints(kind: Any) -> Mapping[str, Any]:  # noqa: ANN401 - a class
    return get_type_hints(kind, include_extras=True)


def _place(values: Any, location: tuple[int | str, ...]) -> Path_:  # noqa: ANN401 - values of YAML
    """Return where in the values an error is; pydantic's path also names the members of unions that it tried."""
    place: Path_ = ()
    for part in location:
        if isinstance(values, Mapping) and isinstance(part, str) and (part in values or part == location[-1]):
            values = values.get(part)
        elif isinstance(values, list | tuple) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            continue
        place = (*place, part)
    return place


def _found(values: Any, place: Path_) -> str:  # noqa: ANN401 - values of YAML
    for part in place:
        if isinstance(values, Mapping) and part not in values:
            return "none"
        values = values[part]
    return shorten(values)


def _annotation(kind: Any, place: Path_) -> Any:  # noqa: ANN401 - type expressions
    for part in place:
        kind = next((inner for inner in _members(kind) if get_origin(inner) is tuple or is_dataclass(inner)), kind)
        if is_dataclass(kind) and isinstance(part, str):
            kind = _hints(cast("Any", kind))[part]
        elif get_origin(kind) is tuple:
            kind = get_args(kind)[0]
    return kind


def _members(kind: Any) -> Iterator[Any]:  # noqa: ANN401 - type expressions
    """Yield the members of a union, without their constraints; any other type is its own only member."""
    origin = get_origin(kind)
    if origin is Annotated:
        yield from _members(get_args(kind)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(kind):
            yield from _members(member)
    else:
        yield kind


def _misplaced_bools(kind: Any, value: Any, place: Path_) -> Iterator[Path_]:  # noqa: ANN401
    """Yield where true or false stands for a number: Python, and so pydantic, would take them for 1 and 0."""
    members = list(_members(kind))
    if isinstance(value, bool):
        if bool not in members and (int in members or float in members):
            yield place
    elif isinstance(value, Mapping):
        for member in members:
            if is_dataclass(member):
                hints = _hints(cast("Any", member))
                for name in hints.keys() & value.keys():
                    yield from _misplaced_bools(hints[name], value[name], (*place, name))
    elif isinstance(value, list | tuple):
        for member in members:
            if get_origin(member) is tuple:
                for index, item in enumerate(value):
                    yield from _misplaced_bools(get_args(member)[0], item, (*place, index))


def describe(kind: Any) -> str:  # noqa: ANN401 - type expressions
    """Return in words what a field of this type takes.

    >>> describe(Annotated[int, Ge(0)] | Literal["auto", "all"])
    "a whole number of 0 or more, 'auto' or 'all'"
    """
    parts = [part for part in dict.fromkeys(_parts(kind)) if part]
    return " or ".join((", ".join(parts[:-1]), parts[-1])) if len(parts) > 1 else "".join(parts)


def _parts(kind: Any) -> Iterator[str]:  # noqa: ANN401 - type expressions
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        yield _constrained(arguments[0], arguments[1:])
    elif origin in (Union, types.UnionType):
        for member in arguments:
            yield from _parts(member)
    elif origin is Literal:
        yield from (repr(word) for word in arguments)
    elif origin is tuple:
        yield f"a list, each item {describe(arguments[0])}"
    elif is_dataclass(kind):
        yield f"`name: value` with {', '.join(field.name for field in fields(kind))}"
    elif kind is bool:
        yield from ("true", "false")
    elif kind is not type(None):
        yield _WORDS.get(kind, "`name: value`")


def _constrained(kind: Any, constraints: tuple[Any, ...]) -> str:  # noqa: ANN401 - type expressions
    words = describe(kind)
    for constraint in constraints:
        match constraint:
            case Interval(ge=low, le=high):
                words = f"{words} from {low} to {high}"
            case Ge(ge=low):
                words = f"{words} of {low} or more"
            case Len(max_length=high):
                words = f"{words} of 1 to {high} characters"
            case MaxLen(max_length=high):
                words = f"{words}, at most {high}"
    return words


def shorten(value: object, *, limit: int = 80) -> str:
    r"""Return a value as it would stand in a file, on one line, cut so that a message stays a sentence.

    >>> shorten(True), shorten(None), shorten("a\n")
    ('true', 'nothing', "'a\\n'")
    """
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, int | float):
        text = f"the number {value:g}" if isinstance(value, float) else f"the number {value}"
    elif isinstance(value, dict | list | tuple):
        text = json.dumps(value, ensure_ascii=False, default=str)
        # JSON keeps a few characters that end a line elsewhere.
        text = text if text.isprintable() else repr(text)
    else:
        text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
