"""Models on disk: single files, shard sets, directories, searches."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstudiod.adapters.gguf_file import BadModelFileError, HeaderCache, ModelFileNotFoundError, read_header
from llmstudiod.adapters.model_files import find_models, model_id_from_stem, resolve_model
from tests.gguf_files import packed, packed_key, packed_tensor, write_model, write_shard, write_shards


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small whole model."""
    return write_model(tmp_path / "model.gguf")


def test_single_file_resolves_to_itself(model: Path) -> None:
    """A model in one file has one shard; the suffix does not matter."""
    path = model.rename(model.with_name("blob"))
    found = resolve_model(path)
    assert (found.path, found.shards, found.header.path) == (path, (path,), str(path))
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


def test_model_with_a_tensor_type_of_the_future_is_found(tmp_path: Path) -> None:
    """A file of a newer llama.cpp's quantisation is a model like any other; its size stands for its weights'."""
    path = tmp_path / "new.gguf"
    path.write_bytes(packed(n_tensors=1, body=packed_tensor(b"t", (8,), 57) + bytes(500)))
    found, faults = find_models(tmp_path)
    assert faults == []
    assert [(model.model_id, model.weights_bytes > 0) for model in found] == [("new", True)]
    assert (
        resolve_model(path).weights_bytes
        == found[0].weights_bytes
        == path.stat().st_size - read_header(path).data_offset
    )


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


def test_headers_come_from_the_cache_that_is_given(model: Path) -> None:
    """A caller with a cache reads no file twice."""
    cache = HeaderCache()
    assert resolve_model(model, read=cache.read).header is cache.read(model)
