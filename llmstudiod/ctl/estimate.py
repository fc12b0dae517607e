"""``llmstudioctl estimate FILE``: what a model needs, read from its header as whoever asks, without a daemon."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmstudiod.adapters.gguf_file import read_header
from llmstudiod.adapters.model_files import ModelFile, resolve_model
from llmstudiod.core.command import Context, plan_context
from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.memory import Estimate, estimate
from llmstudiod.core.model_shape import ModelShape, model_shape
from llmstudiod.core.needs import ENCODER_BYTES, run_of
from llmstudiod.core.recipe import Recipe
from llmstudiod.core.units import counted, format_bytes
from llmstudiod.ctl import show
from llmstudiod.ctl.client import Client

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
MAX_TOKENS = 1 << 24


class EstimateError(LlmstudioError):
    """What is asked cannot be estimated."""

    kind, status, exit_code = "bad_request", 400, 3


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to run the model, with what it needs."""

    name: str
    need: Estimate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file and the settings that change what it needs."""
    parser.add_argument("file", type=Path, help="a GGUF file, or the first of its shards")
    parser.add_argument("--n-ctx", type=_whole(MAX_TOKENS), metavar="TOKENS", help="context of one request")
    parser.add_argument("--n-parallel", type=_whole(256), metavar="N", help="requests at the same time (default: 4)")
    parser.add_argument("--kv-unified", action="store_true", help="all requests share one context")
    parser.add_argument("--n-gpu-layers", type=_whole(1024, least=0), metavar="N", help="layers on one GPU")
    parser.add_argument("--cache-type-k", choices=CACHE_TYPES, help="type of the keys (default: f16)")
    parser.add_argument("--cache-type-v", choices=CACHE_TYPES, help="type of the values (default: f16)")
    parser.add_argument("--n-ubatch", type=_whole(1 << 16), metavar="TOKENS", help="micro-batch (default: 512)")
    parser.add_argument("--no-flash-attn", action="store_true", help="without flash attention")
    parser.add_argument("--n-cpu-moe", type=_whole(1024, least=0), metavar="N", help="experts of N layers stay in RAM")
    parser.add_argument("--draft-model", type=Path, metavar="FILE", help="a draft model beside it")
    parser.add_argument("--mmproj", type=Path, metavar="FILE", help="an encoder for pictures or sound beside it")


def command(_: Client, arguments: argparse.Namespace) -> int:
    """Print what the model needs on the CPU and on one GPU, or with the layers that were asked for."""
    model = resolve_model(arguments.file)
    shape = _shape(model)
    recipe = Recipe(
        id="estimate",
        model_path=str(arguments.file),
        max_model_len=arguments.n_ctx,
        max_num_seqs=arguments.n_parallel,
        kv_unified=arguments.kv_unified,
        flash_attn=not arguments.no_flash_attn,
        n_ubatch=arguments.n_ubatch,
        cache_type_k=arguments.cache_type_k,
        cache_type_v=arguments.cache_type_v,
        n_cpu_moe=arguments.n_cpu_moe,
    )
    context = plan_context(recipe, shape.n_ctx_train)
    draft = None if arguments.draft_model is None else _shape(resolve_model(arguments.draft_model))
    mmproj = 0 if arguments.mmproj is None else read_header(arguments.mmproj).weights_bytes
    every = shape.n_layers + 1
    layers = [0, every] if arguments.n_gpu_layers is None else [min(arguments.n_gpu_layers, every)]
    ways = [_Way(_name(count, every), _need(recipe, context, shape, count, draft, mmproj)) for count in layers]
    if arguments.json:
        print(json.dumps(_as_dict(model, shape, context, ways), ensure_ascii=False, indent=2))
        return 0
    print(_head(model, shape, context))
    for way in ways:
        print(f"\n{way.name}\n{show.memory_table(way.need.as_dict())}")
    for note in ways[0].need.notes:
        print(f"\nnote: the compute buffers are {note}; llama-server itself will tell more exactly")
    return 0


def _need(
    recipe: Recipe, context: Context, shape: ModelShape, layers: int, draft: ModelShape | None, mmproj: int
) -> Estimate:
    run = run_of(recipe, context, cache_ram_mib=None, n_gpu_layers=layers, proportions=(1.0,) if layers else ())
    need = estimate(shape, run)
    if draft is not None:
        need += estimate(draft, run)
    return need.with_encoder(weights=mmproj, compute=ENCODER_BYTES) if mmproj else need


def _shape(model: ModelFile) -> ModelShape:
    shape = model_shape(model.header.metadata, model.tensors)
    if shape is None:
        architecture = model.header.architecture or "none"
        message = f"{str(model.path)!r} does not tell its layers and width (architecture: {architecture})"
        raise EstimateError(message, hint="an encoder or adapter goes with a model: name it by --mmproj")
    return shape


def _name(layers: int, every: int) -> str:
    if not layers:
        return "without a GPU"
    return "all layers on one GPU" if layers == every else f"{layers} of {every} layers on one GPU"


def _head(model: ModelFile, shape: ModelShape, context: Context) -> str:
    kind = ", ".join(filter(None, [shape.architecture, model.header.file_type, f"{shape.n_layers} layers"]))
    trained = f", trained for {shape.n_ctx_train} tokens" if shape.n_ctx_train else ""
    return (
        f"{model.header.name or model.path.stem}: {kind}{trained}, {format_bytes(model.total_bytes)}\n"
        f"{counted(context.n_parallel, 'slot')} of {context.n_ctx} tokens, {context.n_ctx_total} in all"
    )


def _as_dict(model: ModelFile, shape: ModelShape, context: Context, ways: list[_Way]) -> dict[str, Any]:
    return {
        "file": str(model.path),
        "name": model.header.name,
        "architecture": shape.architecture,
        "file_type": model.header.file_type,
        "layers": shape.n_layers,
        "n_ctx_train": shape.n_ctx_train,
        "file_bytes": model.total_bytes,
        "n_ctx": context.n_ctx,
        "n_parallel": context.n_parallel,
        "n_ctx_total": context.n_ctx_total,
        "estimates": [{"name": way.name, **way.need.as_dict()} for way in ways],
    }


def _whole(most: int, *, least: int = 1) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {least} to {most}, found {value}")
        return value

    return number
