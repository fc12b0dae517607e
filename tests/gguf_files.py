"""Writes GGUF files for tests: with the gguf package, which is the oracle, and by hand where they must be wrong."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

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
