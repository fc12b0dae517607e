"""What a GGUF file says about itself, read from its header without trusting it.

Called for recipes, for memory estimates and for models without a recipe; blocking, so call it in a thread.
Nothing here is kept between calls; a caller that reads the same files often owns a `HeaderCache`.

The file may be anything that a user downloaded: every count and length is held against the file's size
and a fixed limit before it is believed, and every refusal is a `BadModelFileError`.
What llama.cpp refuses in a header (ggml/src/gguf.cpp) is refused here too: the reason is known before a start.
"""

import contextlib
import errno
import math
import os
import re
import shlex
import stat
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.units import format_bytes

# Far above anything published (gemma's header, with 262k tokens and 515k merges, is 16 MB), far below what would hurt.
MAX_HEADER_BYTES = 128 << 20
MAX_SKIPPED_STRINGS = 4 << 20
MAX_KEYS = 4096
MAX_KEY_BYTES = 1024
MAX_TENSORS = 1 << 16
MAX_TENSOR_NAME_BYTES = 63  # GGML_MAX_NAME less its NUL
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_KEPT_ELEMENTS = 1024  # per-layer arrays (head_count_kv) are kept, vocabularies are not
MAX_KEPT_BYTES = 4 << 20  # strings and small arrays of one file together; chat templates are 10 to 100 kB

MAX_TYPE_NUMBER = 999  # types are numbered from 0, 43 of them in 2026; beyond this the header is damaged

