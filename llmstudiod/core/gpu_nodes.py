"""Which device nodes a model's unit needs for its GPUs, from what /dev and /proc/driver/nvidia hold."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from llmstudiod.core.errors import AccessDeniedError
from llmstudiod.core.launch import LaunchRequest

_MINOR = re.compile(r"^Device Minor:\s*(\d+)", re.MULTILINE)
_UUID = re.compile(r"^GPU UUID:\s*(GPU-\S+)", re.MULTILINE)
_NVIDIA = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset")


def nvidia_minors(information: Mapping[str, str]) -> list[tuple[str, int]]:
    """Return UUID and minor number of each GPU, in the order of the PCI bus, which is that of NVML.

    ``information`` holds the files ``/proc/driver/nvidia/gpus/<bus id>/information`` by bus id. The minor is the number
    in the name of the device node; it is not the index. Source: NVIDIA's driver README, chapter "The /proc interface".
    """
    found = []
    for _, text in sorted(information.items()):
        uuid, minor = _UUID.search(text), _MINOR.search(text)
        if uuid and minor:
            found.append((uuid[1], int(minor[1])))
    return found


def with_gpus(
    request: LaunchRequest,
    allowed: Sequence[str] | Literal["none"] | None,
    asked: Sequence[str],
    *,
    backends: Iterable[str],
    minors: Sequence[tuple[str, int]],
    nodes: Iterable[str],
) -> LaunchRequest:
    """Return the request with the device nodes of its GPUs, and with their UUIDs where it says which CUDA may see.

    ``allowed`` is what the recipe says, ``asked`` the UUIDs that were chosen for it among those; none: all of them.
    With the nodes of some GPUs alone CUDA numbers those from 0: an index of the whole machine would mean another one.

    Raises:
        AccessDeniedError: A GPU is asked for that the recipe does not allow.
    """
    if request.decisions.n_gpu_layers == 0:  # it lies on the CPU
        return request
    uuids = {str(index): uuid for index, (uuid, _) in enumerate(minors)}
    named = None if allowed is None else [] if allowed == "none" else [uuids.get(name, name) for name in allowed]
    if named is not None and (more := [gpu for gpu in asked if gpu not in named]):
        raise AccessDeniedError(f"'{request.model_id}': its recipe does not allow {more[0]}")
    chosen = list(asked) or named
    if chosen == []:
        return request
    environment = dict(request.environment)
    if chosen is not None:
        environment |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(chosen)}
    found = gpu_nodes(backends, chosen, minors=minors, nodes=nodes)
    return replace(request, devices=found, environment=environment)


def gpu_nodes(
    backends: Iterable[str], gpus: Sequence[str] | None, *, minors: Sequence[tuple[str, int]], nodes: Iterable[str]
) -> tuple[str, ...]:
    """Return the nodes that a unit may use.

    ``backends`` are the binary's devices (``CUDA0``, ``Vulkan0``, ``ROCm0``); ``gpus`` the UUIDs or indices that the
    recipe names, None for all; ``nodes`` what there is below /dev. A part of a GPU (MIG) needs its GPU and the
    capabilities; since its UUID does not tell which GPU that is, it gets all of them.
    """
    there = set(nodes)
    kinds = {re.sub(r"\d+$", "", name) for name in backends}
    wanted: list[str] = []
    if kinds & {"CUDA", "Vulkan"}:
        is_split = any(name.startswith("MIG-") for name in gpus or ())
        chosen = [minor for index, (uuid, minor) in enumerate(minors) if gpus is None or {uuid, str(index)} & {*gpus}]
        chosen = [minor for _, minor in minors] if is_split else chosen
        wanted += [*_NVIDIA, *(f"/dev/nvidia{minor}" for minor in chosen)] if chosen else []
        wanted += sorted(node for node in there if node.startswith("/dev/nvidia-caps/")) if is_split else []
    if kinds & {"Vulkan", "ROCm", "SYCL"}:
        wanted += sorted(node for node in there if node.startswith("/dev/dri/renderD"))
    if "ROCm" in kinds:
        wanted.append("/dev/kfd")
    return tuple(node for node in wanted if node in there)
