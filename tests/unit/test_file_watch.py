"""Files that change are noticed, once they are still."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmstudiod.adapters.file_watch import changed, model_files


async def test_returns_once_the_files_are_still() -> None:
    """Three writes in a row are one change."""
    seen: Iterator[int] = iter([0, 0, 1, 2, 3, 3, 3])
    asked = []

    def identities() -> int:
        asked.append(next(seen))
        return asked[-1]

    async with asyncio.timeout(5):
        await changed(identities, period_s=0.001, settle_s=0.001)
    assert asked == [0, 0, 1, 2, 3, 3]


async def test_waits_for_a_change() -> None:
    """Nothing changes, so it does not return."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await changed(lambda: 1, period_s=0.001, settle_s=0.001)


def test_model_files(tmp_path: Path) -> None:
    """GGUFs below the directories count, with size and time; other files and lost directories do not."""
    (tmp_path / "deep").mkdir()
    for name in ("b.gguf", "deep/a.gguf", "x.txt"):
        (tmp_path / name).write_bytes(b"1234")
    (tmp_path / "lost.gguf").symlink_to("/nonexistent")
    found = model_files([str(tmp_path), "/nonexistent"])
    assert [(Path(path).name, size) for path, size, _ in found] == [("b.gguf", 4), ("a.gguf", 4)]
    (tmp_path / "b.gguf").write_bytes(b"12345")
    assert model_files([str(tmp_path)]) != found
