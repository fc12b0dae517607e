"""Notices that files have changed, by looking now and then: it works on every file system, and costs next to nothing.

An editor that writes a file in pieces, or removes it and puts another one in its place, is given a moment: a change
counts once that file is as it was a moment ago. Each file is judged by itself, so that one which is copied for an hour
hides no other.
"""

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from llmstudiod.adapters.own_thread import in_own_thread

MAX_FILES = 20_000

Files = Mapping[str, object]
"""What is equal while a file is unchanged, by path."""


class FileWatch:
    """Compares the files with what they were when they were read.

    ``look`` returns them as they are, and blocks; ``known`` as they were before they were last read, so that what
    changes meanwhile, or before the first look, is not missed.
    """

    def __init__(self, look: Callable[[], Files], known: Callable[[], Files]) -> None:
        self._look, self._known = look, known
        self._told: dict[str, tuple[object, object]] = {}  # how each file was known to be, and was, at the last notice

    async def changed(self, *, period_s: float, settle_s: float) -> None:
        """Return when a file is another than the known one, and has been still for ``settle_s``."""
        last: Files | None = None
        while True:
            now = await in_own_thread(self._look)
            new = self._new(now)
            if last is not None and any(now.get(path) == last.get(path) for path in new):
                known = self._known()
                self._told = {path: (known.get(path), now.get(path)) for path in now.keys() | known.keys()}
                return
            last = now
            await asyncio.sleep(settle_s if new else period_s)

    def _new(self, now: Files) -> set[str]:
        known = self._known()
        new = {path for path in now.keys() | known.keys() if now.get(path) != known.get(path)}
        # Once is enough, also where it could not be read.
        return {path for path in new if self._told.get(path) != (known.get(path), now.get(path))}


def model_files(directories: Iterable[str]) -> dict[str, object]:
    """Return size and times of every GGUF below the directories, by path. Blocks."""
    found: dict[str, object] = {}
    for directory in directories:
        for folder, _, names in os.walk(directory):
            for name in names:
                if name.lower().endswith(".gguf"):
                    path = Path(folder, name)
                    try:
                        status = path.stat()
                    except OSError:
                        continue
                    found[str(path)] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            if len(found) > MAX_FILES:
                return found
    return found
