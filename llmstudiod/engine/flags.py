"""``llama-server``'s command line as settings of xllamacpp's ``CommonParams``: one table and its parser.

Spellings, defaults and messages follow llama-server 0.7.0 (common/arg.cpp), so that what reads its messages reads
these too. A flag that ``CommonParams`` cannot express is unknown here, and numbers are strict (``4k`` is refused).
Environment variables are not read. Pure: needs no xllamacpp, which takes 100 MB.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class EnumMember:
    """A member of one of xllamacpp's enums, by name."""

    enum: str
    member: str


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA adapter and how strongly it applies."""

    path: str
    scale: float


# Path of an attribute of CommonParams -> plain value, EnumMember or Lora, or a list or dict of them.
Settings = dict[str, Any]

# What llama-server sets and CommonParams does not: four slots with one KV cache (-1: auto), and the port.
DEFAULTS: Settings = {"n_parallel": -1, "port": 9931}

# Repeating these adds to them; of any other flag the last one counts.
_ADDED_UP = frozenset(
    {"lora_adapters", "tensor_buft_overrides", "speculative.draft.tensor_buft_overrides", "default_template_kwargs"}
)


class ArgumentError(Exception):
    """The command line is wrong; the message is llama-server's line about it."""


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag, its spellings, and what it sets: ``read`` gets the value's text, or a bool where there is no value."""

    names: tuple[str, ...]
    read: Callable[[str], Settings] | None = None
    switch: Callable[[bool], Settings] | None = None
    off_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A parsed command line; ``query`` is ``--version``, ``--help``, ... where one of those was given."""

    settings: Settings = field(default_factory=lambda: dict(DEFAULTS))
    query: str | None = None


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Return the settings that the arguments ask for; as in llama-server, ``--version`` ends the reading.

    >>> parse_command_line(["-m", "x.gguf", "-np", "2"]).settings
    {'n_parallel': 2, 'port': 9931, 'model.path': 'x.gguf'}

    Raises:
        ArgumentError: A flag is unknown, or its value is missing or wrong.
    """
    settings, query = dict(DEFAULTS), None
    flags = _flags_by_name()
    words = iter(arguments)
    for word in words:
        name = word.replace("_", "-") if word.startswith("--") else word
        if name in {"--version", "--list-devices"}:
            return CommandLine(settings, name)
        if name in {"-h", "--help", "--usage", "--completion-bash"}:
            query = "--help" if name != "--completion-bash" else name
            continue
        flag = flags.get(name)
        if flag is None:
            raise ArgumentError(f"error: invalid argument: {word}")
        try:
            if flag.switch is not None:
                found = flag.switch(name in flag.names)
            else:
                assert flag.read is not None
                found = flag.read(_next_value(words))
        except (ValueError, OSError) as error:
            raise ArgumentError(f'error while handling argument "{name}": {error}') from error
        _merge(settings, found)
    return CommandLine(settings, query)


def flag_names() -> list[str]:
    """Return every spelling that is accepted, without the ``--no-x`` twins, as llama-server's completion does."""
    return [*_QUERIES, *(name for flag in FLAGS for name in flag.names)]


def _next_value(words: Any) -> str:
    value = next(words, None)
    if value is None:
        raise ValueError("expected value for argument")
    return str(value)


def _merge(settings: Settings, found: Settings) -> None:
    for path, value in found.items():
        if path in _ADDED_UP and path in settings:
            settings[path] = {**settings[path], **value} if isinstance(value, dict) else [*settings[path], *value]
        elif path == _SAMPLING_BITS:
            settings[path] = [*settings.get(path, []), *value]
        else:
            settings[path] = value


@functools.cache
def _flags_by_name() -> dict[str, Flag]:
    return {name: flag for flag in FLAGS for name in (*flag.names, *flag.off_names)}
