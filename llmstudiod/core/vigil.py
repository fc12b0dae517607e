"""Whether a server that became ready still answers. Looks go in, a verdict comes out; pure.

A missed health probe alone proves nothing: a burst of connections can hold /health back for seconds while the server
works. And a line in its log proves nothing, since clients can write there. So a server counts as hung only when it
answers nothing new and its process does nothing either, or when requests stand still in it for long, or when it cannot
produce one token though nothing else holds it up: one that is asked for behind full slots waits for its turn, and one
behind a long step whose client has left waits for its end.
"""

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

MISSES = 3
LAST_ALARMS = 5
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

    ``answers``: /health did in time. ``slots``: how far each slot is, None where it was not asked, or does not say
    since that is switched off. ``is_mute``: it was asked for its slots, and gave no answer in time. ``n_free``: slots
    that do nothing, as far as that is known. ``cpu_s``: the CPU time of its process so far, None: not known.
    ``is_stopped``: a signal stopped the process. ``is_alarmed``: a line of its log that is new sounds fatal.
    """

    at: float
    answers: bool
    n_in_flight: int
    slots: tuple[object, ...] | None = None
    is_mute: bool = False
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
        self._is_alarmed = False  # and could not be asked yet
        self.reason = ""

    def look(self, look: Look) -> Verdict:
        """Take a look and return the verdict; ``reason`` says what HUNG means."""
        computes = self._computes(look)
        if not look.answers:
            return self._missed(look, computes=computes)
        self._misses = 0
        moves = self._moves(look, computes=computes)
        if self._is_to_be_asked(look, moves=moves, computes=computes):
            return Verdict.ASK
        if look.n_in_flight == 0 or moves:
            self._moved_at = look.at
            return Verdict.WELL
        if self._may_be_slow(look, computes=computes):
            return Verdict.WELL
        if look.n_free or look.is_mute:
            return Verdict.ASK
        still_s = look.at - self._moved_at
        self.reason = f"/health answers, but its {look.n_in_flight} requests have stood still for {still_s:.0f} s"
        return Verdict.HUNG

    def asked(self, look: Look, *, has_answered: bool, within_s: float) -> Verdict:
        """Take what came of ASK, and a look after it: what others had in it meanwhile may have held the token up."""
        computes = self._computes(look)
        if not has_answered and not look.answers:
            return self._missed(look, computes=computes)
        self._misses = 0
        moves = look.n_in_flight > 0 and self._moves(look, computes=computes)
        if has_answered or moves:
            self._moved_at = look.at
            return Verdict.WELL
        if not look.n_free and computes and self._may_be_slow(look, computes=True):
            # A step on a CPU goes on after its client has left; no request stands still then to show it, so ask again.
            self._is_alarmed = look.n_in_flight == 0
            return Verdict.WELL
        self.reason = f"/health answers, but it could not produce one token within {within_s:.0f} s"
        return Verdict.HUNG

    def _is_to_be_asked(self, look: Look, *, moves: bool, computes: bool) -> bool:
        """Whether an alarm is reason to ask now: not behind full slots of a server that does something.

        Slots that move at the next look are an answer as good as a token.
        """
        is_alarmed = self._is_alarmed or look.is_alarmed
        has_room = look.n_in_flight == 0 or look.n_free > 0
        is_asked = is_alarmed and (has_room or not (moves or computes))
        self._is_alarmed = is_alarmed and not is_asked and (look.is_alarmed or not moves)
        return is_asked

    def _moves(self, look: Look, *, computes: bool) -> bool:
        """Whether its requests have got on; where /slots is switched off its process stands for them."""
        if look.is_mute:
            return False
        if look.slots is None:
            return computes
        before, self._slots = self._slots, look.slots
        return look.slots != before

    def _may_be_slow(self, look: Look, *, computes: bool) -> bool:
        """Whether its requests have not stood still for so long that it means something."""
        factor = PATIENCE_FACTOR if computes and not look.n_free else 1
        return look.at - self._moved_at < factor * self._patience_s

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


class Alarms:
    """What of a run's lines sounds fatal, ``last`` the latest ones. A client may have had them written."""

    def __init__(self) -> None:
        self.last: deque[str] = deque(maxlen=LAST_ALARMS)
        self._n_seen = 0

    def are_new(self, lines: Sequence[str], n_told: int) -> bool:
        """Take the lines at hand, and how many there ever were; return whether a new one sounds fatal."""
        n_new = n_told - self._n_seen if n_told >= self._n_seen else n_told
        self._n_seen = n_told
        found = [line for line in lines[max(0, len(lines) - n_new) :] if is_alarming(line)]
        self.last += found
        return bool(found)
