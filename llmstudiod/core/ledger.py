"""Who holds how much memory: what was measured, less what is promised to those who have not taken it yet.

A device's room is the least of two sums. What it has in all, less what everybody of ours holds: that is right at once,
and knows nothing of other programs. And what was measured to be free, less what those of ours will still take: that
knows of other programs, and is as old as the measurement.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from llmstudiod.core.placement import Placement, Room


@dataclass(frozen=True, slots=True)
class Holding:
    """What one model holds. ``untaken``: what of it no measurement of today shows as used, in bytes.

    All of it until the model is ready; afterwards the pages of its mapped file, which Linux counts as available, and
    the prompt cache, which grows for days.
    """

    held: Room
    untaken: Room


@dataclass(frozen=True, slots=True)
class Memory:
    """What the machine has for models, and what of it was free ``at`` a moment; what is reserved is taken off both.

    ``taken``: bytes of each device that each of our models has, where the driver tells.
    """

    at: float
    capacity: Room
    free: Room
    names: tuple[str, ...] = ()
    uuids: tuple[str, ...] = ()
    taken: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def room(self, holdings: Iterable[Holding], claims: Iterable[Room] = ()) -> Room:
        """Return what is left beside those who hold something, and beside ``claims``, which were promised."""
        promised = list(claims)
        holdings = list(holdings)
        by_books = _less(self.capacity, [*(each.held for each in holdings), *promised])
        by_measure = _less(self.free, [*(each.untaken for each in holdings), *promised])
        devices = tuple(min(pair) for pair in zip(by_books.devices, by_measure.devices, strict=True))
        return Room(min(by_books.host, by_measure.host), devices)

    def room_by_books(self, holdings: Iterable[Holding], claims: Iterable[Room] = ()) -> Room:
        """Return what would be left if nobody else used anything."""
        return _less(self.capacity, [*(each.held for each in holdings), *claims])

    def released(self, holdings: Iterable[Holding]) -> "Memory":
        """Return what will be measured when these have gone."""
        free = self.free
        for each in holdings:
            taken = _less(each.held, [each.untaken])
            free = Room(free.host + taken.host, tuple(a + b for a, b in zip(free.devices, taken.devices, strict=True)))
        return replace(self, free=free)


def holding(model: str, placement: Placement, memory: Memory, *, is_taken: bool) -> Holding:
    """Return what a model's placement holds; ``is_taken``: it was ready when the memory was measured."""
    n_devices = len(memory.free.devices)
    held = placement.held(n_devices, memory.uuids)
    if not is_taken:
        taken = memory.taken.get(model, (0,) * n_devices)
        devices = tuple(max(0, size - part) for size, part in zip(held.devices, taken, strict=True))
        return Holding(held, Room(held.host, devices))
    mapped = placement.estimate.host.weights - placement.estimate.repacked
    later = mapped + placement.estimate.prompt_cache
    return Holding(held, Room(min(held.host, later), (0,) * n_devices))


def _less(room: Room, takes: Iterable[Room]) -> Room:
    host, devices = room.host, list(room.devices)
    for take in takes:
        host -= take.host
        devices = [left - part for left, part in zip(devices, take.devices, strict=True)]
    return Room(host, tuple(devices))
