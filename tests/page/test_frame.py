"""What surrounds the pages: one stream for each tab, places that are kept, sessions that end, the keyboard's focus."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.integration.running_daemon import RunningDaemon, running_daemon, wait_until
from tests.page.conftest import complaints_of, open_page
from tests.page.test_page import row

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

HIDE = """isHidden => {
    Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""


def model_page(page: Page, daemon: RunningDaemon, model: str = "tiny") -> Page:
    """Go to a model's page, and wait until its log has been told."""
    page.goto(f"http://localhost:{daemon.port}/#/model/{model}")
    expect(page.locator("#link")).to_have_text("live")
    return page


def test_many_tabs_share_the_connections(context: BrowserContext, daemon: RunningDaemon) -> None:
    """A browser has six connections for one host; of eight tabs with models, those behind the last hold none."""
    page = context.new_page()
    open_page(page, daemon)
    daemon.ctl("load", "tiny")
    for _ in range(7):
        expect(model_page(page, daemon).get_by_role("log")).to_contain_text("listening on")
        page.evaluate(HIDE, arg=True)  # headless, every tab is held to be seen
        wait_until(lambda: daemon.admin.get("events", "stats")["channels"]["default"] == 0)
        page = context.new_page()
    last = model_page(page, daemon)
    expect(last.locator("main .head .state")).to_contain_text("ready for")
    expect(last.get_by_role("log")).to_contain_text("listening on")


def test_hidden_tab_is_up_to_date_when_it_is_seen_again(page: Page, daemon: RunningDaemon) -> None:
    """It holds no stream meanwhile."""
    page.clock.install()
    open_page(page, daemon)
    page.evaluate(HIDE, arg=True)
    page.clock.run_for(5000)
    assert daemon.admin.get("events", "stats")["channels"]["default"] == 0
    daemon.ctl("load", "tiny")
    page.evaluate(HIDE, arg=False)
    page.clock.run_for(500)
    expect(row(page, "Tiny chat")).to_contain_text("ready")


def test_model_page_follows_its_model_over_loads(signed_in: Page, daemon: RunningDaemon) -> None:
    """Slots and log by the one stream, also of the next load; the plan is made anew when the state changes."""
    page = model_page(signed_in, daemon)
    expect(page.get_by_role("log")).to_contain_text("It has written nothing yet.")
    daemon.ctl("load", "tiny")
    expect(page.get_by_role("heading", name="Slots")).to_be_visible()
    expect(page.get_by_role("log")).to_contain_text("listening on")
    expect(page.get_by_role("main")).to_contain_text("It runs now.")
    daemon.ctl("unload", "tiny")
    expect(page.get_by_role("heading", name="Slots")).to_have_count(0)
    expect(page.get_by_role("main")).to_contain_text("It would be started now.")


@pytest.fixture
def coming_and_going(tmp_path: Path) -> tuple[Path, dict[str, object]]:
    """Where a daemon can be started again and again on the same port."""
    for name in ("home", "state"):
        (tmp_path / name).mkdir()
    with running_daemon(tmp_path / "home") as before:
        port = before.port
    return tmp_path / "home", {"listen": [f"127.0.0.1:{port}"], "state_directory": tmp_path / "state"}


def test_page_opened_while_the_daemon_is_away(
    context: BrowserContext, coming_and_going: tuple[Path, dict[str, object]]
) -> None:
    """It says so, and comes by itself; never is one page shown under another's name."""
    home, settings = coming_and_going
    page = context.new_page()
    complaints = complaints_of(page)
    with running_daemon(home, **settings) as daemon:  # type: ignore[arg-type]
        open_page(page, daemon)
    expect(page.locator("#link")).to_contain_text("connection lost")
    page.get_by_role("link", name="Keys").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(re.compile("The daemon cannot be reached|Keys"))
    with running_daemon(home, **settings) as daemon:  # type: ignore[arg-type]
        expect(page.locator("#link")).to_have_text("live", timeout=30_000)
        expect(page.get_by_role("heading", level=1)).to_have_text("Keys")
        expect(page.get_by_role("main")).to_contain_text("There are no keys")
    assert complaints == []


def test_session_that_ends_hides_the_page_and_keeps_what_was_typed(signed_in: Page, daemon: RunningDaemon) -> None:
    """After signing in again the form is as it was."""
    page = signed_in
    page.get_by_role("link", name="New recipe").click()
    page.get_by_label("Name", exact=True).fill("half written")
    daemon.admin.post("web", "sign-out")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    for _ in range(4):  # a browser lets a page say no to the first ones only
        page.keyboard.press("Escape")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert page.evaluate("() => document.querySelector('dialog').matches(':modal')")  # all else is inert, and covered
    page.get_by_label("Code or admin key").fill(daemon.admin.post("web", "code")["code"])
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Sign in")).to_have_count(0)
    expect(page.get_by_label("Name", exact=True)).to_have_value("half written")
    expect(page.locator("#link")).to_have_text("live")


def test_page_that_met_the_end_of_the_session_is_drawn_afterwards(signed_in: Page, daemon: RunningDaemon) -> None:
    """What it asked for in vain is asked again."""
    page = signed_in
    page.route("**/usage", lambda route: route.fulfill(status=401, json={"detail": "sign in"}))
    page.get_by_role("link", name="Usage").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    page.unroute("**/usage")
    page.get_by_label("Code or admin key").fill(daemon.admin.post("web", "code")["code"])
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("main")).to_contain_text("No model has served anything yet.")


