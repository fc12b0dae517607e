"""Files that nobody but root could have written, and how root writes them."""

import os
import stat
from pathlib import Path

from llmstudiod.core.errors import AccessDeniedError
from llmstudiod.core.yaml_lines import MAX_FILE_BYTES

_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def read_trusted(path: str, *, owner: int) -> bytes:
    """Return the content of a file that only ``owner`` or root can have written, and cut off beyond its largest size.

    No link is followed, and no directory above it may be open to others' renaming.

    Raises:
        AccessDeniedError: It is somebody else's, or somebody else could have put it there.
        OSError: It cannot be read.
    """
    directory = _opened_directory(os.path.dirname(path), owner)
    try:
        descriptor = _open(os.path.basename(path), os.O_RDONLY, directory, path)
    finally:
        os.close(directory)
    with open(descriptor, "rb") as stream:
        _check(os.fstat(descriptor), path, owner)
        return stream.read(MAX_FILE_BYTES + 1)


def write_trusted(path: str, text: str, *, owner: int, mode: int = 0o644) -> None:
    """Put a file in its place as a whole, or leave what was there.

    Raises:
        AccessDeniedError: Its directory is open to others.
        OSError: It cannot be written.
    """
    name = os.path.basename(path)
    directory = _opened_directory(os.path.dirname(path), owner)
    try:
        part = f".{name}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _FLAGS
        descriptor = os.open(part, flags, 0o600, dir_fd=directory)
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        os.rename(part, name, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)
    finally:
        os.close(directory)


def remove_trusted(path: str, *, owner: int) -> None:
    """Remove a file from a directory that is only ours to write."""
    directory = _opened_directory(os.path.dirname(path), owner)
    try:
        os.unlink(os.path.basename(path), dir_fd=directory)
    finally:
        os.close(directory)


def _opened_directory(path: str, owner: int) -> int:
    """Return a descriptor of a directory, every step to it checked."""
    descriptor = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in Path(path).parts[1:]:
            inner = _open(name, os.O_RDONLY | os.O_DIRECTORY, descriptor, path)
            os.close(descriptor)
            descriptor = inner
            _check(os.fstat(descriptor), path, owner)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open(name: str, flags: int, directory: int, path: str) -> int:
    try:
        return os.open(name, flags | _FLAGS, dir_fd=directory)
    except OSError as error:
        # O_DIRECTORY with O_NOFOLLOW says of a link that it is no directory.
        if stat.S_ISLNK(os.lstat(name, dir_fd=directory).st_mode):
            message = f"'{path}': expected no symbolic link on the way, found '{name}'"
            raise AccessDeniedError(message, hint="give the path that the link leads to") from error
        raise


def _check(status: os.stat_result, path: str, owner: int) -> None:
    if status.st_uid not in {0, owner}:
        hint = f"chown root '{path}' and every directory above it"
        raise AccessDeniedError(f"'{path}': expected root to own it, found uid {status.st_uid}", hint=hint)
    is_sticky_directory = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    if status.st_mode & 0o022 and not is_sticky_directory:
        hint = f"chmod go-w '{path}' and every directory above it"
        mode = stat.S_IMODE(status.st_mode)
        raise AccessDeniedError(f"'{path}': expected nobody but root to write it, found mode {mode:04o}", hint=hint)
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
        raise AccessDeniedError(f"'{path}': expected a regular file, found something else")
