"""``llmstudioctl check FILE``: recipes and settings, read and planned as their author, with or without a daemon."""

import asyncio
import os
import shlex
from pathlib import Path

from llmstudiod.adapters.documents import read_document
from llmstudiod.adapters.find_binary import find_binary
from llmstudiod.adapters.planner import Planner
from llmstudiod.adapters.program import LocalProgram
from llmstudiod.adapters.recipe_files import load_recipe_file, load_recipes
from llmstudiod.adapters.settings_file import load_settings
from llmstudiod.core.catalogue import build_catalogue
from llmstudiod.core.errors import BinaryError, LlmstudioError
from llmstudiod.core.recipe import Fault, LoadedRecipes, RecipeEntry, Severity
from llmstudiod.core.settings import DEFAULT_FILE, Settings
from llmstudiod.launchers.subprocess import SubprocessLauncher

MAGIC = b"GGUF"
SETTINGS_FILE = Path(DEFAULT_FILE)


def check_files(files: list[Path]) -> list[Fault]:
    """Return everything that is wrong with the files, and with what their recipes name: models, flags."""
    faults: list[Fault] = []
    entries: list[RecipeEntry] = []
    for file in files:
        if _is_gguf(file):
            hint = f"`llmstudioctl estimate {shlex.quote(str(file))}` tells what it needs, `recipe new` makes a recipe"
            faults.append(Fault("expected recipes or settings, found a GGUF", str(file), hint=hint))
            continue
        if _holds_settings(file):
            loaded_settings = load_settings(file)
            faults += loaded_settings.faults
            faults += _binary_faults(loaded_settings.settings, file)
            continue
        loaded = load_recipe_file(file)
        faults += _faults_of_place(file, loaded)
        faults += loaded.faults
        entries += loaded.entries
        faults += [warning for entry in loaded.entries for warning in entry.warnings]
    return faults + asyncio.run(_plan(entries))


def _is_gguf(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _holds_settings(file: Path) -> bool:
    """Tell settings from recipes: by the name that they are installed under, or by their keys."""
    if file.name == SETTINGS_FILE.name or file.parent.name == f"{SETTINGS_FILE.name}.d":
        return True
    document = read_document(file)
    keys = set(document.value) if not isinstance(document, Fault) and isinstance(document.value, dict) else set()
    own = {"recipes_dir", "model_dirs", "llama_server", "launcher", "listen", "admin_socket", "max_instances"}
    return bool(keys & own) and "model_path" not in keys


def _binary_faults(settings: Settings, file: Path) -> list[Fault]:
    if settings.llama_server is None:
        return []
    try:
        find_binary(settings.llama_server, {})
    except BinaryError as error:
        return [Fault(error.message, str(file), key="llama_server", hint=error.hint)]
    return []


def _faults_of_place(file: Path, loaded: LoadedRecipes) -> list[Fault]:
    """Return what only matters where a recipe is in force: who may write it, and whose names it takes."""
    settings = _settings()
    directory = Path(settings.recipes_dir)
    if file.absolute().parent != directory:
        return []
    others = load_recipes(directory)
    known = {(fault.file, fault.line, fault.key) for fault in loaded.faults}
    everything = build_catalogue(others.entries, others.faults).faults
    names = {str(file), str(file.absolute())}
    return [fault for fault in everything if fault.file in names and (fault.file, fault.line, fault.key) not in known]


def _settings() -> Settings:
    return load_settings(SETTINGS_FILE).settings if os.access(SETTINGS_FILE, os.R_OK) else Settings()


async def _plan(entries: list[RecipeEntry]) -> list[Fault]:
    """Make each recipe's plan without carrying it out."""
    settings = _settings()
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
