"""Models as files on disk: one file, a set of shards, a directory with one model, or all below a directory.

Called for recipes and for models without one; blocking, so call it in a thread. Nothing is kept between calls.
"""

import itertools
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmstudiod.adapters.gguf_file import (
    SHARD_NAME,
    BadModelFileError,
    ModelFileNotFoundError,
    bad_model,
    opened,
    os_fault,
    read_header,
)
from llmstudiod.core.gguf import GgufHeader, TensorInfo, is_auxiliary

MAX_SEARCH_DEPTH = 4  # hub/models--ORG--NAME/snapshots/REVISION/QUANTISATION
MAX_SEARCH_ENTRIES = 50_000

_SHARD_STEM_END = re.compile(r"-[0-9]{5}-of-[0-9]{5}\Z")

HeaderReader = Callable[[Path], GgufHeader]


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model that llama-server can be pointed at: ``path`` goes to ``--model``, sums are over all shards."""

    path: Path
    shards: tuple[Path, ...]
    header: GgufHeader
    tensors: tuple[TensorInfo, ...]
    total_bytes: int
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model met by `find_models`; without its tensors and metadata, so that thousands may be held."""

    model_id: str
    path: Path
    shards: tuple[Path, ...]
    architecture: str | None
    file_type: str | None
    total_bytes: int
    weights_bytes: int


def resolve_model(path: Path, *, read: HeaderReader = read_header) -> ModelFile:
    """Return the model at a path: a file, the first shard of a set, or a directory that holds exactly one model.

    Symbolic links are followed to the data, but shards are told by the links' names:
    in Hugging Face's cache ``x-00001-of-00002.gguf`` is a link to a blob named by its hash.

    Raises:
        BadModelFileError: There is no such model, or not exactly one, or one of its files is faulty.
    """
    if _is_directory(path):
        path = _only_model_in(path, read=read)
    header = read(path)
    name = SHARD_NAME.fullmatch(path.name)
    number, count = (int(name["number"]), int(name["count"])) if name else (1, 1)
    if (header.split_no + 1, header.split_count) != (number, count):
        told = (
            f"is part {header.split_no + 1} of {header.split_count} by its header, part {number} of {count} by its name"
        )
        raise bad_model(path, told, hint="give every part the name that it had at its source, NAME-00001-of-00004.gguf")
    if number > 1:
        hint = f"give the first part, {str(_first_shard(path))!r}"
        raise bad_model(path, f"is part {number} of {count}, expected part 1", hint=hint)
    shards = [path.with_name(_shard_name(name["base"], no, count)) for no in range(1, count + 1)] if name else [path]
    headers = [header, *(_read_shard(shard, index, header, read=read) for index, shard in enumerate(shards[1:], 1))]
    tensors = tuple(itertools.chain.from_iterable(part.tensors for part in headers))
    expected = header.metadata.get("split.tensors.count")
    if count > 1 and isinstance(expected, int) and expected != len(tensors):
        raise bad_model(path, f"describes {expected} tensors in {count} files, they hold {len(tensors)}")
    return ModelFile(
        path=path,
        shards=tuple(shards),
        header=header,
        tensors=tensors,
        total_bytes=sum(part.file_bytes for part in headers),
        weights_bytes=sum(part.weights_bytes for part in headers),
    )


def find_models(
    directory: Path, *, limit: int = 2000, read: HeaderReader = read_header
) -> tuple[list[FoundModel], list[BadModelFileError]]:
    """Return the models below a directory, sorted by path, and what is wrong with the others.

    Looks at names that end in ``.gguf``, `MAX_SEARCH_DEPTH` directories deep, and not at hidden names.
    A file that is reached by several links counts once. Two models may have the same ``model_id``: the caller chooses.
    """
    faults: list[BadModelFileError] = []
    found: list[FoundModel] = []
    for path in _first_shards(_gguf_files_below(directory, faults)):
        if len(found) >= limit:
            faults.append(
                bad_model(directory, f"holds more than {limit} models, the rest is left out", hint="split it up")
            )
            break
        try:
            model = None if _is_mmproj_name(path) else resolve_model(path, read=read)
            if model is None or is_auxiliary(model.header):
                continue
            model_id = model_id_from_stem(path.stem)
        except BadModelFileError as fault:
            faults.append(fault)
            continue
        found.append(
            FoundModel(
                model_id=model_id,
                path=path,
                shards=model.shards,
                architecture=model.header.architecture,
                file_type=model.header.file_type,
                total_bytes=model.total_bytes,
                weights_bytes=model.weights_bytes,
            )
        )
    return sorted(found, key=lambda model: model.path), faults


