"""GGUF headers, shard sets and searches, against the gguf package as writer and oracle."""

import os
import re
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmstudiod.adapters.gguf_file import (
    GGML_TYPES,
    MAX_KEYS,
    MAX_TENSORS,
    ArraySummary,
    BadModelFileError,
    GgufHeader,
    HeaderCache,
    ModelFileNotFoundError,
    ModelFilePermissionError,
    find_models,
    is_auxiliary,
    model_id_from_stem,
    read_header,
    resolve_model,
)

Q8_0 = gguf.GGMLQuantizationType.Q8_0
Edit = Callable[[Any], None]


def write_model(path: Path, edit: Edit | None = None, *, arch: str = "llama", n_tensors: int = 3) -> Path:
    """Write a small GGUF file with f32, f16 and q8_0 tensors; ``edit`` adds keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("Tiny")
    writer.add_context_length(4096)
    writer.add_block_count(2)
    writer.add_file_type(15)
    if edit is not None:
        edit(writer)
    tensors = (
        ("token_embd.weight", np.ones((3, 64), np.float16), None),
        ("output_norm.weight", np.ones(7, np.float32), None),
        ("output.weight", np.zeros((4, 68), np.uint8), Q8_0),
    )
    for name, data, raw_type in tensors[:n_tensors]:
        writer.add_tensor(name, data, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_shard(directory: Path, no: int, count: int, *, named: str = "m", said: int | None = None) -> Path:
    """Write shard ``no`` (from 0) of a set of ``count`` with one tensor; ``said`` is the count in its header."""
    path = directory / f"{named}-{no + 1:05d}-of-{count:05d}.gguf"
    writer = gguf.GGUFWriter(path, "llama" if no == 0 else "")
    writer.add_uint16("split.no", no)
    writer.add_uint16("split.count", count if said is None else said)
    writer.add_int32("split.tensors.count", count)
    writer.add_tensor(f"blk.{no}.weight", np.ones((2, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_shards(directory: Path, count: int = 3, *, named: str = "m") -> list[Path]:
    """Write a whole shard set."""
    directory.mkdir(parents=True, exist_ok=True)
    return [write_shard(directory, no, count, named=named) for no in range(count)]


def add_values(writer: Any) -> None:
    """Add a key of every value type, and arrays."""
    writer.add_uint8("v.u8", 200)
    writer.add_int8("v.i8", -5)
    writer.add_uint16("v.u16", 65535)
    writer.add_int16("v.i16", -300)
    writer.add_int32("v.i32", -70000)
    writer.add_uint64("v.u64", 1 << 63)
    writer.add_int64("v.i64", -(1 << 62))
    writer.add_float32("v.f32", 1e-5)
    writer.add_float64("v.f64", 1e300)
    writer.add_bool("v.bool", val=True)
    writer.add_string("v.str", "żółw\n")
    writer.add_array("v.ints", [8, 0, 8])
    writer.add_array("v.bools", [True, False])
    writer.add_array("v.floats", [0.5] * 1025)
    writer.add_token_list(["a", "", "c" * 5000])
    writer.add_chat_template("{{ x }}")


def packed_string(text: bytes) -> bytes:
    """Pack a GGUF string."""
    return struct.pack("<Q", len(text)) + text


def packed(
    *, version: int = 3, n_tensors: int = 0, n_keys: int = 0, body: bytes = b"", magic: bytes = b"GGUF"
) -> bytes:
    """Pack a file by hand."""
    return magic + struct.pack("<IQQ", version, n_tensors, n_keys) + body


def packed_key(key: bytes, value_type: int, value: bytes) -> bytes:
    """Pack a key and its value."""
    return packed_string(key) + struct.pack("<I", value_type) + value


def packed_tensor(name: bytes, shape: tuple[int, ...], type_number: int = 0, offset: int = 0) -> bytes:
    """Pack one tensor's description."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return packed_string(name) + dims + struct.pack("<IQ", type_number, offset)


