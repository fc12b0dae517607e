"""What the privileged launcher can be asked: one line of JSON each, written by the daemon, believed by nobody.

Everything that is not named here is refused: unknown verbs, unknown or missing or repeated keys, values of another
type or out of their range. What a request *means* (is this recipe root's, is this model where models may lie) is the
launcher's to judge; a request that passes here is only well-formed.
"""

import json
import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from llmstudiod.core.errors import BadRequestError
from llmstudiod.core.launch import Decisions
from llmstudiod.core.recipe import ID_PATTERN, MAX_CONTEXT

MAX_REQUEST_BYTES = (1 << 20) + (1 << 18)  # a recipe file of its largest size, escaped by a sane author

_ID = re.compile(ID_PATTERN)
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_GPU = re.compile(r"(GPU|MIG)-[0-9A-Za-z/-]{1,80}")
_RECIPE_NAME = re.compile(r"[^.].*\.(yaml|yml|json)")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,120}\.(yaml|yml|json)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Verb(StrEnum):
    """What can be asked."""

    START = "start"  # start a recipe's unit
    SHOW = "show"  # tell the systemd-run command line of that, and start nothing
    DRY_RUN = "dry-run"  # let the binary tell, in the model's sandbox, what memory it would take
    CHECK = "check"  # let the binary's own parser read the command line, in the model's sandbox
    STOP = "stop"  # stop a model's unit and free its name
    KILL = "kill"  # the same, with SIGKILL first
    PROBE = "probe"  # tell what the binary is and what it can do
    PUT_RECIPE = "put-recipe"  # write a file into the recipes directory
    DELETE_RECIPE = "delete-recipe"  # remove one from there
    PUT_KEYS = "put-keys"  # replace the file of API keys, which holds hashes


