"""Notices that files have changed, by looking now and then: it works on every file system, and costs next to nothing.

An editor that writes a file in pieces, or removes it and puts another one in its place, is given a moment: a change
counts once nothing has changed any more for as long as that.
"""

import asyncio
import os
from collections.abc import Callable, Iterable
from pathlib import Path

MAX_FILES = 20_000


async def changed(identities: Callable[[], object], *, period_s: float, settle_s: float) -> None:
    """Return when the files are others than now, and have been still for ``settle_s``.

    ``identities`` returns equal values for unchanged files; it blocks, and is called in a thread.
    """
    before = await asyncio.to_thread(identities)
    while (now := await asyncio.to_thread(identities)) == before:  # noqa: ASYNC110 - files tell nobody
        await asyncio.sleep(period_s)
    while True:
        await asyncio.sleep(settle_s)
        last, now = now, await asyncio.to_thread(identities)
        if now == last:
            return


def model_files(directories: Iterable[str]) -> list[tuple[str, int, int]]:
    """Return path, size and time of every GGUF below the directories. Blocks."""
    found = []
    for directory in directories:
        for folder, _, names in os.walk(directory):
            for name in names:
                if name.endswith(".gguf"):
                    path = Path(folder, name)
                    try:
                        status = path.stat()
                    except OSError:
                        continue
                    found.append((str(path), status.st_size, status.st_mtime_ns))
            if len(found) > MAX_FILES:
                return sorted(found)
    return sorted(found)
