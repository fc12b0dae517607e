"""What a model will need: weights, KV cache and compute buffers in bytes, for each device and for the host.

Pure arithmetic on `ModelShape`. KV equals llama-server's own log to its rounding; compute buffers were within 6 % of
it for dense, sliding-window and latent attention (`tests/system/test_estimates.py` asks the installed llama-server).
Source of the formulas: llama.cpp, src/llama-kv-cache.cpp, llama-memory-recurrent.cpp and llama-model.cpp for KV cache
and layers; the compute buffers were fitted to what llama.cpp 0.7.0 reserves.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import Any, Self

from llmstudiod.core.model_shape import Layer, ModelShape

MIB = 1 << 20

# (elements, bytes) of a block. Source: ggml.c, type_traits.
_CACHE_TYPES: Mapping[str, tuple[int, int]] = {
    "f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q5_1": (32, 24), "q5_0": (32, 22),
    "q4_1": (32, 20), "q4_0": (32, 18), "iq4_nl": (32, 18),
}  # fmt: skip

PROCESS_BYTES = 64 * MIB
"""An idle llama-server has 23 MB, of which 17 are its program; the rest is for threads and their stacks."""

GPU_PROCESS_BYTES = 512 * MIB
"""A GPU's runtime library takes 150 MB of host memory and more, with pinned buffers for copies."""

VOCABULARY_BYTES = 320
"""Host memory for one token: 150,000 took 42 MB."""

DEVICE_RUNTIME_BYTES = 512 * MIB
"""What a GPU's runtime takes on the device before the first tensor, its context and kernels."""


@dataclass(frozen=True, slots=True)
class Run:
    """How a model is run. ``n_ctx`` is llama-server's ``-c``, the total of all slots; sizes as its flags mean them.

    ``n_gpu_layers`` counts the output as a layer. ``proportions`` is the share of each device, not normalised.
    """

    n_ctx: int
    n_seq: int = 1
    is_unified: bool = False
    n_ubatch: int = 512
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: bool = True
    swa_full: bool = False
    all_logits: bool = False
    n_gpu_layers: int = 0
    proportions: tuple[float, ...] = ()
    split_mode: str = "layer"
    main_gpu: int = 0
    n_cpu_moe: int = 0
    kv_offload: bool = True
    repack: bool = True
    cache_ram: int = 0
    n_checkpoints: int = 32


