"""The generator of small models: what it writes can be read, is the same each time, and has the fault asked for."""

import time
from pathlib import Path

import pytest

from llmstudiod.demo.tiny_gguf import Fault, TinyModel, WeightType, main, write_big_gguf, write_tiny_gguf

gguf = pytest.importorskip("gguf")


def _read(path: Path) -> tuple[dict[str, object], dict[str, list[int]]]:
    """Return the metadata, and each tensor's shape as llama.cpp has it."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}


def test_default_is_small_and_quick(tmp_path: Path) -> None:
    """The default takes under 1 MB and well under a second, and returns its size."""
    started = time.monotonic()
    size = write_tiny_gguf(tmp_path / "m.gguf")
    # Under 0.5 s on an idle machine; the margin is for busy ones, and the first import of numpy.
    assert time.monotonic() - started < 5
    assert size == (tmp_path / "m.gguf").stat().st_size < 1_000_000


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    """Two files of one model are equal; another seed gives another file."""
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write_tiny_gguf(tmp_path / name, TinyModel(seed=seed))
    first, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again != other


def test_metadata_and_shapes(tmp_path: Path) -> None:
    """Sizes asked for are the sizes written, with the keys that llama.cpp needs."""
    model = TinyModel(name="x", n_layers=3, n_embd=128, n_head=4, n_head_kv=1, n_ff=96, context_length=512)
    write_tiny_gguf(tmp_path / "m.gguf", model)
    keys, shapes = _read(tmp_path / "m.gguf")
    assert keys["general.architecture"] == "llama"
    assert keys["general.name"] == "x"
    assert keys["llama.block_count"] == 3
    assert keys["llama.context_length"] == 512
    assert keys["llama.attention.head_count_kv"] == 1
    assert shapes["blk.2.attn_k.weight"] == [128, 32]
    assert shapes["blk.0.ffn_down.weight"] == [96, 128]
    assert "tokenizer.chat_template" not in keys
    assert "llama.pooling_type" not in keys


def test_vocabulary_has_specials_bytes_and_words(tmp_path: Path) -> None:
    """Three special tokens, 256 bytes, and hundreds of words that start with the mark of a space."""
    write_tiny_gguf(tmp_path / "m.gguf")
    keys, shapes = _read(tmp_path / "m.gguf")
    tokens = keys["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    words = tokens[259:]
    assert len(set(words)) == len(words) > 400
    assert all(word.startswith("\u2581") and word[1:].isalpha() for word in words)
    assert shapes["output.weight"] == [64, len(tokens)]


@pytest.mark.parametrize("weight_type", list(WeightType))
def test_weight_type_is_that_of_the_matrices(tmp_path: Path, weight_type: WeightType) -> None:
    """Matrices have the type asked for; norms are f32 always."""
    write_tiny_gguf(tmp_path / "m.gguf", TinyModel(weight_type=weight_type))
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types.pop("output_norm.weight") == "F32"
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == weight_type.name


def test_optional_keys(tmp_path: Path) -> None:
    """A chat template, a pooling type and another architecture are in the file when asked for."""
    model = TinyModel(architecture="qwen3", chat_template="{{ x }}", pooling_type="mean")
    write_tiny_gguf(tmp_path / "m.gguf", model)
    keys, shapes = _read(tmp_path / "m.gguf")
    assert keys["tokenizer.chat_template"] == "{{ x }}"
    assert keys["qwen3.pooling_type"] == 1
    assert shapes["blk.0.attn_q_norm.weight"] == [16]


def test_faults(tmp_path: Path) -> None:
    """Each fault changes the one thing that it names."""
    for fault in Fault:
        write_tiny_gguf(tmp_path / fault, TinyModel(fault=fault))
    size = write_tiny_gguf(tmp_path / "sound")
    assert "llama.block_count" not in _read(tmp_path / Fault.MISSING_KEY)[0]
    assert "blk.0.ffn_down.weight" not in _read(tmp_path / Fault.MISSING_TENSOR)[1]
    assert _read(tmp_path / Fault.WRONG_SHAPE)[1]["blk.0.attn_q.weight"] == [64, 65]
    assert _read(tmp_path / Fault.UNKNOWN_ARCHITECTURE)[0]["general.architecture"] == "nosuch"
    assert (tmp_path / Fault.TRUNCATED).stat().st_size == size - 64


def test_nothing_is_left_after_a_failure(tmp_path: Path) -> None:
    """A model that cannot be written leaves neither a file nor a part of one."""
    with pytest.raises(KeyError):
        write_tiny_gguf(tmp_path / "m.gguf", TinyModel(pooling_type="nosuch"))
    assert list(tmp_path.iterdir()) == []


def test_big_is_about_the_size_asked_for(tmp_path: Path) -> None:
    """The big model comes within a layer of the size, with as many layers as that takes."""
    asked = 200 << 20
    size = write_big_gguf(tmp_path / "big.gguf", size_bytes=asked)
    assert abs(size - asked) < 75_000_000
    assert _read(tmp_path / "big.gguf")[0]["llama.block_count"] == 3


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The program writes the file that its options describe and tells the size."""
    out = tmp_path / "m.gguf"
    main([str(out), "--embedding", "--eos-bias", "-40", "--weight-type", "q8_0", "--name", "e"])
    keys, _ = _read(out)
    assert (keys["general.name"], keys["llama.pooling_type"]) == ("e", 1)
    assert capsys.readouterr().out.startswith(f"{out}: ")
