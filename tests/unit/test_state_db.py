"""``state.db``: whatever happens to it costs only what it held."""

import contextlib
import errno
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmstudiod.adapters import state_db
from llmstudiod.adapters.state_db import StateDb


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the file belongs."""
    return tmp_path / "state.db"


def test_value_outlives_the_daemon(path: Path) -> None:
    """By table and key; a later one takes its place."""
    first = StateDb(path)
    first.put("learned", "a", {"kv": 1.5})
    first.put("learned", "a", {"kv": 2.5})
    first.put("holdings", "a", {"x": [1]})
    first.close()
    second = StateDb(path)
    assert second.get("learned", "a") == {"kv": 2.5}
    assert second.get("holdings", "a") == {"x": [1]}
    assert second.get("learned", "b") is None


def test_killed_daemon_loses_nothing(path: Path) -> None:
    """What was put is in the file, with nobody to close it."""
    StateDb(path).put("learned", "a", {"kv": 1.5})
    assert StateDb(path).get("learned", "a") == {"kv": 1.5}
    assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_without_a_file_it_remembers_for_as_long_as_it_runs() -> None:
    """As in development."""
    state = StateDb(None)
    state.put("learned", "a", {"kv": 1})
    assert state.get("learned", "a") == {"kv": 1}


@pytest.mark.parametrize("content", [b"no database" * 100, b"SQLite format 3\0" + b"\xff" * 4000, b""])
def test_damaged_file_is_put_aside(path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """The daemon says so and makes a new one; an empty file is a new one."""
    path.write_bytes(content)
    state = StateDb(path)
    assert state.get("learned", "a") is None
    state.put("learned", "a", {"kv": 1})
    assert state.get("learned", "a") == {"kv": 1}
    broken = path.with_name("state.db.broken")
    assert broken.exists() == bool(content)
    if content:
        assert broken.read_bytes() == content
        assert f"it is kept as {broken}" in caplog.text


def test_file_that_is_damaged_while_it_is_used_is_put_aside(path: Path) -> None:
    """With its log, which belongs to it."""
    state = StateDb(path)
    for number in range(500):
        state.put("learned", str(number), {"text": "x" * 200})
    state.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    state = StateDb(path)
    state.put("learned", "a", {"kv": 1})
    state.put("learned", "a", {"kv": 2})
    assert state.get("learned", "a") == {"kv": 2}


def test_file_of_a_later_version_is_put_aside(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After a downgrade."""
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    state = StateDb(path)
    state.put("learned", "a", {"kv": 1})
    assert state.get("learned", "a") is None or state.get("learned", "a") == {"kv": 1}
    state.put("learned", "a", {"kv": 1})
    assert state.get("learned", "a") == {"kv": 1}
    assert "it is of version 99, expected 1" in caplog.text


def test_full_disk_stops_the_recording_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is told once, not with every value; when there is room again it goes on."""
    state = StateDb(path)
    state.put("learned", "a", {"kv": 1})
    connection = state._connection
    assert connection is not None
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with caplog.at_level(logging.ERROR):
        for number in range(3):
            state.put("learned", f"b{number}", {"text": "x" * 100_000})
    assert caplog.text.count("disk is full") == 1
    assert state.get("learned", "a") == {"kv": 1}
    connection.execute("PRAGMA max_page_count = 100000")
    state.put("learned", "b", {"kv": 2})
    assert state.get("learned", "b") == {"kv": 2}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """Nothing is kept, and nobody fails."""
    tmp_path.chmod(0o500)
    StateDb(tmp_path / "state.db").put("learned", "a", {})


def test_directory_that_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same."""
    state = StateDb(tmp_path / "no" / "state.db")
    state.put("learned", "a", {"kv": 1})
    assert state.get("learned", "a") is None
    assert caplog.text.count("unable to open database file") == 1


def counts(path: Path, table: str) -> int:
    """Return how many rows another program finds."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        count: int = connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        return count


@pytest.mark.parametrize("names", [["state.db"], ["state.db", "state.db-wal", "state.db-shm"]])
def test_file_that_is_removed_is_written_again(
    path: Path, names: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The daemon has it open still: nothing is lost, and it is told."""
    monkeypatch.setattr(state_db, "LOOK_S", 0.0)
    state = StateDb(path, tables=["more (name TEXT)"])
    state.put("learned", "a", {"kv": 1})
    state.write(("INSERT INTO more VALUES (?)", [("x",)]))
    for name in names:
        path.with_name(name).unlink()
    state.put("learned", "b", {"kv": 2})
    assert "was removed while it was in use: what it held is written again" in caplog.text
    assert (counts(path, "learned"), counts(path, "more")) == (2, 1)
    state.put("learned", "c", {"kv": 3})
    assert caplog.text.count("was removed") == 1
    state.close()
    assert StateDb(path).all("learned") == {"a": {"kv": 1}, "b": {"kv": 2}, "c": {"kv": 3}}
    assert sorted(each.name for each in path.parent.iterdir() if "part" in each.name) == []


def write_other(path: Path) -> None:
    """Write the database beside it that will be put in its place."""
    other = StateDb(path.with_name("other.db"))
    other.put("learned", "a", {"kv": 1})
    other.close()


