"""Settings and recipes as they were last read, so that a start that a connection waits for need not validate again.

Reading YAML and checking it with pydantic costs as much as half of a start. The snapshot holds what came out of it,
and the identity of every file that went in; one changed byte, or one file more or less, and it counts for nothing.
A lost, damaged or foreign snapshot costs the time that it would have saved, nothing else.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmstudiod import __version__
from llmstudiod.core.recipe import Fault, LoadedRecipes, Recipe, RecipeEntry, Severity
from llmstudiod.core.settings import LoadedSettings, Settings

logger = logging.getLogger(__name__)

NAME = "configuration.json"
CLOCK_GRAIN_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Configuration:
    """What the files say: settings, and the recipes in force of the recipes directory.

    ``files`` are the identities that the files had before they were read.
    """

    settings: LoadedSettings
    recipes: LoadedRecipes
    files: Sequence[Any] = field(default=(), compare=False)


def read_snapshot(directory: Path, config: Path) -> Configuration | None:
    """Return the snapshot in ``directory`` if every file is as it was then, else None."""

    def is_unchanged(raw: dict[str, Any]) -> bool:
        return bool(
            raw["version"] == __version__ and raw["files"] == identities(config, raw["settings"]["recipes_dir"])
        )

    return _read(directory, is_unchanged)


def read_last_good(directory: Path) -> Configuration | None:
    """Return the last snapshot whatever has happened to the files: it holds what was in force last.

    One of another version counts as far as this one understands it: an upgrade is no reason to end what runs.
    """
    return _read(directory, lambda _: True)


def _read(directory: Path, is_wanted: Callable[[dict[str, Any]], bool]) -> Configuration | None:
    try:
        raw = json.loads((directory / NAME).read_bytes())
        if not is_wanted(raw):
            return None
        recipes = [item["recipe"] for item in raw["recipes"]]
        if raw["version"] != __version__:
            raw = {**raw, **_understood(raw["settings"], raw["sources"])}
            recipes = [values if _is_understood(values) else None for values in recipes]
        settings = LoadedSettings(
            settings=Settings(**{name: _frozen(value) for name, value in raw["settings"].items()}),
            sources=raw["sources"],
            faults=_faults(raw["setting_faults"]),
        )
        entries = tuple(
            RecipeEntry(Recipe.from_dict(values), item["file"], item["line"], _faults(item["warnings"]))
            for values, item in zip(recipes, raw["recipes"], strict=True)
            if values is not None
        )
        return Configuration(settings, LoadedRecipes(entries, _faults(raw["faults"])), raw["files"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.info("the snapshot of the configuration is of no use: %s", error)
        return None


def _understood(settings: dict[str, Any], sources: dict[str, str]) -> dict[str, Any]:
    """Return those settings of another version that this one has and takes, and where they came from."""
    known = {field.name for field in dataclasses.fields(Settings)}
    taken = {name: value for name, value in settings.items() if name in known and _fits(Settings, {name: value})}
    return {"settings": taken, "sources": {name: place for name, place in sources.items() if name in taken}}


def _is_understood(recipe: dict[str, Any]) -> bool:
    """Return whether this version knows every field of another's recipe, and takes its value."""
    try:
        Recipe.from_dict(recipe)
    except (TypeError, ValueError, AttributeError):
        return False
    return _fits(Recipe, recipe)


def _fits(kind: type[Settings | Recipe], values: dict[str, Any]) -> bool:
    from llmstudiod.core.validation import validate  # slow to import, and needed after an upgrade only
    from llmstudiod.core.yaml_lines import Document

    return isinstance(validate(kind, values, document=Document("", None, {}), origins={}), kind)


def write_snapshot(directory: Path, config: Path, found: Configuration, *, began_ns: int) -> None:
    """Write the snapshot; that it cannot be written is no reason to stop anything.

    ``began_ns`` is when the reading began: a file changed since then may not be what was read, so nothing is kept.
    """
    seen = identities(config, found.settings.settings.recipes_dir)
    if any(identity[-1] > began_ns - CLOCK_GRAIN_NS for _, *identity in seen if identity):
        return
    raw = {
        "version": __version__,
        "files": seen,
        "settings": dataclasses.asdict(found.settings.settings),
        "sources": dict(found.settings.sources),
        "setting_faults": [dataclasses.asdict(fault) for fault in found.settings.faults],
        "recipes": [
            {
                "recipe": entry.recipe.as_dict(),
                "file": entry.file,
                "line": entry.line,
                "warnings": [dataclasses.asdict(warning) for warning in entry.warnings],
            }
            for entry in found.recipes.entries
        ],
        "faults": [dataclasses.asdict(fault) for fault in found.recipes.faults],
    }
    part = directory / f".{NAME}.part"
    try:
        part.write_text(json.dumps(raw))  # ASCII: names of files may hold bytes that are not UTF-8
        part.chmod(0o600)
        part.replace(directory / NAME)
    except (OSError, ValueError) as error:
        logger.info("the snapshot of the configuration cannot be written: %s", error)


def identities(config: Path, recipes_dir: str) -> list[list[Any]]:
    """Return path, inode, size and times of all files that count, as JSON holds them."""
    return [*settings_identities(config), *recipes_identities(recipes_dir)]


def settings_identities(config: Path) -> list[list[Any]]:
    """Return the identities of the settings file and its drop-ins."""
    return [[str(path), *identity(path)] for path in (config, *sorted(Path(f"{config}.d").glob("*")))]


def recipes_identities(recipes_dir: str) -> list[list[Any]]:
    """Return the identities of the recipes directory and of what is in it."""
    return [[str(path), *identity(path)] for path in _listing(Path(recipes_dir))]


def by_path(found: Sequence[Sequence[Any]], recipes_dir: str) -> dict[str, object]:
    """Return identities by path; a directory's is the inode alone, since its times change with what is in it."""
    directory = str(Path(recipes_dir))
    return {path: list(each[:1] if path == directory else each) for path, *each in found}


def _listing(directory: Path) -> list[Path]:
    try:
        return [directory, *sorted(directory.iterdir())]
    except OSError:
        return [directory]


def identity(path: Path) -> list[int]:
    """Return what differs once a file has changed, its owner or mode too. Blocks."""
    try:
        status = path.stat()
    except OSError:
        return []
    # The change time cannot be set back by whoever edits a file and restores its modification time.
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _faults(raw: list[dict[str, Any]]) -> tuple[Fault, ...]:
    return tuple(
        Fault(**{**item, "severity": Severity(item["severity"]), "claims": tuple(item["claims"])}) for item in raw
    )


def _frozen(value: Any) -> Any:  # noqa: ANN401 - JSON holds anything
    return tuple(value) if isinstance(value, list) else value
