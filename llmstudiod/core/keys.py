"""API keys: what their file holds, and whose a presented secret is. Only hashes are kept, so a secret is shown once.

A secret has 256 random bits, so a plain SHA-256 of it cannot be turned round; nothing slower is needed.
"""

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from llmstudiod.core.errors import ConfigError

PREFIX = "llms-"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
MAX_KEYS = 1000

_HASH = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Key:
    """Who may do what. ``models`` empty: all; ``created`` and ``expires`` in seconds since 1970, 0: never."""

    name: str
    hash: str
    admin: bool = False
    metrics: bool = False
    models: tuple[str, ...] = ()
    created: float = 0.0
    expires: float = 0.0

    def may_use(self, model_names: Iterable[str]) -> bool:
        """Whether it may use the model that has these names."""
        return not self.models or not set(self.models).isdisjoint(model_names)

    def is_expired(self, now: float) -> bool:
        """Whether its time is over."""
        return 0 < self.expires <= now


def hash_of(secret: str) -> str:
    """Return what is kept of a secret."""
    return "sha256:" + hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def holder(keys: Sequence[Key], secret: str) -> Key | None:
    """Return whose secret it is. Every key is compared in full, so the time tells nothing about them."""
    presented = hash_of(secret)
    found = None
    for key in keys:
        if hmac.compare_digest(key.hash, presented):
            found = key
    return found


def parse_keys(text: str) -> tuple[Key, ...]:
    """Return the keys of a file.

    Raises:
        ConfigError: It is not one; nobody is let in then, rather than everybody.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the keys file is not valid JSON: {error}", hint=_HINT) from None
    if not isinstance(raw, list) or len(raw) > MAX_KEYS:
        raise ConfigError(f"the keys file: expected a list of at most {MAX_KEYS} keys", hint=_HINT)
    keys = tuple(_key(item, number) for number, item in enumerate(raw, 1))
    for what in ("name", "hash"):
        values = [getattr(key, what) for key in keys]
        if len(set(values)) < len(values):
            raise ConfigError(f"the keys file: two keys have one {what}", hint=_HINT)
    return keys


def write_keys(keys: Iterable[Key]) -> str:
    """Return the text of a keys file.

    Raises:
        ConfigError: It would be refused when it is read, and nobody let in then.
    """
    text = json.dumps([asdict(key) for key in keys], indent=1) + "\n"
    parse_keys(text)
    return text


_HINT = "write it with `llmstudioctl key`"
_FIELDS = {field.name for field in fields(Key)}


def _key(raw: Any, number: int) -> Key:  # noqa: ANN401 - a value of JSON
    if not isinstance(raw, Mapping) or not {"name", "hash"} <= raw.keys() <= _FIELDS:
        raise ConfigError(f"the keys file: key {number}: expected {', '.join(sorted(_FIELDS))}", hint=_HINT)
    is_good = (
        isinstance(raw["name"], str)
        and NAME.fullmatch(raw["name"])
        and isinstance(raw["hash"], str)
        and _HASH.fullmatch(raw["hash"])
        and all(isinstance(raw.get(name, False), bool) for name in ("admin", "metrics"))
        and _are_names(raw.get("models", []))
        and all(_is_time(raw.get(name, 0)) for name in ("created", "expires"))
    )
    if not is_good:
        raise ConfigError(f"the keys file: key {number} has a value that does not fit", hint=_HINT)
    return Key(**{**raw, "models": tuple(raw.get("models", ()))})


def _are_names(value: object) -> bool:
    return isinstance(value, list) and len(value) <= MAX_KEYS and all(isinstance(item, str) for item in value)


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12
