"""llama-server's flags in a recipe: may this one be given, what did a newer build rename, how is it written.

Pure. The recipe loader asks `modernize`, `why_denied` and `find_flag` (for ``field``); the backend asks `render_flag`.
The decisions themselves stand in `llmstudiod.core.flag_table`. Every fault is a `ValueError` whose text is a sentence
for the recipe's author.

``known``, wherever it appears, is what the installed binary accepts (`parse_help_flags`); empty when no binary was
asked, then nothing is refused for being unknown.
"""

import difflib
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import assert_never

from llmstudiod.core.flag_table import (
    DENIED_PREFIXES,
    DENIED_SUFFIXES,
    FLAGS,
    MERGED_LOAD_MODES,
    RENAMED,
    Flag,
    FlagKind,
    Renamed,
)

__all__ = [
    "FLAGS",
    "RENAMED",
    "Flag",
    "FlagKind",
    "FoundFlag",
    "HelpEntry",
    "Modernized",
    "find_flag",
    "modernize",
    "parse_help",
    "parse_help_flags",
    "parse_known_flags",
    "render_flag",
    "undecided_flags",
    "why_denied",
]

_KEY = re.compile(r"(-{0,2})([A-Za-z0-9][A-Za-z0-9._-]*)")
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_ENTRY = re.compile(
    r"^ {0,8}(?P<names>-{1,2}[A-Za-z][^\s,]*(?:,\s+-{1,2}[A-Za-z][^\s,]*)*)"
    r"(?: (?P<placeholder>\S.*?))?(?:\s{2,}(?P<text>.*))?$"
)
_REMOVED = "the argument has been removed"


@dataclass(frozen=True, slots=True)
class FoundFlag:
    """A flag as a key of ``extra_args`` names it; ``is_negated`` when the key is one of its ``--no-`` spellings."""

    flag: Flag
    is_negated: bool = False


@dataclass(frozen=True, slots=True)
class Modernized:
    """``extra_args`` in today's spellings, and a sentence for each entry that was changed."""

    extra_args: dict[str, object]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HelpEntry:
    """One flag as ``llama-server --help`` shows it; ``placeholder`` is empty when nothing follows it."""

    names: tuple[str, ...]
    placeholder: str
    is_removed: bool


def find_flag(key: str) -> FoundFlag | None:
    """Return the flag that a key of ``extra_args`` names, or None when the table has none.

    Dashes in front may be left out, and underscores count as dashes. Case counts: ``-C`` is not ``-c``.

    >>> find_flag("ngl").flag.names[0], find_flag("no_warmup").is_negated
    ('--n-gpu-layers', True)
    """
    found = (_index().get(spelling) for spelling in _spellings(key))
    return next((flag for flag in found if flag is not None), None)


def why_denied(key: str, *, over_http: bool) -> str | None:
    """Return why a recipe may not give this flag, as a clause, or None when it may.

    Ask after `modernize`: old spellings are not in the table. A flag that the table does not list, of a newer build,
    may be given by root's recipes unless its name tells that it belongs to a refused family; over HTTP only
    listed flags count.

    >>> why_denied("log_file", over_http=False)
    'it writes files'
    >>> why_denied("flag-of-tomorrow", over_http=True)
    'only flags that llmstudiod knows may be given over HTTP'
    """
    found = find_flag(key)
    if found is not None:
        return found.flag.denied
    if over_http:
        return "only flags that llmstudiod knows may be given over HTTP"
    return next((reason for spelling in _spellings(key) if (reason := _family_reason(spelling))), None)


