"""Under a steady load everything that can die is killed; `chaos.py` does it by hand for as long as one likes."""

import os
import secrets
from pathlib import Path

import pytest

from .chaos import prepare, run, save_journal, say  # noqa: TID252
from .host import Host  # noqa: TID252

N_FAULTS, N_REQUESTS = 300, 10_000
SEED = "LLMSTUDIO_TEST_CHAOS_SEED"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_chaos(installed_host: Host, tmp_path: Path) -> None:
    """No request is lost or left without a reason, no model dies that was not hit, nothing is left behind."""
    seed = int(os.environ.get(SEED) or secrets.randbelow(1 << 30))
    say(f"\n{SEED}={seed}")
    daemon = prepare(installed_host, tmp_path)
    report = run(daemon, seed=seed, n_faults=N_FAULTS, n_requests=N_REQUESTS, seconds=0)
    say(str(report))
    if report.faults:
        save_journal(daemon, report, tmp_path)
    assert not report.faults, str(report)
