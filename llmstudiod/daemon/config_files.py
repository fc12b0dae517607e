"""The files that say how the daemon is to work, settings and recipes: read, kept as a snapshot, compared again."""

import time
from collections.abc import Mapping
from pathlib import Path

from llmstudiod.adapters.file_watch import Files
from llmstudiod.adapters.snapshot import (
    Configuration,
    by_path,
    identities,
    read_last_good,
    read_snapshot,
    recipes_identities,
    settings_identities,
    write_snapshot,
)


class ConfigFiles:
    """What they said when they were read last, as ``found``; ``is_from_snapshot``: they are as they were then. Blocks.

    ``environment`` may override settings, in development; ``directory`` is where the snapshot is, None: there is none.
    """

    def __init__(self, config: Path, environment: Mapping[str, str] | None, directory: Path | None) -> None:
        self._config, self._environment, self._directory = config, environment, directory
        self._began_ns = time.time_ns()
        kept = read_snapshot(directory, config) if directory else None
        self.is_from_snapshot = kept is not None
        self.found = kept or self._read(read_last_good(directory) if directory else None)

    def reread(self) -> None:
        """Read them again; what has become faulty stays as it was."""
        began_ns = time.time_ns()
        found = self._read(self.found)
        self.found, self._began_ns = found, began_ns

    def write_snapshot(self) -> None:
        """Keep what they said for the next start."""
        if self._directory is not None:
            write_snapshot(self._directory, self._config, self.found, began_ns=self._began_ns)

    def now(self) -> Files:
        """Return the files as they are."""
        return by_path(identities(self._config, self._recipes_dir), self._recipes_dir)

    def known(self) -> Files:
        """Return the files as they were before they were read."""
        return by_path(self.found.files, self._recipes_dir)

    @property
    def _recipes_dir(self) -> str:
        return self.found.settings.settings.recipes_dir

    def _read(self, before: Configuration | None) -> Configuration:
        """Read and check all files; what has become faulty since ``before`` stays as it was.

        Slow to import and to run, which is why there is a snapshot.
        """
        from llmstudiod.adapters.recipe_files import load_recipes
        from llmstudiod.adapters.settings_file import load_settings
        from llmstudiod.core.last_good import with_last_good_settings

        files = settings_identities(self._config)
        settings = load_settings(self._config, self._environment)
        if before is not None:
            settings = with_last_good_settings(settings, before.settings)
        recipes_dir = settings.settings.recipes_dir
        files += recipes_identities(recipes_dir)
        entries = before.recipes.entries if before is not None else ()
        return Configuration(settings, load_recipes(Path(recipes_dir), entries), files)
