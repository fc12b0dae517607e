"""Reads the file of API keys, and makes new secrets."""

import os
import secrets
import stat
from pathlib import Path

from llmstudiod.core.errors import ConfigError
from llmstudiod.core.keys import PREFIX, Key, parse_keys

CREDENTIAL = "keys"
"""The name under which systemd may hand the file over: LoadCredential=keys:/path. It wins over the setting."""

_OWN = "chown root:llmstudio, chmod 640"
_MEND = "mend it, or take it away and make new keys with `llmstudioctl key add`"


def keys_path(setting: str) -> Path:
    """Return where the keys are: what systemd hands over, or else the file of the setting."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    given = Path(directory) / CREDENTIAL if directory else None
    return given if given is not None and given.exists() else Path(setting)


def is_credential(path: Path) -> bool:
    """Whether the keys are what systemd handed over, which is not ours to write."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    return directory is not None and path.parent == Path(directory)


def read_keys(path: Path) -> tuple[Key, ...]:
    """Return the keys; a file that is not there holds none.

    Raises:
        ConfigError: It cannot be read, is none, or another user could have written it; nobody is let in then, rather
            than everybody.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            status = os.fstat(stream.fileno())
            text = stream.read()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"the keys file '{path}' cannot be read: {reason}", hint="chgrp llmstudio, chmod 640"
        ) from error
    if status.st_uid not in {0, os.geteuid()} or status.st_mode & 0o022:
        found = f"uid {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}"
        raise ConfigError(f"the keys file '{path}': expected root alone to write it, found {found}", hint=_OWN)
    try:
        return parse_keys(text)
    except ConfigError as error:
        raise ConfigError(f"'{path}': {error.message}", hint=_MEND) from None


def write_own_keys(path: Path, text: str) -> None:
    """Write the file ourselves, where no launcher does it for us.

    Raises:
        ConfigError: It cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.touch(mode=0o600)
        part.write_text(text, "utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"the keys file '{path}' cannot be written: {error.strerror}") from error


def new_secret() -> str:
    """Return a secret of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)
