"""Durations and sizes: what is read, what is refused, what is written."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstudiod.core.units import format_bytes, format_duration, parse_duration_s, parse_size_bytes

anything = st.one_of(
    st.text(),
    st.text("0123456789. kKmMgGtTiIbBsShHdDwW"),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.lists(st.integers(), max_size=2),
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (0, 0.0),
        (90, 90.0),
        (1.5, 1.5),
        ("90", 90.0),
        ("90s", 90.0),
        ("90 s", 90.0),
        ("1.5h", 5400.0),
        ("10m", 600.0),
        ("10 min", 600.0),
        ("250ms", 0.25),
        ("1h 30m", 5400.0),
        ("1h30m", 5400.0),
        ("2d", 172800.0),
        ("1w", 604800.0),
        ("1H", 3600.0),
        (" 5m ", 300.0),
        ("never", 0.0),
        ("off", 0.0),
    ],
)
def test_durations(text: object, seconds: float) -> None:
    """Seconds, or numbers with units, added up."""
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize(
    "value",
    ["", " ", "h", "5 parsecs", "1h 30", "-5m", "5m!", "1e3", True, None, -1, math.nan, math.inf, [5], "9" * 400],
)
def test_what_is_no_duration(value: object) -> None:
    """A slip is refused with what was found, never read as something else."""
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration_s(value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (1024, 1024),
        ("1024", 1024),
        ("1024B", 1024),
        ("1K", 1024),
        ("1KiB", 1024),
        ("1kB", 1000),
        ("64MiB", 64 << 20),
        ("64m", 64 << 20),
        ("1.5G", 3 << 29),
        ("1GB", 10**9),
        ("2 TiB", 2 << 40),
        (" 8G ", 8 << 30),
    ],
)
def test_sizes(text: object, size: int) -> None:
    """K, M, G, T count in 1024, kB, MB, GB, TB in 1000."""
    assert parse_size_bytes(text) == size


@pytest.mark.parametrize("value", ["", "G", "5 apples", "-1G", "1G 5M", "1.5.2G", True, None, -1, 1.5, "9" * 400 + "G"])
def test_what_is_no_size(value: object) -> None:
    """A slip is refused with what was found."""
    with pytest.raises(ValueError, match="expected a size"):
        parse_size_bytes(value)


@given(anything)
def test_nothing_but_value_errors(value: object) -> None:
    """Whatever a file holds, the answer is a finite number of 0 or more, or a ValueError."""
    try:
        seconds = parse_duration_s(value)
    except ValueError:
        pass
    else:
        assert 0 <= seconds < math.inf
    try:
        size = parse_size_bytes(value)
    except ValueError:
        pass
    else:
        assert size >= 0


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (437_760, "427.5 KiB"),
        (21 * (1 << 30) + (410 << 20), "21.4 GiB"),
        (3 << 40, "3.0 TiB"),
        (5 << 50, "5120.0 TiB"),
        ((1 << 20) - 1, "1.0 MiB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    """One decimal, the largest unit that leaves at least one."""
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "250 ms"),
        (1.0, "1.0 s"),
        (42.7, "42 s"),
        (60, "1m"),
        (3599, "59m 59s"),
        (3840, "1h 4m"),
        (90_061, "1d 1h"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    """At most two units."""
    assert format_duration(seconds) == text


@given(st.integers(0, 1 << 60))
def test_formatted_sizes_are_close(count: int) -> None:
    """What is shown can be read back, within its rounding."""
    shown = parse_size_bytes(format_bytes(count))
    assert abs(shown - count) <= max(1, 0.051 * max(count, 1024))