SHARD_NAME = re.compile(r"(?P<base>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)

_BLOCK_BYTES = 1 << 20
_DOWNLOAD_AGAIN = "download it again and compare its size and checksum with the source's"
_ALIGNMENT_KEY = "general.alignment"


class BadModelFileError(LlmstudioError):
    """A model file is damaged, incomplete, not GGUF, or not the file to start from."""

    kind, status, exit_code = "bad_model_file", 503, 3


class ModelFileNotFoundError(BadModelFileError):
    """There is no model file at this path."""

    kind = "model_file_not_found"


class ModelFilePermissionError(BadModelFileError):
    """The daemon's user may not read the model file."""

    kind = "model_file_permission"


@dataclass(frozen=True, slots=True)
class GgmlType:
    """How a tensor's numbers are stored: ``block_bytes`` for every ``block_size`` numbers of a row.

    None for both: a type of a newer llama.cpp. Whether it can be served is for the installed llama.cpp to say.
    """

    number: int
    name: str
    block_size: int | None
    block_bytes: int | None


# ggml.h and ggml.c (type_traits), spelled as ggml_type_name() does; q2_0 came after gguf-py 0.19.
GGML_TYPES: Mapping[int, GgmlType] = MappingProxyType({
    number: GgmlType(number, name, block_size, block_bytes)
    for number, name, block_size, block_bytes in (
        (0, "f32", 1, 4), (1, "f16", 1, 2), (2, "q4_0", 32, 18), (3, "q4_1", 32, 20), (6, "q5_0", 32, 22),
        (7, "q5_1", 32, 24), (8, "q8_0", 32, 34), (9, "q8_1", 32, 40), (10, "q2_K", 256, 84), (11, "q3_K", 256, 110),
        (12, "q4_K", 256, 144), (13, "q5_K", 256, 176), (14, "q6_K", 256, 210), (15, "q8_K", 256, 292),
        (16, "iq2_xxs", 256, 66), (17, "iq2_xs", 256, 74), (18, "iq3_xxs", 256, 98), (19, "iq1_s", 256, 50),
        (20, "iq4_nl", 32, 18), (21, "iq3_s", 256, 110), (22, "iq2_s", 256, 82), (23, "iq4_xs", 256, 136),
        (24, "i8", 1, 1), (25, "i16", 1, 2), (26, "i32", 1, 4), (27, "i64", 1, 8), (28, "f64", 1, 8),
        (29, "iq1_m", 256, 56), (30, "bf16", 1, 2), (34, "tq1_0", 256, 54), (35, "tq2_0", 256, 66),
        (39, "mxfp4", 32, 17), (40, "nvfp4", 64, 36), (41, "q1_0", 128, 18), (42, "q2_0", 64, 18),
    )
})  # fmt: skip
_REMOVED_TYPES = {
    4: "q4_2", 5: "q4_3", 31: "q4_0_4_4", 32: "q4_0_4_8", 33: "q4_0_8_8",
    36: "iq4_nl_4_4", 37: "iq4_nl_4_8", 38: "iq4_nl_8_8",
}  # fmt: skip
# llama.h, enum llama_ftype; 1024 (LLAMA_FTYPE_GUESSED) is a flag beside them.
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
    40: "Q1_0", 41: "Q2_0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ArraySummary:
    """A value that was stepped over: a string array, a long array, or (as ``char``) a very long string."""

    element_type: str
    length: int


Scalar = str | int | float | bool
MetadataValue = Scalar | tuple[int | float | bool, ...] | ArraySummary


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: ``shape`` with the row length first, ``offset`` from the file's ``data_offset``.

    ``n_bytes`` is None for a type whose size is unknown.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    n_bytes: int | None


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of one GGUF file, which is whole: the data that it describes is there, if its size can be told."""

    path: Path
    file_bytes: int
    version: int
    metadata: Mapping[str, MetadataValue]
    tensors: tuple[TensorInfo, ...]
    data_offset: int

    @property
    def weights_bytes(self) -> int:
        """The tensors' bytes, without the padding between them; all data of the file where a size is unknown."""
        sizes = [tensor.n_bytes for tensor in self.tensors if tensor.n_bytes is not None]
        return sum(sizes) if len(sizes) == len(self.tensors) else max(0, self.file_bytes - self.data_offset)

    @property
    def expected_file_bytes(self) -> int | None:
        """The least size of a whole file with this header, or None where the size of a tensor is unknown.

        llama.cpp wants no padding after the last tensor.
        """
        ends = [tensor.offset + tensor.n_bytes for tensor in self.tensors if tensor.n_bytes is not None]
        return self.data_offset + max(ends, default=0) if len(ends) == len(self.tensors) else None

    @property
    def n_params(self) -> int:
        """The numbers in the tensors of this file."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def architecture(self) -> str | None:
        """llama.cpp's name for the kind of model, such as ``llama``; None in all shards but the first."""
        return self._text("general.architecture")

    @property
    def name(self) -> str | None:
        """The model's own name, for people."""
        return self._text("general.name")

    @property
    def context_length(self) -> int | None:
        """The context, in tokens, that the model was trained with."""
        return self._whole_number(f"{self.architecture}.context_length")

    @property
    def block_count(self) -> int | None:
        """The number of layers."""
        return self._whole_number(f"{self.architecture}.block_count")

    @property
    def split_no(self) -> int:
        """Which shard this is, from 0."""
        return self._whole_number("split.no") or 0

    @property
    def split_count(self) -> int:
        """How many shards the model has; 1 when it is not split."""
        return max(1, self._whole_number("split.count") or 1)

    @property
    def has_chat_template(self) -> bool:
        """Whether the file brings its own chat template."""
        return bool(self.metadata.get("tokenizer.chat_template"))

    @property
    def file_type(self) -> str | None:
        """The mix of tensor types as people know it, such as ``Q4_K_M``."""
        number = self._whole_number("general.file_type")
        return None if number is None else _FILE_TYPES.get(number & ~1024, f"ftype {number}")

    def _text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def _whole_number(self, key: str) -> int | None:
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_header(path: Path) -> GgufHeader:
    """Return the header of a GGUF file; some 50 ms for a vocabulary of 150,000 tokens.

    Raises:
        BadModelFileError: The file cannot be read, is not GGUF, is damaged or is shorter than its header says.
    """
    with opened(path) as (descriptor, status):
        return _parse(path, descriptor, status.st_size)


class HeaderCache:
    """Headers by the identity of the file, so that a changed or replaced file is read again; safe in threads."""

    def __init__(self, *, max_entries: int = 64) -> None:
        self._max_entries = max_entries
        self._headers: OrderedDict[tuple[int, int, int, int], GgufHeader] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._headers)

    def read(self, path: Path) -> GgufHeader:
        """Return what `read_header` returns, and raise what it raises; faults are not remembered."""
        # The identity is taken from the open file: the name may point elsewhere a moment later.
        with opened(path) as (descriptor, status):
            identity = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
            with self._lock:
                header = self._headers.get(identity)
            if header is None:
                header = _parse(path, descriptor, status.st_size)
        with self._lock:
            self._headers[identity] = header
            self._headers.move_to_end(identity)
            while len(self._headers) > self._max_entries:
                self._headers.popitem(last=False)
        return header if header.path == path else replace(header, path=path)


