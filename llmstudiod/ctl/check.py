"""``llmstudioctl check FILE``: recipes and settings, read and planned as their author, with or without a daemon."""

import asyncio
import os
from pathlib import Path

from llmstudiod.adapters.documents import read_document
from llmstudiod.adapters.planner import Planner
from llmstudiod.adapters.program import LocalProgram
from llmstudiod.adapters.recipe_files import load_recipe_file
from llmstudiod.adapters.settings_file import load_settings
from llmstudiod.core.errors import BinaryError, LlmstudioError
from llmstudiod.core.recipe import Fault, RecipeEntry, Severity
from llmstudiod.core.settings import DEFAULT_FILE, Settings
from llmstudiod.launchers.subprocess import SubprocessLauncher

SETTINGS_FILE = Path(DEFAULT_FILE)


def check_files(files: list[Path]) -> list[Fault]:
    """Return everything that is wrong with the files, and with what their recipes name: models, flags."""
    faults: list[Fault] = []
    entries: list[RecipeEntry] = []
    for file in files:
        if _holds_settings(file):
            faults += load_settings(file).faults
            continue
        loaded = load_recipe_file(file)
        faults += loaded.faults
        entries += loaded.entries
        faults += [warning for entry in loaded.entries for warning in entry.warnings]
    return faults + asyncio.run(_plan(entries))


def _holds_settings(file: Path) -> bool:
    """Tell settings from recipes: by the name that they are installed under, or by their keys."""
    if file.name == SETTINGS_FILE.name or file.parent.name == f"{SETTINGS_FILE.name}.d":
        return True
    document = read_document(file)
    keys = set(document.value) if not isinstance(document, Fault) and isinstance(document.value, dict) else set()
    own = {"recipes_dir", "model_dirs", "llama_server", "launcher", "listen", "admin_socket", "max_instances"}
    return bool(keys & own) and "model_path" not in keys


async def _plan(entries: list[RecipeEntry]) -> list[Fault]:
    """Make each recipe's plan without carrying it out."""
    settings = load_settings(SETTINGS_FILE).settings if os.access(SETTINGS_FILE, os.R_OK) else Settings()
    planner = Planner(settings, SubprocessLauncher(Path(settings.runtime_dir)), LocalProgram(settings, os.environ))
    faults = []
    for entry in entries:
        try:
            await planner.plan(entry)
        except BinaryError as error:
            message = f"its flags were not checked: {error.message}"
            faults.append(Fault(message, entry.file or "", hint=error.hint, severity=Severity.WARNING))
        except LlmstudioError as error:
            faults.append(Fault(error.message, entry.file or "", entry.line, hint=error.hint))
    return faults