def header_or_fault(path: Path) -> GgufHeader | BadModelFileError:
    """Return what reading gives; any other exception is a bug and gets out."""
    try:
        return read_header(path)
    except BadModelFileError as fault:
        return fault


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small whole model with every kind of value."""
    return write_model(tmp_path / "model.gguf", add_values)


def test_types_agree_with_the_gguf_package() -> None:
    """Every tensor type that gguf knows has the same number, name and sizes here."""
    ours = {entry.number: (entry.name.upper(), entry.block_size, entry.block_bytes) for entry in GGML_TYPES.values()}
    theirs = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert theirs.items() <= ours.items()


@pytest.mark.parametrize("kind", [kind for kind in gguf.LlamaFileType if kind.name != "GUESSED"], ids=str)
def test_file_type_is_named_as_llama_cpp_names_it(kind: gguf.LlamaFileType, tmp_path: Path) -> None:
    """``general.file_type`` becomes the name after MOSTLY_, also with the guessed flag."""
    body = packed_key(b"general.file_type", 4, struct.pack("<I", kind.value | 1024))
    path = tmp_path / "x.gguf"
    path.write_bytes(packed(n_keys=1, body=body))
    assert read_header(path).file_type == kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")


def test_metadata_agrees_with_the_gguf_package(model: Path) -> None:
    """Every key that gguf reads is here with the same value; string arrays and long arrays are summaries."""
    header = read_header(model)
    fields = {name: field for name, field in gguf.GGUFReader(model).fields.items() if not name.startswith("GGUF.")}
    assert set(header.metadata) == set(fields)
    for name, field in fields.items():
        expected, found = field.contents(), header.metadata[name]
        match found:
            case ArraySummary(length=length):
                assert length == len(expected), name
            case tuple():
                assert list(found) == expected, name
            case _:
                assert (found, type(found)) == (expected, type(expected)), name
    assert header.metadata["tokenizer.ggml.tokens"] == ArraySummary("str", 3)
    assert header.metadata["v.floats"] == ArraySummary("f32", 1025)
    assert header.metadata["v.ints"] == (8, 0, 8)


def test_tensors_agree_with_the_gguf_package(model: Path) -> None:
    """Names, shapes, types, places and sizes of tensors are those that gguf reads."""
    header, oracle = read_header(model), gguf.GGUFReader(model)
    assert header.data_offset == oracle.data_offset
    found = [(t.name, t.shape, t.type.number, header.data_offset + t.offset, t.n_bytes) for t in header.tensors]
    assert found == [
        (t.name, tuple(int(n) for n in t.shape), t.tensor_type.value, t.data_offset, t.n_bytes) for t in oracle.tensors
    ]
    assert header.weights_bytes == sum(t.n_bytes for t in oracle.tensors)
    assert header.n_params == sum(int(t.n_elements) for t in oracle.tensors)


def test_properties_tell_what_a_model_is(model: Path) -> None:
    """The header's properties give the values that were written."""
    header = read_header(model)
    assert (header.architecture, header.name, header.version) == ("llama", "Tiny", 3)
    assert (header.context_length, header.block_count, header.file_type) == (4096, 2, "Q4_K_M")
    assert (header.split_no, header.split_count, header.has_chat_template) == (0, 1, True)
    assert header.file_bytes == model.stat().st_size >= header.expected_file_bytes


def test_other_alignment_is_followed(tmp_path: Path) -> None:
    """``general.alignment`` moves the data and the tensors."""
    path = write_model(tmp_path / "x.gguf", lambda writer: writer.add_custom_alignment(256))
    header, oracle = read_header(path), gguf.GGUFReader(path)
    assert header.data_offset == oracle.data_offset
    assert [header.data_offset + t.offset for t in header.tensors] == [t.data_offset for t in oracle.tensors]


def test_long_string_is_a_summary(tmp_path: Path) -> None:
    """A string of several MB (a whole tokenizer.json) is stepped over."""
    path = write_model(
        tmp_path / "x.gguf", lambda writer: writer.add_string("tokenizer.huggingface.json", "x" * 5_000_000)
    )
    header = read_header(path)
    assert header.metadata["tokenizer.huggingface.json"] == ArraySummary("char", 5_000_000)
    assert len(header.tensors) == 3


