"""Talking to a model: what it writes is shown as it is meant, and whatever goes wrong is told where it went wrong."""

import json
from collections.abc import Sequence

import pytest
from playwright.sync_api import Page, expect

from tests.integration.running_daemon import RunningDaemon

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

DONE = "data: [DONE]\n\n"


def piece(content: str = "", thought: str = "", end: str | None = None) -> str:
    """Return an event of a chat's stream."""
    delta = {"content": content} | ({"reasoning_content": thought} if thought else {})
    return "data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": end}]}) + "\n\n"


def answer_with(page: Page, *events: str) -> None:
    """Have every chat answered with these events; what a model writes cannot be chosen otherwise."""
    body = "".join(events)
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, headers={"Content-Type": "text/event-stream"}, body=body),
    )


@pytest.fixture
def talking(signed_in: Page) -> Page:
    """The page on which one talks, with a model chosen."""
    signed_in.get_by_role("link", name="Try it").click()
    signed_in.get_by_label("Model", exact=True).select_option("tiny")
    return signed_in


def say(page: Page, text: str) -> None:
    """Send a message."""
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


TEXT = """# A heading
Some **bold** and `code` and <b>no markup</b>, [a link](javascript:alert(1)).

```python
def f():
    return "<script>alert(1)</script>"
```

1. one
2. two
   - deeper

| a | b |
|---|---|
| 1 | 2 |
"""


def test_markdown_is_shown_as_meant_and_markup_is_not(talking: Page) -> None:
    """Headings, lists, tables, code that can be copied; HTML stays text, links stay text; thoughts are folded."""
    answer_with(talking, piece(thought="Let me think."), *map(piece, TEXT), piece(end="stop"), DONE)
    say(talking, "Write")
    words = talking.locator(".said.assistant .words")
    expect(words.locator("p.heading")).to_have_text("A heading")
    expect(words.locator("strong")).to_have_text("bold")
    expect(words.locator("pre")).to_have_text('def f():\n    return "<script>alert(1)</script>"')
    expect(words.locator("ol > li")).to_have_count(2)
    expect(words.locator("ol ul > li")).to_have_text("deeper")
    expect(words.locator("td")).to_have_text(["1", "2"])
    expect(words).to_contain_text("<b>no markup</b>")
    expect(words.locator("a, b, script")).to_have_count(0)
    thought = talking.locator(".said.assistant .thought")
    expect(thought).not_to_have_attribute("open", "")
    expect(thought.locator("div")).to_have_text("Let me think.")


@pytest.mark.parametrize(
    "text",
    ["Use `foo` then " * 7000, "**a** " * 20_000, "*" * 100_000, "`a " * 30_000, "a|b\n" + " " * 100_000],
    ids=["code", "bold", "stars", "ticks", "spaces"],
)
def test_odd_text_is_shown_all_the_same(talking: Page, text: str) -> None:
    """However many marks it has, and at once: a browser must not stand still for it."""
    answer_with(talking, piece(text), piece(" The end.", end="stop"), DONE)
    say(talking, "Write")
    expect(talking.locator(".said.assistant .words")).to_contain_text("The end.")
    expect(talking.locator(".timings").last).to_contain_text("in all")
    assert talking.locator(".said .why").count() == 0


TROUBLE = 'data: {"error": {"message": "it crashed", "hint": "look at its log", "kind": "upstream_crashed"}}\n\n'


@pytest.mark.parametrize(
    ("events", "told"),
    [
        ([piece("Half an"), TROUBLE], "it crashed"),
        ([piece("Half an")], "ended in the middle"),
        ([piece("Half an"), "data: nonsense\n\n"], "no JSON"),
    ],
    ids=["error", "cut", "nonsense"],
)
def test_trouble_in_the_middle_stands_below_what_was_written(talking: Page, events: Sequence[str], told: str) -> None:
    """Half an answer is worth reading; one can try again."""
    answer_with(talking, *events)
    say(talking, "Write")
    bubble = talking.locator(".said.assistant")
    expect(bubble.locator(".why")).to_contain_text(told)
    expect(bubble.locator(".words")).to_have_text("Half an")
    expect(bubble.locator(".timings")).to_be_empty()
    talking.unroute("**/v1/chat/completions")
    answer_with(talking, piece("All of it", end="stop"), DONE)
    talking.get_by_role("button", name="Try again").click()
    expect(talking.locator(".said.assistant").last.locator(".words")).to_have_text("All of it")


