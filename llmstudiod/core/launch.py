"""What is asked of a launcher, and how it follows from a recipe."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmstudiod.core.command import BoundFile, Command, ModelFiles, ServerBinary, build_command
from llmstudiod.core.recipe import STRICT, Recipe, Sandbox, recipe_hash

_LIMIT_PROPERTIES: Mapping[str, str] = {
    "memory_max": "MemoryMax",
    "cpu_weight": "CPUWeight",
    "io_weight": "IOWeight",
    "allowed_cpus": "AllowedCPUs",
    "nice": "Nice",
    "tasks_max": "TasksMax",
}


@dataclass(frozen=True, slots=True)
class Decisions:
    """What was chosen for a start where the recipe leaves it open; None: the default. ``cache_ram`` in MiB.

    ``n_gpu_layers`` counts the output as a layer, 0: no GPU at all. ``tensor_split`` are whole layers on each of
    ``gpus``, which are UUIDs among those that the recipe allows.
    """

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    cache_ram: int | None = None
    n_gpu_layers: int | None = None
    tensor_split: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()


def decided(recipe: Recipe, decisions: Decisions) -> Recipe:
    """Return the recipe with what was chosen; what it says itself stays."""
    changes: dict[str, Any] = {}
    for name in ("max_model_len", "max_num_seqs", "cache_ram"):
        if getattr(recipe, name) is None and getattr(decisions, name) is not None:
            changes[name] = getattr(decisions, name)
    if decisions.n_gpu_layers is not None:
        changes |= _on_gpus(recipe, decisions, decisions.n_gpu_layers)
    return replace(recipe, **changes)


def _on_gpus(recipe: Recipe, decisions: Decisions, n_gpu_layers: int) -> dict[str, Any]:
    """Return what a place on GPUs means for a recipe; whoever is told UUIDs sees those GPUs alone, from 0 on."""
    if not n_gpu_layers:
        return {"gpus": "none", "n_gpu_layers": 0}
    changes: dict[str, Any] = {"gpus": decisions.gpus or recipe.gpus}
    if recipe.n_gpu_layers == "auto":
        changes["n_gpu_layers"] = n_gpu_layers
    if recipe.split_mode is None:
        changes["split_mode"] = "layer" if len(decisions.gpus) > 1 else "none"
    if recipe.tensor_split is None and len(decisions.tensor_split) > 1:
        changes["tensor_split"] = tuple(map(float, decisions.tensor_split))
    if recipe.main_gpu is not None and len(decisions.gpus) == 1:
        changes["main_gpu"] = 0  # it is the only one that is seen
    return changes


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """One server to be started: plain values.

    ``limits`` holds systemd's property names; ``devices`` are the device nodes of its GPUs, ``executables`` the paths
    that it may execute from, ``hidden`` what else it may not see. The subprocess launcher uses none of these four, nor
    ``sandbox``.
    """

    model_id: str
    recipe_hash: str
    recipe_file: str | None
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    socket_path: str
    model_path: str = ""
    n_ctx_train: int | None = None
    files: tuple[BoundFile, ...] = ()
    limits: Mapping[str, str] = field(default_factory=dict)
    sandbox: Sandbox = STRICT
    devices: tuple[str, ...] = ()
    device_groups: tuple[str, ...] = ()
    executables: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    decisions: Decisions = field(default_factory=Decisions)


def question(argv: Iterable[str]) -> LaunchRequest:
    """Return what asks a binary something that is not about a model."""
    return LaunchRequest("question", "", None, tuple(argv), {"LC_ALL": "C.UTF-8"}, "")


def launch_request(
    recipe: Recipe,
    files: ModelFiles,
    binary: ServerBinary,
    *,
    recipe_file: str | None,
    socket_path: str,
    is_sandboxed: bool,
    decisions: Decisions,
) -> tuple[LaunchRequest, Command]:
    """Return what starts the recipe's server, with the command line and what was decided on the way.

    Raises:
        LoadFailedError: The recipe asks for what this binary cannot do, or the socket's path is too long.
    """
    command = build_command(
        decided(recipe, decisions), files, binary, socket_path=socket_path, is_sandboxed=is_sandboxed
    )
    request = LaunchRequest(
        model_id=recipe.id,
        recipe_hash=recipe_hash(recipe),
        recipe_file=recipe_file,
        argv=command.argv,
        environment=command.environment,
        socket_path=socket_path,
        model_path=files.model[0],
        n_ctx_train=files.n_ctx_train,
        files=command.files,
        limits=_limits(recipe),
        sandbox=recipe.sandbox,
        decisions=decisions,
        executables=binary.executables,
    )
    return request, command


def with_fallback(limits: Mapping[str, str], memory_max: int) -> dict[str, str]:
    """Return the limits with one on memory where there is none; 0 bytes: none."""
    return {**({"MemoryMax": str(memory_max), "MemorySwapMax": "0"} if memory_max else {}), **limits}


def _limits(recipe: Recipe) -> dict[str, str]:
    values = {name: getattr(recipe.limits, name) for name in _LIMIT_PROPERTIES}
    limits = {_LIMIT_PROPERTIES[name]: str(value) for name, value in values.items() if value is not None}
    if "MemoryMax" in limits:
        limits["MemorySwapMax"] = "0"
    return limits
