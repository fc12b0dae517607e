"""From a recipe to what its model needs in memory, and to the limit that its unit gets."""

import hashlib
import json
from collections.abc import Iterable, Mapping

from llmstudiod.core.command import DEFAULT_CACHE_RAM_MIB, Context
from llmstudiod.core.flags import find_flag
from llmstudiod.core.memory import MIB, Estimate, Run, checkpoint_bytes, estimate
from llmstudiod.core.model_shape import ModelShape
from llmstudiod.core.recipe import Recipe

FORMULAS = 1
"""The version of the estimate that corrections are relative to."""

DEFAULT_UBATCH = 512
DEFAULT_CHECKPOINTS = 32
ENCODER_BYTES = 1 << 30
"""What an mmproj's encoder may take beside its weights for one picture; not validated."""


def default_cache_ram_mib(total_ram: int) -> int:
    """Return how much host memory prompts of the past may take where a recipe does not say: a sixteenth of it.

    It is promised to each model, so llama-server's own 8 GiB would leave no room for a second one on most machines.

    >>> default_cache_ram_mib(24 << 30), default_cache_ram_mib(1 << 40)
    (1536, 8192)
    """
    return min(DEFAULT_CACHE_RAM_MIB, total_ram // 16 // MIB)


def run_of(
    recipe: Recipe,
    context: Context,
    *,
    cache_ram_mib: int | None,
    n_gpu_layers: int = 0,
    proportions: tuple[float, ...] = (),
) -> Run:
    """Return how llama-server will run the recipe's model, its defaults where the recipe says nothing."""
    extra = _canonical(recipe.extra_args)
    n_batch = recipe.n_batch or 2048
    return Run(
        n_ctx=context.n_ctx_total,
        n_seq=context.n_parallel,
        is_unified=recipe.kv_unified,
        n_ubatch=min(recipe.n_ubatch or DEFAULT_UBATCH, n_batch, context.n_ctx_total),
        type_k=recipe.cache_type_k or "f16",
        type_v=recipe.cache_type_v or "f16",
        flash_attn=recipe.flash_attn is not False,
        swa_full=extra.get("--swa-full") is True,
        all_logits=recipe.embedding or recipe.rerank,
        n_gpu_layers=n_gpu_layers,
        proportions=proportions,
        n_cpu_moe=recipe.n_cpu_moe or 0,
        kv_offload=extra.get("--kv-offload") is not False,
        repack=extra.get("--repack") is not False,
        cache_ram=(cache_ram_mib or 0) * MIB,
        n_checkpoints=_number(extra.get("--ctx-checkpoints"), DEFAULT_CHECKPOINTS),
    )


def on_the_host(shape: ModelShape, run: Run, *, draft: ModelShape | None = None, mmproj_bytes: int = 0) -> Estimate:
    """Return what a model needs at most in host memory, with the files that go with it: nothing on a GPU."""
    total = estimate(shape, run)
    if draft is not None:
        total += estimate(draft, run)
    if mmproj_bytes:
        total = total.with_encoder(weights=mmproj_bytes, compute=ENCODER_BYTES)
    return total


def memory_limit(need: Estimate, shape: ModelShape, run: Run, *, file_bytes: int) -> int:
    """Return the ``MemoryMax=`` of a model's unit where its recipe sets none, in bytes.

    The whole file counts, since its pages do: a limit below that makes a mapped model crawl instead of failing.
    The quarter on top is for what the formulas do not know; a limit is there to stop a leak, not to save memory.
    """
    rest = need.host_total - need.host.weights + need.prompt_cache + checkpoint_bytes(shape, run)
    return (max(need.host.weights, file_bytes) + rest) * 5 // 4


# What a recipe says of other things than what llama-server does with memory.
_UNRELATED = frozenset({
    "id", "name", "description", "tags", "served_model_name", "aliases", "default", "unlisted", "idle_timeout",
    "pinned", "preload", "priority", "concurrency_limit", "load_stall_timeout", "drain_timeout", "restart",
    "restart_limit", "restart_window", "limits", "sandbox",
})  # fmt: skip


def memory_key(recipe: Recipe, files: Iterable[str], build: Iterable[str]) -> str:
    """Return under which name it is kept what a model needs: its files, what is set, the build of llama-server."""
    settings = {name: value for name, value in recipe.as_dict().items() if name not in _UNRELATED}
    content = json.dumps([FORMULAS, settings, *files, *build], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _canonical(extra_args: Mapping[str, object]) -> dict[str, object]:
    """Return the flags by their first name; a negated one as False."""
    values: dict[str, object] = {}
    for key, value in extra_args.items():
        found = find_flag(key)
        if found is not None:
            values[found.flag.names[0]] = (not value) if found.is_negated and isinstance(value, bool) else value
    return values


def _number(value: object, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default
