"""GGUF headers, against the gguf package as writer and oracle."""

import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmstudiod.adapters.gguf_file import (
    MAX_KEYS,
    MAX_TENSORS,
    BadModelFileError,
    HeaderCache,
    ModelFileNotFoundError,
    ModelFilePermissionError,
    read_header,
)
from llmstudiod.core.gguf import GGML_TYPES, ArraySummary, GgufHeader, is_auxiliary
from tests.gguf_files import Edit, add_values, packed, packed_key, packed_string, packed_tensor, write_model


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
    assert header.expected_file_bytes is not None
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
    "another format": (b"\x89PNG\r\n\x1a\n", "is not GGUF: it does not begin with these letters"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is not GGUF but a pointer of git-lfs"),
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
    "absurd type": (
        packed(n_tensors=1, body=packed_tensor(b"t", (32,), 1000)),
        "tensor 't' of the impossible type 1000",
    ),
    "removed type": (
        packed(n_tensors=1, body=packed_tensor(b"t", (32,), 31)),
        "of the type q4_0_4_4 (31), which llama.cpp no longer reads",
    ),
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


@pytest.mark.parametrize("number", [43, 57, 999])
def test_tensor_type_of_the_future_is_kept(number: int, tmp_path: Path) -> None:
    """A type that is not known yet is named by its number; llama.cpp decides whether it serves the model."""
    path = tmp_path / "x.gguf"
    tensors = (
        packed_tensor(b"known", (8,), 0, 0),
        packed_tensor(b"new", (33,), number, 32),
        packed_tensor(b"after", (8,), 0, 12_352),
        packed_tensor(b"last", (8,), 0, 12_384),
    )
    path.write_bytes(packed(n_tensors=4, body=b"".join(tensors) + bytes(320)))
    header = read_header(path)
    assert [(tensor.type.name, tensor.n_bytes) for tensor in header.tensors] == [
        ("f32", 32),
        (f"type-{number}", None),
        ("f32", 32),
        ("f32", 32),
    ]
    assert header.expected_file_bytes is None, "nobody can tell how long the file must be"
    assert header.weights_bytes == header.file_bytes - header.data_offset


def test_offset_after_known_tensors_is_still_checked(tmp_path: Path) -> None:
    """Only the tensor right after one of unknown size may start where it says."""
    tensors = (
        packed_tensor(b"new", (8,), 57, 0),
        packed_tensor(b"after", (8,), 0, 320),
        packed_tensor(b"wrong", (8,), 0, 640),
    )
    path = tmp_path / "x.gguf"
    path.write_bytes(packed(n_tensors=3, body=b"".join(tensors) + bytes(999)))
    with pytest.raises(BadModelFileError, match="tensor 'wrong' at offset 640, expected 352"):
        read_header(path)


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
    assert header.expected_file_bytes is not None
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
            read_header(path)
        assert caught.value.kind == "model_file_not_found"


@pytest.mark.parametrize("name", ["a\0b", "x" * 300], ids=["NUL", "too long"])
def test_impossible_path_is_our_error(name: str, tmp_path: Path) -> None:
    """A path that the kernel does not take is told as such."""
    with pytest.raises(BadModelFileError, match="cannot be read"):
        read_header(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_a_permission_fault(model: Path) -> None:
    """A file that the user may not read has its own kind."""
    model.chmod(0)
    with pytest.raises(ModelFilePermissionError) as caught:
        read_header(model)
    assert caught.value.kind == "model_file_permission"


def test_fifo_and_device_are_refused_without_waiting(tmp_path: Path) -> None:
    """A FIFO without a writer does not hang the reader."""
    os.mkfifo(tmp_path / "x.gguf")
    for path in (tmp_path / "x.gguf", Path("/dev/zero")):
        with pytest.raises(BadModelFileError, match="is not a regular file"):
            read_header(path)


def test_name_that_is_not_printable_stays_out_of_messages(tmp_path: Path) -> None:
    """Line breaks and stray bytes in a file name cannot forge a log line."""
    path = tmp_path / os.fsdecode(b"a\n<0>forged \xff.gguf")
    path.write_bytes(b"junk")
    with pytest.raises(BadModelFileError) as caught:
        read_header(path)
    assert caught.value.message.isprintable()


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


def test_cache_reads_a_file_once_until_it_changes(model: Path) -> None:
    """The same file gives the same header; a changed one is read again; another name keeps its own path."""
    cache = HeaderCache()
    first = cache.read(model)
    assert cache.read(model) is first
    link = model.with_name("link.gguf")
    link.symlink_to(model)
    assert cache.read(link).path == str(link)
    assert cache.read(link).metadata is first.metadata
    os.utime(model, ns=(1, 1))
    assert cache.read(model) is not first


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
