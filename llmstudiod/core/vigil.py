"""Whether a server that became ready still answers. Looks go in, a verdict comes out; pure.

A missed health probe alone proves nothing: a burst of connections can hold /health back for seconds while the server
works. And a line in its log proves nothing, since clients can write there. So a server counts as hung only when it
answers nothing new and its process does nothing either, or when requests stand still in it for long, or when it cannot
produce one token.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

MISSES = 3
_ALARMING = re.compile(r"\b(?:CUDA|ROCm|MUSA) error\b|ErrorDeviceLost|GGML_ASSERT\(|ggml_abort")
PATIENCE_FACTOR = 5  # for a process that computes: one step of a large prompt on a CPU can take minutes


class Verdict(StrEnum):
    """What a look says."""

    WELL = "well"
    WAIT = "wait"  # odd, and to be looked at again soon
    ASK = "ask"  # let it produce a token, then tell `Vigil.asked`
    HUNG = "hung"


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen of a server at one moment.

    ``answers``: /health did in time. ``slots``: how far each slot is, None where it was not asked or did
    not say. ``n_free``: slots that do nothing. ``cpu_s``: the CPU time of its process so far, None: not known.
    ``is_stopped``: a signal stopped the process. ``is_alarmed``: a line of its log that is new sounds fatal.
    """

    at: float
    answers: bool
    n_in_flight: int
    slots: tuple[object, ...] | None = None
    n_free: int = 0
    cpu_s: float | None = None
    is_stopped: bool = False
    is_alarmed: bool = False


class Vigil:
    """Watches one run; ``patience_s`` is for how long requests may stand still in it."""

    def __init__(self, at: float, *, patience_s: float) -> None:
        self._patience_s = patience_s
        self._moved_at = at
        self._misses = 0
        self._missed_at = at
        self._slots: tuple[object, ...] | None = None
        self._cpu_s: float | None = None
        self.reason = ""

    def look(self, look: Look) -> Verdict:
        """Take a look and return the verdict; ``reason`` says what HUNG means."""
        computes = self._computes(look)
        if not look.answers:
            return self._missed(look, computes=computes)
        self._misses = 0
        if look.is_alarmed:
            return Verdict.ASK
        moves = computes if look.slots is None else look.slots != self._slots
        if look.n_in_flight == 0 or moves:
            self._slots = look.slots
            self._moved_at = look.at
            return Verdict.WELL
        still_s = look.at - self._moved_at
        may_be_slow = look.n_free == 0 and computes and still_s < PATIENCE_FACTOR * self._patience_s
        if still_s < self._patience_s or may_be_slow:
            return Verdict.WELL
        if look.n_free:
            return Verdict.ASK
        self.reason = f"/health answers, but its {look.n_in_flight} requests have stood still for {still_s:.0f} s"
        return Verdict.HUNG

    def asked(self, at: float, *, has_answered: bool, within_s: float) -> Verdict:
        """Take what came of ASK."""
        if has_answered:
            self._moved_at = at
            return Verdict.WELL
        self.reason = f"/health answers, but it could not produce one token within {within_s:.0f} s"
        return Verdict.HUNG

    def _missed(self, look: Look, *, computes: bool) -> Verdict:
        if self._misses == 0:
            self._missed_at = look.at
        self._misses += 1
        silent_s = look.at - self._missed_at
        if self._misses < MISSES or (computes and silent_s < self._patience_s):
            return Verdict.WAIT
        did = "was stopped by a signal" if look.is_stopped else "computes" if computes else "does nothing"
        self.reason = f"/health gave no answer {self._misses} times, and its process {did}"
        return Verdict.HUNG

    def _computes(self, look: Look) -> bool:
        """Whether its process has used the CPU since the last look; True where that cannot be told."""
        before, self._cpu_s = self._cpu_s, look.cpu_s
        return look.cpu_s is None or before is None or look.cpu_s > before


class Movement:
    """Whether a load still moves; ``patience_s`` is for how long it may stand still.

    Memory and lines count for ever. CPU time alone does so for a while: a file that is read through a fixed buffer into
    a GPU shows nothing else where the process is another user's, but a server that spins for ever shows the same.
    """

    def __init__(self, at: float, *, patience_s: float) -> None:
        self._moved_at = at
        self._longest_s = PATIENCE_FACTOR * patience_s
        self._mark: object = None
        self._cpu_s: float | None = None

    def is_seen(self, at: float, mark: object, *, cpu_s: float | None) -> bool:
        """Take a look. ``mark`` is another one whenever memory or log have grown."""
        before, self._cpu_s = self._cpu_s, cpu_s
        if mark != self._mark:
            self._mark, self._moved_at = mark, at
            return True
        computes = cpu_s is not None and before is not None and cpu_s > before
        return computes and at - self._moved_at < self._longest_s


def is_alarming(line: str) -> bool:
    """Whether a line of a ready server's log is reason enough to ask it for a token; no more than that."""
    return _ALARMING.search(line) is not None
