"""What the launcher knows by itself: root's settings and recipes, and the last good copy of each.

A start takes the recipe from its copy when that has the hash that was asked for: a half-edited file changes nothing.
Only an unknown hash makes it read the file, and import what reads YAML, which takes longer than a whole start.
"""

import contextlib
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from llmstudiod.core import strict
from llmstudiod.core.errors import ConfigError, LlmstudioError
from llmstudiod.core.keys import parse_keys, write_keys
from llmstudiod.core.launcher_protocol import Launch
from llmstudiod.core.recipe import LoadedRecipes, Recipe
from llmstudiod.core.settings import Settings
from llmstudiod.privileged.trusted import read_trusted, remove_trusted, write_trusted


class Store:
    """Settings, recipes and keys below /etc/llmstudio, and the copies in ``state``."""

    def __init__(self, config: str, state: Path, *, owner: int = 0) -> None:
        self._config, self._state, self._owner, self._lock = config, state, owner, threading.Lock()
        self._unkept: dict[str, str] = {}

    def settings(self) -> Settings:
        """Return root's settings, from the copy while no file has changed."""
        places = (self._config, *sorted(map(str, Path(f"{self._config}.d").glob("*.yaml"))))
        identities = [identity(path) for path in places if os.path.lexists(path)]
        kept = self.kept("settings.json")
        if kept and kept.get("files") == identities:
            return Settings.from_dict(kept["settings"])
        from llmstudiod.core.settings_reader import read_settings
        from llmstudiod.core.yaml_lines import parse_bytes

        settings = read_settings([parse_bytes(self._read(path), file=path) for path, *_ in identities]).settings
        self.keep("settings.json", {"files": identities, "settings": dataclasses.asdict(settings)})
        return settings

    def recipe(self, launch: Launch, settings: Settings) -> Recipe:
        """Return the recipe that has the hash that is asked for, or raise an LlmstudioError that says why not."""
        if launch.file is None:
            return strict.unnamed_recipe(launch, settings, os.path.realpath)
        strict.refuse_place(launch.file, settings, exists=os.path.lexists(launch.file))
        file, raw = launch.file, self._read(launch.file)
        kept = self.kept(f"recipes/{launch.id}.json")
        if copy := strict.good_copy(kept, launch, raw, lambda: self._loaded(file, raw)):
            return copy
        recipe = strict.wanted_recipe(self._loaded(file, raw), model=launch.id, expected_hash=launch.hash, file=file)
        copied = {"hash": launch.hash, "file": launch.file, "content": strict.digest(raw), "recipe": recipe.as_dict()}
        self.keep(f"recipes/{launch.id}.json", copied)
        return recipe

    def put_recipe(self, name: str, text: str, settings: Settings) -> None:
        """Write a recipe file that came over HTTP, and note it before; what a person wrote stays as it is."""
        path = os.path.join(settings.recipes_dir, name)
        with self._lock:
            noted = strict.noted(self._written(name, path), name, raw := text.encode())
            strict.refuse_put(self._loaded(path, raw), self._others(path), settings.model_dirs, os.path.realpath)
            self._write("written.json", json.dumps(noted))
            write_trusted(path, text, owner=self._owner)

    def delete_recipe(self, name: str, settings: Settings) -> None:
        """Remove a recipe file that came over HTTP."""
        path = os.path.join(settings.recipes_dir, name)
        with self._lock:
            self._written(name, path)
            remove_trusted(path, owner=self._owner)

    def _written(self, name: str, path: str) -> dict[str, Any]:
        """Return what came over HTTP and is there, by name; AccessDeniedError where another file is in its place."""
        written = self.kept("written.json") or {}
        if os.path.lexists(path):
            strict.refuse_foreign(path, self._read(path), written.get(name))
        return {each: noted for each, noted in written.items() if os.path.lexists(Path(path).with_name(each))}

    def _others(self, path: str) -> Iterator[LoadedRecipes]:
        """Yield the other recipe files of a directory, as far as they can be trusted."""
        for other in Path(path).parent.glob("*.*"):
            if other.suffix in {".yaml", ".yml", ".json"} and other != Path(path):
                with contextlib.suppress(LlmstudioError):
                    yield self._loaded(str(other))

    def put_keys(self, text: str, settings: Settings) -> None:
        """Replace the file of API keys, which the daemon's group may read."""
        write_trusted(settings.keys_file, write_keys(parse_keys(text)), owner=self._owner, mode=0o640)

    def kept(self, name: str) -> dict[str, Any] | None:
        """Return what was kept under a name; what is lost or damaged is made again."""
        try:
            return cast("dict[str, Any]", json.loads(self._unkept.get(name) or (self._state / name).read_bytes()))
        except (OSError, ValueError):
            return None

    def keep(self, name: str, content: dict[str, Any]) -> None:
        """Keep what can be found out again; a disk that is full has it kept in memory alone."""
        text = self._unkept[name] = json.dumps(content)
        try:
            self._write(name, text)
            self._unkept.pop(name, None)
        except (OSError, ConfigError) as error:
            sys.stderr.write(f"not kept: {error!s:.300}\n")

    def _write(self, name: str, text: str) -> None:
        """Write a file in the launcher's own directory."""
        path = self._state / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_trusted(str(path), text, owner=self._owner, mode=0o600)

    def _loaded(self, path: str, raw: bytes | None = None) -> LoadedRecipes:
        from llmstudiod.core.recipe_reader import parse_recipe_bytes

        return parse_recipe_bytes(self._read(path) if raw is None else raw, file=path)

    def _read(self, path: str) -> bytes:
        return read_trusted(path, owner=self._owner)


def identity(path: str) -> list[Any]:
    """Return what changes when a file does; its change time cannot be set back by whoever edits it."""
    status = os.lstat(path)
    return [path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
