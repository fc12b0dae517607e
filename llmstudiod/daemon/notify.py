"""What systemd is told: READY, STATUS, RELOADING, STOPPING, WATCHDOG.

``sdnotify`` 0.3.2 encodes in latin-1 and swallows errors, so one "…" in a STATUS would lose the whole datagram, READY
included: everything is made ASCII first, and STATUS never travels with anything else.
"""

import os
import time

import sdnotify


class Notifier:
    """Talks to ``NOTIFY_SOCKET`` where there is one; without systemd it does nothing."""

    def __init__(self) -> None:
        self._systemd = sdnotify.SystemdNotifier()
        usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
        is_ours = pid in ("", str(os.getpid()))
        self.watchdog_period_s = int(usec) / 2e6 if usec.isdigit() and is_ours else None
        # Neither is any child's business.
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            os.environ.pop(name, None)

    def ready(self) -> None:
        """The sockets are served; also the end of a reload."""
        self._send("READY=1")

    def reloading(self) -> None:
        """A reload begins; systemd wants the time of it, or fails the reload."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, *, within_s: float) -> None:
        """The daemon drains; that may take ``within_s``."""
        self._send(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int(within_s * 1e6)}")

    def alive(self) -> None:
        """The event loop runs."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._send(f"STATUS={' '.join(text.split())}")

    def _send(self, state: str) -> None:
        self._systemd.notify(state.encode("ascii", "replace").decode("ascii"))