def is_auxiliary(header: GgufHeader) -> bool:
    """Tell whether a file only goes with a model: mmproj, LoRA adapter, control vector, imatrix, bare vocabulary."""
    if header.architecture in {"clip", "controlvector"}:
        return True
    if header.metadata.get("general.type") in {"mmproj", "adapter", "imatrix"}:
        return True
    # The first shard of a set may hold no tensors (llama-gguf-split --no-tensor-first-split).
    return not header.tensors and header.split_count == 1


# --- the header, byte by byte ---

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: ("u8", struct.Struct("<B")), 1: ("i8", struct.Struct("<b")), 2: ("u16", struct.Struct("<H")),
    3: ("i16", struct.Struct("<h")), 4: ("u32", _U32), 5: ("i32", struct.Struct("<i")), 6: ("f32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<?")), 10: ("u64", _U64), 11: ("i64", struct.Struct("<q")),
    12: ("f64", struct.Struct("<d")),
}  # fmt: skip


class _Bytes:
    """The file as a sequence, read in large blocks; ``at`` is the next byte, ``subject`` what it belongs to."""

    def __init__(self, path: Path, descriptor: int, file_bytes: int) -> None:
        self.path, self.at, self.subject = path, 0, "the magic"
        self.skipped_strings = 0
        self.kept_bytes = 0
        self._descriptor, self._file_bytes = descriptor, file_bytes
        self._block, self._block_at = b"", 0

    def refuse(self, found: str, *, hint: str = _DOWNLOAD_AGAIN) -> NoReturn:
        raise bad_model(self.path, found, hint=hint)

    def require(self, count: int) -> None:
        """Refuse the file unless ``count`` more bytes can be part of its header."""
        if self.at + count > self._file_bytes:
            size = format_bytes(self._file_bytes)
            self.refuse(f"is {size} and ends inside its header: {self.subject} needs {count} bytes at byte {self.at}")
        if self.at + count > MAX_HEADER_BYTES:
            self.refuse(f"has a header of more than {format_bytes(MAX_HEADER_BYTES)}, see {self.subject}")

    def number(self, form: struct.Struct) -> int:
        index = self._load(form.size)
        self.at += form.size
        value: int = form.unpack_from(self._block, index)[0]
        return value

    def take(self, count: int) -> bytes:
        index = self._load(count)
        self.at += count
        return self._block[index : index + count]

    def skip(self, count: int) -> None:
        self.require(count)
        self.at += count

    def skip_strings(self, count: int) -> None:
        """Step over an array of strings: 300,000 in some 40 ms, because the loop touches nothing but locals."""
        self.require(count * _U64.size)
        self.skipped_strings += count
        if self.skipped_strings > MAX_SKIPPED_STRINGS:
            self.refuse(f"lists more than {MAX_SKIPPED_STRINGS} strings, see {self.subject}")
        unpack = _U64.unpack_from
        while count:
            index = self._load(_U64.size)
            block, last = self._block, len(self._block) - _U64.size
            while count and index <= last:
                index += 8 + unpack(block, index)[0]
                count -= 1
            self.at = self._block_at + index  # may be past the block, or past the file: require() tells
        self.require(0)

    def _load(self, count: int) -> int:
        """Return where in the block the next ``count`` bytes start, reading a block when they are not in it."""
        self.require(count)
        index = self.at - self._block_at
        if index + count <= len(self._block):
            return index
        self._block, self._block_at = os.pread(self._descriptor, max(count, _BLOCK_BYTES), self.at), self.at
        if len(self._block) < count:
            self.refuse("became shorter while it was being read", hint="wait until the download has ended")
        return 0


