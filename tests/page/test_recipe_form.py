"""The recipe's form while answers are slow and others write too: what was typed is never lost without a word."""

import re

import pytest
from playwright.sync_api import Page, Route, expect

from tests.integration.running_daemon import RunningDaemon
from tests.page.test_page import new_recipe, stored

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]


class Held:
    """Requests that get no answer until `release`."""

    def __init__(self, page: Page, url: str, *, method: str) -> None:
        self._method = method
        self._routes: list[Route] = []
        self._is_open = False
        page.route(url, self._take)

    def _take(self, route: Route) -> None:
        if self._is_open or route.request.method != self._method:
            route.continue_()
        else:
            self._routes.append(route)

    def release(self) -> None:
        """Let those go on that were held, and all that come."""
        self._is_open = True
        for route in self._routes:
            route.continue_()


def edit(page: Page, daemon: RunningDaemon, model: str = "first") -> None:
    """Open the form of a recipe that may be saved."""
    page.goto(f"http://localhost:{daemon.port}/#/recipe/{model}")
    expect(page.get_by_label("Context", exact=True)).not_to_have_value("")
    expect(page.get_by_role("button", name="Save", exact=True)).to_be_enabled()


def save(page: Page, model: str = "first") -> None:
    """Save, and see it done."""
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page).to_have_url(f"{page.url.split('#', maxsplit=1)[0]}#/model/{model}")


@pytest.fixture
def editing(signed_in: Page, daemon: RunningDaemon) -> Page:
    """The form of a recipe that is stored."""
    stored(daemon, "first")
    edit(signed_in, daemon)
    return signed_in


def test_what_is_typed_while_the_text_is_made_is_in_it(editing: Page, daemon: RunningDaemon) -> None:
    """The YAML says what the form said last, not what it said when somebody asked for the YAML."""
    page = editing
    context = page.get_by_label("Context", exact=True)
    context.fill("1024")
    held = Held(page, "**/recipes/check**", method="POST")
    with page.expect_request("**/recipes/check**"):
        page.get_by_role("tab", name="YAML").click()
    context.fill("2048")
    held.release()
    expect(page.get_by_label("The recipe as YAML")).to_have_value(re.compile("max_model_len: 2048"))
    save(page)
    assert daemon.admin.get("recipes", "first")["max_model_len"] == 2048


def test_what_is_typed_while_the_form_is_filled_is_in_it(editing: Page, daemon: RunningDaemon) -> None:
    """The other way round."""
    page = editing
    page.get_by_role("tab", name="YAML").click()
    editor = page.get_by_label("The recipe as YAML")
    text = editor.input_value()
    editor.fill(text.replace("512", "1024"))
    held = Held(page, "**/recipes/check**", method="POST")
    with page.expect_request("**/recipes/check**"):
        page.get_by_role("tab", name="Form").click()
    editor.fill(text.replace("512", "2048"))
    held.release()
    expect(page.get_by_label("Context", exact=True)).to_have_value("2048")
    save(page)
    assert daemon.admin.get("recipes", "first")["max_model_len"] == 2048


def test_last_tab_that_was_chosen_counts(editing: Page, daemon: RunningDaemon) -> None:
    """An answer that comes late takes nobody away from where one went meanwhile."""
    page = editing
    page.get_by_label("Context", exact=True).fill("1024")
    held = Held(page, "**/recipes/check**", method="POST")
    with page.expect_request("**/recipes/check**"):
        page.get_by_role("tab", name="YAML").click()
    page.get_by_role("tab", name="Form").click()
    held.release()
    page.get_by_label("Context", exact=True).fill("2048")
    expect(page.get_by_label("Preview")).to_contain_text("2,048 tokens for each")
    expect(page.get_by_role("tab", name="Form")).to_have_attribute("aria-selected", "true")


