"""What a request has cost, read from the last bytes of its answer.

llama-server ends an answer with ``timings``, streams too, whether they were asked for or not; embeddings and others
have ``usage`` alone. A model's words cannot be taken for either: inside a JSON string the quotation marks are escaped.
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

    >>> spent(b'…}],"timings":{"cache_n":2,"prompt_n":5,"prompt_ms":1.5,"predicted_n":7,"predicted_ms":3.5}}')
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
    usage = _last_object(_USAGE, tail)
    if usage is None:
        return NOTHING
    prompt = _count(usage, "prompt_tokens") or _count(usage, "input_tokens")
    return Spent(prompt=prompt, completion=_count(usage, "completion_tokens") or _count(usage, "output_tokens"))


def _last_object(name: re.Pattern[bytes], tail: bytes) -> dict[str, Any] | None:
    found = None
    for match in name.finditer(tail):
        found = match
    if found is None:
        return None
    try:
        value, _ = _DECODER.raw_decode(tail[found.end() :].decode("utf-8", "replace"))
    except (ValueError, RecursionError):  # cut off, or split between two chunks; or nested without end
        return None
    return value if isinstance(value, dict) else None


def _count(values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    return value if type(value) is int and 0 <= value < 1 << 40 else 0


def _ms(values: dict[str, Any], name: str) -> float:
    value = values.get(name)
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e12 else 0.0
