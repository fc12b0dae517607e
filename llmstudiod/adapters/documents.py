"""Reads YAML and JSON files; `llmstudiod.core.yaml_lines` says what is in them."""

import os
import stat
from pathlib import Path

from llmstudiod.core.recipe import MAX_FILE_BYTES, Fault
from llmstudiod.core.yaml_lines import Document, parse_bytes


def read_document(path: Path) -> Document | Fault:
    """Return the parsed file, or what is wrong with it."""
    file = str(path)
    try:
        # Without O_NONBLOCK the open of a FIFO waits for a writer for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return Fault("expected a regular file, found a directory, pipe or device", file=file)
            with open(descriptor, "rb", closefd=False) as stream:
                raw = stream.read(MAX_FILE_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        hint = "let the daemon's user read it (chmod o+r)" if isinstance(error, PermissionError) else None
        return Fault(f"cannot read the file: {error.strerror}", file=file, hint=hint)
    return parse_bytes(raw, file=file)