def modernize(extra_args: Mapping[str, object], *, known: frozenset[str]) -> Modernized:
    """Return ``extra_args`` with flags that llama-server dropped replaced by what took their place.

    An old flag is replaced wherever the binary accepts the new one, even if it still accepts the old one too: so
    ``mlock`` and ``load_mode`` are one setting, and giving both is found. It stays as it is for an older binary.

    >>> modernize({"no_mmap": True, "top_k": 40}, known=frozenset()).extra_args
    {'top_k': 40, '--load-mode': 'none'}

    Raises:
        ValueError: The flag has no single successor, or two entries contradict each other.
    """
    kept: dict[str, object] = {}
    replaced: dict[str, list[tuple[str, object]]] = {}  # new flag -> old flags, each with the new value
    for key, value in extra_args.items():
        old = next((spelling for spelling in _spellings(key) if spelling in RENAMED), None)
        if old is None or value is None or not _is_replaced(old, RENAMED[old], known):
            kept[key] = value
            continue
        flag, new_value = _replacement(old, RENAMED[old], value)
        if new_value is not None:
            replaced.setdefault(flag, []).append((old, new_value))
    notes = []
    for flag, given in replaced.items():
        olds = [old for old, _ in given]
        _check_not_given(flag, kept, olds)
        kept[flag] = _merged(flag, given)
        notes.append(_note(flag, kept[flag], olds))
    return Modernized(kept, tuple(notes))


def render_flag(key: str, value: object, *, known: frozenset[str]) -> list[str]:
    """Return the command-line arguments for one entry of ``extra_args``: none, one or two.

    A switch takes true and false; false is the ``--no-`` spelling where there is one and else nothing, as null is.
    A list is joined by commas, an object is compact JSON, other values stand as they are.
    A flag and its value are two arguments: llama-server knows no ``--flag=value``.

    >>> render_flag("flash_attn", True, known=frozenset())
    ['--flash-attn', 'on']
    >>> render_flag("warmup", False, known=frozenset())
    ['--no-warmup']

    Raises:
        ValueError: The flag is refused or not accepted by the binary, or the value does not suit it.
    """
    found = find_flag(key)
    if reason := why_denied(key, over_http=False):
        raise ValueError(f"{key} is not allowed: {reason}")
    if found is None:
        return _render_unlisted(key, value, known)
    if value is None:
        return []
    if found.flag.kind is FlagKind.SWITCH:
        return _render_switch(found, value, known)
    name = _accepted(found.flag.names, known)
    if value is False and found.flag.kind is not FlagKind.ON_OFF_AUTO:
        return []
    text = _text(name, found.flag.kind, value)
    return [] if text is None else [name, text]


def parse_help(help_text: str) -> tuple[HelpEntry, ...]:
    """Return the flags of ``llama-server --help``, one entry for each, removed ones too.

    A flag starts a line (older builds indent it a little) with its spellings; one space and a placeholder follow when
    it takes a value; its description follows after two spaces or more, or on the next lines, which are indented.
    Source: ``common_arg::to_string`` in llama.cpp's ``common/arg.cpp``.
    """
    entries: list[HelpEntry] = []
    lines = help_text.splitlines()
    for number, line in enumerate(lines):
        match = _ENTRY.match(line)
        if match is None:
            continue
        # Long spellings leave no room on their line: the description is then the next one.
        text = match["text"] or (lines[number + 1] if number + 1 < len(lines) else "")
        names = tuple(re.split(r",\s+", match["names"]))
        entries.append(HelpEntry(names, match["placeholder"] or "", text.strip().startswith(_REMOVED)))
    return tuple(entries)


def parse_help_flags(help_text: str) -> frozenset[str]:
    """Return every spelling that the binary accepts, from its ``--help``: the source to use for ``known``.

    Unlike ``--completion-bash`` it has the ``--no-`` spellings, and tells which flags were removed.
    """
    return frozenset(name for entry in parse_help(help_text) if not entry.is_removed for name in entry.names)


def parse_known_flags(completion_text: str) -> frozenset[str]:
    """Return the spellings in ``--completion-bash``: a cross-check of `parse_help_flags`, not a replacement.

    It lists removed flags as if they worked and leaves out the ``--no-`` spellings.
    """
    opts = re.search(r'\bopts="([^"]*)"', completion_text)
    return frozenset(opts.group(1).split()) if opts else frozenset()


def undecided_flags(help_text: str) -> list[str]:
    """Return the spellings in a ``--help`` that `FLAGS` and `RENAMED` say nothing about; empty is the aim."""
    names = {name for entry in parse_help(help_text) for name in entry.names}
    return sorted(names - _index().keys() - RENAMED.keys())