def model_id_from_stem(stem: str) -> str:
    """Return the model id for a file that has no recipe.

    >>> model_id_from_stem("Qwen3 8B (new)-Q4_K_M-00001-of-00002")
    'qwen3-8b-new-q4_k_m'

    Raises:
        BadModelFileError: Nothing of the name can be part of an id.
    """
    name = re.sub(r"(?:[^a-z0-9._]|-)+", "-", _SHARD_STEM_END.sub("", stem).lower())
    model_id = name.lstrip("._-")[:63].rstrip("._-")
    if not model_id:
        hint = "rename the file, or write a recipe for it"
        raise BadModelFileError(f"{stem!r} gives no model id: no letter of a-z or digit in it", hint=hint)
    return model_id


def _shard_name(base: str, number: int, count: int) -> str:
    return f"{base}-{number:05d}-of-{count:05d}.gguf"


def _first_shard(path: Path) -> Path:
    name = SHARD_NAME.fullmatch(path.name)
    return path.with_name(_shard_name(name["base"], 1, int(name["count"]))) if name else path


def _first_shards(paths: Iterable[Path]) -> list[Path]:
    return list(dict.fromkeys(_first_shard(path) for path in paths))


def _read_shard(path: Path, index: int, first: GgufHeader, *, read: HeaderReader) -> GgufHeader:
    header = read(path)
    found, expected = (header.split_no, header.split_count), (index, first.split_count)
    if found != expected:
        told = f"split.no {found[0]} and split.count {found[1]}, expected {expected[0]} and {expected[1]}"
        raise bad_model(path, f"does not belong to {str(first.path)!r}: it has {told}")
    return header


def _only_model_in(directory: Path, *, read: HeaderReader) -> Path:
    try:
        with os.scandir(directory) as listing:
            entries = itertools.islice(listing, MAX_SEARCH_ENTRIES)
            visible = (entry for entry in entries if not entry.name.startswith("."))
            files = sorted(Path(entry.path) for entry in visible if not _is_directory(entry))
    except OSError as error:
        raise os_fault(directory, error) from error
    # A half-finished download beside the model (model.gguf.part) has the magic too, so the suffix goes first.
    files = [path for path in files if _has_suffix(path.name)] or [path for path in files if _has_magic(path)]
    models = [path for path in _first_shards(files) if not _is_mmproj_name(path)]
    if len(models) > 1:
        models = [path for path in models if not _is_auxiliary_file(path, read=read)]
    if not models:
        raise ModelFileNotFoundError(
            f"{str(directory)!r} holds no model: found no GGUF file, or only files that go with a model",
            hint="give the path of the GGUF file",
            details={"path": str(directory)},
        )
    if len(models) > 1:
        names = ", ".join(repr(path.name) for path in models[:8]) + (", …" if len(models) > 8 else "")
        raise bad_model(
            directory, f"holds {len(models)} models, expected one: {names}", hint="give the path of one of them"
        )
    return models[0]


def _gguf_files_below(directory: Path, faults: list[BadModelFileError]) -> Iterator[Path]:
    pending = [(directory, 0)]
    seen: set[tuple[int, int]] = set()  # directories: links may go in circles; files: a link is not a second model
    n_left = MAX_SEARCH_ENTRIES
    while pending:
        folder, depth = pending.pop()
        try:
            if _is_seen(folder.stat(), seen):
                continue
            with os.scandir(folder) as listing:
                entries = sorted(itertools.islice(listing, n_left + 1), key=lambda entry: entry.name)
        except (OSError, ValueError) as error:
            faults.append(os_fault(folder, error))
            continue
        n_left -= len(entries)
        if n_left < 0:
            found = f"holds more than {MAX_SEARCH_ENTRIES} files, the rest is left out"
            faults.append(bad_model(directory, found, hint="keep models in a directory of their own"))
            return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                status = entry.stat()
            except OSError:
                if _has_suffix(entry.name):  # a dead link: reading it says so
                    yield Path(entry.path)
                continue
            if stat.S_ISDIR(status.st_mode):
                if depth < MAX_SEARCH_DEPTH:
                    pending.append((Path(entry.path), depth + 1))
            elif _has_suffix(entry.name) and not _is_seen(status, seen):
                yield Path(entry.path)


def _is_seen(status: os.stat_result, seen: set[tuple[int, int]]) -> bool:
    """Tell whether a file was met before, and remember it."""
    identity = (status.st_dev, status.st_ino)
    if identity in seen:
        return True
    seen.add(identity)
    return False


def _is_directory(path: Path | os.DirEntry[str]) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False  # opening it as a file tells why


def _has_suffix(name: str) -> bool:
    return name.lower().endswith(".gguf")


def _has_magic(path: Path) -> bool:
    try:
        with opened(path) as (descriptor, _):
            return os.pread(descriptor, 4, 0) == b"GGUF"
    except BadModelFileError:
        return False


def _is_mmproj_name(path: Path) -> bool:
    return path.name.lower().startswith("mmproj")


def _is_auxiliary_file(path: Path, *, read: HeaderReader) -> bool:
    try:
        return is_auxiliary(read(path))
    except BadModelFileError:
        return False  # a faulty file still counts, so that it is named
