"""Durations and sizes as people write them: ``10m``, ``512MiB``.

Used by settings, recipes and the command line; pure.
"""

import re

_DURATION_S = {"ms": 0.001, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_SIZE_BYTES = {
    "": 1, "b": 1,
    "k": 1 << 10, "kib": 1 << 10, "kb": 10**3,
    "m": 1 << 20, "mib": 1 << 20, "mb": 10**6,
    "g": 1 << 30, "gib": 1 << 30, "gb": 10**9,
    "t": 1 << 40, "tib": 1 << 40, "tb": 10**12,
}  # fmt: skip
_SIZE_LIMIT = 1 << 63  # what systemd and the kernel count sizes in
_PART = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)")


def parse_duration_s(value: object) -> float:
    """Return seconds from ``90``, ``"90s"``, ``"10m"`` or ``"1h 30m"``; ``"never"`` and ``"off"`` are 0.

    >>> parse_duration_s("1h 30m")
    5400.0

    Raises:
        ValueError: The text is not a duration.
    """
    if isinstance(value, bool):
        raise ValueError(f"expected a duration such as 90s or 10m, found {value!r}")
    if isinstance(value, int | float):
        if not 0 <= value < float("inf"):
            raise ValueError(f"expected a duration of 0 or more, found {value!r}")
        return float(value)
    text = value.strip().lower() if isinstance(value, str) else ""
    if text in {"never", "off"}:
        return 0.0
    total, position = 0.0, 0
    while position < len(text):
        part = _PART.match(text, position)
        unit = part.group(2) if part else ""
        # A bare number is seconds, but only alone: "1h 30" is a slip, not an hour and thirty seconds.
        if part is None or (unit or "s") not in _DURATION_S or (not unit and (position or part.end() != len(text))):
            break
        total += float(part.group(1)) * _DURATION_S[unit or "s"]
        position = part.end()
    if not text or position < len(text) or total == float("inf"):
        raise ValueError(f"expected a duration such as 90s, 10m or 1h 30m, found {value!r}")
    return total


def parse_size_bytes(value: object) -> int:
    """Return bytes from ``1024``, ``"64MiB"``, ``"1.5G"``; K, M, G, T are powers of 1024, kB, MB, GB of 1000.

    >>> parse_size_bytes("64MiB")
    67108864

    Raises:
        ValueError: The text is not a size.
    """
    size = -1.0
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (part := _PART.fullmatch(value.strip())):
        size = float(part.group(1)) * _SIZE_BYTES.get(part.group(2).lower(), -1)
    if 0 <= size < _SIZE_LIMIT:
        return int(size)
    raise ValueError(f"expected a size such as 512MiB or 2G, found {value!r}")


def format_bytes(count: int) -> str:
    """Return a size for people: ``"17.9 GiB"``.

    >>> format_bytes(437_760)
    '427.5 KiB'
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if round(size, 1) < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_duration(seconds: float) -> str:
    """Return a span of time for people, at most two units: ``"1h 4m"``.

    >>> format_duration(3840)
    '1h 4m'
    """
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    whole = int(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if whole < 10 else f"{whole} s"
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, whole = divmod(whole, length)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])


def counted(number: int, word: str) -> str:
    """Return a number with its word.

    >>> counted(1, "model"), counted(0, "model")
    ('1 model', '0 models')
    """
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
