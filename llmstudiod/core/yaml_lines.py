"""YAML (and JSON, which is YAML) with the line of every key, so that a fault can say where it is.

Reads untrusted text: bounded in size and depth, no tags, no aliases that multiply, no duplicate keys.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from llmstudiod.core.recipe import MAX_FILE_BYTES, Fault

MAX_NODES = 20_000
MAX_DEPTH = 20
_TOO_MUCH = f"expected at most {MAX_NODES} values and {MAX_DEPTH} levels, found more"

_TAG = "tag:yaml.org,2002:"
_TEXTS = frozenset({_TAG + "str", _TAG + "timestamp", _TAG + "value"})  # nobody means a date
_SCALARS = frozenset(_TAG + name for name in ("int", "float", "bool", "null"))
_SURROGATES = re.compile(r"(?<!\\)((?:\\\\)*)\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})", re.IGNORECASE)

Path_ = tuple[str | int, ...]

# CSafeLoader is six times faster, but not every build of PyYAML has it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_constructor = yaml.constructor.SafeConstructor
_UNREADABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

# What libyaml says -> what a person can do about it.
_SYNTAX_HINTS: Mapping[str, str] = {
    "mapping values are not allowed in this context": "indent all keys alike, and quote a value that has ': ' in it",
    "found character that cannot start any token": "put the value into double quotes",
    "found undefined alias": "a text that begins with * needs quotes",
    "could not find expected ':'": "write `key: value`",
}


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file: plain values, and the 1-based line of each key or item by its path."""

    file: str
    value: Any
    lines: Mapping[Path_, int] = field(default_factory=dict)

    def line(self, path: Path_) -> int | None:
        """Return the line of the deepest part of ``path`` that stands in the file."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None


class _FaultyDocumentError(Exception):
    def __init__(self, message: str, place: yaml.Node | yaml.Event, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.line = place.start_mark.line + 1 if place.start_mark else None
        self.hint = hint


def parse_bytes(raw: bytes, *, file: str) -> Document | Fault:
    """Return the parsed content of a file, or what is wrong with it."""
    if len(raw) > MAX_FILE_BYTES:
        limit = f"expected a file of at most {MAX_FILE_BYTES >> 20} MiB, found a longer one"
        return Fault(limit, file=file, hint="a recipe needs some hundred bytes")
    try:
        return parse_document(raw.decode("utf-8-sig"), file=file)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        found = f"expected UTF-8, found the byte 0x{raw[error.start]:02x}"
        return Fault(found, file=file, line=line, hint="save the file as UTF-8")


def parse_document(text: str, *, file: str) -> Document | Fault:
    """Return the parsed text, or what is wrong with it."""
    if file.endswith(".json"):
        text = _as_yaml(text)
    if character := _UNREADABLE.search(text):
        line = text.count("\n", 0, character.start()) + 1
        found = f"expected text, found the control character U+{ord(character[0]):04X}"
        return Fault(found, file=file, line=line, hint="is this the right file? It has to be text")
    lines: dict[Path_, int] = {}
    try:
        _check_shape(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            value = None if node is None else _Builder(lines).build(node, ())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        return _syntax_fault(error, text, file)
    except yaml.YAMLError as error:
        return Fault(f"not valid YAML: {' '.join(str(error).split())}", file=file)
    except _FaultyDocumentError as error:
        return Fault(str(error), file=file, line=error.line, hint=error.hint)
    return Document(file=file, value=value, lines=lines)


def _as_yaml(text: str) -> str:
    """Return JSON as the YAML that it almost is: tabs and pairs of surrogates (an escaped emoji) are errors in YAML."""
    text = text.replace("\t", " ")  # inside a JSON string a bare tab cannot stand

    def character(match: re.Match[str]) -> str:
        return match[1] + bytes.fromhex(match[2] + match[3]).decode("utf-16-be")

    return _SURROGATES.sub(character, text)


def _check_shape(text: str) -> None:
    """Refuse what is too deep or too long before it is composed: libyaml's composer recurses until it crashes."""
    depth = count = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        count += isinstance(event, yaml.NodeEvent)
        if depth > MAX_DEPTH or count > MAX_NODES:
            raise _too_much(event)


def _too_much(place: yaml.Node | yaml.Event) -> _FaultyDocumentError:
    return _FaultyDocumentError(_TOO_MUCH, place)


def _syntax_fault(error: yaml.MarkedYAMLError, text: str, file: str) -> Fault:
    mark = error.problem_mark or error.context_mark
    line, rest = (mark.line + 1, text[mark.index :]) if mark else (None, text)
    problem = error.problem or error.context or "it cannot be read"
    if problem == "exceeded maximum nesting depth":  # libyaml 0.2.6 and newer count before we can
        return Fault(_TOO_MUCH, file, line)
    hint = _SYNTAX_HINTS.get(problem, "see this line and the one before it")
    if problem == "but found another document":
        problem, hint = "expected one document, found a second", "write several recipes as a list (- id: …)"
    elif "expected" in problem and not rest.strip():
        problem, hint = f"the file ends too early: {problem}", "is a bracket or a quotation mark left open?"
        line = text.rstrip().count("\n") + 1
    elif rest.startswith("\t"):
        problem, hint = "expected spaces, found a tab", "indent with spaces"
    language = "JSON" if file.endswith(".json") else "YAML"
    return Fault(f"not valid {language}: {problem}", file, line, hint=hint)


class _Builder:
    """Turns nodes into values, writing down where each key stands."""

    def __init__(self, lines: dict[Path_, int]) -> None:
        self._lines = lines
        self._count = 0
        self._scalars = _constructor()

    def build(self, node: yaml.Node, path: Path_) -> Any:  # noqa: ANN401 - YAML holds anything
        self._count += 1
        if self._count > MAX_NODES or len(path) > MAX_DEPTH:  # again, since an alias stands for a whole tree
            raise _too_much(node)
        self._lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                raise _FaultyDocumentError("expected a key, found << (merge keys are not read)", key_node)
            if not isinstance(key_node, yaml.ScalarNode) or self._scalar(key_node) is None:
                raise _FaultyDocumentError("expected a plain word as a key", key_node)
            # YAML 1.1 reads an unquoted `on` or `no` as a boolean, also where it stands as a key.
            name = str(key_node.value)
            if name in result:
                first = self._lines[*path, name]
                found = f"{name!r} is given twice, first in line {first}"
                raise _FaultyDocumentError(found, key_node, hint="keep one of them")
            self._lines[*path, name] = key_node.start_mark.line + 1
            result[name] = self.build(value_node, (*path, name))
        return result

    def _scalar(self, node: yaml.Node) -> str | int | float | bool | None:
        if node.tag in _TEXTS and isinstance(node, yaml.ScalarNode):
            return str(node.value)
        if node.tag not in _SCALARS or not isinstance(node, yaml.ScalarNode):
            tag = node.tag.replace(_TAG, "!!")
            hint = "leave the tag out; a text that begins with ! needs quotes"
            raise _FaultyDocumentError(f"expected a plain value, found the tag {tag!r}", node, hint=hint)
        if ":" in node.value:  # YAML 1.1 reads 12:30 as 750
            return str(node.value)
        try:
            value: int | float | bool | None = self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, OverflowError):
            return str(node.value)  # 0b_ and its like; whoever wanted a number says so
        # Python refuses to print integers of 4300 digits; nobody here has a use for more than 64 bits.
        return str(node.value) if isinstance(value, int) and value.bit_length() > 64 else value
