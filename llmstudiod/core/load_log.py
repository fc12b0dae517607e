"""What the log of a load tells: how far it is, and what is not as it was asked for.

Only the lines up to the ready mark count; behind it clients write into the log as they please. Source of the lines:
llama.cpp 0.7.0 (build 11669), recorded runs, with ``-lv 4``; CUDA's from ggml-cuda.cu.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from llmstudiod.core.placement import Placement
from llmstudiod.core.recipe import Recipe

_READY = re.compile(r"listening on (?:https?|unix)://|listening on unix:")
_PREFIX = re.compile(r"^\d+\.\d\d\.\d{3}\.\d{3} [IWEDT] ")

# Marks in the order in which a load passes them: the share of the load that is behind it, the word for what follows.
_STAGES: tuple[tuple[str, float, str], ...] = (
    (r"initializing \.\.\.|loaded \w+ backend", 0.01, "starting"),
    (r"load_model: loading model|llama_model_loader: loaded meta data", 0.02, "reading the model"),
    (r"load_tensors: loading model tensors", 0.05, "reading the model"),
    (r"llama_context: constructing|llama_kv_cache.*: size =|KV buffer size", 0.85, "reserving memory"),
    (r"sched_reserve: .*compute buffer size|graph_reserve", 0.9, "reserving memory"),
    (r"warming up the model", 0.93, "warming up"),
    (r"initializing, n_slots =|initializing slots", 0.97, "warming up"),
    (r"model loaded", 0.99, "warming up"),
)
_COMPILED = tuple((re.compile(pattern), share, word) for pattern, share, word in _STAGES)

_OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
_CAPPED = re.compile(r"the slot context \((\d+)\) exceeds the training context of the model \((\d+)\) - capping")
_REDUCED = re.compile(r"context size reduced from (\d+) to (\d+)")
_NO_CUDA = re.compile(r"failed to initialize (CUDA|ROCm|MUSA|HIP): (.*)")
_SIMPLE: tuple[tuple[str, str], ...] = (
    (
        r"failed to initialize speculative decoding context|target and draft vocabs are not compatible",
        "the draft model is not used: it does not fit the model's vocabulary; see draft_model",
    ),
    (
        r"failed to mlock|mlock.*(?:failed|Cannot allocate memory)",
        "its memory could not be locked; see load_mode, and LimitMEMLOCK= of its unit",
    ),
    (
        r"failed to set (?:process )?(?:priority|affinity)|failed to set affinity",
        "its priority or CPU affinity could not be set; use limits.nice and limits.allowed_cpus instead",
    ),
    (
        r"Flash Attention (?:was auto, set to disabled|not supported)|flash_attn.*(?:not supported|forcing off)",
        "flash attention is off: it is not possible here, and its KV cache takes more memory",
    ),
)
_SIMPLE_COMPILED = tuple((re.compile(pattern), text) for pattern, text in _SIMPLE)


@dataclass(frozen=True, slots=True)
class Expected:
    """What a start asked for. ``n_gpu_layers`` counts the output as a layer; None: all that there are."""

    is_on_gpu: bool = False
    n_gpu_layers: int | None = None
    has_draft: bool = False


def expected(recipe: Recipe, placement: Placement | None, *, lists_gpus: bool, has_gpus: bool) -> Expected:
    """Return what a start by a recipe asked for, where it was placed if that is known.

    ``lists_gpus``: llama-server does; ``has_gpus``: the machine has some, whatever llama-server makes of them. A model
    that is left to the processor though it lists some was meant to go there.
    """
    layers = recipe.n_gpu_layers
    if placement is not None and placement.gpus:
        return Expected(is_on_gpu=True, n_gpu_layers=placement.run.n_gpu_layers, has_draft=_has_draft(recipe))
    is_left_to_us = has_gpus if placement is None or not lists_gpus else False
    is_on_gpu = recipe.gpus != "none" and layers != 0 and (is_left_to_us if layers == "auto" else True)
    return Expected(is_on_gpu, layers if isinstance(layers, int) else None, _has_draft(recipe))


def _has_draft(recipe: Recipe) -> bool:
    return recipe.draft_model is not None


@dataclass(frozen=True, slots=True)
class LoadFacts:
    """``progress``: a lower bound from 0 to 1 that the lines prove; ``warnings``: sentences with the next step."""

    stage: str = "starting"
    progress: float = 0.0
    warnings: tuple[str, ...] = ()
    is_ready: bool = False


def read_load(lines: Iterable[str], expected: Expected) -> LoadFacts:
    """Return what the lines of one run tell of its load."""
    stage, progress, is_ready = "starting", 0.0, False
    warnings: dict[str, None] = {}
    for line in lines:
        text = _PREFIX.sub("", line)
        if _READY.search(text):
            stage, progress, is_ready = "ready", 1.0, True
            break
        for pattern, share, word in _COMPILED:
            if share > progress and pattern.search(text):
                stage, progress = word, share
        warnings |= dict.fromkeys(_warnings(text, expected))
    return LoadFacts(stage, progress, tuple(warnings), is_ready)


def _warnings(text: str, expected: Expected) -> list[str]:
    """Return what one line tells that is not as it was asked for."""
    found = [warning for pattern, warning in _SIMPLE_COMPILED if pattern.search(text)]
    if expected.has_draft and "no implementations specified for speculative decoding" in text:
        found.append("the draft model is not used: llama-server was not told how; see spec_type")
    if expected.is_on_gpu:
        found += _about_gpus(text, expected)
    if match := _CAPPED.search(text):
        found.append(f"a request may use {match[2]} tokens, which the model was trained for, instead of {match[1]}")
    if match := _REDUCED.search(text):
        found.append(
            f"the context has {match[2]} tokens instead of {match[1]}, for want of memory; max_model_len sets it"
        )
    return found


def _about_gpus(text: str, expected: Expected) -> list[str]:
    if match := _NO_CUDA.search(text):
        return [
            f"no GPU is used: {match[1]} could not be initialized ({match[2].strip()}); `llmstudioctl gpus` tells more"
        ]
    if "no usable GPU found" in text:
        return ["no GPU is used: this llama-server finds none; see `llmstudioctl status` for its build and devices"]
    match = _OFFLOADED.search(text)
    if match is None:
        return []
    placed, n_all = int(match[1]), int(match[2])
    wanted = n_all if expected.n_gpu_layers is None else min(expected.n_gpu_layers, n_all)
    if placed >= wanted:
        return []
    return [f"{placed} of {n_all} layers are on the GPU, and {wanted} were to be; the others run on the CPU"]