@dataclass(frozen=True, slots=True)
class Launch:
    """A recipe to be started, checked or shown: which one, and what the daemon found out about its files.

    ``file`` is None for a GGUF that is served without a recipe. ``model`` is the GGUF or first shard that the daemon
    found where the recipe names a directory or a relative path. ``memory_max`` in bytes, 0: none.
    ``max_model_len`` (tokens), ``max_num_seqs`` and ``cache_ram`` (MiB) count where the recipe says nothing.
    """

    verb: Verb
    id: str
    hash: str
    file: str | None
    model: str
    n_ctx_train: int | None = None
    memory_max: int = 0
    gpus: tuple[str, ...] = ()
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    cache_ram: int | None = None
    n_gpu_layers: int | None = None
    tensor_split: tuple[int, ...] = ()

    @property
    def decisions(self) -> Decisions:
        """Return what the daemon chose where the recipe leaves it open."""
        return Decisions(**{name: getattr(self, name) for name in Decisions.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class Act:
    """Something about a unit, which ``id`` names, or about the binary."""

    verb: Verb
    id: str = ""


@dataclass(frozen=True, slots=True)
class Write:
    """A file of root's to be written or removed; the keys have one place, which nobody names."""

    verb: Verb
    name: str = ""
    text: str = ""


Request = Launch | Act | Write

_CHOSEN = frozenset({"n_ctx_train", "memory_max", *Decisions.__dataclass_fields__})
_KEYS: Mapping[Verb, tuple[type[Any], frozenset[str], frozenset[str]]] = {
    **dict.fromkeys(
        (Verb.START, Verb.SHOW, Verb.CHECK, Verb.DRY_RUN),
        (Launch, frozenset({"id", "hash", "file", "model"}), _CHOSEN),
    ),
    **dict.fromkeys((Verb.STOP, Verb.KILL), (Act, frozenset({"id"}), frozenset())),
    Verb.PROBE: (Act, frozenset(), frozenset()),
    Verb.PUT_RECIPE: (Write, frozenset({"name", "text"}), frozenset()),
    Verb.DELETE_RECIPE: (Write, frozenset({"name"}), frozenset()),
    Verb.PUT_KEYS: (Write, frozenset({"text"}), frozenset()),
}
"""The class of each verb's request, the keys that it needs, and those that it may have."""


def write_request(request: Request) -> bytes:
    """Return the request as its line."""
    _, needed, possible = _KEYS[request.verb]
    values = {name: value for name, value in asdict(request).items() if name in {"verb"} | needed | possible}
    return json.dumps(values).encode() + b"\n"


def parse_request(line: bytes) -> Request:
    """Return the request in a line.

    Raises:
        BadRequestError: It is none; the message says what was found and what was expected.
    """
    if len(line) > MAX_REQUEST_BYTES:
        raise BadRequestError(f"expected a request of at most {MAX_REQUEST_BYTES} bytes, found more")
    try:
        raw = json.loads(line.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"expected a request as one line of JSON: {str(error)[:200]}") from None
    if not isinstance(raw, dict):
        raise BadRequestError("expected a request as a JSON object")
    word = raw.pop("verb", None)
    verb = next((verb for verb in Verb if verb.value == word), None)
    if verb is None:
        raise BadRequestError(f"expected a verb ({', '.join(Verb)}), found {_shown(word)}")
    kind, needed, possible = _KEYS[verb]
    if unknown := raw.keys() - needed - possible:
        raise BadRequestError(f"{verb}: expected no key {_shown(min(unknown))}")
    if missing := needed - raw.keys():
        raise BadRequestError(f"{verb}: expected a key '{min(missing)}', found none")
    values: dict[str, Any] = {}
    for name, value in raw.items():
        expected, convert = _CHECKS[name]
        values[name] = convert(value)
        if values[name] is _WRONG:
            raise BadRequestError(f"{verb}: {name}: expected {expected}, found {_shown(value)}")
    request: Request = kind(verb=verb, **values)
    return request


_WRONG = object()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _matching(pattern: re.Pattern[str]) -> Callable[[object], object]:
    return lambda value: value if isinstance(value, str) and pattern.fullmatch(value) else _WRONG


def _path(value: object) -> object:
    if not isinstance(value, str) or not value.startswith("/") or value.startswith("//"):
        return _WRONG
    try:
        is_short = len(value.encode()) <= 4095
    except UnicodeEncodeError:
        return _WRONG
    return value if is_short and not _CONTROL.search(value) and posixpath.normpath(value) == value else _WRONG


def _recipe_path(value: object) -> object:
    """A file that was put aside, by its name, is no recipe."""
    is_recipe = isinstance(value, str) and _RECIPE_NAME.fullmatch(posixpath.basename(value))
    return _path(value) if is_recipe else _WRONG


def _optional(check: Callable[[object], object]) -> Callable[[object], object]:
    return lambda value: None if value is None else check(value)


def _whole(least: int, most: int) -> Callable[[object], object]:
    return lambda value: value if type(value) is int and least <= value <= most else _WRONG


def _gpus(value: object) -> object:
    is_good = isinstance(value, list) and len(value) <= 64 and all(_matching(_GPU)(item) is item for item in value)
    return tuple(value) if is_good and isinstance(value, list) else _WRONG


def _split(value: object) -> object:
    is_good = isinstance(value, list) and len(value) <= 64 and all(_whole(0, 4096)(item) is item for item in value)
    return tuple(value) if is_good and isinstance(value, list) else _WRONG


def _text(value: object) -> object:
    if not isinstance(value, str):
        return _WRONG
    try:
        return value if len(value.encode()) <= 1 << 20 else _WRONG
    except UnicodeEncodeError:
        return _WRONG


_CHECKS: Mapping[str, tuple[str, Callable[[object], object]]] = {
    "id": (f"an id ({ID_PATTERN})", _matching(_ID)),
    "hash": ("sha256: and 64 hexadecimal digits", _matching(_HASH)),
    "file": ("the absolute path of a .yaml, .yml or .json file, or null", _optional(_recipe_path)),
    "name": ("the name of a .yaml, .yml or .json file without a directory", _matching(_FILE_NAME)),
    "model": ("the absolute path of a model file", _path),
    "n_ctx_train": ("a whole number from 1 to 2^31, or null", _optional(_whole(1, 1 << 31))),
    "max_model_len": (f"a whole number from 1 to {MAX_CONTEXT}, or null", _optional(_whole(1, MAX_CONTEXT))),
    "max_num_seqs": ("a whole number from 1 to 256, or null", _optional(_whole(1, 256))),
    "cache_ram": ("a whole number of MiB up to 2^24, or null", _optional(_whole(0, 1 << 24))),
    "memory_max": ("a whole number of bytes up to 2^60", _whole(0, 1 << 60)),
    "n_gpu_layers": ("a whole number up to 4096, or null", _optional(_whole(0, 4096))),
    "tensor_split": ("a list of at most 64 whole numbers up to 4096", _split),
    "gpus": ("a list of at most 64 UUIDs of GPUs", _gpus),
    "text": ("text of at most 1 MiB", _text),
}
