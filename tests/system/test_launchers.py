"""The launchers' suite, `tests/integration/test_launchers.py`, run inside a booted host by Debian's own pytest."""

from pathlib import Path

import pytest

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .host import Host  # noqa: TID252

SUITE = Path(__file__).parent.parent / "integration/test_launchers.py"
INSIDE = "/root/tests/test_launchers.py"


@pytest.mark.parametrize("launcher", ["systemd", "subprocess"])
def test_suite_passes_inside(installed_host: Host, launcher: str) -> None:
    """Units under the real systemd, and plain processes under Debian's Python, keep the same promises."""
    installed_host.put(SUITE, INSIDE)
    options = ["-q", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto", "-o", "timeout=30"]
    environment = {"LLMSTUDIO_TEST_LAUNCHER": launcher, "PYTHONDONTWRITEBYTECODE": "1"}
    done = installed_host.run("python3", "-m", "pytest", *options, INSIDE, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    left = installed_host.run("systemctl", "list-units", "--all", "--no-legend", "llmstudio-model-*").stdout
    assert left == ""