@functools.cache
def _index() -> Mapping[str, FoundFlag]:
    """Every spelling in the table; cached because it is asked for each key of each recipe."""
    index = {name: FoundFlag(flag) for flag in FLAGS for name in flag.names}
    index |= {name: FoundFlag(flag, is_negated=True) for flag in FLAGS for name in flag.negated}
    return MappingProxyType(index)


def _spellings(key: str) -> tuple[str, ...]:
    """Return what a key may stand for on the command line; nothing for what can be no flag (``--host=::``).

    llama-server too reads ``--log_file`` as ``--log-file``, so a refusal must not depend on it.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return ()
    name = match[2].replace("_", "-")
    return (match[1] + name,) if match[1] else ("--" + name, "-" + name)


def _family_reason(spelling: str) -> str | None:
    """Return why an unlisted flag is refused by its name alone."""
    positive = spelling.replace("--no-", "--", 1)
    for prefix, reason in DENIED_PREFIXES:
        if positive.startswith(prefix):
            return reason
    return next((reason for suffix, reason in DENIED_SUFFIXES if positive.endswith(suffix)), None)


def _is_replaced(old: str, renamed: Renamed, known: frozenset[str]) -> bool:
    """Return whether this binary wants the new flag; with no binary asked, take it for a new one."""
    if not known:
        return True
    return renamed.flag in known if renamed.flag else old not in known


def _replacement(old: str, renamed: Renamed, value: object) -> tuple[str, object | None]:
    """Return the new flag and its value; None as the value when the old entry said nothing but the default."""
    if renamed.flag is None:
        raise ValueError(f"{old} was removed from llama-server: {renamed.hint}")
    if renamed.on is None:
        return renamed.flag, value
    if not isinstance(value, bool):
        raise _mismatch(old, "true or false", value)
    return renamed.flag, renamed.on if value else renamed.off


def _check_not_given(flag: str, kept: Mapping[str, object], replaced: Iterable[str]) -> None:
    """Refuse an old spelling beside the new one: which of them was meant?"""
    for key, value in kept.items():
        found = find_flag(key)
        if value is not None and found is not None and flag in found.flag.names:
            raise ValueError(f"{key} and {' and '.join(replaced)} set the same thing: keep {key}")


def _merged(flag: str, given: list[tuple[str, object]]) -> object:
    """Return the one value that several old flags stand for together (``mlock`` and ``no_mmap``)."""
    values = [value for _, value in given]
    if all(value == values[0] for value in values):
        return values[0]
    merged = MERGED_LOAD_MODES.get(frozenset(str(value) for value in values)) if flag == "--load-mode" else None
    if merged is None:
        raise ValueError(f"{' and '.join(old for old, _ in given)} contradict each other: give {flag}")
    return merged


def _note(flag: str, value: object, olds: list[str]) -> str:
    """Return the sentence that tells the author what became of the old flags."""
    hints = {RENAMED[old].hint for old in olds} - {""}
    tail = f" ({'; '.join(sorted(hints))})" if hints else ""
    return f"{' and '.join(olds)} {'was' if len(olds) == 1 else 'were'} replaced by {flag}: given as {value}{tail}"


def _render_switch(found: FoundFlag, value: object, known: frozenset[str]) -> list[str]:
    """Return the spelling that says on or off."""
    name = found.flag.negated[0] if found.is_negated else found.flag.names[0]
    if not isinstance(value, bool):
        raise _mismatch(name, "true or false", value)
    if value is not found.is_negated:
        return [_accepted(found.flag.names, known)]
    return [_accepted(found.flag.negated, known)] if found.flag.negated else []


def _render_unlisted(key: str, value: object, known: frozenset[str]) -> list[str]:
    """Return the arguments for a flag of a newer build, about which only ``known`` says something."""
    spellings = _spellings(key)
    # A short spelling could be the alias of a refused flag; the long name shows what it is.
    if not spellings or not spellings[0].startswith("--"):
        raise ValueError(f"{key} is no flag that llmstudiod knows: write its long name, without a value in it")
    name = spellings[0]
    twin = "--" + name.removeprefix("--no-") if name.startswith("--no-") else "--no-" + name.removeprefix("--")
    if value is None:
        return []
    if value is False and twin in known:
        return [twin]
    _accepted((name,), known)
    if isinstance(value, bool):
        return [name] if value else []
    if twin in known:
        raise _mismatch(name, "true or false", value)
    text = _any_text(name, value)
    # If the flag takes no value after all, such a text would be read as the next flag.
    if text is not None and text.startswith("-") and not _NUMBER.fullmatch(text):
        raise ValueError(f"{name} is not known to llmstudiod, so its value may not begin with '-', found {text!r}")
    return [] if text is None else [name, text]


def _accepted(names: tuple[str, ...], known: frozenset[str]) -> str:
    """Return the first spelling that the binary accepts."""
    if not known:
        return names[0]
    for name in names:
        if name in known:
            return name
    matches = difflib.get_close_matches(names[0], sorted(known), n=3)
    raise ValueError(
        f"the installed llama-server does not accept {names[0]}"
        + (f"; did you mean {' or '.join(matches)}?" if matches else "")
    )


def _text(name: str, kind: FlagKind, value: object) -> str | None:
    """Return a value as the argument that this kind of flag wants; None when there is nothing to give."""
    match kind:
        case FlagKind.ON_OFF_AUTO:
            return _on_off_auto_text(name, value)
        case FlagKind.INTEGER | FlagKind.NUMBER:
            return _number_text(name, value, is_integer=kind is FlagKind.INTEGER)
        case FlagKind.LIST:
            return _list_text(name, value) if isinstance(value, list | tuple) else _scalar_text(name, value)
        case FlagKind.JSON:
            # A list is a JSON array here; a text is taken for JSON that the author wrote.
            return _scalar_text(name, value) if isinstance(value, str) else _json_text(name, value)
        case FlagKind.VALUE:
            return _scalar_text(name, value)
        case FlagKind.SWITCH:
            raise _mismatch(name, "true or false", value)
        case _:
            assert_never(kind)


def _any_text(name: str, value: object) -> str | None:
    """Return a value as an argument by its own type, for a flag whose kind is not known."""
    if isinstance(value, list | tuple):
        return _list_text(name, value)
    return _json_text(name, value) if isinstance(value, Mapping) else _scalar_text(name, value)


def _on_off_auto_text(name: str, value: object) -> str:
    """Return one of the three words; YAML reads a bare ``on`` as true."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str) and value in {"on", "off", "auto"}:
        return value
    raise _mismatch(name, "on, off or auto", value)


