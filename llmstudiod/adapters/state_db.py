"""``state.db``: what the daemon has learned and may lose. SQLite in WAL mode, in the daemon's state directory.

Whatever happens to the file costs only what it held. A file that is none is put aside and a new one is made; a disk
that is full stops the recording, not the serving. Everything here blocks, and is called in threads.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import sqlite3

T = TypeVar("T")

logger = logging.getLogger(__name__)

VERSION = 1
MAX_ROWS = 2000
_TABLES = ("learned", "holdings", "stories", "totals", "sessions", "pins")


class StateDb:
    """Values as JSON, by table and key, and whole tables. Thread-safe. ``path`` None keeps them in memory.

    ``tables`` are made beside its own: ``name (columns)``.
    """

    def __init__(self, path: Path | None, *, tables: Sequence[str] = ()) -> None:
        self._path = path
        self._tables = tuple(tables)
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
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

    def delete(self, table: str, key: str) -> None:
        """Forget what was put under a key."""
        self.write((f"DELETE FROM {_known(table)} WHERE key = ?", [(key,)]))  # noqa: S608

    def rows(self, select: str, values: Sequence[object] = ()) -> list[dict[str, Any]]:
        """Return the rows that a statement of ours finds, by the names of their columns; none where that fails."""

        def read(connection: "sqlite3.Connection") -> list[dict[str, Any]]:
            cursor = connection.execute(select, tuple(values))
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor]

        return self._do(read) or []

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

        if self._do(write):
            self._complained = ""

    def close(self) -> None:
        """Write everything into the file itself."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _do(self, action: "Callable[[sqlite3.Connection], T]") -> T | None:
        """Do something with the database; what cannot be read or written is told once, and is None."""
        import sqlite3  # slow to import: nobody waits for it at a start

        with self._lock:
            try:
                if self._connection is None:
                    self._connection = self._opened()
                return action(self._connection)
            except sqlite3.OperationalError as error:  # a full disk, a lock, a directory that cannot be written
                self._complain(str(error))
            except sqlite3.DatabaseError as error:
                self._start_anew(str(error))
            return None

    def _opened(self) -> "sqlite3.Connection":
        import sqlite3

        connection = sqlite3.connect(self._path or ":memory:", isolation_level=None, check_same_thread=False, timeout=2)
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise sqlite3.DatabaseError(f"it is of version {version}, expected {VERSION}")
            connection.execute("PRAGMA synchronous = NORMAL")
            there = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not there.issuperset((*_TABLES, *(table.partition(" ")[0] for table in self._tables))):
                connection.execute("PRAGMA journal_mode = WAL")
                for table in _TABLES:
                    columns = "key TEXT PRIMARY KEY, at REAL NOT NULL, value TEXT NOT NULL"
                    connection.execute(f"CREATE TABLE IF NOT EXISTS {table} ({columns})")
                for table in self._tables:
                    connection.execute(f"CREATE TABLE IF NOT EXISTS {table}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _start_anew(self, reason: str) -> None:
        """Put a damaged file aside; the next statement makes a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._path is None:
            return
        broken = self._path.with_name(f"{self._path.name}.broken")
        logger.error("%s cannot be used (%s): it is kept as %s, and what it held is lost", self._path, reason, broken)
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        try:
            self._path.replace(broken)
        except OSError as error:
            self._complain(str(error))

    def _complain(self, reason: str) -> None:
        if reason != self._complained:
            logger.error("%s: %s; what would be recorded is lost until that is mended", self._path, reason)
            self._complained = reason


def _known(table: str) -> str:
    if table not in _TABLES:
        raise ValueError(f"expected a table of {_TABLES}, found {table}")
    return table
