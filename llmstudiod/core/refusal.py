"""Why a model does not fit, in one sentence with the sum, and what would fit."""

from collections.abc import Sequence
from dataclasses import replace

from llmstudiod.core.memory import Run, Share
from llmstudiod.core.placement import Room, Wish, host_bytes, length_of, needs, place
from llmstudiod.core.units import format_bytes

WORTH_TELLING = 64 << 20


def refusal(wish: Wish, room: Room, freeable: Room, others: Room, *, names: Sequence[str]) -> tuple[str, str]:
    """Return why a model does not fit, with the sum, and what would fit.

    ``room`` is free now, ``freeable`` what could be freed in addition, ``others`` what other programs use; ``names``
    are those of the devices, for people.
    """
    on_gpu = bool(room.devices) and wish.gpus != () and wish.n_gpu_layers != 0
    layers = wish.all_layers if wish.n_gpu_layers is None else min(wish.n_gpu_layers, wish.all_layers)
    n_seq = 1 if wish.are_slots_open else wish.run.n_seq
    total = length_of(wish.run) * (1 if wish.run.is_unified else n_seq)
    run = replace(wish.run, n_seq=n_seq, n_ctx=total)
    run = replace(run, n_gpu_layers=layers if on_gpu else 0, proportions=(1.0,) if on_gpu else ())
    need = needs(wish, run)
    told = [f"it needs {_sum(need.devices[0], run)} on a GPU" if on_gpu else ""]
    host = replace(need.host, runtime=need.host.runtime + need.prompt_cache)
    if not on_gpu or host_bytes(need) > room.host:
        told.append(f"{'and' if on_gpu else 'it needs'} {_sum(host, run)} of RAM")
    places = [
        f"{names[index]} has {format_bytes(max(0, room.devices[index]))} free, "
        f"{format_bytes(freeable.devices[index])} could be freed{_used_by_others(others.devices[index])}"
        for index in range(len(room.devices))
        if on_gpu and (wish.gpus is None or index in wish.gpus)
    ]
    if len(told) > 1 or not on_gpu:
        free = f"{format_bytes(max(0, room.host))} of RAM are free, {format_bytes(freeable.host)} could be freed"
        places.append(free + _used_by_others(others.host))
    sentence = " ".join(part for part in told if part)
    return f"{sentence}; {'; '.join(places)}", _what_would_fit(wish, room, freeable)


def _used_by_others(size: int) -> str:
    return f", other programs use {format_bytes(size)}" if size >= WORTH_TELLING else ""


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
        shorter = replace(wish, run=replace(wish.run, n_ctx=middle * 256 * streams), is_context_open=False)
        if place(shorter, room) is None:
            high = middle - 1
        else:
            best, low = middle * 256, middle + 1
    return best
