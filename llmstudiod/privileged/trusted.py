"""Files that nobody but root could have written, and how root writes them.

No link is followed, and no directory above them may be open to others' renaming. ``owner`` is root but in tests.
"""

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator

from llmstudiod.core.errors import AccessDeniedError, ConfigError
from llmstudiod.core.recipe import MAX_FILE_BYTES
from llmstudiod.core.strict import refuse_untrusted

_HINTS = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room on its disk") | {errno.EROFS: "its disk is read-only"}
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def read_trusted(path: str, *, owner: int) -> bytes:
    """Return a file's content, cut off beyond its largest size; AccessDeniedError if another could have made it."""
    with _directory_of(path, owner) as (directory, name):
        descriptor = _open(name, os.O_RDONLY, directory, path)
    with open(descriptor, "rb") as stream:
        refuse_untrusted(path, os.fstat(descriptor), owner=owner)
        return stream.read(MAX_FILE_BYTES + 1)


def write_trusted(path: str, text: str, *, owner: int, mode: int = 0o644) -> None:
    """Put a file in its place as a whole, or leave what was there."""
    with _directory_of(path, owner) as (directory, name):
        part = f".{name}.{threading.get_ident()}.part"  # the launcher answers in threads
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _FLAGS, 0o600, dir_fd=directory)
        try:
            with open(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fchmod(descriptor, mode)
                os.fsync(descriptor)
            os.rename(part, name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError:
            os.unlink(part, dir_fd=directory)
            raise


def remove_trusted(path: str, *, owner: int) -> None:
    """Remove a file from a directory that is only ours to write."""
    with _directory_of(path, owner) as (directory, name):
        os.unlink(name, dir_fd=directory)


@contextlib.contextmanager
def _directory_of(path: str, owner: int) -> Iterator[tuple[int, str]]:
    """Yield a descriptor of the file's directory, every step to it checked, and the file's name."""
    *above, name = path.split("/")[1:]
    descriptor = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for step in above:
            inner = _open(step, os.O_RDONLY | os.O_DIRECTORY, descriptor, path)
            os.close(descriptor)
            descriptor = inner
            refuse_untrusted(path, os.fstat(descriptor), owner=owner)
        yield descriptor, name
    except OSError as error:
        raise ConfigError(f"'{path}': {error.strerror}", hint=_HINTS.get(error.errno or 0)) from error
    finally:
        os.close(descriptor)


def _open(name: str, flags: int, directory: int, path: str) -> int:
    try:
        return os.open(name, flags | _FLAGS, dir_fd=directory)
    except OSError as error:
        if not stat.S_ISLNK(os.lstat(name, dir_fd=directory).st_mode):
            raise
        message = f"'{path}': expected no symbolic link on the way, found '{name}'"
        raise AccessDeniedError(message, hint="name the place that the link leads to") from error
