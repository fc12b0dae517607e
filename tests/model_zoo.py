"""GGUF files of many architectures whose weights are a hole: real sizes, no disk space, loadable by llama.cpp.

For the estimator: what a model needs depends on its header alone. Written by the gguf package.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

TYPES = gguf.GGMLQuantizationType
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """The sizes of a model; ``keys`` go in as they are, with ``{arch}.`` before those that begin with a dot."""

    arch: str = "llama"
    layers: int = 4
    embd: int = 1024
    ff: int = 2816
    heads: int = 16
    kv_heads: int = 4
    head: int = 64
    vocab: int = 2048
    ctx_train: int = 8192
    weights: Any = TYPES.F16
    tied: bool = False
    experts: int = 0
    experts_used: int = 0
    expert_ff: int = 0
    keys: Mapping[str, Any] = field(default_factory=dict)


def tensors(model: Model) -> Iterator[tuple[str, Shape, bool]]:
    """Yield name, shape (row length first) and whether the tensor is a matrix, which is quantised."""
    e = model.embd
    yield "token_embd.weight", (e, model.vocab), True
    yield "output_norm.weight", (e,), False
    if not model.tied:
        yield "output.weight", (e, model.vocab), True
    for layer in range(model.layers):
        for name, shape, is_matrix in _layer(model, layer):
            yield f"blk.{layer}.{name}", shape, is_matrix


def _layer(model: Model, layer: int) -> Iterator[tuple[str, Shape, bool]]:
    e, head = model.embd, model.head
    yield "attn_norm.weight", (e,), False
    if model.arch == "mamba":
        yield from _mamba(model)
        return
    if model.arch == "deepseek2":
        yield from _latent_attention(model)
    else:
        q, kv = model.heads * head, model.kv_heads * head
        yield "attn_q.weight", (e, q), True
        yield "attn_k.weight", (e, kv), True
        yield "attn_v.weight", (e, kv), True
        yield "attn_output.weight", (q, e), True
        if model.arch == "gpt-oss":
            for name, length in (("q", q), ("k", kv), ("v", kv), ("output", e)):
                yield f"attn_{name}.bias", (length,), False
            yield "attn_sinks.weight", (model.heads,), False
    if model.arch in {"qwen3", "qwen3moe", "gemma3"}:
        yield "attn_q_norm.weight", (head,), False
        yield "attn_k_norm.weight", (head,), False
    if model.arch in {"gemma2", "gemma3", "gpt-oss"}:
        yield "post_attention_norm.weight", (e,), False
    if model.arch in {"gemma2", "gemma3"}:
        yield "post_ffw_norm.weight", (e,), False
    if model.arch != "gpt-oss":
        yield "ffn_norm.weight", (e,), False
    dense = model.keys.get(".leading_dense_block_count", 0) if model.experts else model.layers
    yield from _experts(model) if layer >= dense else _feed_forward(model)


def _feed_forward(model: Model) -> Iterator[tuple[str, Shape, bool]]:
    yield "ffn_gate.weight", (model.embd, model.ff), True
    yield "ffn_up.weight", (model.embd, model.ff), True
    yield "ffn_down.weight", (model.ff, model.embd), True


def _experts(model: Model) -> Iterator[tuple[str, Shape, bool]]:
    e, f, n = model.embd, model.expert_ff or model.ff, model.experts
    yield "ffn_gate_inp.weight", (e, n), False
    yield "ffn_gate_exps.weight", (e, f, n), True
    yield "ffn_up_exps.weight", (e, f, n), True
    yield "ffn_down_exps.weight", (f, e, n), True
    if model.arch == "gpt-oss":
        yield "ffn_gate_inp.bias", (n,), False
        yield "ffn_gate_exps.bias", (f, n), False
        yield "ffn_up_exps.bias", (f, n), False
        yield "ffn_down_exps.bias", (e, n), False
    shared = model.keys.get(".expert_shared_count", 0)
    if shared:
        yield "ffn_gate_shexp.weight", (e, f * shared), True
        yield "ffn_up_shexp.weight", (e, f * shared), True
        yield "ffn_down_shexp.weight", (f * shared, e), True


def _latent_attention(model: Model) -> Iterator[tuple[str, Shape, bool]]:
    e, keys = model.embd, model.keys
    rank, rope = keys[".attention.kv_lora_rank"], keys[".rope.dimension_count"]
    key, value = keys[".attention.key_length_mla"], keys[".attention.value_length_mla"]
    yield "attn_q_a.weight", (e, keys[".attention.q_lora_rank"]), True
    yield "attn_q_a_norm.weight", (keys[".attention.q_lora_rank"],), False
    yield "attn_q_b.weight", (keys[".attention.q_lora_rank"], model.heads * key), True
    yield "attn_kv_a_mqa.weight", (e, rank + rope), True
    yield "attn_kv_a_norm.weight", (rank,), False
    yield "attn_k_b.weight", (key - rope, rank, model.heads), True
    yield "attn_v_b.weight", (rank, value, model.heads), True
    yield "attn_output.weight", (model.heads * value, e), True


def _mamba(model: Model) -> Iterator[tuple[str, Shape, bool]]:
    e, keys = model.embd, model.keys
    inner, state = keys[".ssm.inner_size"], keys[".ssm.state_size"]
    rank, kernel = keys[".ssm.time_step_rank"], keys[".ssm.conv_kernel"]
    yield "ssm_in.weight", (e, 2 * inner), True
    yield "ssm_conv1d.weight", (kernel, inner), False
    yield "ssm_conv1d.bias", (inner,), False
    yield "ssm_x.weight", (inner, rank + 2 * state), True
    yield "ssm_dt.weight", (rank, inner), True
    yield "ssm_dt.bias", (inner,), False
    yield "ssm_a", (state, inner), False
    yield "ssm_d", (inner,), False
    yield "ssm_out.weight", (inner, e), True


def write(path: Path, model: Model) -> Path:
    """Write the file: the header, then a hole of the weights' size."""
    writer = gguf.GGUFWriter(path, model.arch)
    values: dict[str, Any] = {
        ".context_length": model.ctx_train, ".embedding_length": model.embd, ".block_count": model.layers,
        ".feed_forward_length": model.ff, ".attention.head_count": model.heads,
        ".attention.head_count_kv": model.kv_heads, ".attention.key_length": model.head,
        ".attention.value_length": model.head, ".attention.layer_norm_rms_epsilon": 1e-5, ".vocab_size": model.vocab,
        ".rope.dimension_count": model.head,
    }  # fmt: skip
    if model.experts:
        values |= {".expert_count": model.experts, ".expert_used_count": model.experts_used}
        values |= {".expert_feed_forward_length": model.expert_ff} if model.expert_ff else {}
    for key, value in {**values, **model.keys}.items():
        _add(writer, f"{model.arch}{key}" if key.startswith(".") else key, value)
    _add_vocabulary(writer, model.vocab)
    total = 0
    for name, shape, is_matrix in tensors(model):
        kind = model.weights if is_matrix else TYPES.F32
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        count = 1
        for n in shape:
            count *= n
        size = count // block * block_bytes
        rows = tuple(reversed(shape))
        # The writer takes the shape of the stored bytes for types of whole blocks.
        stored = (*rows[:-1], rows[-1] // block * block_bytes) if block > 1 else rows
        writer.add_tensor_info(name, stored, _dtype(kind), size, raw_dtype=kind)
        total += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + total)
    return path


