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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.gguf import (
    GGML_TYPES,
    REMOVED_TYPES,
    ArraySummary,
    GgmlType,
    GgufHeader,
    MetadataValue,
    TensorInfo,
)
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
        return header if header.path == str(path) else replace(header, path=str(path))


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
        path=str(path),
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
        if magic == b"vers":
            data.refuse("is not GGUF but a pointer of git-lfs", hint="run `git lfs pull` where it came from")
        # What it begins with is not told: it may be any file, and messages travel.
        data.refuse("is not GGUF: it does not begin with these letters", hint="give a GGUF file, or download it again")
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
    if number in REMOVED_TYPES:
        found = f"of the type {REMOVED_TYPES[number]} ({number}), which llama.cpp no longer reads"
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
            mode, real = stat.S_IMODE(path.stat().st_mode), path.resolve()
            if not mode & stat.S_IROTH:
                leads = "" if real == path else f"leads to {str(real)!r}, which "
                found = f"{leads}has mode {mode:04o}: neither the daemon nor the model may read it"
                # Nobody is advised to open a file of which nothing tells that it is a model.
                is_model = real.suffix == ".gguf" or "blobs" in real.parts
                hint = f"chmod o+r {shlex.quote(str(real))}" if is_model else "give the path of a GGUF file"
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
