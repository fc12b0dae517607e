"""How properties are tried, and what could not be run on this machine, in one line for each reason."""

import os
from collections import Counter

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "fuzz", max_examples=100_000, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.register_profile("steady", derandomize=True, database=None, print_blob=True)
if os.environ.get("LLMSTUDIO_TEST_REQUIRE_ALL"):  # a failure there is of the change that is tried, not of the dice
    hypothesis.settings.load_profile("steady")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Group skipped tests by directory and reason: eighty lines that say the same hide the one that does not."""
    reasons: Counter[tuple[str, str]] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "?"
        reasons[report.nodeid.rpartition("/")[0], reason] += 1
    if reasons:
        terminalreporter.write_sep("-", "not run on this machine")
    for (directory, reason), count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count:4} of {directory}: {reason}")
