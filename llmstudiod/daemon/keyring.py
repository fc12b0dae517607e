"""The API keys in force: read from their file into the rules of access, and written there."""

import asyncio
import logging
import time
from collections.abc import Callable

from llmstudiod.adapters.file_watch import Files
from llmstudiod.adapters.key_file import is_credential, keys_path, read_keys, write_own_keys
from llmstudiod.adapters.snapshot import identity
from llmstudiod.core.errors import ConfigError
from llmstudiod.core.keys import Key, holder, write_keys
from llmstudiod.core.launcher_protocol import Verb, Write
from llmstudiod.core.recipe import Fault
from llmstudiod.core.settings import Settings
from llmstudiod.http.access import Access, Rules
from llmstudiod.launchers.privileged import PrivilegedClient

logger = logging.getLogger("llmstudiod")


class Keyring:
    """Keeps ``access.rules`` as keys file and settings say; ``reloading`` is held while both are read.

    ``helper`` writes the file, which is root's then; None: the daemon does it itself.
    """

    def __init__(
        self,
        access: Access,
        settings: Callable[[], Settings],
        helper: PrivilegedClient | None,
        reloading: asyncio.Lock,
    ) -> None:
        self._access, self._settings, self._helper, self._reloading = access, settings, helper, reloading
        self._error: ConfigError | None = None
        self._known: Files = {}

    def read(self) -> None:
        """Read the file. One that cannot be read lets nobody in, rather than everybody. Blocks."""
        settings = self._settings()
        keys: tuple[Key, ...] | None = None
        self._error, self._known = None, self.file_now()
        try:
            keys = read_keys(keys_path(settings.keys_file))
        except ConfigError as error:
            self._error = error
            logger.error("%s (%s)", error.message, error.hint)  # noqa: TRY400 - no bug
        self._access.rules = Rules(
            keys=keys,
            allowed_hosts=frozenset(name.lower() for name in settings.allowed_hosts),
            cors_origins=frozenset(settings.cors_origins),
            allows_open_listener=settings.allow_open_listener,
        )

    async def reread(self) -> None:
        """Take what the file holds now, which somebody may have changed a moment ago."""
        async with self._reloading:  # what a reload has read meanwhile is newer
            await asyncio.to_thread(self.read)

    async def put(self, keys: tuple[Key, ...]) -> None:
        """Replace all keys.

        Raises:
            LlmstudioError: The file cannot be written, or would not be read.
        """
        text, path = write_keys(keys), keys_path(self._settings().keys_file)
        if is_credential(path):
            hint = "change what LoadCredential= of llmstudiod.service names, then `systemctl restart llmstudiod`"
            raise ConfigError(
                "the keys in force are systemd's credential 'keys', which is not ours to write", hint=hint
            )
        if self._helper is not None:
            await self._helper.ask(Write(Verb.PUT_KEYS, text=text))
        else:
            await asyncio.to_thread(write_own_keys, path, text)
        await self.reread()

    def keys(self) -> tuple[Key, ...]:
        """Return the keys in force.

        Raises:
            ConfigError: Their file is faulty; what it holds must not be lost.
        """
        if self._error is not None:
            raise self._error
        return self._access.rules.keys or ()

    def admin(self, secret: str) -> Key | None:
        """Return the key with this secret if it has the admin right."""
        return holder(self.admins(), secret)

    def admins(self) -> tuple[Key, ...]:
        """Return the keys with the admin right."""
        keys = self._access.rules.keys or ()
        return tuple(key for key in keys if key.admin and not key.is_expired(time.time()))

    def faults(self) -> list[Fault]:
        """Return what is wrong with the file."""
        error = self._error
        return [] if error is None else [Fault(error.message, self._settings().keys_file, hint=error.hint)]

    def file_now(self) -> Files:
        """Return the file as it is, for a `FileWatch`. Blocks."""
        path = keys_path(self._settings().keys_file)
        return {str(path): identity(path)}

    def file_known(self) -> Files:
        """Return the file as it was before it was read."""
        return self._known
