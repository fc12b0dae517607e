"""Who has signed in at the page: one-time codes, and the sessions that a browser's cookie names.

Only hashes of secrets are kept. Sessions outlast the daemon, in ``state.db``, but not the key that opened them; codes
live for minutes and in memory.
"""

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from llmstudiod.adapters.state_db import StateDb

COOKIE = "llmstudio_session"
CODE_S = 600.0
SESSION_S = 7 * 86400.0
MAX_CODES = 100
MAX_SESSIONS = 500
_TABLE = "sessions"


class _Session(NamedTuple):
    """``until``: since 1970; ``key``: the hash of the API key that opened it, or nothing for a code."""

    until: float
    key: str


class Sessions:
    """Makes codes, turns each into one session, and knows the sessions.

    ``now``: seconds since 1970; ``is_admin``: whether there is still a key with this hash that may administer.
    """

    def __init__(self, state: StateDb, is_admin: Callable[[str], bool], now: Callable[[], float] = time.time) -> None:
        self._state = state
        self._is_admin = is_admin
        self._now = now
        self._codes: dict[str, float] = {}
        self._sessions: dict[str, _Session] | None = None
        self._lock = threading.RLock()  # who opens and closes does so in threads; to look one up needs none

    def new_code(self) -> str:
        """Return a code that opens one session within `CODE_S`."""
        now = self._now()
        self._codes = {code: until for code, until in self._codes.items() if until > now}
        while len(self._codes) >= MAX_CODES:
            del self._codes[next(iter(self._codes))]
        code = secrets.token_urlsafe(18)
        self._codes[_hash(code)] = now + CODE_S
        return code

    def redeem(self, code: str) -> bool:
        """Use a code up; whether it was one, and in time."""
        return self._codes.pop(_hash(code), 0.0) > self._now()

    def open(self, key: str) -> str:
        """Return the secret of a new session, opened by the API key with this hash, or by a code. Blocks."""
        token = secrets.token_urlsafe(32)
        with self._lock:
            sessions = self._known()
            for gone in [each for each, session in sessions.items() if not self._is_good(session)]:
                self._forget(gone)
            while len(sessions) >= MAX_SESSIONS:
                self._forget(min(sessions, key=sessions.__getitem__))
            session = sessions[_hash(token)] = _Session(self._now() + SESSION_S, key)
            self._state.put(_TABLE, _hash(token), session._asdict())
        return token

    def is_open(self, token: str) -> bool:
        """Whether a secret is that of a session."""
        session = self._known().get(_hash(token))
        return session is not None and self._is_good(session)

    def close(self, token: str) -> None:
        """End a session. Blocks."""
        self._forget(_hash(token))

    def close_all(self) -> None:
        """End every session. Blocks."""
        with self._lock:
            for each in list(self._known()):
                self._forget(each)

    def _forget(self, hashed: str) -> None:
        with self._lock:
            if self._known().pop(hashed, None) is not None:
                self._state.delete(_TABLE, hashed)

    def _is_good(self, session: _Session) -> bool:
        return session.until > self._now() and (not session.key or self._is_admin(session.key))

    def _known(self) -> dict[str, _Session]:
        if self._sessions is None:
            with self._lock:
                if self._sessions is None:
                    rows = self._state.all(_TABLE)
                    found = {key: session for key, row in rows.items() if (session := _session(row)) is not None}
                    self._sessions = found
        return self._sessions


def _session(row: Mapping[str, object]) -> _Session | None:
    until, key = row.get("until"), row.get("key")
    return _Session(until, key) if isinstance(until, int | float) and isinstance(key, str) else None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
