"""The documents speak of what exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_named_in_the_pitfalls_exists() -> None:
    """A line of docs/PITFALLS.md without its test would be a promise without a proof."""
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "PITFALLS.md").read_text()))
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    missing = sorted(name for name in named if f"def {name}(" not in sources)
    assert named
    assert not missing
