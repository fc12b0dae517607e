"""Where a model goes: which GPUs, how it is split, how many layers, and the context where the recipe left it open.

Pure: needs and free bytes in, a placement or a refusal out. One GPU is preferred, then the fewest; of those that fit
the one with the least room, so that the larger ones stay free for larger models. Nothing is chosen that a recipe sets.
What it leaves open gives way in this order: slots down to one, the context, layers on the GPUs, the GPUs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from itertools import combinations
from typing import Any, Self

from llmstudiod.core.learned import AS_ESTIMATED, Correction, corrected
from llmstudiod.core.memory import Estimate, Run, estimate
from llmstudiod.core.model_shape import ModelShape
from llmstudiod.core.needs import ENCODER_BYTES

MIN_CONTEXT = 2048
"""A context that was left open is not reduced below this."""

_MAX_TRIES = 64


class Grade(IntEnum):
    """How good a place is, the best first. Whoever waits gets the best that the machine could ever give it."""

    FULL = 0  # all layers on GPUs where there are any, and the whole context
    SHORTER = 1  # a shorter context
    PARTLY = 2  # as many layers on GPUs as fit
    PARTLY_SHORTER = 3
    CPU = 4  # no GPU, though there are some
    CPU_SHORTER = 5

    @property
    def is_shorter(self) -> bool:
        """Whether the context is less than what is wished for."""
        return bool(self % 2)


@dataclass(frozen=True, slots=True)
class Wish:
    """A model that wants a place, what its recipe sets and what it leaves open.

    ``run`` has the context and the slots that are wished for. ``gpus``: the indices that are allowed, None for all;
    ``max_gpus``: how many at most. ``n_gpu_layers`` None: as many as fit. ``is_context_open``: the context may be
    reduced; ``are_slots_open``: so may the slots. ``draft`` and ``mmproj_bytes`` go where the model goes.
    ``correction``: what llama-server told of it. ``margin``: the part of the need that must be free on top of it.
    """

    model: str
    shape: ModelShape
    run: Run
    gpus: tuple[int, ...] | None = None
    max_gpus: int | None = None
    n_gpu_layers: int | None = None
    tensor_split: tuple[float, ...] | None = None
    split_mode: str | None = None
    main_gpu: int = 0
    is_context_open: bool = False
    are_slots_open: bool = False
    draft: ModelShape | None = None
    mmproj_bytes: int = 0
    correction: Correction = AS_ESTIMATED
    margin: float = 0.0

    @property
    def all_layers(self) -> int:
        """The blocks, and the output as one more."""
        return self.shape.n_layers + 1

    def grades(self, *, has_gpus: bool) -> tuple[Grade, ...]:
        """Return the grades of place that it may have, the best first."""
        may_give_way = has_gpus and self.gpus != () and self.n_gpu_layers is None
        return tuple(
            grade
            for grade in Grade
            if (self.is_context_open or not grade.is_shorter) and (may_give_way or grade < Grade.PARTLY)
        )


@dataclass(frozen=True, slots=True)
class Room:
    """The bytes that may be used: of host memory, and of each GPU by its index."""

    host: int
    devices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model goes. ``gpus`` are indices, ``run.proportions`` their parts in this order; none: the CPU.

    ``is_reduced``: the context is shorter than the one that was wished for. ``uuids``: those of ``gpus``, once known.
    """

    # An index is a place among the GPUs that were measured; a GPU that is lost or added moves the others, not the UUID.

    gpus: tuple[int, ...]
    run: Run
    estimate: Estimate
    notes: tuple[str, ...] = ()
    is_reduced: bool = False
    uuids: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the placement of which ``values`` is the `as_dict`; KeyError, TypeError, ValueError for none."""
        run, need = values["run"], values["estimate"]
        return cls(
            gpus=tuple(map(int, values["gpus"])),
            run=Run(**{**run, "proportions": tuple(run["proportions"])}),
            estimate=Estimate.from_dict(need),
            notes=tuple(values["notes"]),
            is_reduced=bool(values["is_reduced"]),
            uuids=tuple(map(str, values["uuids"])),
        )

    def held(self, n_devices: int, uuids: Sequence[str] = ()) -> Room:
        """Return what it takes of the host and of each of all devices, which have ``uuids``."""
        devices = [0] * n_devices
        places = {uuid: index for index, uuid in enumerate(uuids)}
        for number, (index, share) in enumerate(zip(self.gpus, self.estimate.devices, strict=True)):
            place = places.get(self.uuids[number]) if self.uuids and uuids else index
            if place is not None:
                devices[place] += share.total
        return Room(host_bytes(self.estimate), tuple(devices))


def host_bytes(need: Estimate) -> int:
    """Return what a model takes of RAM: what it has for good, and the prompt cache that it may fill.

    Weights that the CPU copies into another order count once: the file's own pages are not needed any more then, and
    the kernel gives them to whoever needs room.
    """
    return need.host.total + need.prompt_cache


def needs(wish: Wish, run: Run) -> Estimate:
    """Return what the model needs when it is run like that, with what goes with it."""
    total = estimate(wish.shape, run)
    if wish.draft is not None:
        layers = wish.draft.n_layers + 1 if run.n_gpu_layers else 0
        total += estimate(wish.draft, replace(run, n_gpu_layers=layers, cache_ram=0))
    if wish.mmproj_bytes:
        total = total.with_encoder(weights=wish.mmproj_bytes, compute=ENCODER_BYTES)
    return corrected(total, wish.correction)


def place(wish: Wish, room: Room, grade: Grade | None = None) -> Placement | None:
    """Return where the model goes, or None where it fits nowhere; ``grade``: only a place as good as that."""
    for each in wish.grades(has_gpus=bool(room.devices)):
        if grade is not None and each is not grade:
            continue
        for run in _runs(wish, each):
            found = _placed(wish, run, room, each)
            if found is not None:
                return _told(wish, found)
    return None


def _told(wish: Wish, found: Placement) -> Placement:
    """Return the placement with what is less than was wished for, in words."""
    lengths = length_of(wish.run), length_of(found.run)
    notes, is_reduced = list(found.notes), lengths[1] < lengths[0]
    if is_reduced:
        notes.append(f"context reduced from {lengths[0]} to {lengths[1]} tokens for one request: more does not fit")
    if found.run.n_seq < wish.run.n_seq:
        slots = "slots" if found.run.n_seq > 1 else "slot"
        notes.append(f"{found.run.n_seq} {slots} instead of {wish.run.n_seq}: more does not fit")
    return replace(found, notes=tuple(notes), is_reduced=is_reduced)


def length_of(run: Run) -> int:
    """Return the tokens that one request may use."""
    return run.n_ctx // (1 if run.is_unified else run.n_seq)


def _runs(wish: Wish, grade: Grade) -> Iterator[Run]:
    """Yield the ways to run it at a grade, the best first: the longest context, then the most slots.

    Where only a part of it goes to GPUs each slot costs layers, so it gets one.
    """
    most, whole = wish.run.n_seq, length_of(wish.run)
    fewest = 1 if wish.are_slots_open else most
    if grade in {Grade.PARTLY, Grade.PARTLY_SHORTER}:
        most = fewest
    lengths = [whole]
    if grade.is_shorter:
        lengths = []
        length = whole // 2 // 256 * 256
        while length >= MIN_CONTEXT:
            lengths.append(length)
            length = length // 2 // 256 * 256
    for length in lengths:
        for slots in range(most, fewest - 1, -1):
            yield replace(wish.run, n_seq=slots, n_ctx=length * (1 if wish.run.is_unified else slots))


def _placed(wish: Wish, run: Run, room: Room, grade: Grade) -> Placement | None:
    allowed = [index for index in range(len(room.devices)) if wish.gpus is None or index in wish.gpus]
    wanted = wish.all_layers if wish.n_gpu_layers is None else min(wish.n_gpu_layers, wish.all_layers)
    if not allowed or not wanted or grade >= Grade.CPU:
        return _fitting(wish, replace(run, n_gpu_layers=0, proportions=()), (), room)
    choices = _choices(wish, allowed, room)
    if grade >= Grade.PARTLY:
        return max(filter(None, (_most_layers(wish, run, gpus, room) for gpus in choices)), key=_layers, default=None)
    return next(filter(None, (_split(wish, run, gpus, wanted, room) for gpus in choices)), None)


def _choices(wish: Wish, allowed: Sequence[int], room: Room) -> Iterator[tuple[int, ...]]:
    """Yield sets of GPUs, the fewest first; of one alone the tightest first, of several those with the most room."""
    by_room = sorted(allowed, key=lambda index: (room.devices[index], index))
    yield from ((index,) for index in by_room)
    most = min(len(allowed), wish.max_gpus or len(allowed))
    if wish.split_mode == "none":
        most = 1
    for count in range(2, most + 1):
        if wish.tensor_split and len(wish.tensor_split) == count:
            yield from combinations(sorted(allowed), count)  # the recipe's parts have an order
        else:
            yield tuple(sorted(by_room[-count:]))


def _split(wish: Wish, run: Run, gpus: tuple[int, ...], n_layers: int, room: Room) -> Placement | None:
    """Return the placement of so many layers on these GPUs: parts by their room, moved a layer at a time."""
    if wish.tensor_split and len(wish.tensor_split) == len(gpus):
        return _fitting(wish, replace(run, n_gpu_layers=n_layers, proportions=wish.tensor_split), gpus, room)
    if wish.tensor_split and len(gpus) > 1:
        return None
    mode = wish.split_mode or ("none" if len(gpus) == 1 else "layer")
    run = replace(run, n_gpu_layers=n_layers, split_mode=mode, main_gpu=0)
    if len(gpus) == 1:
        return _fitting(wish, replace(run, proportions=(1.0,)), gpus, room)
    fixed = needs(wish, replace(run, proportions=tuple(1.0 for _ in gpus))).devices
    parts = [max(1, room.devices[g] - share.compute - share.runtime) for g, share in zip(gpus, fixed, strict=True)]
    counts = _whole_parts(parts, n_layers)
    for _ in range(_MAX_TRIES):
        found = needs(wish, replace(run, proportions=tuple(map(float, counts))))
        taken = [_with_margin(share.total, wish) for share in found.devices]
        spare = [room.devices[gpu] - size for gpu, size in zip(gpus, taken, strict=True)]
        if min(spare) >= 0:
            return _fitting(wish, replace(run, proportions=tuple(map(float, counts))), gpus, room)
        worst, best = spare.index(min(spare)), spare.index(max(spare))
        if counts[worst] == 0 or spare[best] <= 0:
            return None
        counts[worst] -= 1
        counts[best] += 1
    return None


def _whole_parts(parts: Sequence[int], total: int) -> list[int]:
    """Return whole numbers in proportion to ``parts`` whose sum is ``total``.

    >>> _whole_parts([3, 1], 9)
    [7, 2]
    """
    exact = [total * part / sum(parts) for part in parts]
    counts = [int(value) for value in exact]
    for index in sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _most_layers(wish: Wish, run: Run, gpus: tuple[int, ...], room: Room) -> Placement | None:
    """Return the placement with the most layers on these GPUs, the rest on the CPU; None where not one fits."""
    best, low, high = None, 1, wish.all_layers - 1
    while low <= high:
        middle = (low + high) // 2
        found = _split(wish, run, gpus, middle, room)
        if found is None:
            high = middle - 1
        else:
            best, low = found, middle + 1
    return best


def _layers(placement: Placement) -> tuple[int, int]:
    return placement.run.n_gpu_layers, -len(placement.gpus)


def _fitting(wish: Wish, run: Run, gpus: tuple[int, ...], room: Room) -> Placement | None:
    need = needs(wish, run)
    if _with_margin(host_bytes(need), wish) > room.host:
        return None
    shares = zip(gpus, need.devices, strict=True)
    if any(_with_margin(share.total, wish) > room.devices[index] for index, share in shares):
        return None
    notes: tuple[str, ...] = ()
    if run.n_gpu_layers < wish.all_layers and wish.n_gpu_layers is None and room.devices and wish.gpus != ():
        notes = (f"{run.n_gpu_layers} of {wish.all_layers} layers on the GPU: more does not fit",)
    return Placement(gpus, run, need, notes)


def _with_margin(size: int, wish: Wish) -> int:
    return size + int(size * wish.margin)
