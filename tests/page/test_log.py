"""A model's log on its page: as it was written, without what only terminals understand."""

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.integration.running_daemon import RunningDaemon

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]


def test_lines_are_text_and_errors_are_found(signed_in: Page, daemon: RunningDaemon) -> None:
    """Colours are taken out, HTML is shown; errors past llama-server's own log count as such."""
    page = signed_in
    daemon.ctl("load", "tiny")
    page.goto(f"http://localhost:{daemon.port}/#/model/tiny")
    log = page.get_by_role("log")
    expect(log).to_contain_text("listening on")
    with Path(f"/proc/{daemon.admin.get('instances', 'tiny')['pid']}/fd/2").open("w") as stderr:
        stderr.write("\x1b[31mred <img src=x onerror=alert(1)>\x1b[0m\nCUDA error: out of memory\n")
    expect(log.get_by_text("red <img src=x onerror=alert(1)>", exact=True)).to_be_visible()
    page.get_by_label("Which lines").select_option("E")
    expect(log.locator("div:visible")).to_have_text(["CUDA error: out of memory"])
    page.get_by_label("Search the log").fill("nothing like that")
    expect(log).to_contain_text("No line is like that.")


def test_whoever_scrolls_back_stays_there(signed_in: Page, daemon: RunningDaemon) -> None:
    """By whatever means; at the end it is followed again."""
    page = signed_in
    daemon.ctl("load", "tiny")
    page.goto(f"http://localhost:{daemon.port}/#/model/tiny")
    log = page.get_by_role("log")
    expect(log).to_contain_text("listening on")
    follow = page.get_by_role("button", name="Follow")
    expect(follow).to_have_attribute("aria-pressed", "true")
    log.evaluate("box => { box.scrollTop = 0; }")
    expect(follow).to_have_attribute("aria-pressed", "false")
    pid = daemon.admin.get("instances", "tiny")["pid"]
    with Path(f"/proc/{pid}/fd/2").open("w") as stderr:
        stderr.write("one more line\n")
    expect(log).to_contain_text("one more line")
    assert log.evaluate("box => box.scrollTop") == 0
    follow.click()
    expect(log.get_by_text("one more line")).to_be_in_viewport()
