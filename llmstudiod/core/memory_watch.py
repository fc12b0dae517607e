"""When the machine's memory has to be measured: before somebody starts, and again when somebody has gone."""

from llmstudiod.core.events import MemoryMeasured
from llmstudiod.core.ledger import Memory
from llmstudiod.core.placement import Room

MEASURED_FOR_S = 2.0  # other programs come and go
SETTLING_S = 5.0  # a GPU's memory is free a moment after its process has gone
AGAIN_S = 0.25


class MemoryWatch:
    """The last measurement, and the one that is being made. ``is_on``: memory is planned."""

    def __init__(self) -> None:
        self.is_on = False
        self.memory: Memory | None = None
        self.others = Room(0)  # what other programs used when that could be told last
        self._number = 0
        self._is_asked = False
        self._gone_at = float("-inf")
        self._again_at = float("-inf")

    def is_fresh(self, at: float) -> bool:
        """Whether ``memory`` was measured since anybody went, and not long ago."""
        return self.memory is not None and at < self.memory.at + MEASURED_FOR_S

    def ask(self) -> int | None:
        """Return the number of the measurement that is to be made; None while one is being made."""
        if self._is_asked:
            return None
        self._is_asked = True
        self._number += 1
        return self._number

    def answer(self, event: MemoryMeasured) -> None:
        """Take a measurement, unless somebody has gone since it was asked for."""
        if event.number == self._number and self._is_asked:
            self._is_asked = False
            self.memory = event.memory
            self.is_on = event.memory is not None

    def outdate(self) -> None:
        """Have it measured again before it is used."""
        self.memory, self._is_asked = None, False

    def gone(self, at: float) -> None:
        """Somebody has gone, and gives back what he had."""
        self._gone_at = at
        self.outdate()

    def is_settling(self, at: float) -> bool:
        """Whether somebody has gone so recently that his memory may be free later."""
        return at < self._gone_at + SETTLING_S

    def again(self, at: float) -> float | None:
        """Return when to measure again while memory settles; None when that is arranged already."""
        if at < self._again_at:
            return None
        self._again_at = at + AGAIN_S
        return self._again_at