def test_large_vocabulary_is_read_quickly_and_without_holding_it(tmp_path: Path) -> None:
    """150,000 tokens, scores, types and 151,000 merges cost little time and memory."""

    def add_vocabulary(writer: Any) -> None:
        writer.add_token_list([f"token{n}" for n in range(150_000)])
        writer.add_token_scores([0.5] * 150_000)
        writer.add_token_types([1] * 150_000)
        writer.add_token_merges([f"left{n} right{n}" for n in range(151_000)])

    path = write_model(tmp_path / "x.gguf", add_vocabulary)
    start = time.perf_counter()
    header = read_header(path)
    elapsed_s = time.perf_counter() - start
    assert header.metadata["tokenizer.ggml.merges"] == ArraySummary("str", 151_000)
    assert len(header.tensors) == 3
    tracemalloc.start()
    read_header(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert elapsed_s < 2  # 0.05 s on an idle machine; the bound is for a busy one
    assert peak_bytes < 15e6


HUGE = 1 << 60
HOSTILE = {
    "empty": (b"", "is 0 B and ends inside its header: the magic needs 4 bytes"),
    "another format": (b"\x89PNG\r\n\x1a\n", "starts with b'\\x89PNG', expected b'GGUF'"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "it starts with b'vers'"),
    "version 0": (packed(version=0), "is GGUF version 0"),
    "version 1": (packed(version=1), "is GGUF version 1, which llama.cpp no longer reads, expected 2 or 3"),
    "version 4": (packed(version=4), "is GGUF version 4, expected 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian GGUF, expected little-endian"),
    "tensors": (packed(n_tensors=HUGE), f"claims {HUGE} tensors, expected at most {MAX_TENSORS}"),
    "keys": (packed(n_keys=HUGE), f"claims {HUGE} keys, expected at most {MAX_KEYS}"),
    "empty key": (packed(n_keys=1, body=packed_key(b"", 7, b"\1")), "key (1 of 1) of 0 bytes"),
    "long key": (packed(n_keys=1, body=packed_key(b"k" * 1025, 7, b"\1")), "of 1025 bytes, expected 1 to 1024"),
    "huge key": (packed(n_keys=1, body=struct.pack("<Q", HUGE)), f"of {HUGE} bytes, expected 1 to 1024"),
    "key twice": (packed(n_keys=2, body=packed_key(b"k", 7, b"\1") * 2), "has the key 'k' twice"),
    "value type": (packed(n_keys=1, body=packed_key(b"k", 13, b"\1")), "has key 'k' of the unknown value type 13"),
    "huge string": (packed(n_keys=1, body=packed_key(b"k", 8, struct.pack("<Q", HUGE))), f"key 'k' needs {HUGE} bytes"),
    "huge string array": (
        packed(n_keys=1, body=packed_key(b"k", 9, struct.pack("<IQ", 8, HUGE))),
        f"key 'k' needs {8 * HUGE} bytes at byte 49",
    ),
    "huge number array": (
        packed(n_keys=1, body=packed_key(b"k", 9, struct.pack("<IQ", 10, HUGE))),
        f"key 'k' needs {8 * HUGE} bytes",
    ),
    "huge string in an array": (
        packed(n_keys=1, body=packed_key(b"k", 9, struct.pack("<IQQQ", 8, 2, HUGE, 0))),
        "ends inside its header: key 'k'",
    ),
    "last string too long": (
        packed(n_keys=1, body=packed_key(b"k", 9, struct.pack("<IQQ", 8, 1, HUGE))),
        "ends inside its header: key 'k'",
    ),
    "nested arrays": (
        packed(n_keys=1, body=packed_key(b"k", 9, struct.pack("<IQ", 9, 1) * 1000)),
        "has key 'k' with an array of arrays",
    ),
    "array of nothing": (
        packed(n_keys=1, body=packed_key(b"k", 9, struct.pack("<IQ", 99, 1))),
        "has key 'k' with an array of the unknown value type 99",
    ),
    "alignment": (
        packed(n_keys=1, body=packed_key(b"general.alignment", 4, struct.pack("<I", 24))),
        "has general.alignment 24, expected a power of 2",
    ),
    "alignment 0": (
        packed(n_keys=1, body=packed_key(b"general.alignment", 4, struct.pack("<I", 0))),
        "has general.alignment 0, expected a power of 2",
    ),
    "alignment text": (
        packed(n_keys=1, body=packed_key(b"general.alignment", 8, packed_string(b"x"))),
        "has general.alignment 'x', expected a power of 2",
    ),
    "tensor name": (packed(n_tensors=1, body=packed_tensor(b"t" * 64, (1,))), "with 64 bytes, expected at most 63"),
    "tensor twice": (
        packed(n_tensors=2, body=packed_tensor(b"t", (1,)) + packed_tensor(b"t", (1,), 0, 32) + bytes(64)),
        "has the tensor 't' twice",
    ),
    "dimensions": (packed(n_tensors=1, body=packed_tensor(b"t", (1,) * 5)), "tensor 't' with 5 dimensions"),
    "elements": (packed(n_tensors=1, body=packed_tensor(b"t", (1 << 40, 1 << 40))), "of the impossible shape"),
    "negative dimension": (packed(n_tensors=1, body=packed_tensor(b"t", (0, 1 << 63))), "of the impossible shape"),
    "unknown type": (packed(n_tensors=1, body=packed_tensor(b"t", (32,), 999)), "tensor 't' of the unknown type (999)"),
    "removed type": (packed(n_tensors=1, body=packed_tensor(b"t", (32,), 31)), "of the removed type q4_0_4_4 (31)"),
    "row": (
        packed(n_tensors=1, body=packed_tensor(b"t", (33,), 8)),
        "rows of 33 elements of type q8_0, expected a multiple",
    ),
    "offset": (packed(n_tensors=1, body=packed_tensor(b"t", (1,), 0, 32) + bytes(99)), "at offset 32, expected 0"),
    "no data": (
        packed(n_tensors=1, body=packed_tensor(b"t", (1 << 30,))),
        "describes 4.0 GiB: the download is incomplete",
    ),
}


@pytest.mark.parametrize(("content", "told"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_file_is_refused_with_its_fault(content: bytes, told: str, tmp_path: Path) -> None:
    """A file that llama.cpp would refuse is refused at once, in words."""
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(BadModelFileError) as caught:
        read_header(path)
    assert time.perf_counter() - start < 1
    assert told in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.hint
    assert (caught.value.kind, caught.value.status, caught.value.exit_code) == ("bad_model_file", 503, 3)


def test_endless_string_array_is_refused(tmp_path: Path) -> None:
    """A sparse file of many GB that claims to be one list of strings does not keep the reader busy."""
    path = tmp_path / "x.gguf"
    path.write_bytes(packed(n_keys=1, body=packed_key(b"k", 9, struct.pack("<IQ", 8, 1 << 30))))
    os.truncate(path, 1 << 36)
    with pytest.raises(BadModelFileError, match="more than"):
        read_header(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """A file that is cut anywhere before its last tensor byte is refused, in the header and in the data."""
    whole = write_model(tmp_path / "whole.gguf", add_values, n_tensors=2)
    content, header = whole.read_bytes(), read_header(whole)
    path = tmp_path / "cut.gguf"
    path.write_bytes(content)
    for size in range(header.expected_file_bytes - 1, -1, -1):
        os.truncate(path, size)
        with pytest.raises(BadModelFileError, match=r"incomplete|ends inside its header"):
            read_header(path)
    path.write_bytes(content[: header.expected_file_bytes])
    assert read_header(path).tensors == header.tensors


def test_incomplete_download_tells_both_sizes(tmp_path: Path) -> None:
    """A truncated file is told from its sizes."""
    path = tmp_path / "x.gguf"
    path.write_bytes(packed(n_tensors=1, body=packed_tensor(b"t", (1 << 20, 1 << 10))))
    os.truncate(path, 3 << 30)
    expected = "is 3.0 GiB but its header describes 4.0 GiB: the download is incomplete, 1.0 GiB are missing"
    with pytest.raises(BadModelFileError, match=expected):
        read_header(path)


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_mutated_file_gives_a_header_or_our_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever bytes are changed, the outcome is a header or an error of our tree."""
    directory = tmp_path_factory.getbasetemp() / "mutated"
    whole = directory / "whole.gguf"
    if not whole.exists():
        write_model(whole, add_values)
    content = bytearray(whole.read_bytes())
    header_end = read_header(whole).data_offset
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, header_end - 1))
        content[at] = data.draw(st.sampled_from((0, 1, 8, 9, 0x7F, 0x80, 0xFF)) | st.integers(0, 255))
    mutated = directory / "mutated.gguf"
    mutated.write_bytes(content)
    match header_or_fault(mutated):
        case BadModelFileError(kind=kind, message=message):
            assert kind == "bad_model_file"
            assert message.isprintable()
        case header:
            for name in (name for name in dir(GgufHeader) if not name.startswith("_")):
                getattr(header, name)
            is_auxiliary(header)


@given(content=st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_body_gives_a_header_or_our_error(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Random bytes after a believable start are read or refused."""
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    path.write_bytes(packed(n_tensors=1, n_keys=2, body=content))
    outcome = header_or_fault(path)
    assert isinstance(outcome, GgufHeader) or outcome.message.isprintable()


def test_missing_file_is_not_found(tmp_path: Path) -> None:
    """A path without a file, and one through a file, have their own kind."""
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "no.gguf", tmp_path / "file" / "x.gguf"):
        with pytest.raises(ModelFileNotFoundError, match="does not exist") as caught:
            resolve_model(path)
        assert caught.value.kind == "model_file_not_found"


@pytest.mark.parametrize("name", ["a\0b", "x" * 300], ids=["NUL", "too long"])
def test_impossible_path_is_our_error(name: str, tmp_path: Path) -> None:
    """A path that the kernel does not take is told as such."""
    with pytest.raises(BadModelFileError, match="cannot be read"):
        resolve_model(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_a_permission_fault(model: Path) -> None:
    """A file that the user may not read has its own kind."""
    model.chmod(0)
    with pytest.raises(ModelFilePermissionError) as caught:
        resolve_model(model)
    assert caught.value.kind == "model_file_permission"


def test_fifo_and_device_are_refused_without_waiting(tmp_path: Path) -> None:
    """A FIFO without a writer does not hang the reader."""
    os.mkfifo(tmp_path / "x.gguf")
    for path in (tmp_path / "x.gguf", Path("/dev/zero")):
        with pytest.raises(BadModelFileError, match="is not a regular file"):
            resolve_model(path)


def test_name_that_is_not_printable_stays_out_of_messages(tmp_path: Path) -> None:
    """Line breaks and stray bytes in a file name cannot forge a log line."""
    path = tmp_path / os.fsdecode(b"a\n<0>forged \xff.gguf")
    path.write_bytes(b"junk")
    with pytest.raises(BadModelFileError) as caught:
        read_header(path)
    assert caught.value.message.isprintable()


def test_single_file_resolves_to_itself(model: Path) -> None:
    """A model in one file has one shard; the suffix does not matter."""
    path = model.rename(model.with_name("blob"))
    found = resolve_model(path)
    assert (found.path, found.shards, found.header.path) == (path, (path,), path)
    assert found.total_bytes == path.stat().st_size
    assert (found.tensors, found.weights_bytes) == (found.header.tensors, found.header.weights_bytes)


def test_shards_are_joined(tmp_path: Path) -> None:
    """The first shard, or the directory, gives the whole set with its sums."""
    shards = write_shards(tmp_path)
    for path in (shards[0], tmp_path):
        found = resolve_model(path)
        assert found.shards == tuple(shards)
        assert found.path == shards[0]
        assert [tensor.name for tensor in found.tensors] == ["blk.0.weight", "blk.1.weight", "blk.2.weight"]
        assert found.weights_bytes == 3 * 64
        assert found.total_bytes == sum(path.stat().st_size for path in shards)


def test_hugging_face_cache_resolves_by_link_names(tmp_path: Path) -> None:
    """Links named as shards, to blobs named by a hash, are a shard set."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    links = []
    for number, shard in enumerate(write_shards(blobs)):
        blob = shard.rename(blobs / f"{number:064x}")
        links.append(snapshot / shard.name)
        links[-1].symlink_to(os.path.relpath(blob, snapshot))
    assert resolve_model(links[0]).shards == tuple(links)
    assert resolve_model(snapshot).shards == tuple(links)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    """A set without its second file names that file, and how many there are."""
    shards = write_shards(tmp_path)
    shards[1].unlink()
    with pytest.raises(ModelFileNotFoundError, match=r"m-00002-of-00003.gguf") as caught:
        resolve_model(shards[0])
    assert "part 2 of a model split into 3 files" in (caught.value.hint or "")


def test_directory_without_the_first_shard_names_it(tmp_path: Path) -> None:
    """What remains of a set points to the file that is missing."""
    write_shards(tmp_path)[0].unlink()
    with pytest.raises(ModelFileNotFoundError, match=r"m-00001-of-00003.gguf"):
        resolve_model(tmp_path)


def test_second_shard_points_to_the_first(tmp_path: Path) -> None:
    """llama.cpp starts from the first shard only."""
    shards = write_shards(tmp_path)
    with pytest.raises(BadModelFileError, match="is part 2 of 3, expected part 1") as caught:
        resolve_model(shards[1])
    assert str(shards[0]) in (caught.value.hint or "")


def test_renamed_shard_is_refused(tmp_path: Path) -> None:
    """A shard whose name does not say so cannot be joined to the others."""
    renamed = write_shards(tmp_path)[0].rename(tmp_path / "model.gguf")
    with pytest.raises(BadModelFileError, match="is part 1 of 3 by its header, part 1 of 1 by its name"):
        resolve_model(renamed)


def test_whole_model_named_as_one_of_one_is_taken(tmp_path: Path) -> None:
    """``-00001-of-00001`` is a model in one file, with or without split keys."""
    path = write_model(tmp_path / "m-00001-of-00001.gguf")
    assert resolve_model(path).shards == (path,)


def test_shard_of_another_set_is_refused(tmp_path: Path) -> None:
    """Each shard's split.count and split.no must agree with the first's."""
    shards = write_shards(tmp_path)
    write_shard(tmp_path, 2, 3, said=9)
    with pytest.raises(BadModelFileError, match=r"split.no 2 and split.count 9, expected 2 and 3") as caught:
        resolve_model(shards[0])
    assert caught.value.message.startswith(repr(str(shards[2])))


def test_lost_tensor_in_a_set_is_told(tmp_path: Path) -> None:
    """split.tensors.count is held against the tensors that are there."""
    shards = write_shards(tmp_path)
    body = packed_key(b"split.no", 2, b"\1\0") + packed_key(b"split.count", 2, b"\3\0")
    shards[1].write_bytes(packed(n_keys=2, body=body))
    with pytest.raises(BadModelFileError, match="describes 3 tensors in 3 files, they hold 2"):
        resolve_model(shards[0])


def test_directory_with_one_model_resolves_to_it(tmp_path: Path) -> None:
    """Projectors, adapters, half-finished downloads and other files beside a model are not models."""
    path = write_model(tmp_path / "m" / "model.gguf")
    write_model(tmp_path / "m" / "mmproj-f16.gguf", arch="clip")
    write_model(tmp_path / "m" / "vision.gguf", arch="clip")
    write_model(tmp_path / "m" / "lora.gguf", lambda writer: writer.add_type("adapter"))
    (tmp_path / "m" / "other.gguf.part").write_bytes(packed())
    (tmp_path / "m" / "README.md").write_text("x")
    (tmp_path / "m" / "._model.gguf").write_bytes(b"x")
    assert resolve_model(tmp_path / "m").path == path


def test_directory_with_a_model_without_suffix_resolves_to_it(tmp_path: Path) -> None:
    """Where nothing is named .gguf, the magic decides."""
    path = write_model(tmp_path / "m" / "sha256-abc")
    (tmp_path / "m" / "README.md").write_text("x")
    assert resolve_model(tmp_path / "m").path == path


def test_directory_with_several_models_lists_them(tmp_path: Path) -> None:
    """The user is told what to choose from."""
    write_model(tmp_path / "b.gguf")
    write_model(tmp_path / "a.gguf")
    with pytest.raises(BadModelFileError, match=r"holds 2 models, expected one: 'a.gguf', 'b.gguf'"):
        resolve_model(tmp_path)


def test_directory_without_a_model_is_not_found(tmp_path: Path) -> None:
    """A directory with only other files holds no model."""
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(ModelFileNotFoundError, match="holds no model"):
        resolve_model(tmp_path)


@pytest.mark.parametrize(
    ("arch", "edit", "n_tensors", "expected"),
    [
        ("llama", None, 3, False),
        ("clip", None, 3, True),
        ("controlvector", None, 3, True),
        ("llama", lambda writer: writer.add_type("adapter"), 3, True),
        ("llama", lambda writer: writer.add_type("imatrix"), 3, True),
        ("llama", lambda writer: writer.add_type("model"), 3, False),
        ("llama", None, 0, True),
        ("llama", lambda writer: writer.add_uint16("split.count", 2), 0, False),
    ],
    ids=["model", "mmproj", "control vector", "adapter", "imatrix", "typed model", "vocabulary", "empty first shard"],
)
def test_auxiliary_files_are_told(arch: str, edit: Edit | None, n_tensors: int, expected: bool, tmp_path: Path) -> None:
    """Files that only go with a model are told from their headers."""
    assert is_auxiliary(read_header(write_model(tmp_path / "x", edit, arch=arch, n_tensors=n_tensors))) is expected


def test_search_finds_models_and_tells_faults(tmp_path: Path) -> None:
    """Models, shard sets and links are found once; faults name their files; other files are passed over."""
    big = write_model(tmp_path / "org" / "Big Model.Q8_0.gguf")
    shards = write_shards(tmp_path / "set", named="Set")
    write_model(tmp_path / "org" / "mmproj-x.gguf", arch="clip")
    write_model(tmp_path / "org" / "lora.gguf", lambda writer: writer.add_type("adapter"))
    (tmp_path / "zlink.gguf").symlink_to(big)
    (tmp_path / "org" / "loop").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "dead.gguf").symlink_to("nowhere")
    (tmp_path / "junk.gguf").write_bytes(b"junk")
    (tmp_path / ".hidden.gguf").write_bytes(b"junk")
    write_shards(tmp_path / "part", named="part")[2].unlink()
    found, faults = find_models(tmp_path)
    paths = {model.model_id: model.path for model in found}
    assert set(paths) == {"zlink", "set"}  # the link is met first
    assert next(model for model in found if model.model_id == "set").shards == tuple(shards)
    assert sorted(Path(fault.details["path"]).name for fault in faults) == [
        "dead.gguf",
        "junk.gguf",
        "part-00003-of-00003.gguf",
    ]


def test_search_is_bounded_in_depth_and_number(tmp_path: Path) -> None:
    """Directories deeper than four are not entered; past the limit a fault says that there is more."""
    write_model(tmp_path / "1/2/3/4/in.gguf")
    write_model(tmp_path / "1/2/3/4/5/out.gguf")
    write_model(tmp_path / "a.gguf")
    found, faults = find_models(tmp_path)
    assert ([model.model_id for model in found], faults) == (["in", "a"], [])
    found, faults = find_models(tmp_path, limit=1)
    assert len(found) == 1
    assert "holds more than 1 models" in faults[0].message


def test_search_in_no_directory_is_a_fault(tmp_path: Path) -> None:
    """A directory that is not there gives no models and one fault; so does a file."""
    found, faults = find_models(tmp_path / "no")
    assert (found, [fault.kind for fault in faults]) == ([], ["model_file_not_found"])
    (tmp_path / "file").write_bytes(b"")
    assert "is not a directory" in find_models(tmp_path / "file")[1][0].message


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("Qwen3-8B-Q4_K_M", "qwen3-8b-q4_k_m"),
        ("Set-00001-of-00004", "set"),
        ("a  b (1)", "a-b-1"),
        (".-_x", "x"),
        ("żółw 7B", "w-7b"),
        ("x" * 80, "x" * 63),
    ],
)
def test_model_id_comes_from_the_file_name(stem: str, expected: str) -> None:
    """The id is the stem in lower case, with what an id may not hold left out."""
    assert model_id_from_stem(stem) == expected


@given(stem=st.text())
def test_model_id_always_has_its_form(stem: str) -> None:
    """Any name gives an id of the right form, or our error."""
    try:
        model_id = model_id_from_stem(stem)
    except BadModelFileError:
        return
    assert re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", model_id)


def test_cache_reads_a_file_once_until_it_changes(model: Path) -> None:
    """The same file gives the same header; a changed one is read again; another name keeps its own path."""
    cache = HeaderCache()
    first = cache.read(model)
    assert cache.read(model) is first
    link = model.with_name("link.gguf")
    link.symlink_to(model)
    assert cache.read(link).path == link
    assert cache.read(link).metadata is first.metadata
    os.utime(model, ns=(1, 1))
    assert cache.read(model) is not first
    assert resolve_model(model, read=cache.read).header is cache.read(model)


def test_cache_is_bounded_and_does_not_keep_faults(tmp_path: Path) -> None:
    """The oldest header goes when there are too many; a fault is told every time."""
    cache = HeaderCache(max_entries=2)
    models = [write_model(tmp_path / f"{number}.gguf") for number in range(3)]
    headers = [cache.read(path) for path in models]
    assert len(cache) == 2
    assert cache.read(models[2]) is headers[2]
    assert cache.read(models[0]) is not headers[0]
    (tmp_path / "bad.gguf").write_bytes(b"junk")
    for _ in range(2):
        with pytest.raises(BadModelFileError):
            cache.read(tmp_path / "bad.gguf")
    assert len(cache) == 2
