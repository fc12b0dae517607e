"""Finds llama-server.

By the setting, ``LLAMA_SERVER_PATH``, ``PATH``, then the embedded engine: never by a recipe or over HTTP.
"""

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from llmstudiod.core.binary_answers import INSTALL_HINT, chosen_binary
from llmstudiod.core.command import ServerBinary
from llmstudiod.core.errors import BinaryError

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
    if not os.path.isfile(path):  # noqa: PTH113
        raise BinaryError(f"{found.source}: expected a program, found no file '{path}'", hint=INSTALL_HINT)
    if not os.access(path, os.X_OK):
        hint = f"chmod +x {shlex.quote(path)}"
        raise BinaryError(f"{found.source}: expected a program, found '{path}', which is not executable", hint=hint)
    return found
