"""What a model needs: the formulas against figures that llama-server 0.7.0 logged, and what must hold for all."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstudiod.adapters.gguf_file import read_header
from llmstudiod.core.command import plan_context
from llmstudiod.core.gguf import GGML_TYPES, MetadataValue, TensorInfo
from llmstudiod.core.memory import (
    DEVICE_RUNTIME_BYTES,
    MIB,
    Run,
    assign_layers,
    cells,
    checkpoint_bytes,
    compute_bytes,
    estimate,
    kv_bytes,
)
from llmstudiod.core.model_shape import Layer, ModelShape, model_shape
from llmstudiod.core.needs import memory_limit, on_the_host, run_of
from llmstudiod.core.recipe import Recipe
from tests.model_zoo import TYPES, ZOO, Model, write

# A model of 16 layers with 4 x 128 keys and values; MiB of its KV cache as logged.
BIG = ModelShape(
    architecture="llama", layers=(Layer(k_row=512, v_row=512),) * 16, input_weights=0, output_weights=0, n_embd=2048,
    n_ff=5632, n_head=16, q_width=2048, kv_width=512, n_vocab=678, n_ctx_train=8192,
)  # fmt: skip
LOGGED_KV = [
    (Run(4096), 128.0),
    (Run(4096, type_k="q8_0", type_v="q8_0"), 68.0),
    (Run(4096, type_k="q4_0", type_v="q4_0"), 36.0),
    (Run(4096, type_k="q8_0"), 98.0),
    (Run(4096, type_k="q5_1", type_v="iq4_nl"), 42.0),
    (Run(4096, type_k="f32", type_v="f32"), 256.0),
    (Run(4097), 136.0),
    (Run(4096, n_seq=3), 144.0),
]
# By model of the zoo, for -c 8192 -np 2: MiB of KV cache, of compute buffer, of weights.
LOGGED = {
    "llama-gqa": (128.0, 30.52, 352.13),
    "qwen3": (256.0, 30.52, 236.07),
    "gemma2": (192.0, 34.53, 175.10),
    "gemma3": (92.0, 32.03, 322.20),
    "mla": (36.0, 54.01, 166.15),
    "mla-dense": (54.0, 54.01, 197.83),
    "mixtral": (64.0, 56.02, 1392.32),
    "gpt-oss": (76.0, 38.78, 441.16),
    "mamba": (2.38, 30.30, 110.47),
}

MINIMAL: Mapping[str, MetadataValue] = {
    "general.architecture": "llama", "llama.block_count": 1, "llama.embedding_length": 64,
}  # fmt: skip


def shape_of(model: Model, directory: Path) -> ModelShape:
    """Return what the estimator sees of a model."""
    header = read_header(write(directory / "m.gguf", model))
    shape = model_shape(header.metadata, header.tensors)
    assert shape is not None
    return shape


@pytest.mark.parametrize(("run", "mib"), LOGGED_KV)
def test_kv_cache_is_as_logged(run: Run, mib: float) -> None:
    """Padding, streams and the blocks of each type."""
    assert kv_bytes(BIG, run) == mib * MIB


@pytest.mark.parametrize("name", LOGGED)
def test_model_is_as_logged(name: str, tmp_path: Path) -> None:
    """KV and weights to the log's rounding, compute buffers within 6 %; the state-space formula is not validated."""
    kv, compute, weights = LOGGED[name]
    shape, run = shape_of(ZOO[name], tmp_path), Run(8192, n_seq=2)
    need = estimate(shape, run)
    assert need.kv / MIB == pytest.approx(kv, abs=0.011)
    assert need.host.weights / MIB == pytest.approx(weights, abs=0.011)
    assert compute_bytes(shape, run) / MIB == pytest.approx(compute, rel=0.06 if name != "mamba" else 0.10)
    assert need.is_validated == (name not in {"mixtral", "gpt-oss", "mamba"})
    assert bool(need.notes) != need.is_validated


@pytest.mark.parametrize(
    ("arch", "keys", "windowed"),
    [
        ("gemma2", {".attention.sliding_window": 4096}, [0, 2]),
        ("gemma2", {}, [0, 2]),
        ("gemma3", {".attention.sliding_window": 512}, [0, 1, 2, 3]),
        ("gemma3", {".attention.sliding_window": 512, ".attention.sliding_window_pattern": 2}, [0, 2]),
        ("gemma4", {".attention.sliding_window": 512, ".attention.sliding_window_pattern": [True] * 3 + [False]},
         [0, 1, 2]),
        ("llama", {".attention.sliding_window": 4096}, []),  # in the header, and not used
        ("smallthinker", {".attention.sliding_window": 512}, [1, 2, 3]),
        ("gpt-oss", {}, []),
    ],
)  # fmt: skip
def test_sliding_windows(arch: str, keys: Mapping[str, object], windowed: list[int], tmp_path: Path) -> None:
    """By the header's pattern, or the architecture's own."""
    shape = shape_of(Model(arch, layers=4, keys=keys), tmp_path)
    assert [index for index, layer in enumerate(shape.layers) if layer.window] == windowed


