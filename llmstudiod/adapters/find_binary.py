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

from llmstudiod.core.command import ServerBinary
from llmstudiod.core.errors import BinaryError

ENGINE = (sys.executable, "-m", "llmstudiod.engine")
INSTALL_HINT = (
    "install llama.cpp's llama-server (Debian: `apt install llama.cpp-tools`) or the embedded engine "
    "(`pip install 'llmstudiod[engine]'`), or set llama_server in llmstudiod.yaml"
)


def find_binary(setting: str | None, environment: Mapping[str, str]) -> ServerBinary:
    """Return the program to run, not yet asked anything.

    Raises:
        BinaryError: There is none, or the one that was named cannot be executed.
    """
    for source, path in (("llama_server", setting), ("LLAMA_SERVER_PATH", environment.get("LLAMA_SERVER_PATH"))):
        if path:
            return ServerBinary((_executable(path, source),), source)
    found = shutil.which("llama-server", path=environment.get("PATH", os.defpath))
    if found:
        return ServerBinary((str(Path(found).absolute()),), "PATH")
    if importlib.util.find_spec("xllamacpp") is not None:
        return ServerBinary(ENGINE, "the embedded engine", is_engine=True)
    raise BinaryError("there is no llama-server on this machine", hint=INSTALL_HINT)


def _executable(path: str, source: str) -> str:
    if not Path(path).is_absolute():
        hint = "write it from the root on, such as /usr/bin/llama-server"
        raise BinaryError(f"{source}: expected an absolute path, found '{path}'", hint=hint)
    # os.path, unlike Path, answers False where a directory may not be searched.
    if not os.path.isfile(path):  # noqa: PTH113
        raise BinaryError(f"{source}: expected a program, found no file '{path}'", hint=INSTALL_HINT)
    if not os.access(path, os.X_OK):
        hint = f"chmod +x {shlex.quote(path)}"
        raise BinaryError(f"{source}: expected a program, found '{path}', which is not executable", hint=hint)
    return path
