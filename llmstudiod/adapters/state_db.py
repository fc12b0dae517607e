"""``state.db``: what the daemon has learned and may lose. SQLite in WAL mode, in the daemon's state directory.

Whatever happens to the file costs only what it held. A file that is none is put aside and a new one is made; one that
was removed is written again; a disk that is full stops the recording, not the serving. All but `StateDb.put_soon` and
`StateDb.delete_soon` blocks, and is called in threads.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import sqlite3

T = TypeVar("T")

logger = logging.getLogger(__name__)

VERSION = 1
MAX_ROWS = 2000
WRITE_PATIENCE_S, READ_PATIENCE_S, PAUSE_S = 2.0, 0.2, 0.02  # with another program that locks the file
LOOK_S = 1.0
_COLUMNS = "key TEXT PRIMARY KEY, at REAL NOT NULL, value TEXT NOT NULL"
_TABLES = ("learned", "holdings", "stories", "totals", "sessions", "pins")


_Identity = tuple[int, int] | None


class _UnusableError(Exception):
    """The file is a database, but not one of ours."""


class StateDb:
    """Values as JSON, by table and key, and whole tables. Thread-safe. ``path`` None keeps them in memory.

    ``tables`` are made beside its own: ``name (columns)``. ``retired`` are of an earlier version, and dropped.
    """

    def __init__(self, path: Path | None, *, tables: Sequence[str] = (), retired: Sequence[str] = ()) -> None:
        self._path = path
        self._tables = (*(f"{table} ({_COLUMNS})" for table in _TABLES), *tables)
        self._retired = retired
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, "state.db")
        self._connection: sqlite3.Connection | None = None
        self._identity: _Identity = None  # of the file that is open
        self._ours: dict[Path, _Identity] = {}  # those beside it, which are no other file's
        self._stale: dict[Path, _Identity] = {}  # those of a file that is gone
        self._looked_at = 0.0
        self._complained = ""

    def get(self, table: str, key: str) -> dict[str, Any] | None:
        """Return what was put under a key, or None."""
        rows = self.rows(f"SELECT value FROM {_known(table)} WHERE key = ?", (key,))  # noqa: S608 - a known table
        try:
            value = json.loads(rows[0]["value"]) if rows else None
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def all(self, table: str) -> dict[str, dict[str, Any]]:
        """Return every value of a table by its key."""
        found = {}
        for row in self.rows(f"SELECT key, value FROM {_known(table)}"):  # noqa: S608
            try:
                value = json.loads(row["value"])
            except ValueError:
                continue
            if isinstance(value, dict):
                found[str(row["key"])] = value
        return found

    def put(self, table: str, key: str, value: Mapping[str, Any]) -> None:
        """Keep a value, the oldest ones giving way."""
        name = _known(table)
        insert = f"INSERT OR REPLACE INTO {name} (key, at, value) VALUES (?, ?, ?)"  # noqa: S608
        trim = f"DELETE FROM {name} WHERE key NOT IN (SELECT key FROM {name} ORDER BY at DESC LIMIT ?)"  # noqa: S608
        self.write((insert, [(key, time.time(), json.dumps(dict(value)))]), (trim, [(MAX_ROWS,)]))

    def put_soon(self, table: str, key: str, value: Mapping[str, Any]) -> Future[None]:
        """Have a value kept, and wait for nothing; what is returned is done when it is kept, or cannot be."""
        return self._soon(self.put, table, key, value)

    def delete_soon(self, table: str, key: str) -> None:
        """Have a value forgotten, after what was to be put before, and wait for nothing."""
        self._soon(self.delete, table, key)

    def delete(self, table: str, key: str) -> None:
        """Forget what was put under a key."""
        self.write((f"DELETE FROM {_known(table)} WHERE key = ?", [(key,)]))  # noqa: S608

    def rows(self, select: str, values: Sequence[object] = ()) -> list[dict[str, Any]]:
        """Return the rows that a statement of ours finds, by the names of their columns; none where that fails."""

        def read(connection: "sqlite3.Connection") -> list[dict[str, Any]]:
            cursor = connection.execute(select, tuple(values))
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor]

        return self._do(read, patience_s=READ_PATIENCE_S) or []

    def write(self, *steps: tuple[str, Sequence[Sequence[object]]]) -> None:
        """Carry statements of ours out, each for its rows of values: all of it, or nothing."""

        def write(connection: "sqlite3.Connection") -> bool:
            connection.execute("BEGIN")
            try:
                for statement, rows in steps:
                    connection.executemany(statement, rows)
            except BaseException:
                connection.rollback()
                raise
            connection.execute("COMMIT")
            return True

        if self._do(write, patience_s=WRITE_PATIENCE_S):
            self._complained = ""

    def close(self) -> None:
        """Write everything into the file itself."""
        self._writer.submit(lambda: None).result()  # what was to be put soon is put now
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _soon(self, action: Callable[..., None], *values: object) -> Future[None]:
        done = self._writer.submit(action, *values)
        done.add_done_callback(Future.result)  # a bug is logged
        return done

    def _do(self, action: "Callable[[sqlite3.Connection], T]", *, patience_s: float) -> T | None:
        """Do something with the database; what cannot be read or written is told once, and is None.

        Another program's lock is waited for outside our own: who reads does not wait with those who write.
        """
        import sqlite3  # slow to import: nobody waits for it at a start

        deadline = time.monotonic() + patience_s
        while True:
            with self._lock:
                try:
                    return action(self._current())
                except (sqlite3.Error, _UnusableError, OSError) as error:
                    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
                    if code != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                        self._failed(error, code)
                        return None
            time.sleep(PAUSE_S)

    def _failed(self, error: Exception, code: int) -> None:
        import sqlite3

        # All else (a full disk, a lock, a directory that cannot be written, a bug) is no reason to lose what there is.
        if isinstance(error, _UnusableError) or code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
            self._start_anew(str(error))
        else:
            self._complain(str(error))

    def _current(self) -> "sqlite3.Connection":
        """Return the connection to the file that is there now."""
        if self._connection is not None and time.monotonic() >= self._looked_at + LOOK_S:
            self._follow_file(self._connection)
        if self._connection is None:
            self._remove_stale()
            self._connection = self._opened()
            self._identity = self._identity_now()
            self._note_ours()
            self._looked_at = time.monotonic()
        return self._connection

    def _identity_now(self) -> _Identity:
        return _identity(self._path) if self._path else None

    def _follow_file(self, connection: "sqlite3.Connection") -> None:
        """Notice that somebody removed or replaced the file; what was removed is still open, and is written again."""
        self._looked_at = time.monotonic()
        found = self._identity_now()
        if found == self._identity:
            self._note_ours()
            return
        try:
            if found is None:
                self._write_again(connection)
            else:
                logger.warning("%s was replaced: what the new one holds counts", self._path)
        finally:
            connection.close()
            self._connection = None
            self._stale = self._ours

    def _remove_stale(self) -> None:
        """Remove what a file that is gone has left: the new one, which is opened next, would be read with it."""
        for path, identity in self._stale.items():
            if identity is not None and _identity(path) == identity:
                path.unlink(missing_ok=True)
        self._stale = {}

    def _note_ours(self) -> None:
        self._ours = {path: _identity(path) for path in self._beside()} if self._path else {}

    def _write_again(self, connection: "sqlite3.Connection") -> None:
        import sqlite3

        assert self._path is not None
        part = self._path.with_name(f"{self._path.name}.part")
        try:
            for path in (part, *self._beside()):
                path.unlink(missing_ok=True)
            with closing(sqlite3.connect(part)) as copy:
                connection.backup(copy)
            part.replace(self._path)
        except (sqlite3.Error, OSError) as error:
            words = "%s was removed while it was in use, and what it held is lost (%s)"
            logger.error(words, self._path, error)  # noqa: TRY400 - no bug
            part.unlink(missing_ok=True)
        else:
            logger.warning("%s was removed while it was in use: what it held is written again", self._path)

    def _beside(self) -> list[Path]:
        """Return the files of SQLite's that belong to the database."""
        assert self._path is not None
        return [self._path.with_name(self._path.name + suffix) for suffix in ("-wal", "-shm")]

    def _opened(self) -> "sqlite3.Connection":
        import sqlite3

        connection = sqlite3.connect(self._path or ":memory:", isolation_level=None, check_same_thread=False, timeout=0)
        try:
            _refuse_version(connection)
            connection.execute("PRAGMA synchronous = NORMAL")
            if self._lacks_tables(connection):
                connection.execute("PRAGMA journal_mode = WAL")
                for table in self._tables:
                    connection.execute(f"CREATE TABLE IF NOT EXISTS {table}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
            for table in self._retired:
                connection.execute(f"DROP TABLE IF EXISTS {table}")
        except (sqlite3.Error, _UnusableError):
            connection.close()
            raise
        return connection

    def _lacks_tables(self, connection: "sqlite3.Connection") -> bool:
        """Whether tables are to be made; one that has other columns than ours was made by somebody else."""
        import sqlite3

        with closing(sqlite3.connect(":memory:")) as model:
            for table in self._tables:
                model.execute(f"CREATE TABLE {table}")
            expected = _columns(model)
        found = _columns(connection)
        for table in expected.keys() & found.keys():
            if found[table] != expected[table]:
                raise _UnusableError(f"expected the columns {expected[table]} in {table}, found {found[table]}")
        return not expected.keys() <= found.keys()

    def _start_anew(self, reason: str) -> None:
        """Put a damaged file aside; the next statement makes a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._path is None:
            return
        broken = self._path.with_name(f"{self._path.name}.broken")
        logger.error("%s cannot be used (%s): it is kept as %s, and what it held is lost", self._path, reason, broken)
        try:
            for path in self._beside():
                path.unlink(missing_ok=True)
            self._path.replace(broken)
        except OSError as error:
            self._complain(str(error))

    def _complain(self, reason: str) -> None:
        if reason != self._complained:
            logger.error("%s: %s; what would be recorded is lost until that is mended", self._path, reason)
            self._complained = reason


def _identity(path: Path) -> _Identity:
    """Return what tells a file from any other; None: there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _refuse_version(connection: "sqlite3.Connection") -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in (0, VERSION):
        raise _UnusableError(f"it is of version {version}, expected {VERSION}")


def _columns(connection: "sqlite3.Connection") -> dict[str, list[str]]:
    """Return the names of each table's columns."""
    select = "SELECT m.name, c.name FROM sqlite_master AS m, pragma_table_info(m.name) AS c WHERE m.type = 'table'"
    found: dict[str, list[str]] = {}
    for table, column in connection.execute(select):
        found.setdefault(table, []).append(column)
    return found


def _known(table: str) -> str:
    if table not in _TABLES:
        raise ValueError(f"expected a table of {_TABLES}, found {table}")
    return table