def test_kept_draft_does_not_undo_what_others_saved(editing: Page, daemon: RunningDaemon) -> None:
    """It is told next to Discard, and Save does not write over it until somebody says so."""
    page = editing
    page.get_by_label("Context", exact=True).fill("1024")
    page.get_by_role("link", name="Usage").click()
    page.get_by_role("heading", name="Usage", level=1).wait_for()
    stored(daemon, "first", priority=7)
    edit(page, daemon)
    expect(page.locator(".kept")).to_contain_text("Unsaved changes were kept. The recipe was changed elsewhere")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator(".note.error")).to_contain_text("the recipe 'first' was changed meanwhile")
    assert daemon.admin.get("recipes", "first")["priority"] == 7
    page.get_by_role("button", name="Save over it").click()
    expect(page).to_have_url(re.compile("#/model/first"))
    found = daemon.admin.get("recipes", "first")
    assert (found["max_model_len"], found.get("priority")) != (512, 7)
    assert daemon.admin.text("recipes", "first", "file").count("priority") == 0


def test_of_two_tabs_the_second_is_told(editing: Page, daemon: RunningDaemon) -> None:
    """Also where nobody left the form; Discard shows what is stored, which can be saved again."""
    page = editing
    context = page.get_by_label("Context", exact=True)
    context.fill("1024")
    expect(page.get_by_label("Preview")).to_contain_text("1,024 tokens for each")
    stored(daemon, "first", max_model_len=2048)
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator(".kept")).to_contain_text("The recipe was changed elsewhere meanwhile.")
    expect(page.locator(".kept")).not_to_contain_text("Unsaved changes were kept", use_inner_text=True)
    page.get_by_role("button", name="Discard").click()
    expect(context).to_have_value("2048")
    expect(page.locator(".kept")).to_be_hidden()
    context.fill("256")
    save(page)
    assert daemon.admin.get("recipes", "first")["max_model_len"] == 256


def test_what_is_typed_while_it_is_saved_stays(editing: Page, daemon: RunningDaemon) -> None:
    """It is told that it is not stored yet; the next Save stores it."""
    page = editing
    context = page.get_by_label("Context", exact=True)
    context.fill("1024")
    expect(page.get_by_label("Preview")).to_contain_text("1,024 tokens for each")
    held = Held(page, "**/recipes/first", method="PUT")
    with page.expect_request("**/recipes/first"):
        page.get_by_role("button", name="Save", exact=True).click()
    context.fill("2048")
    held.release()
    expect(page.locator(".note")).to_contain_text("saved, without what was typed meanwhile")
    assert daemon.admin.get("recipes", "first")["max_model_len"] == 1024
    expect(context).to_have_value("2048")
    expect(page.get_by_label("Preview")).to_contain_text("2,048 tokens for each")
    save(page)
    assert daemon.admin.get("recipes", "first")["max_model_len"] == 2048


def test_who_left_while_it_was_saved_stays_there(editing: Page, daemon: RunningDaemon) -> None:
    """It is told that it was saved; the place that one chose meanwhile is kept, and nothing waits in the form."""
    page = editing
    page.get_by_label("Context", exact=True).fill("1024")
    expect(page.get_by_label("Preview")).to_contain_text("1,024 tokens for each")
    held = Held(page, "**/recipes/first", method="PUT")
    with page.expect_request("**/recipes/first"):
        page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_role("link", name="Usage").click()
    page.get_by_role("heading", name="Usage", level=1).wait_for()
    held.release()
    expect(page.locator(".note")).to_contain_text("The recipe of first is saved")
    assert page.url.endswith("#/usage")
    edit(page, daemon)
    expect(page.get_by_label("Context", exact=True)).to_have_value("1024")
    expect(page.get_by_text("Unsaved changes were kept")).to_be_hidden()


def test_what_is_typed_while_a_new_one_is_saved_stays(signed_in: Page, daemon: RunningDaemon) -> None:
    """It is a change of the recipe that was made."""
    page = signed_in
    new_recipe(page, daemon)
    page.get_by_label("Id", exact=True).fill("made")
    expect(page.get_by_label("Preview")).to_contain_text("id: made")
    held = Held(page, "**/recipes", method="POST")
    with page.expect_request("**/recipes"):
        page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_label("Context", exact=True).fill("256")
    held.release()
    page.get_by_role("heading", name="Recipe of made", level=1).wait_for()
    expect(page.get_by_label("Context", exact=True)).to_have_value("256")
    expect(page.get_by_text("The recipe was changed elsewhere")).to_be_hidden()
    expect(page.get_by_role("button", name="Save", exact=True)).to_be_enabled()
    save(page, "made")
    assert daemon.admin.get("recipes", "made")["max_model_len"] == 256
