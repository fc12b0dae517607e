"""YAML (and JSON, which is YAML) with the line of every key, so that a fault can say where it is.

Reads untrusted text: bounded in size and depth, no tags, no aliases that multiply, no duplicate keys.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmstudiod.core.recipe import Fault

MAX_FILE_BYTES = 1 << 20
MAX_NODES = 20_000
MAX_DEPTH = 20

Path_ = tuple[str | int, ...]

# CSafeLoader is six times faster, but not every build of PyYAML has it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_constructor = yaml.constructor.SafeConstructor


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
    def __init__(self, message: str, node: yaml.Node | None = None) -> None:
        super().__init__(message)
        self.line = node.start_mark.line + 1 if node else None


def read_document(path: Path) -> Document | Fault:
    """Return the parsed file, or what is wrong with it."""
    file = str(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        return Fault(f"cannot read the file: {error.strerror}", file=file)
    if len(raw) > MAX_FILE_BYTES:
        return Fault(
            f"the file is over {MAX_FILE_BYTES >> 20} MiB", file=file, hint="a recipe needs some hundred bytes"
        )
    try:
        return parse_document(raw.decode("utf-8-sig"), file=file)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        return Fault(f"byte {error.start} is not UTF-8", file=file, line=line, hint="save the file as UTF-8")


def parse_document(text: str, *, file: str) -> Document | Fault:
    """Return the parsed text, or what is wrong with it."""
    if file.endswith(".json"):
        # Legal white space in JSON, an error in YAML; inside a JSON string a bare tab cannot stand.
        text = text.replace("\t", " ")
    lines: dict[Path_, int] = {}
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            value = None if node is None else _Builder(lines).build(node, ())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        return Fault(
            f"not valid YAML: {error.problem or error.context}",
            file=file,
            line=mark.line + 1 if mark else None,
            hint="see the line, and the one before it",
        )
    except yaml.YAMLError as error:
        return Fault(f"not valid YAML: {' '.join(str(error).split())}", file=file)
    except _FaultyDocumentError as error:
        return Fault(str(error), file=file, line=error.line)
    return Document(file=file, value=value, lines=lines)


class _Builder:
    """Turns nodes into values, writing down where each key stands."""

    def __init__(self, lines: dict[Path_, int]) -> None:
        self._lines = lines
        self._count = 0
        self._scalars = _constructor()

    def build(self, node: yaml.Node, path: Path_) -> Any:  # noqa: ANN401 - YAML holds anything
        self._count += 1
        if self._count > MAX_NODES or len(path) > MAX_DEPTH:
            raise _FaultyDocumentError(f"expected at most {MAX_NODES} values and {MAX_DEPTH} levels, found more", node)
        self._lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, Hashable) or key is None or key_node.tag == "tag:yaml.org,2002:merge":
                raise _FaultyDocumentError("expected a plain word as a key", key_node)
            # YAML 1.1 reads an unquoted `on` or `no` as a boolean, also where it stands as a key.
            name = key if isinstance(key, str) else str(key_node.value)
            if name in result:
                first = self._lines[*path, name]
                raise _FaultyDocumentError(f"'{name}' is given twice, first in line {first}", key_node)
            self._lines[*path, name] = key_node.start_mark.line + 1
            result[name] = self.build(value_node, (*path, name))
        return result

    def _scalar(self, node: yaml.Node) -> Any:  # noqa: ANN401
        try:
            value = self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise _FaultyDocumentError(f"'{node.value}' cannot be read: {error}", node) from error
        # Dates and bytes have no place in our files; people mean the text that they wrote.
        return value if value is None or isinstance(value, str | int | float | bool) else str(node.value)