@pytest.mark.parametrize(
    ("arch", "keys", "cached"),
    [
        ("jamba", {".attention.head_count_kv": [0, 4, 0, 4], ".ssm.conv_kernel": 4, ".ssm.inner_size": 64}, [1, 3]),
        ("nemotron_h", {".attention.head_count_kv": [0, 0, 4, 0], ".feed_forward_length": [0, 64, 0, 0],
                        ".ssm.conv_kernel": 4, ".ssm.inner_size": 64}, [2]),
        ("qwen3next", {".ssm.conv_kernel": 4, ".ssm.inner_size": 64}, [3]),
        ("falcon-h1", {".ssm.conv_kernel": 4, ".ssm.inner_size": 64}, [0, 1, 2, 3]),
        ("lfm2", {".attention.head_count_kv": [0, 0, 8, 0], ".shortconv.l_cache": 3}, [2]),
        ("rwkv7", {".wkv.head_size": 64, ".attention.head_count": 0}, []),
        ("bert", {}, []),
        ("glm4moe", {".nextn_predict_layers": 1}, [0, 1, 2]),
        ("gemma3n", {".attention.shared_kv_layers": 2}, [0, 1]),
    ],
)  # fmt: skip
def test_layers_with_a_cache(arch: str, keys: Mapping[str, object], cached: list[int], tmp_path: Path) -> None:
    """Recurrent layers have a state, encoders nothing, and the last layers may share or go unused."""
    shape = shape_of(Model(arch, layers=4, kv_heads=4, keys=keys), tmp_path)
    assert [index for index, layer in enumerate(shape.layers) if layer.k_row] == cached
    assert shape.is_recurrent == any(key.startswith((".ssm", ".wkv", ".shortconv")) for key in keys)


def test_header_without_sizes_has_no_shape() -> None:
    """Nothing is guessed where the count of layers, the width or the name is missing."""
    full = {**MINIMAL, "llama.block_count": 2}
    assert model_shape(full, ()) is not None
    for key in full:
        assert model_shape({**full, key: 0}, ()) is None
        assert model_shape({name: value for name, value in full.items() if name != key}, ()) is None


def test_experts_and_output_are_told_apart(tmp_path: Path) -> None:
    """Experts may stay on the host, the embedding always does, a tied one lies on the GPU a second time."""
    shape = shape_of(replace(ZOO["mixtral"], layers=2), tmp_path)
    layer = shape.layers[0]
    assert layer.expert_weights == 2 * 3 * 1024 * 3584 * 8
    on_gpu = Run(4096, n_gpu_layers=3, proportions=(1,))
    whole, without = estimate(shape, on_gpu), estimate(shape, replace(on_gpu, n_cpu_moe=1))
    assert whole.devices[0].weights - without.devices[0].weights == layer.expert_weights
    assert without.host.weights - whole.host.weights == layer.expert_weights
    assert whole.host.weights == shape.input_weights
    tied = shape_of(Model(layers=2, tied=True), tmp_path)
    assert tied.weights == estimate(tied, Run(4096)).host.weights
    assert estimate(tied, on_gpu).devices[0].weights + tied.input_weights == tied.weights + tied.output_weights


@pytest.mark.parametrize(
    ("n_gpu_layers", "shares", "placed"),
    [
        (0, (1,), [None] * 5),
        (1, (1,), [None, None, None, None, 0]),  # the output goes first
        (5, (1,), [0] * 5),
        (99, (1, 1), [0, 0, 0, 1, 1]),
        (99, (3, 1), [0, 0, 0, 0, 1]),
        (4, (1, 1), [None, 0, 0, 1, 1]),
        (99, (0, 1), [1] * 5),
        (99, (), [None] * 5),
    ],
)
def test_layers_go_to_devices_as_llama_cpp_puts_them(
    n_gpu_layers: int, shares: tuple[float, ...], placed: list[int | None]
) -> None:
    """The last layers, in the devices' order, by cumulated shares."""
    assert assign_layers(4, n_gpu_layers, shares) == placed


def test_device_without_layers_takes_nothing() -> None:
    """No runtime, no buffer: llama-server is not shown that device."""
    need = estimate(BIG, Run(4096, n_gpu_layers=99, proportions=(0, 1)))
    assert need.devices[0].total == 0
    assert need.devices[1].runtime == DEVICE_RUNTIME_BYTES
    assert need.host.kv == 0
    alone = estimate(BIG, Run(4096, n_gpu_layers=99, proportions=(1, 1), split_mode="none", main_gpu=1))
    assert [bool(device.layers) for device in alone.devices] == [False, True]
    kept = estimate(BIG, Run(4096, n_gpu_layers=99, proportions=(1,), kv_offload=False))
    assert (kept.host.kv, kept.devices[0].kv) == (128 * MIB, 0)


