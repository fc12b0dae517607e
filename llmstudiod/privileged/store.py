"""What the launcher knows by itself: root's settings and recipes, and the last good copy of each.

A start takes the recipe from its copy when that has the hash that was asked for: a half-edited file changes nothing.
Only an unknown hash makes it read the file, and import what reads YAML, which takes longer than a whole start.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, cast

from llmstudiod.core.errors import AccessDeniedError, ConfigError
from llmstudiod.core.keys import parse_keys, write_keys
from llmstudiod.core.launcher_protocol import Launch
from llmstudiod.core.model_names import id_from_stem
from llmstudiod.core.recipe import LoadedRecipes, Recipe, recipe_hash
from llmstudiod.core.settings import Settings
from llmstudiod.core.strict import files_outside, refuse_delete, refuse_put, wanted_recipe
from llmstudiod.privileged.trusted import read_trusted, remove_trusted, write_trusted


class Store:
    """Settings, recipes and keys below /etc/llmstudio, and the copies in ``state``."""

    def __init__(self, config: str, state: Path, *, owner: int = 0) -> None:
        self._config, self._state, self._owner = config, state, owner

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
            recipe = Recipe(id=launch.id, model_path=launch.model)
            is_it = recipe_hash(recipe) == launch.hash and id_from_stem(Path(launch.model).stem) == launch.id
            if not settings.auto_recipes or not is_it:
                raise AccessDeniedError(f"'{launch.model}' is not served without a recipe as '{launch.id}'")
            if faults := files_outside(recipe, settings.model_dirs, os.path.realpath):
                raise AccessDeniedError(str(faults[0]))
            return recipe
        if os.path.dirname(launch.file) != os.path.normpath(settings.recipes_dir):
            raise AccessDeniedError(f"'{launch.file}' does not lie in the recipes directory, {settings.recipes_dir}")
        if not os.path.lexists(launch.file):
            raise ConfigError(f"the recipe of '{launch.id}' is gone: there is no '{launch.file}'")
        kept = self.kept(f"recipes/{launch.id}.json")
        if kept and (kept.get("hash"), kept.get("file")) == (launch.hash, launch.file):
            return Recipe.from_dict(kept["recipe"])
        loaded = self._loaded(launch.file)
        recipe = wanted_recipe(loaded, model=launch.id, expected_hash=launch.hash, file=launch.file)
        self.keep(f"recipes/{launch.id}.json", {"hash": launch.hash, "file": launch.file, "recipe": recipe.as_dict()})
        return recipe

    def put_recipe(self, name: str, text: str, settings: Settings) -> None:
        """Write a recipe file that came over HTTP."""
        path = os.path.join(settings.recipes_dir, name)
        new = self._loaded(path, text.encode())
        recipes = [entry.recipe for entry in new.entries]
        outside = [fault for each in recipes for fault in files_outside(each, settings.model_dirs, os.path.realpath)]
        refuse_put(new, self._loaded(path) if os.path.lexists(path) else None, outside)
        write_trusted(path, text, owner=self._owner)

    def delete_recipe(self, name: str, settings: Settings) -> None:
        """Remove a recipe file that could have come over HTTP."""
        path = os.path.join(settings.recipes_dir, name)
        refuse_delete(self._loaded(path), path)
        remove_trusted(path, owner=self._owner)

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