def test_end_that_was_not_the_models_is_told(talking: Page) -> None:
    """As many tokens as were allowed."""
    answer_with(talking, piece("A"), piece(end="length"), DONE)
    say(talking, "Write")
    expect(talking.locator(".timings").last).to_contain_text("as many tokens as were allowed")


def test_new_conversation_knows_nothing_of_the_last(endless: str, talking: Page, daemon: RunningDaemon) -> None:
    """One that is begun while an answer comes ends that answer, and is not told of it."""
    talking.get_by_label("Model", exact=True).select_option(endless)
    talking.get_by_label("Tokens at most").fill("100000")
    say(talking, "Go on for ever")
    expect(talking.locator(".said.assistant .words")).not_to_be_empty()
    talking.get_by_role("button", name="Start anew").click()
    expect(talking.locator(".said")).to_have_count(0)
    expect(talking.get_by_role("button", name="Send")).to_be_visible()
    talking.get_by_label("Tokens at most").fill("4")
    with talking.expect_request("**/v1/chat/completions") as sent:
        say(talking, "Hello")
    assert json.loads(sent.value.post_data or "")["messages"] == [{"role": "user", "content": "Hello"}]
    expect(talking.locator(".timings").last).to_contain_text("4 written")
    assert daemon.admin.get("instances", endless)["in_flight"] == 0


def test_conversation_is_there_after_looking_elsewhere(talking: Page) -> None:
    """For as long as the tab is open; and the next message goes with the ones before."""
    talking.get_by_label("Tokens at most").fill("4")
    say(talking, "First")
    expect(talking.locator(".timings").last).to_contain_text("4 written")
    talking.get_by_role("link", name="Usage").click()
    talking.get_by_role("heading", name="Usage", level=1).wait_for()
    talking.get_by_role("link", name="Try it").click()
    expect(talking.locator(".said")).to_have_count(2)
    talking.get_by_label("Tokens at most").fill("4")
    talking.get_by_label("Model", exact=True).select_option("tiny")
    with talking.expect_request("**/v1/chat/completions") as sent:
        say(talking, "Second")
    assert [each["role"] for each in json.loads(sent.value.post_data or "")["messages"]] == [
        "user",
        "assistant",
        "user",
    ]


def test_end_of_a_long_answer_stays_in_sight(endless: str, talking: Page) -> None:
    """Whoever reads along sees what comes; the place to write in stays too, and Escape stops."""
    talking.get_by_label("Model", exact=True).select_option(endless)
    talking.get_by_label("Tokens at most").fill("100000")
    say(talking, "Go on for ever")
    talking.wait_for_function("() => document.documentElement.scrollHeight > 1.5 * window.innerHeight")
    expect(talking.get_by_role("button", name="Stop")).to_be_in_viewport()
    near = "() => window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 200"
    talking.wait_for_function(near)
    talking.get_by_label("Message").press("Escape")
    expect(talking.locator(".timings").last).to_contain_text("stopped after")


def test_tabs_by_the_keyboard(talking: Page) -> None:
    """Arrow keys go from one to the next."""
    talking.get_by_role("tab", name="Chat").focus()
    talking.keyboard.press("ArrowRight")
    expect(talking.get_by_role("tab", name="Completion")).to_be_focused()
    expect(talking.get_by_label("Text to go on with")).to_be_visible()
    talking.keyboard.press("End")
    expect(talking.get_by_role("tab", name="Embedding")).to_have_attribute("aria-selected", "true")
