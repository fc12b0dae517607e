"""Where log lines go: to stderr, with the journal's priorities when it is the journal that reads them."""

import logging
import os
import sys
from typing import ClassVar


class _JournalFormatter(logging.Formatter):
    """``<N>message``: the journal takes the number as the line's priority. Source: sd-daemon(3)."""

    PRIORITIES: ClassVar = {
        logging.CRITICAL: 2,
        logging.ERROR: 3,
        logging.WARNING: 4,
        logging.INFO: 6,
        logging.DEBUG: 7,
    }

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; each line of a traceback gets the number, or it would lose its priority."""
        number = self.PRIORITIES.get(record.levelno, 6)
        return "\n".join(f"<{number}>{line}" for line in super().format(record).splitlines())


def set_up(level: str) -> None:
    """Send everything to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    if os.environ.get("JOURNAL_STREAM"):
        handler.setFormatter(_JournalFormatter("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(logging.WARNING)
