"""What the launcher knows by itself: root's settings and recipes, and the last good copy of each.

A start takes the recipe from its copy when that has the hash that was asked for: a half-edited file changes nothing.
Only an unknown hash makes it read the file, and import what reads YAML, which takes longer than a whole start.
"""

import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from llmstudiod.core import strict
from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.keys import parse_keys, write_keys
from llmstudiod.core.launcher_protocol import Launch
from llmstudiod.core.recipe import LoadedRecipes, Recipe
from llmstudiod.core.settings import Settings
from llmstudiod.privileged.trusted import read_trusted, remove_trusted, write_trusted


class Store:
    """Settings, recipes and keys below /etc/llmstudio, and the copies in ``state``."""

    def __init__(self, config: str, state: Path, *, owner: int = 0) -> None:
        self._config, self._state, self._owner, self._lock = config, state, owner, threading.Lock()

    def settings(self) -> Settings:
        """Return root's settings, from the copy while no file has changed."""
        drop_ins = sorted(str(path) for path in Path(f"{self._config}.d").glob("*.yaml"))
        files = [path for path in (self._config, *drop_ins) if os.path.lexists(path)]
        identities = [identity(path) for path in files]
        kept = self.kept("settings.json")
        if kept and kept.get("files") == identities:
            return Settings.from_dict(kept["settings"])
        from llmstudiod.core.settings_reader import read_settings
        from llmstudiod.core.yaml_lines import parse_bytes

        settings = read_settings([parse_bytes(self._read(path), file=path) for path in files]).settings
        self.keep("settings.json", {"files": identities, "settings": dataclasses.asdict(settings)})
        return settings

    def recipe(self, launch: Launch, settings: Settings) -> Recipe:
        """Return the recipe that has the hash that is asked for, or raise an LlmstudioError that says why not."""
        if launch.file is None:
            return strict.unnamed_recipe(launch, settings, os.path.realpath)
        strict.refuse_place(launch.file, settings, exists=os.path.lexists(launch.file))
        file, raw = launch.file, self._read(launch.file)
        content = strict.digest(raw)
        kept = self.kept(f"recipes/{launch.id}.json")
        if kept and (kept.get("hash"), kept.get("file")) == (launch.hash, launch.file):
            copy = Recipe.from_dict(kept["recipe"])
            if kept.get("content") == content or strict.may_be_older(copy, lambda: self._loaded(file, raw)):
                return copy
        loaded = self._loaded(launch.file, raw)
        recipe = strict.wanted_recipe(loaded, model=launch.id, expected_hash=launch.hash, file=launch.file)
        copied = {"hash": launch.hash, "file": launch.file, "content": content, "recipe": recipe.as_dict()}
        self.keep(f"recipes/{launch.id}.json", copied)
        return recipe

    def put_recipe(self, name: str, text: str, settings: Settings) -> None:
        """Write a recipe file that came over HTTP; what a person wrote stays as it is."""
        path = os.path.join(settings.recipes_dir, name)
        with self._lock:
            written = self._written(name, path)
            new = self._loaded(path, text.encode())
            strict.refuse_put(new, self._others(path), settings.model_dirs, os.path.realpath)
            write_trusted(path, text, owner=self._owner)
            self.keep("written.json", {**written, name: strict.digest(text.encode())})

    def delete_recipe(self, name: str, settings: Settings) -> None:
        """Remove a recipe file that came over HTTP."""
        path = os.path.join(settings.recipes_dir, name)
        with self._lock:
            self._written(name, path)
            remove_trusted(path, owner=self._owner)

    def _written(self, name: str, path: str) -> dict[str, Any]:
        """Return what came over HTTP, by name; AccessDeniedError where another file is in the place of this one."""
        written = self.kept("written.json") or {}
        if os.path.lexists(path):
            strict.refuse_foreign(path, self._read(path), written.get(name))
        return written

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
            return cast("dict[str, Any]", json.loads((self._state / name).read_bytes()))
        except (OSError, ValueError):
            return None

    def keep(self, name: str, content: dict[str, Any]) -> None:
        """Keep something in the launcher's own directory."""
        path = self._state / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_trusted(str(path), json.dumps(content, ensure_ascii=False), owner=self._owner, mode=0o600)

    def _loaded(self, path: str, raw: bytes | None = None) -> LoadedRecipes:
        from llmstudiod.core.recipe_reader import parse_recipe_bytes

        return parse_recipe_bytes(self._read(path) if raw is None else raw, file=path)

    def _read(self, path: str) -> bytes:
        return read_trusted(path, owner=self._owner)


def identity(path: str) -> list[Any]:
    """Return what changes when a file does; its change time cannot be set back by whoever edits it."""
    status = os.lstat(path)
    return [path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
