"""Who starts, who must go, and who goes on waiting: one look at all instances, which changes none of them.

Wanted models are served in their order. Each gets what is free, or what those who are leaving anyway will free, or
what the fewest and least recently used idle ones would free; a busy one that was only asked to go serves on when it is
not needed. Whoever has a promise keeps it: a later one gets only what is left beside it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache

from llmstudiod.core import room
from llmstudiod.core.errors import DoesNotFitError, LlmstudioError
from llmstudiod.core.ledger import Holding, Memory, holding
from llmstudiod.core.lifecycle import Instance
from llmstudiod.core.memory import Estimate, Run, Share
from llmstudiod.core.placement import Placement, Room, place, refusal

_place = lru_cache(maxsize=256)(place)
_ANYWHERE = Placement((), Run(0), Estimate(Share()))  # where memory is not planned, or the need is not known


@dataclass(slots=True)
class Seating:
    """What should happen. ``start`` with the placement, None where memory is not planned.

    ``unknown``: they may only start, or cost somebody his place, when their plan has been checked. ``crowded``: only a
    busy one could make room. ``hopeless``: nobody could, with the reason, None for want of places. ``settling``: memory
    that was given back is not free yet.
    """

    start: list[tuple[Instance, Placement | None]] = field(default_factory=list)
    stop: list[Instance] = field(default_factory=list)
    recall: list[Instance] = field(default_factory=list)
    unknown: list[Instance] = field(default_factory=list)
    crowded: list[Instance] = field(default_factory=list)
    hopeless: list[tuple[Instance, LlmstudioError | None]] = field(default_factory=list)
    settling: list[Instance] = field(default_factory=list)


class _Table:
    """Who sits, and what was promised."""

    def __init__(self, residents: list[Instance], *, max_instances: int, memory: Memory | None) -> None:
        # A limit that was lowered is reached one by one: whoever goes makes room in turn.
        self._limit = max(max_instances, len(residents)) if max_instances else 0
        self._residents, self._memory = residents, memory
        self._claims: list[Placement] = []

    def claim(self, placement: Placement) -> None:
        self._claims.append(placement)

    def is_possible(self, wanted: Instance, without: Collection[Instance]) -> bool:
        """Whether it could have a place at all, if those ``without`` had gone and nothing was promised."""
        claims, self._claims = self._claims, []
        try:
            return self.placement(wanted, without) is not None
        finally:
            self._claims = claims

    def placement(self, wanted: Instance, without: Collection[Instance]) -> Placement | None:
        """Return where it would go if those ``without`` had gone; None: nowhere."""
        staying = [each for each in self._residents if each not in without]
        if self._limit and len(staying) + len(self._claims) >= self._limit:
            return None
        if self._memory is None or wanted.wish is None:
            return _ANYWHERE
        gone = [each for each in self._residents if each in without]
        memory = self._memory.released(self._holdings(gone))
        found = _place(wanted.wish, memory.room(self._holdings(staying), self._held()))
        return found and replace(found, uuids=tuple(memory.uuids[index] for index in found.gpus if memory.uuids))

    def is_settling(self, wanted: Instance) -> bool:
        """Whether it would fit if what our books call free were free."""
        if self._memory is None or wanted.wish is None:
            return False
        there = self._memory.room_by_books(self._holdings(self._residents), self._held())
        return _place(wanted.wish, there) is not None

    def why_not(self, wanted: Instance, everyone: Collection[Instance]) -> LlmstudioError | None:
        """Return what is said of one that does not fit if all ``everyone`` go; None: for want of places."""
        if self._memory is None or wanted.wish is None:
            return None
        now = self._memory.room(self._holdings(self._residents))
        staying = [each for each in self._residents if each not in everyone]
        later = self._memory.released(self._holdings(everyone)).room(self._holdings(staying))
        freed = tuple(max(0, b - a) for a, b in zip(now.devices, later.devices, strict=True))
        told, hint = refusal(wanted.wish, now, Room(max(0, later.host - now.host), freed), names=self._memory.names)
        return DoesNotFitError(f"cannot load '{wanted.spec.id}': {told}", hint=hint)

    def _holdings(self, instances: Iterable[Instance]) -> list[Holding]:
        assert self._memory is not None
        n_devices = len(self._memory.free.devices)
        return [
            holding(each.placement, n_devices, is_taken=each.facts is not None and each.ready_at < self._memory.at)
            for each in instances
            if each.placement is not None
        ]

    def _held(self) -> list[Room]:
        assert self._memory is not None
        n_devices = len(self._memory.free.devices)
        return [each.held(n_devices) for each in self._claims if each is not _ANYWHERE]


def seating(
    instances: Collection[Instance], *, max_instances: int, memory: Memory | None, is_settling: bool
) -> Seating:
    """Return what should happen now. ``is_settling``: somebody has gone so recently that memory may follow later."""
    found = Seating()
    table = _Table([each for each in instances if each.is_resident], max_instances=max_instances, memory=memory)
    spare = room.recallable(instances)
    going = [each for each in room.leaving(instances) if each not in spare]
    unused = room.unused(instances)
    everyone = [*room.leaving(instances), *room.evictable(instances)]
    for wanted in room.wanted(instances):
        if memory is not None and not wanted.is_vetted:
            found.unknown.append(wanted)
            continue
        placement = table.placement(wanted, ())
        if placement is not None:
            found.start.append((wanted, None if placement is _ANYWHERE else placement))
            table.claim(placement)
            continue
        if not wanted.is_vetted:
            found.unknown.append(wanted)
            continue
        if is_settling and table.is_settling(wanted):
            found.settling.append(wanted)
            continue
        placement, leaving = _with_others_gone(table, wanted, going, unused, spare)
        if placement is None:
            if table.is_possible(wanted, everyone):
                found.crowded.append(wanted)
            else:
                found.hopeless.append((wanted, table.why_not(wanted, everyone)))
            continue
        table.claim(placement)
        found.stop += [each for each in leaving if each in unused]
        going += leaving
        unused = [each for each in unused if each not in leaving]
        spare = [each for each in spare if each not in leaving]
    found.recall = spare
    return found


def _with_others_gone(
    table: _Table, wanted: Instance, going: list[Instance], unused: list[Instance], spare: list[Instance]
) -> tuple[Placement | None, list[Instance]]:
    """Return where it goes when the fewest more have left, and who they are, the first to go first."""
    leaving: list[Instance] = []
    placement = table.placement(wanted, going)
    for each in (*unused, *spare):
        if placement is not None:
            break
        leaving.append(each)
        placement = table.placement(wanted, [*going, *leaving])
    if placement is None:
        return None, []
    for each in leaving[-2::-1]:  # the last one was needed; of the others those that stay cost nothing
        fewer = [other for other in leaving if other is not each]
        better = table.placement(wanted, [*going, *fewer])
        if better is not None:
            placement, leaving = better, fewer
    return placement, leaving
