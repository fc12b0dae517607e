"""Reads the engine's command line with the table in ``flags``; messages are llama-server's, for one parser of both.

Environment variables are not read, except LLAMA_API_KEY by the caller. Pure: needs no xllamacpp.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmstudiod.engine.flags import DEFAULTS, FLAGS, Flag
from llmstudiod.engine.values import OVERRIDES, SAMPLING_BITS, Settings

_AT_ONCE = ("--version", "--list-devices")  # as in llama-server, what comes after is not read
_AT_END = ("-h", "--help", "--usage", "--completion-bash")

# Repeating these flags adds; of any other the last one counts.
_ADDED_UP = frozenset(
    {"api_keys", "default_template_kwargs", "lora_adapters", OVERRIDES, f"speculative.draft.{OVERRIDES}", SAMPLING_BITS}
)


class ArgumentError(Exception):
    """The command line is wrong; the message is llama-server's line about it."""


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What was asked for: settings of ``CommonParams``, and ``--version``, ``--help``, ... where one was given."""

    settings: Settings
    query: str | None = None


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Return what the arguments ask for, llama-server's defaults included.

    >>> parse_command_line(["-m", "x.gguf", "--parallel", "2"]).settings
    {'n_parallel': 2, 'port': 9931, 'model.path': 'x.gguf'}

    Raises:
        ArgumentError: A flag is unknown, or its value is missing or wrong.
    """
    flags = {name: flag for flag in FLAGS for name in (*flag.names, *flag.off_names)}
    settings, query = dict(DEFAULTS), None
    words = iter(arguments)
    for word in words:
        name = word.replace("_", "-") if word.startswith("--") else word
        if name in _AT_ONCE:
            return CommandLine(settings, name)
        if name in _AT_END:
            query = name
            continue
        if name not in flags:
            raise ArgumentError(f"error: invalid argument: {word}")
        try:
            found = _read(flags[name], name, words)
        except ValueError as error:
            raise ArgumentError(f'error while handling argument "{name}": {error}') from error
        for path, value in found.items():
            settings[path] = _sum(settings.get(path), value) if path in _ADDED_UP else value
    return CommandLine(settings, query)


def accepted_flags() -> list[str]:
    """Return every spelling that is accepted but the ``--no-x`` twins, as llama-server's own completion has them."""
    return [*_AT_END, *_AT_ONCE, *(name for flag in FLAGS for name in flag.names)]


def _read(flag: Flag, name: str, words: Iterator[str]) -> Settings:
    if flag.switch is not None:
        return flag.switch(name in flag.names)
    value = next(words, None)
    if value is None:
        raise ValueError("expected value for argument")
    assert flag.read is not None
    return flag.read(value)


def _sum(old: list[object] | dict[str, object] | None, new: list[object] | dict[str, object]) -> object:
    if isinstance(new, dict):
        assert not isinstance(old, list)
        return {**(old or {}), **new}
    return [*(old or []), *new]
