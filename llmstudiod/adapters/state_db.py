"""``state.db``: what the daemon has learned and may lose. SQLite in WAL mode, in the daemon's state directory.

Whatever happens to the file costs only what it held. A file that is none is put aside and a new one is made; a disk
that is full stops the recording, not the serving. Everything here blocks, and is called in threads.
"""

import json
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sqlite3

logger = logging.getLogger(__name__)

VERSION = 1
MAX_ROWS = 2000
_TABLES = ("learned", "holdings")


class StateDb:
    """Values as JSON, by table and key. Thread-safe. ``path`` None keeps them in memory."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._complained = ""

    def get(self, table: str, key: str) -> dict[str, Any] | None:
        """Return what was put under a key, or None."""
        rows = self._do(f"SELECT value FROM {_known(table)} WHERE key = ?", (key,))  # noqa: S608 - a known table
        try:
            value = json.loads(rows[0][0]) if rows else None
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def put(self, table: str, key: str, value: Mapping[str, Any]) -> None:
        """Keep a value, the oldest ones giving way."""
        name = _known(table)
        insert = f"INSERT OR REPLACE INTO {name} (key, at, value) VALUES (?, ?, ?)"  # noqa: S608
        trim = f"DELETE FROM {name} WHERE key NOT IN (SELECT key FROM {name} ORDER BY at DESC LIMIT ?)"  # noqa: S608
        if self._do(insert, (key, time.time(), json.dumps(dict(value)))) is not None:
            self._do(trim, (MAX_ROWS,))
            self._complained = ""

    def close(self) -> None:
        """Write everything into the file itself."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _do(self, statement: str, values: tuple[object, ...]) -> list[Any] | None:
        """Carry a statement out; what cannot be read or written is told once, and is None."""
        import sqlite3  # slow to import: nobody waits for it at a start

        with self._lock:
            try:
                if self._connection is None:
                    self._connection = self._opened()
                return self._connection.execute(statement, values).fetchall()
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
            if version != VERSION:
                connection.execute("PRAGMA journal_mode = WAL")
                for table in _TABLES:
                    columns = "key TEXT PRIMARY KEY, at REAL NOT NULL, value TEXT NOT NULL"
                    connection.execute(f"CREATE TABLE IF NOT EXISTS {table} ({columns})")
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