@dataclass(frozen=True, slots=True)
class Share:
    """What one device holds, in bytes; ``layers`` of the model lie on it."""

    weights: int = 0
    kv: int = 0
    compute: int = 0
    runtime: int = 0
    layers: int = 0

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.weights + self.kv + self.compute + self.runtime

    def __add__(self, other: "Share") -> "Share":
        """Return the sum of each term."""
        return Share(
            self.weights + other.weights,
            self.kv + other.kv,
            self.compute + other.compute,
            max(self.runtime, other.runtime),
            self.layers + other.layers,
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a model needs, in bytes.

    ``host``: what lies in host memory for good; its weights are the mapped file's pages. ``repacked`` are copies of
    weights in another order, which the CPU may make beside them; ``prompt_cache`` may grow to that.
    ``is_validated``: the formulas were held against llama.cpp for this architecture.
    """

    host: Share
    devices: tuple[Share, ...] = ()
    repacked: int = 0
    prompt_cache: int = 0
    is_validated: bool = True
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the estimate of which ``values`` are the fields, as JSON holds them."""
        devices = tuple(Share(**share) for share in values["devices"])
        return cls(**{**values, "host": Share(**values["host"]), "devices": devices, "notes": tuple(values["notes"])})

    @property
    def host_total(self) -> int:
        """Return the most that it will have in host memory, without the prompt cache."""
        return self.host.total + self.repacked

    @property
    def kv(self) -> int:
        """Return the KV cache and the recurrent states, wherever they lie."""
        return self.host.kv + sum(device.kv for device in self.devices)

    def as_dict(self) -> dict[str, Any]:
        """Return the terms as JSON holds them, in bytes."""
        return {
            "host": {**asdict(self.host), "repacked": self.repacked, "total": self.host_total},
            "devices": [{**asdict(share), "total": share.total} for share in self.devices],
            "prompt_cache": self.prompt_cache,
            "is_validated": self.is_validated,
            "notes": list(self.notes),
        }

    def with_encoder(self, *, weights: int, compute: int) -> "Estimate":
        """Return the same with an encoder for pictures or sound, which goes to the first device that is used."""
        share = Share(weights=weights, compute=compute)
        for index, device in enumerate(self.devices):
            if device.layers:
                devices = (*self.devices[:index], device + share, *self.devices[index + 1 :])
                return replace(self, devices=devices)
        return replace(self, host=self.host + share)

    def __add__(self, other: "Estimate") -> "Estimate":
        """Return what both need, as for a draft model beside the model itself."""
        count = max(len(self.devices), len(other.devices))
        mine, others = (each.devices + (Share(),) * (count - len(each.devices)) for each in (self, other))
        return Estimate(
            host=self.host + other.host,
            devices=tuple(a + b for a, b in zip(mine, others, strict=True)),
            repacked=self.repacked + other.repacked,
            prompt_cache=max(self.prompt_cache, other.prompt_cache),
            is_validated=self.is_validated and other.is_validated,
            notes=(*self.notes, *other.notes),
        )


def row_bytes(elements: int, cache_type: str) -> int:
    """Return the bytes of a row in the KV cache.

    >>> row_bytes(1024, "q8_0")
    1088
    """
    block, size = _CACHE_TYPES[cache_type]
    return -(-elements // block) * size


def cells(run: Run) -> tuple[int, int]:
    """Return the tokens that one stream of the cache holds, and how many streams there are.

    >>> cells(Run(n_ctx=5000, n_seq=3))
    (1792, 3)
    """
    n_ctx = _padded(run.n_ctx)
    return (n_ctx, 1) if run.is_unified else (_padded(n_ctx // run.n_seq), run.n_seq)


def window_cells(window: int, run: Run) -> int:
    """Return the cells that a layer with a sliding window keeps in each stream."""
    n_ctx, _ = cells(run)
    if run.swa_full:
        return n_ctx
    return _padded(min(n_ctx, window * (run.n_seq if run.is_unified else 1) + run.n_ubatch))


def layer_kv(layer: Layer, run: Run) -> int:
    """Return the bytes of one layer's KV cache and state, for all sequences."""
    n_ctx, streams = cells(run)
    count = window_cells(layer.window, run) if layer.window else n_ctx
    row = row_bytes(layer.k_row, run.type_k) + row_bytes(layer.v_row, run.type_v)
    return count * streams * row + 4 * run.n_seq * layer.state


def kv_bytes(shape: ModelShape, run: Run) -> int:
    """Return the bytes of the whole KV cache, recurrent states included."""
    return sum(layer_kv(layer, run) for layer in shape.layers)


def checkpoint_bytes(shape: ModelShape, run: Run) -> int:
    """Return the most that saved states take in host memory: a slot keeps some of what cannot be gone back to.

    Source: llama-server's ``--ctx-checkpoints``, for sliding windows and recurrent layers.
    """
    each = 0
    for layer in shape.layers:
        if layer.window and not run.swa_full:
            each += layer.window * (row_bytes(layer.k_row, run.type_k) + row_bytes(layer.v_row, run.type_v))
        each += 4 * layer.state
    return run.n_checkpoints * run.n_seq * each


def compute_bytes(shape: ModelShape, run: Run) -> int:
    """Return the bytes of the buffer for intermediate results where the whole model runs on one device.

    The most that is alive at one moment, for each token of a micro-batch: the attention or the feed-forward part.
    """
    n_ctx, _ = cells(run)
    masks = n_ctx + max((window_cells(layer.window, run) for layer in shape.layers if layer.window), default=0)
    if not shape.has_cache:
        masks = run.n_ubatch
    e = shape.n_embd
    attention = _attention_width(shape)
    if run.flash_attn:
        width = max(attention, _feed_forward_width(shape))
        masks_bytes = 2 * masks
    else:
        scores = shape.n_head * (n_ctx if shape.has_cache else run.n_ubatch)
        width = scores + attention + (0 if shape.mla else 2 * e)
        masks_bytes = 4 * masks
    if not any(layer.k_row for layer in shape.layers) and shape.has_cache:
        masks_bytes = 0
    if run.all_logits:
        width = max(width, shape.n_vocab + 6 * e)
    return run.n_ubatch * (4 * width + masks_bytes)


def output_bytes(shape: ModelShape, run: Run) -> int:
    """Return the bytes of the buffer in host memory for the logits."""
    return 4 * shape.n_vocab * (run.n_ubatch if run.all_logits else run.n_seq)


def _attention_width(shape: ModelShape) -> int:
    """Return the elements that are alive for a token in the attention."""
    e = shape.n_embd
    if shape.mla:  # queries and replies in the latent space are wider than the model
        rank, rope, key, query_rank = shape.mla
        return shape.n_head * (key + 2 * rank + 3 * rope) + 7 * max(e, query_rank) // 2
    state = max((layer.state for layer in shape.layers), default=0)
    if state and not shape.n_head:  # not validated: the inner width of a state-space layer, several times
        return 14 * e
    many = 2 if shape.kv_width >= shape.q_width else 0
    return 2 * shape.q_width + 2 * shape.kv_width + (3 + many) * e


def _feed_forward_width(shape: ModelShape) -> int:
    """Return the elements that are alive for a token in the feed-forward part."""
    e = shape.n_embd
    width = 3 * shape.n_ff + 5 * e
    if shape.n_expert:
        experts = shape.n_expert_used
        up = experts * shape.n_ff_expert
        width = max(3 * up + 5 * e, 2 * experts * e + up + 2 * e, width if shape.mla else 0)
    return width


def assign_layers(n_layers: int, n_gpu_layers: int, proportions: Iterable[float]) -> list[int | None]:
    """Return the device of each layer, and of the output as the last; None: the host.

    The last layers go to the devices. Source: llama_model::load_tensors, get_layer_buft_list.

    >>> assign_layers(4, 3, [1, 1])
    [None, None, 0, 0, 1]
    """
    shares = list(proportions)
    total = sum(shares)
    if not shares or total <= 0:
        return [None] * (n_layers + 1)
    ends = [part / total for part in accumulate(shares)]
    first = max(n_layers + 1 - n_gpu_layers, 0)
    count = min(n_gpu_layers, n_layers + 1)
    placed: list[int | None] = [None] * min(first, n_layers + 1)
    for index in range(n_layers + 1 - first):
        place = index / count
        placed.append(next((device for device, end in enumerate(ends) if place < end), len(ends) - 1))
    return placed


def estimate(shape: ModelShape, run: Run) -> Estimate:
    """Return what the model needs when it is run like that."""
    proportions = run.proportions
    if run.split_mode == "none" and proportions:
        proportions = tuple(float(index == run.main_gpu) for index in range(len(proportions)))
    placed = assign_layers(shape.n_layers, run.n_gpu_layers, proportions)
    host, devices = Share(), [Share()] * len(proportions)
    for index, (layer, device) in enumerate(zip(shape.layers, placed, strict=False)):
        kv = layer_kv(layer, run)
        experts = layer.expert_weights if index < run.n_cpu_moe else 0
        if device is None:
            host += Share(weights=layer.weights, kv=kv, layers=1)
            continue
        here = kv if run.kv_offload else 0
        devices[device] += Share(weights=layer.weights - experts, kv=here, layers=1)
        host += Share(weights=experts, kv=kv - here)
    output = placed[-1]
    host += Share(weights=shape.input_weights)
    if output is None:
        host += Share(weights=0 if shape.is_tied else shape.output_weights)
    else:
        devices[output] += Share(weights=shape.output_weights, layers=1)
    compute = compute_bytes(shape, run)
    n_ctx, _ = cells(run)
    inputs = run.n_ubatch * (4 * shape.n_embd + 2 * n_ctx)
    used = [bool(device.layers) for device in devices]
    on_host = compute if host.layers or not any(used) or run.n_cpu_moe else inputs
    runtime = PROCESS_BYTES + VOCABULARY_BYTES * shape.n_vocab + (GPU_PROCESS_BYTES if any(used) else 0)
    host += Share(compute=on_host + output_bytes(shape, run), runtime=runtime)
    devices = [
        device + Share(compute=compute, runtime=DEVICE_RUNTIME_BYTES) if is_used else device
        for device, is_used in zip(devices, used, strict=True)
    ]
    repacked = min(shape.repackable, host.weights) if run.repack else 0
    notes = () if shape.is_validated else (f"not validated for {_kind(shape)}",)
    return Estimate(host, tuple(devices), repacked, run.cache_ram, shape.is_validated, notes)


def _kind(shape: ModelShape) -> str:
    if shape.is_recurrent:
        return f"recurrent layers ({shape.architecture})"
    return f"experts ({shape.architecture})" if shape.n_expert else f"architecture {shape.architecture}"


def _padded(tokens: int) -> int:
    return -(-tokens // 256) * 256
