"""Where a model goes: which GPUs, how it is split, how many layers, and the context where the recipe left it open.

Pure: needs and free bytes in, a placement or a refusal out. One GPU is preferred, then the fewest; of those that fit
the one with the least room, so that the larger ones stay free for larger models. Nothing is chosen that a recipe sets.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from llmstudiod.core.memory import Estimate, Run, Share, estimate
from llmstudiod.core.model_shape import ModelShape
from llmstudiod.core.needs import ENCODER_BYTES
from llmstudiod.core.units import format_bytes

MIN_CONTEXT = 2048
"""A context that was left open is not reduced below this."""

_MAX_TRIES = 64


@dataclass(frozen=True, slots=True)
class Wish:
    """A model that wants a place, what its recipe sets and what it leaves open.

    ``run`` has the context that is wished for. ``gpus``: the indices that are allowed, None for all; ``max_gpus``: how
    many at most. ``n_gpu_layers`` None: as many as fit. ``is_context_open``: the context may be reduced. ``draft`` and
    ``mmproj_bytes`` go where the model goes.
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
    draft: ModelShape | None = None
    mmproj_bytes: int = 0

    @property
    def all_layers(self) -> int:
        """The blocks, and the output as one more."""
        return self.shape.n_layers + 1


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

    gpus: tuple[int, ...]
    run: Run
    estimate: Estimate
    notes: tuple[str, ...] = ()
    is_reduced: bool = False
    uuids: tuple[str, ...] = ()

    def held(self, n_devices: int) -> Room:
        """Return what it takes of the host and of each of all devices."""
        devices = [0] * n_devices
        for index, share in zip(self.gpus, self.estimate.devices, strict=True):
            devices[index] += share.total
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
    return total.with_encoder(weights=wish.mmproj_bytes, compute=ENCODER_BYTES) if wish.mmproj_bytes else total


def place(wish: Wish, room: Room) -> Placement | None:
    """Return where the model goes, or None where it fits nowhere."""
    for run in _contexts(wish):
        found = _placed(wish, run, room)
        if found is not None:
            if run.n_ctx < wish.run.n_ctx:
                note = f"context reduced from {wish.run.n_ctx} to {run.n_ctx} tokens in all: more does not fit"
                found = replace(found, notes=(*found.notes, note), is_reduced=True)
            return found
    return None


def _contexts(wish: Wish) -> Iterator[Run]:
    """Yield the context that is wished for, then shorter ones where the recipe left it open."""
    run = wish.run
    yield run
    streams = 1 if run.is_unified else run.n_seq
    length = run.n_ctx // streams // 2 // 256 * 256
    while wish.is_context_open and length >= MIN_CONTEXT:
        yield replace(run, n_ctx=length * streams)
        length = length // 2 // 256 * 256


def _placed(wish: Wish, run: Run, room: Room) -> Placement | None:
    allowed = [index for index in range(len(room.devices)) if wish.gpus is None or index in wish.gpus]
    wanted = wish.all_layers if wish.n_gpu_layers is None else min(wish.n_gpu_layers, wish.all_layers)
    if not allowed or not wanted:
        return _fitting(wish, replace(run, n_gpu_layers=0, proportions=()), (), room)
    choices = list(_choices(wish, allowed, room))
    for gpus in choices:
        found = _split(wish, run, gpus, wanted, room)
        if found is not None:
            return found
    if wish.n_gpu_layers is not None:
        return None
    best = max(filter(None, (_most_layers(wish, run, gpus, room) for gpus in choices)), key=_layers, default=None)
    return best or _fitting(wish, replace(run, n_gpu_layers=0, proportions=()), (), room)


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
        spare = [room.devices[g] - share.total for g, share in zip(gpus, found.devices, strict=True)]
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
    if host_bytes(need) > room.host:
        return None
    if any(share.total > room.devices[index] for index, share in zip(gpus, need.devices, strict=True)):
        return None
    notes: tuple[str, ...] = ()
    if gpus and run.n_gpu_layers < wish.all_layers and wish.n_gpu_layers is None:
        notes = (f"{run.n_gpu_layers} of {wish.all_layers} layers on the GPU: more does not fit",)
    return Placement(gpus, run, need, notes)


# Refusals


def refusal(wish: Wish, room: Room, freeable: Room, *, names: Sequence[str]) -> tuple[str, str]:
    """Return why a model does not fit, with the sum, and what would fit.

    ``room`` is free now, ``freeable`` what could be freed in addition; ``names`` are those of the devices, for people.
    """
    on_gpu = bool(room.devices) and wish.gpus != () and wish.n_gpu_layers != 0
    layers = wish.all_layers if wish.n_gpu_layers is None else min(wish.n_gpu_layers, wish.all_layers)
    run = replace(wish.run, n_gpu_layers=layers if on_gpu else 0, proportions=(1.0,) if on_gpu else ())
    need = needs(wish, run)
    told = [f"it needs {_sum(need.devices[0], run)} on a GPU" if on_gpu else ""]
    host = replace(need.host, runtime=need.host.runtime + need.prompt_cache)
    if not on_gpu or host_bytes(need) > room.host:
        told.append(f"{'and' if on_gpu else 'it needs'} {_sum(host, run)} of RAM")
    places = [
        f"{names[index]} has {format_bytes(max(0, room.devices[index]))} free, "
        f"{format_bytes(freeable.devices[index])} could be freed"
        for index in range(len(room.devices))
        if on_gpu and (wish.gpus is None or index in wish.gpus)
    ]
    if len(told) > 1 or not on_gpu:
        free = f"{format_bytes(max(0, room.host))} of RAM are free, {format_bytes(freeable.host)} could be freed"
        places.append(free)
    sentence = " ".join(part for part in told if part)
    return f"{sentence}; {'; '.join(places)}", _what_would_fit(wish, room, freeable)


def _sum(share: Share, run: Run) -> str:
    buffers = share.compute + share.runtime
    parts = [
        f"weights {format_bytes(share.weights)}",
        f"KV cache {format_bytes(share.kv)} for {run.n_ctx:,} tokens",
        f"buffers {format_bytes(buffers)}",
    ]
    return f"{format_bytes(share.total)} ({', '.join(parts)})"


def _what_would_fit(wish: Wish, room: Room, freeable: Room) -> str:
    """Return the next step: the longest context or the most layers with which it would fit."""
    devices = tuple(a + b for a, b in zip(room.devices, freeable.devices, strict=True))
    all_room = Room(room.host + freeable.host, devices)
    streams = 1 if wish.run.is_unified else wish.run.n_seq
    ways = []
    length = _longest(wish, all_room, streams)
    if length:
        ways.append(f"max_model_len {length}")
    if wish.n_gpu_layers:
        fewer = place(replace(wish, n_gpu_layers=None), all_room)
        if fewer is not None and fewer.gpus:
            ways.append(f"n_gpu_layers {fewer.run.n_gpu_layers}")
    if not ways:
        return "a smaller quantisation, or a smaller model, may fit"
    return f"it would fit with {' or '.join(ways)}"


def _longest(wish: Wish, room: Room, streams: int) -> int:
    """Return the longest context of one request with which the model fits, in steps of 256; 0: none."""
    low, high, best = 1, wish.run.n_ctx // streams // 256, 0
    while low <= high:
        middle = (low + high) // 2
        if _placed(wish, replace(wish.run, n_ctx=middle * 256 * streams), room) is None:
            high = middle - 1
        else:
            best, low = middle * 256, middle + 1
    return best
