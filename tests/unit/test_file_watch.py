"""Files that change are noticed, each once it is still."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmstudiod.adapters.file_watch import Files, FileWatch, model_files
from llmstudiod.adapters.own_thread import in_own_thread


class NothingNewError(Exception):
    """The files have been looked at often enough since they changed last."""


class Looks:
    """Files as they are at one look after the other; the last look repeats itself a few times."""

    def __init__(self, *looks: Files, known: Files) -> None:
        self.known, self.count = known, 0
        self.watch = FileWatch(self._look, lambda: self.known)
        self.become(*looks)

    def become(self, *looks: Files) -> None:
        """Have the files change."""
        self._looks: Iterator[Files] = iter([*looks, *[looks[-1]] * 5])

    def _look(self) -> Files:
        self.count += 1
        try:
            self.now = next(self._looks)
        except StopIteration:
            raise NothingNewError from None
        return self.now

    async def changed(self) -> bool:
        """Return whether a change is told before there is nothing new any more."""
        try:
            await self.watch.changed(period_s=0, settle_s=0)
        except NothingNewError:
            return False
        return True


async def test_returns_once_the_files_are_still() -> None:
    """Three writes in a row are one change."""
    looks = Looks({"a": 0}, {"a": 0}, {"a": 1}, {"a": 2}, {"a": 3}, {"a": 3}, known={"a": 0})
    assert await looks.changed()
    assert looks.count == 6


async def test_waits_for_a_change() -> None:
    """Nothing changes, so it does not return."""
    assert not await Looks({"a": 0}, known={"a": 0}).changed()


@pytest.mark.parametrize(("known", "now"), [({"a": 0}, {"a": 1}), ({"a": 0}, {}), ({}, {"a": 0})])
async def test_what_changed_before_the_first_look_is_noticed(known: Files, now: Files) -> None:
    """It is compared with what was read, not with what the first look saw: a start takes a while."""
    assert await Looks(now, known=known).changed()


async def test_file_that_is_being_copied_hides_no_other() -> None:
    """The new one that is still is told while the large one grows, and the large one when it is there."""
    looks = Looks(*[{"large": size, "small": 1} for size in range(100)], known={})
    assert await looks.changed()
    assert looks.count == 2
    looks.known = {**looks.now}
    assert await looks.changed()
    assert looks.count == 101


async def test_growing_file_alone_is_no_change_yet() -> None:
    """Half a recipe, or half a model, is not read."""
    looks = Looks(*[{"large": size} for size in range(100)], known={})
    assert await looks.changed()
    assert looks.count == 101


async def test_change_is_told_once() -> None:
    """Where reading it goes wrong, or takes long, it is not told again before it has changed again."""
    looks = Looks({"a": 1}, known={"a": 0, "b": 0})
    assert await looks.changed()
    assert not await looks.changed()
    looks.become({"a": 2})
    assert await looks.changed()


async def test_look_that_hangs_takes_one_thread_which_nobody_else_needs() -> None:
    """A disk that does not answer stops no other look, and not the end of the process."""
    hang, hung = threading.Event(), threading.Event()
    looks = []

    def look() -> Files:
        looks.append(threading.current_thread())
        hung.set()
        hang.wait(60)
        return {}

    try:
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(FileWatch(look, dict).changed(period_s=0.001, settle_s=0.001))
            assert await asyncio.to_thread(hung.wait, 10)
            await asyncio.sleep(0.05)
            assert [thread.daemon for thread in looks] == [True]
            assert await in_own_thread(lambda: 5) == 5
            watching.cancel()
    finally:
        hang.set()


async def test_error_is_raised_where_it_is_awaited() -> None:
    """As in any other thread."""
    with pytest.raises(ZeroDivisionError):
        await in_own_thread(lambda: 1 // 0)


async def test_removal_of_what_was_read_by_another_way_is_noticed() -> None:
    """A file that came and was read while nobody looked, and was removed by hand afterwards."""
    files, known = {"x": 1}, {"x": 1}
    watch = FileWatch(lambda: dict(files), lambda: dict(known))
    files["x"] = 2
    await asyncio.wait_for(watch.changed(period_s=0.001, settle_s=0.001), 10)
    known.update(files)
    files["y"] = known["y"] = 1
    del files["y"]
    await asyncio.wait_for(watch.changed(period_s=0.001, settle_s=0.001), 10)


def test_model_files(tmp_path: Path) -> None:
    """GGUFs below the directories count, with size, times and mode; other files and lost directories do not."""
    (tmp_path / "deep").mkdir()
    for name in ("b.gguf", "deep/a.GGUF", "x.txt"):
        (tmp_path / name).write_bytes(b"1234")
    (tmp_path / "lost.gguf").symlink_to("/nonexistent")
    found = model_files([str(tmp_path), "/nonexistent"])
    assert set(found) == {str(tmp_path / "b.gguf"), str(tmp_path / "deep" / "a.GGUF")}
    status = (tmp_path / "b.gguf").stat()
    assert found[str(tmp_path / "b.gguf")] == (4, status.st_mtime_ns, status.st_ctime_ns)
    (tmp_path / "b.gguf").chmod(0o600)
    assert model_files([str(tmp_path)]) != found
    found = model_files([str(tmp_path)])
    (tmp_path / "b.gguf").write_bytes(b"12345")
    assert model_files([str(tmp_path)]) != found