def _number_text(name: str, value: object, *, is_integer: bool) -> str:
    """Return a number's text, checked: llama-server reads ``4k`` as 4 and says nothing."""
    pattern = _INTEGER if is_integer else _NUMBER
    text = str(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not pattern.fullmatch(text):
        raise _mismatch(name, "a whole number" if is_integer else "a number", value)
    return text


def _list_text(name: str, values: Iterable[object]) -> str | None:
    """Return the texts joined by commas; None for an empty list."""
    texts = [_scalar_text(name, value) for value in values]
    for text in texts:
        if "," in text:
            raise ValueError(f"{name} separates its values by commas, so none may have one in it, found {text!r}")
    return ",".join(texts) if texts else None


def _json_text(name: str, value: object) -> str:
    """Return compact JSON; NaN and YAML's dates are faults, llama-server could not read them."""
    if not isinstance(value, Mapping | list | tuple):
        raise _mismatch(name, "an object", value)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise _mismatch(name, "JSON", value) from error
    return _checked(name, text)


def _scalar_text(name: str, value: object) -> str:
    """Return the text of a string or a number."""
    is_finite = not isinstance(value, float) or math.isfinite(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not is_finite:
        raise _mismatch(name, "one text or number", value)
    return _checked(name, str(value))


def _checked(name: str, text: str) -> str:
    """Return the text if it can be an argument and one line of a unit file."""
    if any(character in text for character in "\n\r\0"):
        raise ValueError(f"{name}'s value may not have a line break or NUL in it, found {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can carry and execve cannot
        raise ValueError(f"{name}'s value is not valid text, found {text!r}") from error
    return text


def _mismatch(name: str, expected: str, value: object) -> ValueError:
    """Return the fault of a value that does not suit its flag."""
    return ValueError(f"{name} takes {expected}, found {value!r}")
