"""Settings and recipes as they were last read, so that a start that a connection waits for need not validate again.

Reading YAML and checking it with pydantic costs as much as half of a start. The snapshot holds what came out of it,
and the identity of every file that went in; one changed byte, or one file more or less, and it counts for nothing.
A lost, damaged or foreign snapshot costs the time that it would have saved, nothing else.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
    """What the files say: settings, and the recipes of the recipes directory."""

    settings: LoadedSettings
    recipes: LoadedRecipes


def read_snapshot(directory: Path, config: Path) -> Configuration | None:
    """Return the snapshot in ``directory`` if every file is as it was then, else None."""
    return _read(directory, lambda raw: raw["files"] == identities(config, raw["settings"]["recipes_dir"]))


def read_last_good(directory: Path) -> Configuration | None:
    """Return the last snapshot whatever has happened to the files: it holds what was in force last."""
    return _read(directory, lambda _: True)


def _read(directory: Path, is_wanted: Callable[[dict[str, Any]], bool]) -> Configuration | None:
    try:
        raw = json.loads((directory / NAME).read_bytes())
        if raw["version"] != __version__ or not is_wanted(raw):
            return None
        settings = LoadedSettings(
            settings=Settings(**{name: _frozen(value) for name, value in raw["settings"].items()}),
            sources=raw["sources"],
            faults=_faults(raw["setting_faults"]),
        )
        entries = tuple(
            RecipeEntry(Recipe.from_dict(item["recipe"]), item["file"], item["line"], _faults(item["warnings"]))
            for item in raw["recipes"]
        )
        return Configuration(settings, LoadedRecipes(entries, _faults(raw["faults"])))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.info("the snapshot of the configuration is of no use: %s", error)
        return None


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
    paths: Iterable[Path] = [config, *sorted(Path(f"{config}.d").glob("*")), *_listing(Path(recipes_dir))]
    return [[str(path), *_identity(path)] for path in paths]


def _listing(directory: Path) -> list[Path]:
    try:
        return [directory, *sorted(directory.iterdir())]
    except OSError:
        return [directory]


def _identity(path: Path) -> list[int]:
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