def test_what_the_cpu_repacks_counts_twice(tmp_path: Path) -> None:
    """Some types are copied into another order beside the mapped file; the embedding and f16 are not."""
    plain = estimate(shape_of(Model(layers=2), tmp_path), Run(4096))
    packed = shape_of(Model(layers=2, weights=TYPES.Q4_0), tmp_path)
    assert plain.repacked == 0
    need = estimate(packed, Run(4096))
    assert 0 < need.repacked < need.host.weights
    assert estimate(packed, Run(4096, repack=False)).repacked == 0


def test_saved_states_count() -> None:
    """32 for each slot, of what slides or is recurrent: 100 days later they are there."""
    sliding = replace(BIG, layers=(Layer(512, 512, window=1024), Layer(512, 512), Layer(state=1000)))
    assert checkpoint_bytes(BIG, Run(8192, n_seq=2)) == 0
    each = 1024 * 2048 + 4000
    assert checkpoint_bytes(sliding, Run(8192, n_seq=2)) == 32 * 2 * each
    assert checkpoint_bytes(sliding, Run(8192, n_checkpoints=0)) == 0
    assert checkpoint_bytes(sliding, Run(8192, swa_full=True)) == 32 * 4000


@given(
    n_ctx=st.integers(1, 1 << 20),
    n_seq=st.integers(1, 16),
    layers=st.integers(0, 40),
    shares=st.lists(st.floats(0, 10), max_size=4),
    unified=st.booleans(),
)
def test_more_needs_more(n_ctx: int, n_seq: int, layers: int, shares: list[float], *, unified: bool) -> None:
    """A longer context never needs less, and no weight or cell is lost wherever the layers go."""
    run = Run(n_ctx, n_seq=n_seq, is_unified=unified, n_gpu_layers=layers, proportions=tuple(shares))
    need, more = estimate(BIG, run), estimate(BIG, replace(run, n_ctx=n_ctx + 256 * n_seq))
    assert need.kv == kv_bytes(BIG, run) < more.kv
    assert need.host.weights + sum(device.weights for device in need.devices) == BIG.weights
    assert sum(device.layers for device in need.devices) + need.host.layers >= BIG.n_layers
    assert cells(run)[0] * cells(run)[1] >= n_ctx
    assert more.host_total >= need.host_total


def test_recipe_becomes_a_run() -> None:
    """Fields and flags, with llama-server's defaults for the rest."""
    recipe = Recipe(
        id="m", model_path="/m.gguf", max_model_len=4096, max_num_seqs=2, cache_type_k="q8_0", flash_attn=False,
        n_ubatch=4096, n_batch=1024, n_cpu_moe=3, extra_args={"no_kv_offload": True, "swa-full": True, "nr": True},
    )  # fmt: skip
    run = run_of(recipe, plan_context(recipe, None), cache_ram_mib=100)
    assert run == Run(
        8192, n_seq=2, n_ubatch=1024, type_k="q8_0", flash_attn=False, swa_full=True, kv_offload=False, repack=False,
        n_cpu_moe=3, cache_ram=100 * MIB,
    )  # fmt: skip
    plain = Recipe(id="m", model_path="/m.gguf", extra_args={"ctx-checkpoints": 3})
    assert run_of(plain, plan_context(plain, 4096), cache_ram_mib=None) == Run(16384, n_seq=4, n_checkpoints=3)


def test_limit_covers_everything_that_is_known(tmp_path: Path) -> None:
    """The whole file, copies, caches that grow, and a quarter on top; also what goes with the model."""
    shape, run = shape_of(ZOO["gemma3"], tmp_path), Run(8192, n_seq=2, cache_ram=1000 * MIB)
    need = on_the_host(shape, run)
    parts = need.host.kv + need.host.compute + need.host.runtime + checkpoint_bytes(shape, run) + 1000 * MIB
    assert memory_limit(need, shape, run, file_bytes=900 * MIB) == (900 * MIB + parts) * 5 // 4
    more = on_the_host(shape, run, draft=shape, mmproj_bytes=50 * MIB)
    assert more.host.weights == 2 * need.host.weights + 50 * MIB
    assert more.host.runtime == need.host.runtime
    assert more.kv == 2 * need.kv


def test_tensor_of_an_unknown_type_is_not_taken_for_nothing() -> None:
    """A type of a newer llama.cpp: four bytes a number is more than any quantisation."""
    unknown = replace(GGML_TYPES[0], name="type-77", block_size=None, block_bytes=None)
    tensor = TensorInfo("blk.0.attn_q.weight", (64, 64), unknown, 0, None)
    shape = model_shape(MINIMAL, [tensor])
    assert shape is not None
    assert shape.layers[0].weights == 4 * 64 * 64