def test_signing_out_counts_in_every_tab(context: BrowserContext, daemon: RunningDaemon) -> None:
    """None of them goes on showing what there is."""
    first, second = context.new_page(), context.new_page()
    open_page(first, daemon)
    second.goto(f"http://localhost:{daemon.port}/")
    expect(second.get_by_role("heading", name="Models", level=1)).to_be_visible()
    first.get_by_role("link", name="Settings").click()
    first.get_by_role("button", name="Sign out").click()
    for page in (first, second):
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        expect(page.get_by_role("link", name="Tiny chat")).to_have_count(0)


def test_search_and_place_are_there_after_going_back(signed_in: Page) -> None:
    """The list is as it was left."""
    page = signed_in
    page.keyboard.press("/")
    expect(page.get_by_label("Find a model")).to_be_focused()
    page.keyboard.type("tiny")
    expect(page.locator(".models tr.model")).to_have_count(1)
    page.get_by_role("link", name="Tiny chat").click()
    page.get_by_role("heading", name="Tiny chat", level=1).wait_for()
    page.go_back()
    expect(page.get_by_label("Find a model")).to_have_value("tiny")
    expect(page.locator(".models tr.model")).to_have_count(1)


def test_focus_stays_and_rows_do_not_move_under_it(signed_in: Page, daemon: RunningDaemon) -> None:
    """Somebody who loads a model by the keyboard is at its button afterwards; the list is sorted when he has left."""
    page = signed_in
    load = page.get_by_role("button", name="Load Tiny chat")
    load.focus()
    before = page.locator(".models .name").all_inner_texts()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Unload Tiny chat")).to_be_visible()
    expect(row(page, "Tiny chat").locator(".actions button:focus")).to_have_count(1)
    assert page.locator(".models .name").all_inner_texts() == before
    page.get_by_label("Find a model").focus()
    expect(page.locator(".models .name").first).to_have_text("Tiny chat")
    assert daemon.state("tiny") == "ready"


def test_loads_are_said_aloud(signed_in: Page, daemon: RunningDaemon) -> None:
    """What became of one is told to those who do not see it."""
    daemon.ctl("load", "tiny")
    expect(signed_in.locator("#news")).to_have_text("Tiny chat is ready")
    daemon.ctl("load", "gone")
    expect(signed_in.locator("#news")).to_contain_text("gone has failed: model_path")


def test_machine_without_models_says_what_to_do(context: BrowserContext, tmp_path: Path) -> None:
    """Where a GGUF belongs, and a way to make a recipe."""
    with running_daemon(tmp_path) as daemon:
        page = context.new_page()
        open_page(page, daemon)
        expect(page.get_by_role("heading", name="No models yet")).to_be_visible()
        expect(page.get_by_role("main")).to_contain_text(str(tmp_path / "models"))
        expect(page.get_by_role("table")).to_be_hidden()