def _dtype(kind: Any) -> Any:
    return np.dtype({TYPES.F32: np.float32, TYPES.F16: np.float16}.get(kind, np.uint8))


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_vocabulary(writer: Any, size: int) -> None:
    special = ["<unk>", "<s>", "</s>"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [f"\u2581w{index}" for index in range(size - len(special) - len(pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *pieces, *words])
    writer.add_token_scores([0.0] * (len(special) + len(pieces)) + [-float(index) for index in range(len(words))])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(words)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


MLA = {
    ".attention.kv_lora_rank": 512, ".attention.q_lora_rank": 768, ".rope.dimension_count": 64,
    ".attention.key_length": 576, ".attention.value_length": 512, ".attention.key_length_mla": 192,
    ".attention.value_length_mla": 128, ".leading_dense_block_count": 1, ".expert_shared_count": 1,
    ".expert_weights_scale": 1.0,
}  # fmt: skip
MAMBA = {
    ".ssm.conv_kernel": 4, ".ssm.inner_size": 2048, ".ssm.state_size": 16, ".ssm.time_step_rank": 64,
    ".attention.head_count": 0,
}  # fmt: skip

ZOO: Mapping[str, Model] = {
    "llama-gqa": Model(layers=16, ctx_train=32768),
    "llama-wide": Model(layers=2, embd=4096, ff=14336, heads=32, kv_heads=8, head=128, vocab=32000, ctx_train=131072),
    "qwen3": Model("qwen3", layers=8, heads=16, kv_heads=8, head=128, ctx_train=40960),
    "gemma2": Model("gemma2", layers=6, kv_heads=8, head=128, tied=True, keys={".attention.sliding_window": 4096}),
    "gemma3": Model(
        "gemma3", layers=12, head=128, tied=True, ctx_train=32768, keys={".attention.sliding_window": 1024}
    ),
    "mla": Model("deepseek2", layers=4, heads=16, kv_heads=1, experts=8, experts_used=2, expert_ff=512, keys=MLA),
    "mla-dense": Model(
        "deepseek2", layers=6, heads=16, kv_heads=1, experts=8, experts_used=2, expert_ff=512,
        keys={**MLA, ".leading_dense_block_count": 6},
    ),
    "mixtral": Model(layers=8, experts=8, experts_used=2, ff=3584),
    "qwen3moe": Model(
        "qwen3moe", layers=8, kv_heads=4, head=128, experts=16, experts_used=8, expert_ff=768, ctx_train=40960
    ),
    "gpt-oss": Model(
        "gpt-oss", layers=8, kv_heads=8, experts=8, experts_used=4, expert_ff=1024, ctx_train=131072,
        keys={".attention.sliding_window": 128},
    ),
    "mamba": Model("mamba", layers=8, kv_heads=0, keys=MAMBA),
}  # fmt: skip
