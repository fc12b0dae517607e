"""Finds llama-server.

By the setting, ``LLAMA_SERVER_PATH``, ``PATH``, then the embedded engine: never by a recipe or over HTTP.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from llmstudiod.core.binary_answers import chosen_binary, refuse_program
from llmstudiod.core.command import ServerBinary

ENGINE = (sys.executable, "-m", "llmstudiod.engine")


def find_binary(setting: str | None, environment: Mapping[str, str]) -> ServerBinary:
    """Return the program to run, not yet asked anything.

    Raises:
        BinaryError: There is none, or the one that was named cannot be executed.
    """
    on_path = shutil.which("llama-server", path=environment.get("PATH", os.defpath))
    found = chosen_binary(
        setting=setting,
        variable=environment.get("LLAMA_SERVER_PATH"),
        on_path=on_path and str(Path(on_path).absolute()),
        engine=ENGINE if importlib.util.find_spec("xllamacpp") else None,
    )
    path = found.argv[0]
    # os.path, unlike Path, answers False where a directory may not be searched.
    mode = os.stat(path).st_mode if os.path.isfile(path) else None  # noqa: PTH113, PTH116
    refuse_program(found, mode, b"", is_sandboxed=False)
    return found
