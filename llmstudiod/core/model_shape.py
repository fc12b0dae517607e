"""The sizes of a model that decide how much memory it needs, from what its GGUF header says.

Source: llama.cpp, src/llama-hparams.cpp and the `load_hparams` of each architecture; where a header leaves a size
open, the default is the one of llama.cpp. A size that nobody knows is taken as too large rather than too small.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmstudiod.core.gguf import MetadataValue, TensorInfo

_LAYER = re.compile(r"blk\.([0-9]+)\.")

# Every how many layers one attends to the whole context, where the header does not say.
_SWA_PERIOD: Mapping[str, int] = {
    "gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "cohere2": 4, "llama4": 4, "exaone4": 4, "exaone-moe": 4,
    "olmo2": 4, "smallthinker": 4, "afmoe": 4,
}  # fmt: skip
_SWA_DEFAULT_WINDOW: Mapping[str, int] = {"gemma2": 4096, "llama4": 8192}
_FULL_LAYER_FIRST = {"smallthinker"}
_WITHOUT_CACHE = {
    "bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3", "modern-bert",
    "gemma-embedding", "eurobert", "t5encoder", "wavtokenizer-dec",
}  # fmt: skip
_ALL_RECURRENT = {"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"}
_RECURRENT_WITHOUT_HEADS = {"jamba", "granitehybrid", "lfm2", "lfm2moe", "plamo2", "kimi-linear"}
_RECURRENT_BY_INTERVAL = {"qwen3next", "qwen35", "qwen35moe"}
_BOTH_IN_EACH_LAYER = {"falcon-h1"}
# What was compared with llama.cpp's own count: KV to its rounding, compute buffers within 6 %.
_VALIDATED = {"llama", "qwen2", "qwen3", "gemma2", "gemma3", "deepseek2", "mistral3"}


@dataclass(frozen=True, slots=True)
class Layer:
    """One block. ``k_row`` and ``v_row`` are the elements that a token costs in the KV cache.

    ``window`` is the sliding window in tokens, 0: the whole context. ``state`` are the f32 elements that a sequence
    costs in a recurrent layer, whatever its length. ``weights`` and, among them, ``expert_weights`` in bytes.
    """

    k_row: int = 0
    v_row: int = 0
    window: int = 0
    state: int = 0
    weights: int = 0
    expert_weights: int = 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model's sizes. Weights in bytes; ``input_weights`` stay in host memory, ``output_weights`` count as a layer.

    ``n_embd``, ``n_ff``, ``n_head``, ``q_width``, ``kv_width`` are the widest of all layers, in elements.
    ``mla``: (rank, rope, key, query rank) of latent attention, as llama.cpp's headers name them.
    """

    architecture: str
    layers: tuple[Layer, ...]
    input_weights: int
    output_weights: int
    n_embd: int
    n_ff: int
    n_head: int
    q_width: int
    kv_width: int
    n_vocab: int
    n_ctx_train: int | None
    n_expert: int = 0
    n_expert_used: int = 0
    n_ff_expert: int = 0
    mla: tuple[int, int, int, int] | None = None
    is_tied: bool = False
    has_cache: bool = True
    repackable: int = 0

    @property
    def n_layers(self) -> int:
        """The blocks; llama.cpp counts the output as one layer more."""
        return len(self.layers)

    @property
    def weights(self) -> int:
        """The bytes of all tensors, each once."""
        tied = self.output_weights if self.is_tied else 0
        return self.input_weights + self.output_weights - tied + sum(layer.weights for layer in self.layers)

    @property
    def is_recurrent(self) -> bool:
        """Whether a layer keeps a state, so that llama.cpp cannot go back in a sequence."""
        return any(layer.state for layer in self.layers)

    @property
    def is_validated(self) -> bool:
        """Whether the formulas were held against llama.cpp for this architecture."""
        is_dense = not self.n_expert or self.mla is not None
        return self.architecture in _VALIDATED and is_dense and not self.is_recurrent


