"""What would happen if a model were wanted now: where it would go, who would go for it, and the sum."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.ledger import Memory
from llmstudiod.core.lifecycle import Instance, State, Waiter
from llmstudiod.core.placement import Placement, Wish, host_bytes
from llmstudiod.core.seating import account, seating


@dataclass(frozen=True, slots=True)
class Preview:
    """``placement`` None: memory is not planned for it, or it has no place, which ``error`` explains.

    ``evicts``: idle ones that would go, ``waits_for``: busy ones. ``is_running``: it is loaded, and lies there.
    ``account``: who holds what of each GPU and of RAM, see `llmstudiod.core.seating.account`.
    """

    placement: Placement | None
    evicts: tuple[str, ...] = ()
    waits_for: tuple[str, ...] = ()
    error: LlmstudioError | None = None
    is_running: bool = False
    account: tuple[dict[str, Any], ...] = ()


def preview(
    instances: Collection[Instance], model: str, wish: Wish | None, *, max_instances: int, memory: Memory, at: float
) -> Preview:
    """Return what would happen if nobody else waited; changes nothing."""
    residents = [each for each in instances if each.is_resident]
    sums = tuple(account(residents, memory))
    present = next(each for each in instances if each.spec.id == model)
    if present.is_resident:
        return Preview(present.placement, is_running=True, account=sums)
    waiter = Waiter(0, at, None, is_load=True)
    wanted = replace(
        present, state=State.STOPPED, waiters={0: waiter}, wish=wish, is_vetted=True, is_proven=True, placement=None,
        yields_to=None, is_second_try=False,
    )  # fmt: skip
    found = seating([*residents, wanted], max_instances=max_instances, memory=memory, settling=None)
    placement = next((place for _, place in (*found.start, *found.promised)), None)
    return Preview(
        placement,
        evicts=tuple(each.spec.id for each, _ in found.stop),
        waits_for=tuple(each.spec.id for _, busy in found.crowded for each in busy),
        error=next((error for _, error in found.hopeless), None),
        account=sums,
    )


def placement_dict(placement: Placement, names: Collection[str]) -> dict[str, Any]:
    """Return a placement as the admin interface tells it; sizes in bytes. ``names`` are those of all GPUs."""
    all_names = list(names)
    devices = [
        {"name": all_names[index] if index < len(all_names) else f"GPU {index}", "uuid": uuid, "layers": share.layers,
         "memory": share.total}
        for index, uuid, share in zip(
            placement.gpus, placement.uuids or (None,) * len(placement.gpus), placement.estimate.devices, strict=True
        )
    ]  # fmt: skip
    run = placement.run
    return {
        "gpus": devices,
        "n_gpu_layers": run.n_gpu_layers,
        "n_ctx": run.n_ctx // (1 if run.is_unified else run.n_seq),
        "n_parallel": run.n_seq,
        "ram": host_bytes(placement.estimate),
        "notes": list(placement.notes),
        "estimate": placement.estimate.as_dict(),
    }
