"""Reads settings: ``llmstudiod.yaml``, then ``llmstudiod.yaml.d/*.yaml``, each later value winning."""

from collections.abc import Mapping
from pathlib import Path

from llmstudiod.adapters.documents import read_document
from llmstudiod.core.settings import LoadedSettings
from llmstudiod.core.settings_reader import read_settings


def load_settings(file: Path, environment: Mapping[str, str] | None = None) -> LoadedSettings:
    """Read the settings file, its drop-ins and, in development, ``LLMSTUDIO_<SETTING>`` from ``environment``.

    A missing file means defaults; ``environment`` is None in the installed service.
    """
    drop_ins = sorted(Path(f"{file}.d").glob("*.yaml"))
    files = [file, *drop_ins] if _is_there(file) else drop_ins
    return read_settings((read_document(path) for path in files), environment)


def _is_there(file: Path) -> bool:
    """Tell whether there is a settings file; one that cannot be read is there, and is told."""
    try:
        file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
