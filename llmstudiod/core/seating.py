"""Who starts, who must go, and who goes on waiting: one look at all instances, which changes none of them.

Wanted models are served in their order. Each gets the best place that the machine could ever give it, in what is free,
or what those who are leaving anyway will free, or what the fewest and least recently used idle ones would free; a busy
one that was only asked to go serves on when it is not needed. Whoever has a promise keeps it: a later one gets only
what is left beside it.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from llmstudiod.core import room
from llmstudiod.core.errors import DoesNotFitError, LlmstudioError, UnavailableError
from llmstudiod.core.ledger import Holding, Memory, holding
from llmstudiod.core.lifecycle import Instance
from llmstudiod.core.memory import Estimate, Run, Share
from llmstudiod.core.placement import Grade, Placement, Room, place
from llmstudiod.core.refusal import refusal

TIGHT = 0.1
"""The part of its need that must be free on top of it, or else llama-server itself is asked what it needs."""

_place = lru_cache(maxsize=512)(place)
_ANYWHERE = Placement((), Run(0), Estimate(Share()))  # where memory is not planned, or the need is not known

NOISE = 64 << 20

Unit = tuple[Instance, ...]
"""Instances that go together or not at all."""


@dataclass(slots=True)
class Seating:
    """What should happen. ``start`` with the placement, None where memory is not planned; ``stop`` for whom.

    ``unknown``: they may only start, or cost somebody his place, when their plan has been checked, or checked better.
    ``crowded``: only busy ones could make room, and these should. ``hopeless``: nobody could, with the reason, None for
    want of places. ``settling``: memory that was given back is not free yet. ``promised``: places in what ``stop`` and
    those who are leaving will free.
    """

    start: list[tuple[Instance, Placement | None]] = field(default_factory=list)
    stop: list[tuple[Instance, Instance]] = field(default_factory=list)
    recall: list[Instance] = field(default_factory=list)
    unknown: list[Instance] = field(default_factory=list)
    crowded: list[tuple[Instance, list[Instance]]] = field(default_factory=list)
    hopeless: list[tuple[Instance, LlmstudioError | None]] = field(default_factory=list)
    settling: list[Instance] = field(default_factory=list)
    promised: list[tuple[Instance, Placement]] = field(default_factory=list)


class _Table:
    """Who sits, and what was promised."""

    def __init__(self, residents: list[Instance], *, max_instances: int, memory: Memory | None) -> None:
        # A limit that was lowered is reached one by one: whoever goes makes room in turn.
        self._limit = max(max_instances, len(residents)) if max_instances else 0
        self._residents, self._memory = residents, memory
        self._claims: list[tuple[Instance, Placement]] = []

    def claim(self, wanted: Instance, placement: Placement) -> None:
        """Promise a place."""
        self._claims.append((wanted, placement))

    def claim_soon(self, wanted: Instance, going: Collection[Instance], others: Room | None) -> None:
        """Keep for it what it will get when memory has settled, so that nobody who came later takes that meanwhile.

        Beside everybody, or else when those are gone who go already; nobody is kept from what others use for long.
        """
        if self._memory is None or wanted.wish is None:
            return
        staying = [each for each in self._residents if each not in going]
        for neighbours in (self._residents, staying):
            claims = [*self._held(), others or Room(0, (0,) * len(self._memory.free.devices))]
            there = self._memory.room_by_books(self.holdings(neighbours), claims)
            for grade in self._grades(wanted):
                if placement := _place(wanted.wish, there, grade):
                    self.claim(wanted, placement)
                    return

    def best_grade(self, wanted: Instance, without: Collection[Instance]) -> Grade | None:
        """Return how good its place could be, if those ``without`` had gone and nothing was promised; None: none."""
        claims, self._claims = self._claims, []
        try:
            grades = self._grades(wanted)
            return next((grade for grade in grades if self.placement(wanted, without, grade) is not None), None)
        finally:
            self._claims = claims

    def is_better_soon(self, wanted: Instance, without: Collection[Instance], best: Grade | None, others: Room) -> bool:
        """Whether its best place would be a better one if all were free that our books call free.

        ``without``: who may go for it; ``others``: what other programs used when that could be told last.
        """
        if self._memory is None or wanted.wish is None:
            return False
        staying = [each for each in self._residents if each not in without]
        there = self._memory.room_by_books(self.holdings(staying), [others])
        better = (grade for grade in self._grades(wanted) if best is None or grade < best)
        return any(_place(wanted.wish, there, grade) for grade in better)

    def is_settling(self, wanted: Instance, grade: Grade, others: Room) -> bool:
        """Whether it would fit beside everybody if all were free that our books call free."""
        if self._memory is None or wanted.wish is None:
            return False
        there = self._memory.room_by_books(self.holdings(self._residents), [*self._held(), others])
        return _place(wanted.wish, there, grade) is not None

    def _grades(self, wanted: Instance) -> tuple[Grade, ...]:
        if self._memory is None or wanted.wish is None:
            return (Grade.FULL,)
        return wanted.wish.grades(has_gpus=bool(self._memory.free.devices))

    def placement(
        self, wanted: Instance, without: Collection[Instance], grade: Grade, *, margin: float = 0.0
    ) -> Placement | None:
        """Return where it would go if those ``without`` had gone; None: nowhere."""
        staying = [each for each in self._residents if each not in without]
        if self._limit and len(staying) + len(self._claims) >= self._limit:
            return None
        neighbours = {each.spec.id for each in (*staying, *(each for each, _ in self._claims))}
        if neighbours & wanted.spec.excludes:
            return None
        if self._memory is None or wanted.wish is None:
            return _ANYWHERE
        wish = replace(wanted.wish, margin=margin) if margin else wanted.wish
        gone = [each for each in self._residents if each in without]
        memory = self._memory.released(self.holdings(gone))
        there = memory.room(self.holdings(staying), self._held())
        found = _place(wish, there, grade)
        if found is None and wish.margin and not margin:
            found = _place(replace(wish, margin=0.0), there, grade)
        return found and replace(found, uuids=tuple(memory.uuids[index] for index in found.gpus if memory.uuids))

    def is_tight(self, wanted: Instance, placement: Placement, grade: Grade) -> bool:
        """Whether so little would be left that it matters how right the estimate is."""
        if placement is _ANYWHERE:
            return False
        return not placement.estimate.is_validated or self.placement(wanted, (), grade, margin=TIGHT) is None

    def is_at_rest(self, others: Room) -> bool:
        """Whether everything is free that our books call free, as far as ``others`` leave it."""
        if self._memory is None:
            return True
        holdings = self.holdings(self._residents)
        missing = _more(self._memory.room(holdings), self._memory.room_by_books(holdings, [others]))
        return all(size < NOISE for size in missing.devices)

    def why_not(self, wanted: Instance, everyone: Collection[Instance]) -> LlmstudioError | None:
        """Return what is said of one that does not fit if all ``everyone`` go; None: for want of places."""
        staying = [each for each in self._residents if each not in everyone]
        foe = next((each for each in staying if each.spec.id in wanted.spec.excludes), None)
        if foe is not None:
            message = f"cannot load '{wanted.spec.id}': it may never be loaded beside '{foe.spec.id}', which is pinned"
            return UnavailableError(message, hint="see `groups` in llmstudiod.yaml")
        if self._memory is None or wanted.wish is None:
            return None
        now = self._memory.room(self.holdings(self._residents))
        later = self._memory.released(self.holdings(everyone)).room(self.holdings(staying))
        told, hint = refusal(wanted.wish, now, _more(now, later), self.others(), names=self._memory.names)
        return DoesNotFitError(f"cannot load '{wanted.spec.id}': {told}", hint=hint)

    def others(self) -> Room:
        """Return what other programs use: what is not free, and nobody of ours has."""
        assert self._memory is not None
        holdings = self.holdings(self._residents)
        return _more(self._memory.room(holdings), self._memory.room_by_books(holdings))

    def holdings(self, instances: Iterable[Instance]) -> list[Holding]:
        """Return what these hold."""
        assert self._memory is not None
        at = self._memory.at
        return [
            holding(each.spec.id, each.placement, self._memory, is_taken=each.facts is not None and each.ready_at <= at)
            for each in instances
            if each.placement is not None
        ]

    def _held(self) -> list[Room]:
        assert self._memory is not None
        n_devices = len(self._memory.free.devices)
        return [placement.held(n_devices) for _, placement in self._claims if placement is not _ANYWHERE]


def _more(less: Room, more: Room) -> Room:
    """Return how much more there is, 0 where there is less."""
    devices = tuple(max(0, b - a) for a, b in zip(less.devices, more.devices, strict=True))
    return Room(max(0, more.host - less.host), devices)


def seating(
    instances: Collection[Instance], *, max_instances: int, memory: Memory | None, settling: Room | None
) -> Seating:
    """Return what should happen now.

    ``settling``: somebody has gone so recently that memory may follow later, or somebody loads, and what he has taken
    counts twice, as used and as promised; then it is what other programs used before that.
    """
    found = Seating()
    residents = [each for each in instances if each.is_resident]
    table = _Table(residents, max_instances=max_instances, memory=memory)
    spare: list[Unit] = [(each,) for each in room.recallable(instances)]
    going = [each for each in room.leaving(instances) if (each,) not in spare]
    unused = _units(room.unused(instances), residents)
    all_that_may_go = [*room.leaving(instances), *room.evictable(instances)]
    for wanted in room.wanted(instances):
        if memory is not None and not wanted.is_vetted:
            found.unknown.append(wanted)
            continue
        if wanted.is_second_try and (going or (settling is not None and not table.is_at_rest(settling))):
            found.settling.append(wanted)  # what was too small for it must not be so again
            table.claim_soon(wanted, going, settling)
            continue
        everyone = [each for each in all_that_may_go if each.spec.id not in wanted.protects]
        grade = table.best_grade(wanted, everyone)
        if settling is not None and wanted.is_vetted and table.is_better_soon(wanted, everyone, grade, settling):
            found.settling.append(wanted)
            table.claim_soon(wanted, going, settling)
            continue
        placement = None if grade is None else table.placement(wanted, (), grade)
        is_sure = wanted.is_proven or (memory is None and wanted.is_vetted)
        if grade is not None and placement is not None:
            if not is_sure and table.is_tight(wanted, placement, grade):
                found.unknown.append(wanted)
            else:
                found.start.append((wanted, None if placement is _ANYWHERE else placement))
            table.claim(wanted, placement)
            continue
        if not is_sure:
            found.unknown.append(wanted)
            table.claim_soon(wanted, going, settling)
            continue
        if grade is None:
            found.hopeless.append((wanted, table.why_not(wanted, everyone)))
            continue
        if settling is not None and table.is_settling(wanted, grade, settling):
            found.settling.append(wanted)
            table.claim_soon(wanted, going, settling)
            continue
        others = [unit for unit in unused if not any(each.spec.id in wanted.protects for each in unit)]
        placement, leaving = _with_others_gone(table, wanted, grade, going, [*others, *spare])
        if placement is None:
            may_go = [*going, *_all(others), *_all(spare)]
            found.crowded.append((wanted, _busy_to_go(table, wanted, grade, may_go, residents)))
            continue
        table.claim(wanted, placement)
        found.promised.append((wanted, placement))
        found.stop += [(each, wanted) for unit in leaving if unit in unused for each in unit]
        going += _all(leaving)
        unused = [unit for unit in unused if unit not in leaving]
        spare = [unit for unit in spare if unit not in leaving]
    found.recall = _all(spare)
    return found


def _units(unused: Sequence[Instance], residents: Sequence[Instance]) -> list[Unit]:
    """Return who may go, in their order: those of a group that is always together go at once, if all are unused."""
    ids, may_go = {each.spec.id for each in residents}, {each.spec.id: each for each in unused}
    units: dict[frozenset[str], Unit] = {}
    for each in unused:
        fellows = each.spec.companions & ids
        if fellows <= may_go.keys():
            names = frozenset({each.spec.id, *fellows})
            units.setdefault(names, (each, *(may_go[name] for name in sorted(fellows))))
    return list(units.values())


def _all(units: Iterable[Unit]) -> list[Instance]:
    return [each for unit in units for each in unit]


def _with_others_gone(
    table: _Table, wanted: Instance, grade: Grade, going: Sequence[Instance], candidates: Sequence[Unit]
) -> tuple[Placement | None, list[Unit]]:
    """Return where it goes when the fewest more have left, and who they are, the first to go first."""
    leaving: list[Unit] = []
    placement = table.placement(wanted, going, grade)
    for unit in candidates:
        if placement is not None:
            break
        leaving.append(unit)
        placement = table.placement(wanted, [*going, *_all(leaving)], grade)
    if placement is None:
        return None, []
    for unit in leaving[-2::-1]:  # the last one was needed; of the others those that stay cost nothing
        fewer = [other for other in leaving if other is not unit]
        better = table.placement(wanted, [*going, *_all(fewer)], grade)
        if better is not None:
            placement, leaving = better, fewer
    return placement, leaving


def _busy_to_go(
    table: _Table, wanted: Instance, grade: Grade, going: Sequence[Instance], residents: Sequence[Instance]
) -> list[Instance]:
    """Return the fewest busy ones that make room beside all who may go at once; none where those would not do."""
    busy = room.busy_victims(residents, waited_since=room.oldest_arrival(wanted))
    # Whoever always goes with one of them, and is idle, may go as well.
    units: list[Unit] = [
        (each, *(other for other in residents if other.spec.id in each.spec.companions and other.is_idle))
        for each in busy
        if each.spec.id not in wanted.protects
    ]
    return _all(_with_others_gone(table, wanted, grade, going, units)[1])


def account(residents: Collection[Instance], memory: Memory) -> Iterator[dict[str, Any]]:
    """Yield who holds what of each GPU, and of RAM as the last: bytes that are there, free, held, and others'.

    What is reserved is not there; what is promised to those who still load is not free.
    """
    table = _Table(list(residents), max_instances=0, memory=memory)
    n_devices = len(memory.free.devices)
    held = {each.spec.id: each.placement.held(n_devices, memory.uuids) for each in residents if each.placement}
    free = memory.room(table.holdings(residents))
    others = table.others()
    for index, name in enumerate((*memory.names, "RAM")):
        is_ram = index == n_devices

        def part(room: Room, index: int = index, *, is_ram: bool = is_ram) -> int:
            return room.host if is_ram else room.devices[index]

        yield {
            "name": name,
            "uuid": None if is_ram or not memory.uuids else memory.uuids[index],
            "total": part(memory.capacity),
            "free": max(0, part(free)),
            "others": part(others),
            "models": [{"id": model, "memory": size} for model, room in held.items() if (size := part(room))],
        }


def used_by_others(instances: Collection[Instance], memory: Memory) -> Room:
    """Return what other programs use of the machine's memory."""
    return _Table([each for each in instances if each.is_resident], max_instances=0, memory=memory).others()
