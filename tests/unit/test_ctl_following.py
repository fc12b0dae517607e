"""A log that is followed over the end of a daemon: each line once, whenever it was written."""

from collections.abc import Iterator
from typing import Any

import pytest

from llmstudiod.ctl import following
from llmstudiod.ctl.client import Client


class _Daemons(Client):
    """Daemons that each end after a while, beside a log that is written on at every question."""

    def __init__(self, n_before: int, *, n_between: int) -> None:
        super().__init__("/nowhere")
        # Client is frozen.
        object.__setattr__(self, "log", [f"line {number}" for number in range(n_before)])
        object.__setattr__(self, "n_between", n_between)

    log: list[str]
    n_between: int

    def write(self) -> None:
        """Let the model write as much as it does between any two things that happen."""
        self.log.extend(f"line {len(self.log)}" for _ in range(self.n_between))

    def get(self, *parts: str, query: str = "", timeout_s: float | None = None) -> Any:
        """Return the log as it is, and write on."""
        self.write()
        return {"logs": _last(self.log, query)}

    def events(self, *parts: str, query: str = "", last_id: str | None = None) -> Iterator[dict[str, Any]]:
        """Return the stream; what is written while it is there is in it."""
        self.write()
        return self._told(_last(self.log, query), len(self.log))

    def _told(self, first: list[str], n_told: int) -> Iterator[dict[str, Any]]:
        self.write()
        for line in [*first, *self.log[n_told:]]:
            yield {"event": "log", "data": {"line": line}}
        self.write()  # while nobody reads along


def _last(lines: list[str], query: str) -> list[str]:
    limit = int(query.removeprefix("limit="))
    return lines[-limit:] if limit else []


@pytest.mark.parametrize("n_before", [0, 3, following.MAX_LINES + 7])
@pytest.mark.parametrize("n_between", [1, 3])
def test_each_line_comes_once(monkeypatch: pytest.MonkeyPatch, n_before: int, n_between: int) -> None:
    """Whether it was written before the loss, during it, or between the questions that follow it."""
    monkeypatch.setattr(following, "PAUSE_S", 0.0)
    daemons = _Daemons(n_before, n_between=n_between)
    stream = following.lasting_lines(daemons, "a", limit=10, on_loss=lambda: None)
    told = [next(stream)["data"]["line"] for _ in range(60)]
    first = int(told[0].removeprefix("line "))
    assert told == [f"line {number}" for number in range(first, first + 60)]
