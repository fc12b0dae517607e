"""Reads the file of API keys, and makes new secrets."""

import os
import secrets
from pathlib import Path

from llmstudiod.core.errors import ConfigError
from llmstudiod.core.keys import PREFIX, Key, parse_keys

CREDENTIAL = "keys"
"""The name under which systemd may hand the file over: LoadCredential=keys:/path. It wins over the setting."""


def keys_path(setting: str) -> Path:
    """Return where the keys are: what systemd hands over, or else the file of the setting."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    given = Path(directory) / CREDENTIAL if directory else None
    return given if given is not None and given.exists() else Path(setting)


def read_keys(path: Path) -> tuple[Key, ...]:
    """Return the keys; a file that is not there holds none.

    Raises:
        ConfigError: It cannot be read, or is none; nobody is let in then, rather than everybody.
    """
    try:
        return parse_keys(path.read_text("utf-8"))
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"the keys file '{path}' cannot be read: {reason}", hint="chgrp llmstudio, chmod 640"
        ) from error


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
