"""The daemon's stop tells of bugs, and not of a race in aiohttp that harms nobody."""

import asyncio
import logging

import pytest

from llmstudiod.daemon.application import _is_worth_telling


@pytest.mark.parametrize(("error", "is_told"), [(asyncio.InvalidStateError("invalid state"), False), (OSError(), True)])
def test_race_of_aiohttp_is_not_told(error: Exception, *, is_told: bool) -> None:
    """Whatever else goes wrong is."""
    record = logging.LogRecord("aiohttp.server", logging.ERROR, "", 0, "Unhandled", None, (type(error), error, None))
    assert _is_worth_telling(record) is is_told


def test_other_lines_are_told() -> None:
    """Those without an exception too."""
    assert _is_worth_telling(logging.LogRecord("aiohttp.server", logging.ERROR, "", 0, "text", None, None))
