"""axe-core finds nothing serious on any part of the page, light or dark."""

from collections.abc import Iterator
from typing import Any

import pytest
from axe_playwright_python.base import AXE_FILE_PATH
from playwright.sync_api import Browser, Page

from tests.integration.running_daemon import RunningDaemon
from tests.page.conftest import open_page

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]
PLACES = ["", "model/tiny", "model/gone", "recipe", "recipe/tiny", "try", "usage", "keys", "settings"]
AXE = AXE_FILE_PATH.read_text()


@pytest.fixture(params=["light", "dark"])
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A tab into which axe may be put, which the page's policy would forbid."""
    context = browser.new_context(viewport={"width": 1280, "height": 860}, color_scheme=request.param, bypass_csp=True)
    yield context.new_page()
    context.close()


def findings(page: Page) -> list[str]:
    """Return what axe holds to be serious or worse."""
    page.evaluate(AXE)
    result: Any = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{each['id']}: {node['html'][:160]}"
        for each in result["violations"]
        if each["impact"] in {"serious", "critical"}
        for node in each["nodes"][:3]
    ]


def test_nothing_serious_is_found(page: Page, daemon: RunningDaemon) -> None:
    """On any page, with a model that is ready and one that has failed."""
    daemon.ctl("load", "tiny")
    daemon.ctl("load", "gone")
    daemon.admin.post("keys", body={"name": "laptop"})
    page.goto(f"http://localhost:{daemon.port}/")
    page.get_by_label("Code or admin key").wait_for()
    found = {"sign-in": findings(page)}
    open_page(page, daemon)
    for place in PLACES:
        page.goto(f"http://localhost:{daemon.port}/#/{place}")
        page.get_by_role("heading", level=1).wait_for()
        page.wait_for_timeout(700)
        found[place or "models"] = findings(page)
    assert {place: told for place, told in found.items() if told} == {}
