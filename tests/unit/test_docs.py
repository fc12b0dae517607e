"""The documents speak of what exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_every_test_named_in_the_pitfalls_exists() -> None:
    """A line of docs/PITFALLS.md without its test would be a promise without a proof."""
    named = set(re.findall(r"`(test_\w+)`", (DOCS / "PITFALLS.md").read_text()))
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    missing = sorted(name for name in named if f"def {name}(" not in sources)
    assert named
    assert not missing


def test_every_promise_of_the_threat_model_has_its_test() -> None:
    """Each row of the table names one at least, and each is in the file that is named."""
    sources = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    table = (DOCS / "THREATS.md").read_text().partition("| --- | --- |\n")[2].partition("\n\n")[0]
    rows = [re.findall(r"`(\w+\.py)::(test_\w+)`", row.rpartition("|")[0]) for row in table.splitlines()]
    assert rows
    assert all(rows)
    missing = [f"{file}::{name}" for row in rows for file, name in row if f"def {name}(" not in sources.get(file, "")]
    assert not missing


def test_every_file_that_a_document_links_to_exists() -> None:
    """Relative links, as a reader on a forge or in an editor follows them."""
    for document in (ROOT / "README.md", *DOCS.glob("*.md")):
        links = re.findall(r"\]\(([^)#:]+)\)", document.read_text())
        assert [link for link in links if not (document.parent / link).exists()] == [], document.name
