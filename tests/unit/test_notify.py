"""What systemd is told arrives, whatever the text."""

import os
import socket
from pathlib import Path

import pytest

from llmstudiod.daemon.notify import Notifier


def test_status_is_ascii_and_travels_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that latin-1 cannot hold costs neither the status nor READY; children do not get the socket."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        monkeypatch.setenv("WATCHDOG_USEC", "30000000")
        notifier = Notifier()
        assert "NOTIFY_SOCKET" not in os.environ
        assert notifier.watchdog_period_s == 15
        notifier.status("2 models; ready: 模型…\nREADY=0")
        notifier.ready()
        assert manager.recv(4096) == b"STATUS=2 models; ready: ??? READY=0"
        assert manager.recv(4096) == b"READY=1"
        notifier.reloading()
        assert manager.recv(4096).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        notifier.stopping(within_s=90)
        assert manager.recv(4096) == b"STOPPING=1\nEXTEND_TIMEOUT_USEC=90000000"


def test_without_systemd_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container or at a shell there is nobody to tell."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    notifier = Notifier()
    assert notifier.watchdog_period_s is None
    notifier.ready()
