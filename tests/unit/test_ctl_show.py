"""How llmstudioctl shows things: lines of `watch`, tables that fit."""

import time
from typing import Any

import pytest

from llmstudiod.ctl import show

AT = "2026-01-02T03:04:05Z"
UP = {"id": "tiny", "state": "ready"}
FAILED: dict[str, Any] = {
    "id": "tiny",
    "name": "Tiny",
    "state": "failed",
    "since": 1000.0,
    "reason": "it crashed",
    "hint": None,
    "is_pinned": False,
    "is_exhausted": False,
    "alerts": [],
    "progress": None,
    "in_flight": 0,
    "queued": 0,
    "n_ctx": None,
    "totals": {},
    "memory": {"measured": None, "estimated": None},
    "unit": None,
    "notes": [],
    "warnings": [],
    "last_lines": [],
    "story": [],
}


def test_watch_takes_a_list_of_changes_for_no_snapshot() -> None:
    """What has changed is told by the transitions: the models that are not named have not gone."""
    snapshot = {"timestamp": AT, "data": {"instances": [UP]}}
    assert show.event_line(snapshot) == "03:04:05  tiny (ready)"
    for changed in ([], [UP], [{"id": "embed", "state": "stopped"}]):
        assert show.event_line({"timestamp": AT, "data": {"instances": changed, "removed": []}}) is None


@pytest.mark.parametrize("columns", range(20, 120, 7))
def test_columns_fit(columns: int) -> None:
    """Whatever their widths: the last ones go first."""
    for widths in ([40, 8, 30], [5, 90], [60], [12, 7, 8, 8, 8, 8, 8], [63, 8, 3, 8, 12, 70]):
        found = show.fitted(widths, columns)
        assert len(found) == 1 or sum(found) + 2 * (len(found) - 1) <= columns
        assert all(new <= old for new, old in zip(found, widths, strict=False))


def test_empty_columns_are_left_out_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script finds each column where it was."""
    told = (("A", "B", "C"), [["1", "", "3"]])
    assert show.table(*told) == "A  B  C\n1     3"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert show.table(*told) == "A  C\n1  3"


@pytest.mark.parametrize(
    ("retry_in_s", "is_exhausted", "told"),
    [
        (-1, False, "next try: with the next request, or `llmstudioctl load tiny` now"),
        (-1, True, "next try: with the next request, or `llmstudioctl load tiny` now"),
        (30, False, "next try: {at}, or `llmstudioctl load tiny` now"),
        (
            600,
            True,
            "next try: {at}, or `llmstudioctl load tiny` now\n    failures: as many as restart_limit allows; "
            "`llmstudioctl reset tiny` lets requests start it at once",
        ),
        (None, True, "next try: none (restart: never); `llmstudioctl reset tiny` lets requests start it at once"),
    ],
)
def test_next_try_is_told(retry_in_s: int | None, is_exhausted: bool, told: str) -> None:
    """A time that is over is no answer; nor is a budget that counts no more."""
    at = None if retry_in_s is None else time.time() + retry_in_s
    text = show.status_text({**FAILED, "retry_at": at, "is_exhausted": is_exhausted})
    assert f"    {told.format(at=show.clock(at or 0))}\n    requests: " in text
    assert text.count("failures: ") == told.count("failures: ")