def _parse(path: Path, descriptor: int, file_bytes: int) -> GgufHeader:
    data = _Bytes(path, descriptor, file_bytes)
    version = _read_version(data)
    data.subject = "the count of tensors and keys"
    n_tensors, n_keys = data.number(_U64), data.number(_U64)
    for what, count, limit in (("tensors", n_tensors, MAX_TENSORS), ("keys", n_keys, MAX_KEYS)):
        if count > limit:
            data.refuse(f"claims {count} {what}, expected at most {limit}")
    metadata = _read_metadata(data, n_keys)
    alignment = metadata.get(_ALIGNMENT_KEY, 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        data.refuse(f"has {_ALIGNMENT_KEY} {alignment!r}, expected a power of 2")
    tensors = _read_tensors(data, n_tensors, alignment=alignment)
    header = GgufHeader(
        path=path,
        file_bytes=file_bytes,
        version=version,
        metadata=MappingProxyType(metadata),
        tensors=tensors,
        data_offset=_padded(data.at, alignment) if tensors else data.at,
    )
    expected = header.expected_file_bytes
    if expected is not None and expected > file_bytes:
        found = f"is {format_bytes(file_bytes)} but its header describes {format_bytes(expected)}"
        data.refuse(f"{found}: the download is incomplete, {format_bytes(expected - file_bytes)} are missing")
    return header


def _read_version(data: _Bytes) -> int:
    magic = data.take(4)
    if magic != b"GGUF":
        hint = "run `git lfs pull` where it came from" if magic == b"vers" else "give a GGUF file, or download it again"
        data.refuse(f"is not GGUF: it starts with {magic!r}, expected b'GGUF'", hint=hint)
    version = data.number(_U32)
    hint = "get a newer conversion of the model"
    if version and version & 0xFFFF == 0:
        data.refuse("is big-endian GGUF, expected little-endian", hint=hint)
    if version < 2:
        data.refuse(f"is GGUF version {version}, which llama.cpp no longer reads, expected 2 or 3", hint=hint)
    if version > 3:
        data.refuse(f"is GGUF version {version}, expected 2 or 3", hint="update llmstudiod and llama.cpp")
    return version


def _read_metadata(data: _Bytes, n_keys: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for index in range(n_keys):
        data.subject = f"key {index + 1} of {n_keys}"
        length = data.number(_U64)
        if not 0 < length <= MAX_KEY_BYTES:
            data.refuse(f"has a key ({index + 1} of {n_keys}) of {length} bytes, expected 1 to {MAX_KEY_BYTES}")
        key = data.take(length).decode(errors="replace")
        data.subject = f"key {_shown(key)}"
        if key in metadata:
            data.refuse(f"has the {data.subject} twice")
        metadata[key] = _read_value(data)
    return metadata


def _read_value(data: _Bytes) -> MetadataValue:
    value_type = data.number(_U32)
    if value_type == _STRING:
        length = data.number(_U64)
        if _may_keep(data, length):
            return data.take(length).decode(errors="replace")
        data.skip(length)
        return ArraySummary("char", length)
    if value_type == _ARRAY:
        return _read_array(data, data.number(_U32), data.number(_U64))
    if value_type not in _NUMBERS:
        data.refuse(f"has {data.subject} of the unknown value type {value_type}")
    return data.number(_NUMBERS[value_type][1])


def _read_array(data: _Bytes, element_type: int, length: int) -> MetadataValue:
    if element_type == _STRING:
        data.skip_strings(length)
        return ArraySummary("str", length)
    if element_type not in _NUMBERS:  # arrays in arrays too: llama.cpp does not read them either
        kind = "arrays" if element_type == _ARRAY else f"the unknown value type {element_type}"
        data.refuse(f"has {data.subject} with an array of {kind}")
    name, form = _NUMBERS[element_type]
    if length > MAX_KEPT_ELEMENTS or not _may_keep(data, length * 32):  # a Python number is some 32 bytes
        data.skip(length * form.size)
        return ArraySummary(name, length)
    return struct.unpack(f"<{length}{form.format[1:]}", data.take(length * form.size))


def _may_keep(data: _Bytes, count: int) -> bool:
    if data.kept_bytes + count > MAX_KEPT_BYTES:
        return False
    data.kept_bytes += count
    return True


def _read_tensors(data: _Bytes, n_tensors: int, *, alignment: int) -> tuple[TensorInfo, ...]:
    tensors: dict[str, TensorInfo] = {}
    expected_offset: int | None = 0  # None after a tensor of unknown size: the next one says where it starts
    for index in range(n_tensors):
        data.subject = f"tensor {index + 1} of {n_tensors}"
        length = data.number(_U64)
        if length > MAX_TENSOR_NAME_BYTES:
            data.refuse(f"names a tensor with {length} bytes, expected at most {MAX_TENSOR_NAME_BYTES}")
        name = data.take(length).decode(errors="replace")
        data.subject = f"tensor {_shown(name)}"
        if name in tensors:
            data.refuse(f"has the {data.subject} twice")
        tensor = _read_tensor(data, name)
        if expected_offset is not None and tensor.offset != expected_offset:
            data.refuse(f"has {data.subject} at offset {tensor.offset}, expected {expected_offset}")
        expected_offset = None if tensor.n_bytes is None else tensor.offset + _padded(tensor.n_bytes, alignment)
        tensors[name] = tensor
    return tuple(tensors.values())


def _read_tensor(data: _Bytes, name: str) -> TensorInfo:
    n_dimensions = data.number(_U32)
    if n_dimensions > MAX_DIMENSIONS:
        data.refuse(f"has {data.subject} with {n_dimensions} dimensions, expected at most {MAX_DIMENSIONS}")
    shape = tuple(data.number(_U64) for _ in range(n_dimensions))
    n_elements = math.prod(shape)
    if n_elements >= 1 << 63 or max(shape, default=0) >= 1 << 63:
        data.refuse(f"has {data.subject} of the impossible shape {shape}")
    ggml_type = _read_type(data)
    n_bytes = None
    if ggml_type.block_size is not None and ggml_type.block_bytes is not None:
        row = shape[0] if shape else 1
        if row % ggml_type.block_size:
            blocks = f"{ggml_type.name}, expected a multiple of {ggml_type.block_size}"
            data.refuse(f"has {data.subject} with rows of {row} elements of type {blocks}")
        n_bytes = n_elements // ggml_type.block_size * ggml_type.block_bytes
    return TensorInfo(name=name, shape=shape, type=ggml_type, offset=data.number(_U64), n_bytes=n_bytes)


def _read_type(data: _Bytes) -> GgmlType:
    number = data.number(_U32)
    if number in _REMOVED_TYPES:
        found = f"of the type {_REMOVED_TYPES[number]} ({number}), which llama.cpp no longer reads"
        data.refuse(f"has {data.subject} {found}", hint="get another quantisation of the model")
    if number > MAX_TYPE_NUMBER:
        data.refuse(f"has {data.subject} of the impossible type {number}")
    known = GGML_TYPES.get(number)
    return known or GgmlType(number, f"type-{number}", block_size=None, block_bytes=None)


def _padded(count: int, alignment: int) -> int:
    return (count + alignment - 1) // alignment * alignment


# --- opening files, and what may be wrong with them ---


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """Yield a descriptor and status of a regular file; every OSError inside becomes one of ours."""
    try:
        # Without O_NONBLOCK the open of a FIFO waits for a writer for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise os_fault(path, error) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise bad_model(path, "is not a regular file", hint="give the path of a GGUF file")
        yield descriptor, status
    except OSError as error:
        raise os_fault(path, error) from error
    finally:
        os.close(descriptor)


def os_fault(path: Path, error: OSError | ValueError) -> BadModelFileError:
    """Return the fault of a file or directory that the system would not open or read."""
    details = {"path": str(path)}
    code = error.errno if isinstance(error, OSError) else None
    if code in {errno.ENOENT, errno.ENOTDIR}:
        found = "is a link to a file that does not exist" if path.is_symlink() else "does not exist"
        if path.exists():
            found = "is not a directory"
        hint = "check the path, or download the model"
        if name := SHARD_NAME.fullmatch(path.name):
            part = f"part {int(name['number'])} of a model split into {int(name['count'])} files"
            hint = f"it is {part}: download all of them into one directory"
        return ModelFileNotFoundError(f"{str(path)!r} {found}", hint=hint, details=details)
    if code in {errno.EACCES, errno.EPERM}:
        hint = "let the daemon's user read it, and search the directories above it"
        found = "may not be read"
        with contextlib.suppress(OSError):
            mode = stat.S_IMODE(path.stat().st_mode)
            if not mode & stat.S_IROTH:
                found = f"has mode {mode:04o}: neither the daemon nor the model may read it"
                hint = f"chmod o+r {shlex.quote(str(path))}"
        return ModelFilePermissionError(f"{str(path)!r} {found}", hint=hint, details=details)
    reason = os.strerror(code) if code else str(error)
    return bad_model(path, f"cannot be read: {reason}", hint="check the path and the disk")


def bad_model(path: Path, found: str, *, hint: str = _DOWNLOAD_AGAIN) -> BadModelFileError:
    """Return the fault of a file whose content will not do; ``found`` goes on after its name."""
    # repr(): a file name may hold line breaks and bytes that are not UTF-8, and messages go to the journal.
    return BadModelFileError(f"{str(path)!r} {found}", hint=hint, details={"path": str(path)})


def _shown(name: str) -> str:
    """Return a name out of a file, fit for a message."""
    return repr(name if len(name) <= 80 else f"{name[:80]}…")
