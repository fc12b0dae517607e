"""Which GPUs models are placed on, and which of them a recipe means."""

from collections.abc import Iterable, Mapping, Sequence

from llmstudiod.core.devices import Device, Machine
from llmstudiod.core.errors import LoadFailedError
from llmstudiod.core.ledger import Memory
from llmstudiod.core.placement import Room
from llmstudiod.core.recipe import Recipe
from llmstudiod.core.sharing import reserved_on


def plannable(machine: Machine, backends: Iterable[str]) -> tuple[Device, ...]:
    """Return the GPUs on which memory can be planned, in the order of their indices.

    ``backends`` are the devices that llama-server lists. Only CUDA's can be told apart by what is measured, and only
    where each of them was measured; otherwise none, and llama-server finds its place itself.
    """
    listed = list(backends)
    if not listed or not all(name.startswith("CUDA") for name in listed):
        return ()
    cuda = [device for device in machine.devices if device.kind == "CUDA"]
    known = [
        each for each in cuda if each.uuid and each.total and each.free is not None and not each.shares_host_memory
    ]
    return tuple(sorted(known, key=lambda each: each.index)) if len(known) == len(cuda) == len(listed) else ()


def positions(recipe: Recipe, gpus: Sequence[Device]) -> tuple[int, ...] | None:
    """Return which of the GPUs the recipe allows, by their places in ``gpus``; None: all of them.

    Raises:
        LoadFailedError: It names one that is not there.
    """
    if recipe.gpus is None:
        return None
    if recipe.gpus == "none":
        return ()
    names = {name: place for place, each in enumerate(gpus) for name in (str(each.index), str(each.uuid))}
    for wanted in recipe.gpus:
        if wanted not in names:
            there = ", ".join(f"{each.index} ({each.uuid})" for each in gpus) or "none"
            message = f"cannot load '{recipe.id}': gpus: there is no GPU '{wanted}' that can be used; there are {there}"
            raise LoadFailedError(message, hint="`llmstudioctl gpus` shows them", details={"failure": "bad_args"})
    return tuple(names[wanted] for wanted in recipe.gpus)


def with_gpus(memory: Memory, gpus: Sequence[Device], reserved: Mapping[str, int]) -> Memory:
    """Return what the machine has, its GPUs included, less what is to be left free on them."""
    kept = [reserved_on(reserved, index=each.index, uuid=str(each.uuid)) for each in gpus]
    capacity = tuple(max(0, (each.total or 0) - keep) for each, keep in zip(gpus, kept, strict=True))
    free = tuple(max(0, (each.free or 0) - keep) for each, keep in zip(gpus, kept, strict=True))
    return Memory(
        at=memory.at,
        capacity=Room(memory.capacity.host, capacity),
        free=Room(memory.free.host, free),
        names=tuple(each.label for each in gpus),
        uuids=tuple(str(each.uuid) for each in gpus),
        taken=_taken(gpus),
    )


def _taken(gpus: Sequence[Device]) -> dict[str, tuple[int, ...]]:
    """Return what each of our models has of each GPU."""
    models = {process.model for each in gpus for process in each.processes if process.model is not None}
    return {
        model: tuple(sum(process.used or 0 for process in each.processes if process.model == model) for each in gpus)
        for model in models
    }