class _Keys:
    """The values of one architecture, with what stands in their place where they are missing."""

    def __init__(self, metadata: Mapping[str, MetadataValue], architecture: str) -> None:
        self._metadata, self._architecture = metadata, architecture

    def value(self, name: str) -> MetadataValue | None:
        return self._metadata.get(f"{self._architecture}.{name}")

    def number(self, name: str, default: int = 0) -> int:
        value = self.value(name)
        if isinstance(value, tuple):
            value = max((item for item in value if isinstance(item, int)), default=default)
        return value if isinstance(value, int) and value >= 0 else default

    def by_layer(self, name: str, n_layers: int, default: int) -> list[int]:
        """Return a value for each layer: llama.cpp takes a number for all, or an array."""
        value = self.value(name)
        if isinstance(value, tuple) and len(value) >= n_layers:
            return [int(item) for item in value[:n_layers]]
        return [self.number(name, default)] * n_layers


def model_shape(metadata: Mapping[str, MetadataValue], tensors: Iterable[TensorInfo]) -> ModelShape | None:
    """Return the sizes of a model from its header and the tensors of all its shards.

    None where the header lacks what every architecture has: the count of layers, the width, or its name.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        return None
    keys = _Keys(metadata, architecture)
    n_layers, n_embd = keys.number("block_count"), keys.number("embedding_length")
    if not 0 < n_layers <= 1024 or not n_embd:
        return None
    tensors = tuple(tensors)
    weights = _Weights(tensors, n_layers)
    heads = keys.by_layer("attention.head_count", n_layers, 0)
    kv_heads = keys.by_layer("attention.head_count_kv", n_layers, max(heads))
    n_head = max(heads)
    key = keys.number("attention.key_length", n_embd // n_head if n_head else 0)
    value = keys.number("attention.value_length", n_embd // n_head if n_head else 0)
    mla = _latent_attention(keys)
    rows = [(mla[0] + mla[1], 0) if mla else (count * key, count * value) for count in kv_heads]
    windows = _windows(keys, architecture, n_layers)
    swa = (keys.number("attention.key_length_swa", key), keys.number("attention.value_length_swa", value))
    states = _states(keys, architecture, kv_heads, n_embd)
    n_cached = _cached_layers(keys, architecture, n_layers)
    layers = []
    for index in range(n_layers):
        k_row, v_row = rows[index]
        if windows[index] and not mla:
            k_row, v_row = kv_heads[index] * swa[0], kv_heads[index] * swa[1]
        is_cached = index < n_cached and (not states[index] or architecture in _BOTH_IN_EACH_LAYER)
        k_row, v_row = (k_row, v_row) if is_cached and architecture not in _WITHOUT_CACHE else (0, 0)
        own, experts = weights.layers[index], weights.experts[index]
        layers.append(Layer(k_row, v_row, windows[index] if is_cached else 0, states[index], own, experts))
    return ModelShape(
        architecture=architecture,
        layers=tuple(layers),
        input_weights=weights.input,
        output_weights=weights.output,
        n_embd=n_embd,
        n_ff=keys.number("feed_forward_length"),
        n_head=n_head,
        q_width=n_head * max(key, swa[0]),
        kv_width=max(kv_heads) * max(key, swa[0]),
        n_vocab=weights.n_vocab or keys.number("vocab_size"),
        n_ctx_train=keys.number("context_length") or None,
        n_expert=keys.number("expert_count"),
        n_expert_used=keys.number("expert_used_count"),
        n_ff_expert=keys.number("expert_feed_forward_length", keys.number("feed_forward_length")),
        mla=mla,
        is_tied=weights.is_tied,
        has_cache=architecture not in _WITHOUT_CACHE,
        repackable=weights.repackable,
    )


class _Weights:
    """The bytes of tensors by where llama.cpp puts them."""

    # ggml/src/ggml-cpu/repack.cpp: these are copied into another order for the CPU, beside the file's own pages.
    _REPACKED = frozenset({"q4_0", "q4_K", "q2_K", "q5_K", "q6_K", "q8_0", "iq4_nl", "mxfp4"})

    def __init__(self, tensors: tuple[TensorInfo, ...], n_layers: int) -> None:
        self.layers, self.experts = [0] * n_layers, [0] * n_layers
        self.input = self.output = self.repackable = self.n_vocab = 0
        embedding = 0
        has_output = False
        for tensor in tensors:
            size = tensor.n_bytes if tensor.n_bytes is not None else 4 * math.prod(tensor.shape)
            place = _LAYER.match(tensor.name)
            if place and int(place[1]) < n_layers:
                self.layers[int(place[1])] += size
                self.experts[int(place[1])] += size if "_exps." in tensor.name else 0
            elif tensor.name.startswith("output"):
                self.output += size
                has_output |= tensor.name == "output.weight"
            else:
                self.input += size
            if tensor.name == "token_embd.weight" and len(tensor.shape) > 1:
                self.n_vocab, embedding = tensor.shape[1], size
            elif len(tensor.shape) > 1 and tensor.type.name in self._REPACKED:
                self.repackable += size
        self.is_tied = not has_output
        if self.is_tied:  # the embedding serves as output: on a GPU it lies there a second time
            self.output += embedding


def _latent_attention(keys: _Keys) -> tuple[int, int, int, int] | None:
    rank, key = keys.number("attention.kv_lora_rank"), keys.number("attention.key_length_mla")
    if not rank or not key:
        return None
    rope = keys.number("rope.dimension_count")
    return rank, rope, key, keys.number("attention.q_lora_rank")


def _windows(keys: _Keys, architecture: str, n_layers: int) -> list[int]:
    """Return the sliding window of each layer; 0 for the layers that see everything."""
    window = keys.number("attention.sliding_window", _SWA_DEFAULT_WINDOW.get(architecture, 0))
    if architecture == "llama4":
        window = keys.number("attention.chunk_size", _SWA_DEFAULT_WINDOW[architecture])
    if not window:
        return [0] * n_layers
    pattern = keys.value("attention.sliding_window_pattern")
    if isinstance(pattern, tuple) and len(pattern) >= n_layers:
        return [window if item else 0 for item in pattern[:n_layers]]
    period = keys.number("attention.sliding_window_pattern", _SWA_PERIOD.get(architecture, 0))
    if not period:  # a window in the header of an architecture that does not use it
        return [0] * n_layers
    full = 0 if architecture in _FULL_LAYER_FIRST else period - 1
    return [0 if index % period == full else window for index in range(n_layers)]


def _cached_layers(keys: _Keys, architecture: str, n_layers: int) -> int:
    """Return how many layers, from the first, have a KV cache of their own."""
    shared = keys.number("attention.shared_kv_layers", 10 if architecture == "gemma3n" else 0)
    return max(1, n_layers - shared - keys.number("nextn_predict_layers"))


def _states(keys: _Keys, architecture: str, kv_heads: list[int], n_embd: int) -> list[int]:
    """Return the f32 elements of a sequence's state in each layer. Source: llama_hparams::n_embd_r and n_embd_s."""
    n_layers = len(kv_heads)
    interval = keys.number("full_attention_interval", 4)
    if architecture in _ALL_RECURRENT or architecture in _BOTH_IN_EACH_LAYER:
        is_recurrent = [True] * n_layers
    elif architecture in _RECURRENT_WITHOUT_HEADS:
        is_recurrent = [count == 0 for count in kv_heads]
    elif architecture == "nemotron_h":  # a layer without heads is a feed-forward layer where it has a width
        widths = keys.by_layer("feed_forward_length", n_layers, 0)
        is_recurrent = [count == 0 and width == 0 for count, width in zip(kv_heads, widths, strict=True)]
    elif architecture in _RECURRENT_BY_INTERVAL:
        is_recurrent = [(index + 1) % interval != 0 for index in range(n_layers)]
    else:
        return [0] * n_layers
    inner, size = keys.number("ssm.inner_size"), keys.number("ssm.state_size")
    heads = keys.number("wkv.head_size")
    if heads:  # rwkv: the shifted tokens, and one matrix for each head
        state = keys.number("token_shift_count", 2) * n_embd + n_embd * heads
    elif keys.number("shortconv.l_cache"):
        state = n_embd * (keys.number("shortconv.l_cache") - 1)
    else:
        kernel = max(0, keys.number("ssm.conv_kernel") - 1)
        state = kernel * (inner + 2 * keys.number("ssm.group_count") * size) + size * inner
    return [state if recurrent else 0 for recurrent in is_recurrent]
