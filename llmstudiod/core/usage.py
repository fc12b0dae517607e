"""What a request has cost, read from the first and the last bytes of its answer.

llama-server ends an answer with ``timings``, streams too, whether they were asked for or not; embeddings and others
have ``usage`` alone, and Anthropic's streams begin with one ``usage`` and end with another. A model's words cannot be
taken for either: inside a JSON string the quotation marks are escaped.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

_DECODER = json.JSONDecoder()
_TIMINGS, _USAGE = re.compile(rb'"timings":\s*(?={)'), re.compile(rb'"usage":\s*(?={)')


@dataclass(frozen=True, slots=True)
class Spent:
    """Tokens read and written; ``cached`` of those read were there already. Milliseconds of computing, 0: not told.

    llama-server's clock of the written ones begins at the first, so of a single one it tells nothing. Source:
    tools/server/server-context.cpp, ``t_start_generation``.
    """

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    prompt_ms: float = 0.0
    completion_ms: float = 0.0


NOTHING = Spent()


def spent(tail: bytes) -> Spent:
    """Return what the end of an answer tells.

    >>> spent(b'{"choices":[],"timings":{"cache_n":2,"prompt_n":5,"prompt_ms":1.5,"predicted_n":7,"predicted_ms":3.5}}')
    Spent(prompt=7, completion=7, cached=2, prompt_ms=1.5, completion_ms=3.5)
    """
    timings = _last_object(_TIMINGS, tail)
    if timings is not None:
        cached, written = _count(timings, "cache_n"), _count(timings, "predicted_n")
        return Spent(
            prompt=_count(timings, "prompt_n") + cached,
            completion=written,
            cached=cached,
            prompt_ms=_ms(timings, "prompt_ms"),
            completion_ms=_ms(timings, "predicted_ms") if written > 1 else 0.0,
        )
    return _used(_objects(_USAGE, tail))


def _used(usages: list[dict[str, Any]]) -> Spent:
    """Return what the ``usage`` objects of an answer say together; each count only grows.

    OpenAI's counts of a prompt hold what was cached; Anthropic's ``input_tokens`` are those beside it.

    >>> _used([{"input_tokens": 1, "cache_read_input_tokens": 72}, {"output_tokens": 9}])
    Spent(prompt=73, completion=9, cached=72, prompt_ms=0.0, completion_ms=0.0)
    """

    def most(*names: str) -> int:
        return max((_count(usage, name) for usage in usages for name in names), default=0)

    read, written = most("cache_read_input_tokens"), most("cache_creation_input_tokens")
    details = [usage.get(name) for usage in usages for name in ("prompt_tokens_details", "input_tokens_details")]
    known = [_count(each, "cached_tokens") for each in details if isinstance(each, dict)]
    return Spent(
        prompt=most("prompt_tokens", "input_tokens") + read + written,
        completion=most("completion_tokens", "output_tokens"),
        cached=max(read, *known, 0),
    )


def _last_object(name: re.Pattern[bytes], tail: bytes) -> dict[str, Any] | None:
    matches = list(name.finditer(tail))
    return _object(tail, matches[-1].end()) if matches else None


def _objects(name: re.Pattern[bytes], tail: bytes) -> list[dict[str, Any]]:
    return [found for match in name.finditer(tail) if (found := _object(tail, match.end())) is not None]


def _object(tail: bytes, begin: int) -> dict[str, Any] | None:
    try:
        value, _ = _DECODER.raw_decode(tail[begin:].decode("utf-8", "replace"))
    except (ValueError, RecursionError):  # cut off, or split between two chunks; or nested without end
        return None
    return value if isinstance(value, dict) else None


def _count(values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    return value if type(value) is int and 0 <= value < 1 << 40 else 0


def _ms(values: dict[str, Any], name: str) -> float:
    value = values.get(name)
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e12 else 0.0
