"""The files of a model, looked at before they are bound into its unit; and the program that reads them."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from llmstudiod.core.bound_file import MAX_TEXT_BYTES, refuse_file, refuse_links
from llmstudiod.core.command import BoundFile
from llmstudiod.core.errors import LoadFailedError


def checked(files: Sequence[BoundFile], text_file: str | None, model_dirs: Sequence[str]) -> tuple[BoundFile, ...]:
    """Return the files with their real places, each one looked into; an LlmstudioError for one that will not do."""
    real_dirs = [os.path.realpath(directory) for directory in model_dirs]
    places = [_real_place(file.host, is_text=file.host == text_file, real_dirs=real_dirs) for file in files]
    return tuple(replace(file, host=place) for file, place in zip(files, places, strict=True))


def looked_at(path: str) -> tuple[int | None, bytes]:
    """Return mode and first bytes of a program; None where there is none."""
    mode = os.stat(path).st_mode if os.path.isfile(path) else None
    with contextlib.suppress(OSError), open(path, "rb") as stream:
        return mode, stream.read(2)
    return mode, b""


def _real_place(path: str, *, is_text: bool, real_dirs: Sequence[str]) -> str:
    try:
        real, owners = _resolved(path)
        with open(os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as stream:
            status, start = os.fstat(stream.fileno()), stream.read(MAX_TEXT_BYTES + 1 if is_text else 4)
        refuse_links(path, real, link_owners=owners, owner=status.st_uid, real_dirs=real_dirs)
        refuse_file(real, mode=status.st_mode, start=start, is_text=is_text)
    except (OSError, ValueError) as error:
        raise LoadFailedError(f"'{path}' cannot be read: {error}", hint="check the path and its mode") from error
    return real


def _resolved(path: str) -> tuple[str, set[int]]:
    """Return where a path leads, and who owns the links on the way."""
    owners: set[int] = set()
    for _ in range(40):  # as many as the kernel follows; path_resolution(7)
        link = next(filter(os.path.islink, accumulate(path.split("/")[1:], "{}/{}".format, initial="")), None)
        if link is None:
            return path, owners
        owners.add(os.lstat(link).st_uid)
        path = os.path.normpath(os.path.join(os.path.dirname(link), os.readlink(link)) + path[len(link) :])
    raise ValueError("too many links")