def test_file_that_is_replaced_counts(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody has put a copy back."""
    monkeypatch.setattr(state_db, "LOOK_S", 0.0)
    write_other(path)
    state = StateDb(path)
    for number in range(50):  # its log of changes is left beside the file, and no part of the new one
        state.put("learned", f"old{number}", {"kv": number})
    path.with_name("other.db").replace(path)
    assert state.get("learned", "a") == {"kv": 1}
    assert state.get("learned", "old1") is None
    assert "was replaced" in caplog.text
    state.put("learned", "b", {"kv": 3})
    assert counts(path, "learned") == 2


def test_replaced_file_waits_for_the_log_of_the_old_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While that cannot be removed nothing is read or written, and nobody fails."""
    monkeypatch.setattr(state_db, "LOOK_S", 0.0)
    write_other(path)
    state = StateDb(path)
    state.put("learned", "old", {"kv": 2})
    path.with_name("other.db").replace(path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        for _ in range(2):
            state.put("learned", "lost", {"kv": 3})
            assert state.all("learned") == {}
    assert caplog.text.count("Read-only file system") == 1
    assert state.all("learned") == {"a": {"kv": 1}}


def refuse(_path: Path, *, missing_ok: bool = False) -> None:
    """Fail as where a disk has gone bad."""
    raise OSError(errno.EROFS, "Read-only file system")


def test_file_is_looked_at_once_a_second(path: Path) -> None:
    """Not with each value."""
    state = StateDb(path)
    state.put("learned", "a", {"kv": 1})
    looked_at = state._looked_at
    state.put("learned", "a", {"kv": 2})
    assert state._looked_at == looked_at


def test_value_that_is_refused_loses_nothing_else(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A constraint that fails is a bug of ours, and no reason to put the file aside."""
    state = StateDb(path)
    state.put("learned", "a", {"kv": 1})
    state.write(("INSERT INTO learned (key, at, value) VALUES (?, ?, ?)", [("a", 0, "{}")]))
    assert "UNIQUE constraint failed" in caplog.text
    assert state.get("learned", "a") == {"kv": 1}
    assert not path.with_name("state.db.broken").exists()


def test_table_that_nobody_reads_any_more_goes(path: Path) -> None:
    """It would stay for ever; all others keep what they hold."""
    first = StateDb(path, tables=["old (name TEXT)", "more (name TEXT)"])
    first.write(("INSERT INTO old VALUES (?)", [("x",)]), ("INSERT INTO more VALUES (?)", [("x",)]))
    first.close()
    state = StateDb(path, tables=["more (name TEXT)"], retired=["old"])
    assert state.rows("SELECT name FROM more") == [{"name": "x"}]
    assert state.rows("SELECT name FROM sqlite_master WHERE name = 'old'") == []
    state.close()


@pytest.mark.parametrize("foreign", ["learned (key TEXT)", "more (other TEXT)"])
def test_table_of_another_layout_is_put_aside(path: Path, foreign: str, caplog: pytest.LogCaptureFixture) -> None:
    """What could never be written to costs only what it held."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"CREATE TABLE {foreign}")
    state = StateDb(path, tables=["more (name TEXT)"])
    for _ in range(2):
        state.put("learned", "a", {"kv": 1})
        state.write(("INSERT INTO more (name) VALUES (?)", [("x",)]))
    assert state.get("learned", "a") == {"kv": 1}
    assert counts(path, "more")
    assert "expected the columns" in caplog.text


@pytest.fixture
def locked(path: Path) -> Iterator[StateDb]:
    """A database that another program has locked for writing."""
    state = StateDb(path)
    state.put("learned", "a", {"kv": 1})
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield state


def test_reading_does_not_wait_for_who_writes(locked: StateDb) -> None:
    """Another program's lock holds up those who write, and nobody else."""
    writers = [threading.Thread(target=locked.put, args=("learned", f"b{n}", {"kv": 2})) for n in range(3)]
    for writer in writers:
        writer.start()
    began = time.monotonic()
    assert [locked.get("learned", "a") for _ in range(5)] == [{"kv": 1}] * 5
    assert time.monotonic() - began < 0.5
    assert all(writer.is_alive() for writer in writers)
    for writer in writers:
        writer.join()


def test_value_is_put_soon(path: Path, locked: StateDb) -> None:
    """Who has something kept goes on at once; it is there when the database is closed."""
    began = time.monotonic()
    locked.put_soon("learned", "b", {"kv": 2})
    assert time.monotonic() - began < 0.5
    state = StateDb(path.with_name("free.db"))
    state.put_soon("learned", "b", {"kv": 2})
    state.close()
    assert counts(path.with_name("free.db"), "learned") == 1


def test_oldest_values_give_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file does not grow for ever."""
    monkeypatch.setattr(state_db, "MAX_ROWS", 3)
    state = StateDb(path)
    for number in range(5):
        state.put("learned", str(number), {"n": number})
    assert [state.get("learned", str(number)) for number in range(5)] == [None, None, {"n": 2}, {"n": 3}, {"n": 4}]


def test_threads_may_use_it(path: Path) -> None:
    """One statement after the other."""
    state = StateDb(path)

    def put_all(name: int) -> None:
        for number in range(20):
            state.put("learned", f"{name}-{number}", {"n": number})

    threads = [threading.Thread(target=put_all, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(state.get("learned", f"{n}-19") == {"n": 19} for n in range(4))


def test_unknown_table_is_a_bug(path: Path) -> None:
    """No name of a table comes from outside."""
    with pytest.raises(ValueError, match="expected a table"):
        StateDb(path).get("x; DROP TABLE learned", "a")


def test_value_that_is_no_object_is_none(path: Path) -> None:
    """Whoever edits the file by hand."""
    state = StateDb(path)
    state.put("learned", "a", {})
    state.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE learned SET value = '[1]'")
        connection.execute("INSERT INTO learned VALUES ('b', 0, '{')")
    connection.close()
    state = StateDb(path)
    assert (state.get("learned", "a"), state.get("learned", "b")) == (None, None)
