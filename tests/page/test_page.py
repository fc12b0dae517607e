"""The page in a real browser: each of its parts does what it says, live, and without a reload."""

import os
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Dialog, Locator, Page, expect

from llmstudiod.demo.tiny_gguf import TinyModel, write_tiny_gguf
from tests.integration.nvml_stub import GIB, gpu
from tests.integration.running_daemon import RunningDaemon, running_daemon, wait_until
from tests.page.conftest import open_page

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]
Shot = Callable[[str], None]


def row(page: Page, name: str) -> Locator:
    """Return a model's row in the list."""
    return page.get_by_role("row").filter(has=page.get_by_role("link", name=name, exact=True))


def test_code_that_was_used_asks_for_another(page: Page, daemon: RunningDaemon) -> None:
    """The page says so, takes a new code, and signs out."""
    url = daemon.admin.post("web", "code")["urls"][0]
    page.goto(url)
    page.get_by_role("heading", name="Models", level=1).wait_for()
    assert "code" not in page.url
    page.context.clear_cookies()
    page.goto("about:blank")
    page.goto(url)
    expect(page.get_by_role("alert")).to_contain_text("not valid any more")
    page.get_by_label("Code or admin key").fill("llms-wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("admin right")
    page.get_by_label("Code or admin key").fill(daemon.admin.post("web", "code")["code"])
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("link", name="Settings").click()
    page.get_by_role("button", name="Sign out").click()
    page.get_by_role("heading", name="Sign in").wait_for()


def test_admin_key_signs_in(page: Page, daemon: RunningDaemon) -> None:
    """As well as a code does."""
    secret = daemon.admin.post("keys", body={"name": "boss", "admin": True})["secret"]
    page.goto(f"http://localhost:{daemon.port}/")
    page.get_by_label("Code or admin key").fill(secret)
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Keys").click()
    expect(page.get_by_role("rowheader", name="boss")).to_be_visible()


def test_life_of_a_model(signed_in: Page, daemon: RunningDaemon, shot: Shot) -> None:
    """A recipe is made of a GGUF in the form, loaded, talked to, its log is read, and it is unloaded."""
    page = signed_in
    page.get_by_role("link", name="New recipe").click()
    path = str(daemon.home / "models" / "spare-1b-f16.gguf")
    page.get_by_label("GGUF file").fill(path)
    page.keyboard.press("Tab")
    expect(page.get_by_label("Id", exact=True)).to_have_value("spare-1b-f16")
    verdict = page.get_by_label("Preview")
    expect(verdict).to_contain_text("The recipe is good.")
    kv = verdict.get_by_role("row", name=re.compile("KV cache")).get_by_role("cell")
    page.get_by_label("Context", exact=True).fill("512")
    expect(verdict).to_contain_text("512 tokens for each of 4 slots")
    small = kv.inner_text()
    page.get_by_label("Context", exact=True).fill("2048")
    expect(verdict).to_contain_text("2,048 tokens for each")
    assert kv.inner_text() != small
    page.get_by_label("Id", exact=True).fill("talker")
    page.get_by_label("Name", exact=True).fill("Talker")
    page.get_by_label("Slots", exact=True).fill("2")
    expect(verdict).to_contain_text("2 slots")
    shot("form")
    page.get_by_role("button", name="Save and load").click()
    page.get_by_role("heading", name="Talker", level=1).wait_for()
    expect(page.locator("main .head .state")).to_contain_text("ready for")
    expect(page.get_by_role("log")).to_contain_text("all slots are idle")

    page.get_by_role("main").get_by_role("link", name="Try it").click()
    expect(page.get_by_label("Model", exact=True)).to_have_value("talker")
    page.get_by_label("Tokens at most").fill("24")
    page.get_by_label("Message").fill("Hello")
    page.keyboard.press("Enter")
    expect(page.locator(".timings").last).to_contain_text("24 written")
    shot("try-it")

    page.goto(f"http://localhost:{daemon.port}/#/model/talker")
    expect(page.locator("main dl.tiles")).to_contain_text("Tokens/s")
    page.get_by_label("Search the log").fill("nothing like that is in it")
    expect(page.locator(".log > div:visible")).to_have_count(0)
    page.get_by_label("Search the log").fill("print_timing")
    expect(page.locator(".log > div:visible").first).to_contain_text("print_timing")
    page.get_by_label("Search the log").fill("")
    shot("model")
    page.get_by_role("button", name="Unload").click()
    expect(page.locator("main .head .state")).to_contain_text("stopped for")
    assert daemon.state("talker") == "stopped"


def test_list_is_live(signed_in: Page, daemon: RunningDaemon, shot: Shot) -> None:
    """What happens elsewhere is shown at once: loads with their progress, requests, new recipes."""
    page = signed_in
    expect(row(page, "Tiny chat")).to_contain_text("stopped")
    daemon.ctl("load", "tiny")
    expect(row(page, "Tiny chat")).to_contain_text("ready")
    expect(row(page, "Tiny chat")).to_contain_text("1,024")
    expect(row(page, "Tiny chat")).to_contain_text("MiB")
    expect(page.get_by_label("Devices")).to_contain_text("tiny")
    daemon.put_recipe({"id": "added", "model_path": str(daemon.home / "models" / "spare-1b-f16.gguf")})
    daemon.reload()
    expect(row(page, "added")).to_be_visible()
    page.get_by_label("Find a model").fill("tin")
    expect(page.locator(".models tbody tr:visible")).to_have_count(1)
    page.get_by_label("Find a model").fill("")
    shot("live")


def test_load_is_shown_and_given_up(signed_in: Page, daemon: RunningDaemon, shot: Shot) -> None:
    """How far it is, and a button that ends it."""
    page = signed_in
    page.get_by_role("button", name="Load Tiny chat").click()
    pid = wait_until(lambda: daemon.admin.get("instances", "tiny")["pid"])
    os.kill(pid, signal.SIGSTOP)
    try:
        expect(row(page, "Tiny chat").get_by_role("progressbar")).to_be_visible()
        expect(row(page, "Tiny chat")).to_contain_text(re.compile("starting|loading"))
        shot("loading")
        page.get_by_role("button", name="Cancel Tiny chat").click()
        wait_until(lambda: daemon.state("tiny") in {"stopping", "stopped"})
    finally:
        os.kill(pid, signal.SIGCONT)
    expect(row(page, "Tiny chat").locator(".state")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Load Tiny chat")).to_be_visible()


def test_odd_values_are_warned_of(signed_in: Page, daemon: RunningDaemon) -> None:
    """A context beyond what the model was trained for, a path that is no GGUF: told as one types."""
    page = signed_in
    page.get_by_role("link", name="New recipe").click()
    page.get_by_label("GGUF file").fill(str(daemon.home / "models" / "spare-1b-f16.gguf"))
    page.keyboard.press("Tab")
    verdict = page.get_by_label("Preview")
    expect(verdict).to_contain_text("The recipe is good.")
    page.get_by_label("Context", exact=True).fill("999999")
    expect(verdict.locator(".warn, .warning").first).to_contain_text("999")
    page.get_by_label("Context", exact=True).fill("")
    (daemon.home / "models" / "notes.gguf").write_text("no GGUF at all")
    page.get_by_label("GGUF file").fill(str(daemon.home / "models" / "notes.gguf"))
    expect(verdict).to_contain_text("The recipe is good, but it cannot be loaded now.")
    expect(verdict.locator(".fault")).to_contain_text("GGUF")
    page.get_by_label("GGUF file").fill("/etc/passwd")
    expect(verdict).to_contain_text("The recipe cannot be saved like this.")
    expect(page.get_by_role("button", name="Save", exact=True)).to_be_disabled()


def test_gpus_are_bars_of_who_holds_what(page: Page, stub_gpus: Path, daemon: RunningDaemon, shot: Shot) -> None:
    """Models, other programs and what is free, as it is measured."""
    open_page(page, daemon)
    daemon.ctl("load", "tiny")
    pid = daemon.admin.get("instances", "tiny")["pid"]
    told = gpu(0, 24) + gpu(1, 24) + f"used 0 {9 * GIB}\nproc 0 compute {pid} {6 * GIB}\n"
    stub_gpus.write_text(told)
    devices = page.get_by_label("Devices")
    expect(devices.get_by_role("img", name="9.0 GiB of 24.0 GiB in use")).to_be_visible()
    for words in ("GPU 0 NVIDIA Test 24G", "tiny 6.0 GiB", "other programs 3.0 GiB", "free 15.0 GiB", "GPU 1", "RAM"):
        expect(devices).to_contain_text(words)
    expect(row(page, "Tiny chat")).to_contain_text("6.0 GiB GPU")
    shot("gpus")
    page.get_by_role("link", name="Tiny chat").click()
    expect(page.locator("main dl.tiles")).to_contain_text("6.0 GiB")
    expect(page.get_by_role("figure").filter(has_text="GPU memory")).to_contain_text("last 6.0 GiB")


def test_failure_is_explained(signed_in: Page, shot: Shot) -> None:
    """The reason and what to do stand in the list, and on the model's page with its story."""
    page = signed_in
    page.get_by_role("button", name="Load gone").click()
    expect(page.locator(".why:visible")).to_contain_text("does not exist")
    expect(page.locator(".why:visible")).to_contain_text("check the path")
    page.get_by_role("link", name="gone", exact=True).click()
    expect(page.locator("ol.story")).to_contain_text("does not exist")
    expect(page.locator(".why")).to_contain_text(
        re.compile(r"The next request starts it again\.|It may be started again at ")
    )
    shot("failed")
    page.get_by_role("button", name="Reset").click()
    expect(page.locator("main .head .state")).to_contain_text("stopped")


def test_pin_lasts(signed_in: Page, daemon: RunningDaemon) -> None:
    """A pinned model is loaded, says that it is pinned, and can be unpinned."""
    page = signed_in
    page.get_by_role("button", name="Pin Tiny chat").click()
    expect(row(page, "Tiny chat")).to_contain_text("pinned")
    expect(row(page, "Tiny chat")).to_contain_text("ready")
    assert daemon.admin.get("instances", "tiny")["is_pinned"]
    page.get_by_role("button", name="Unpin Tiny chat").click()
    expect(row(page, "Tiny chat")).not_to_contain_text("pinned")


def test_yaml_tells_the_line(signed_in: Page, daemon: RunningDaemon, shot: Shot) -> None:
    """A fault stands at its line; odd values are warned of in the form; what is faulty is not saved."""
    page = signed_in
    page.get_by_role("link", name="New recipe").click()
    page.get_by_label("GGUF file").fill("/etc/hostname")
    page.get_by_label("Id", exact=True).fill("wrong")
    expect(page.locator(".field .told").first).to_contain_text("model directories")
    page.get_by_label("GGUF file").fill(str(daemon.home / "models" / "spare-1b-f16.gguf"))
    page.get_by_label("Context", exact=True).fill("100000")
    expect(page.get_by_label("Preview")).to_contain_text("over the model's 2048 tokens")
    page.get_by_role("tab", name="YAML").click()
    editor = page.get_by_label("The recipe as YAML")
    expect(editor).to_have_value(re.compile("max_model_len: 100000"))
    editor.fill(f"# mine\nid: wrong\nmodel_path: {daemon.home}/models/spare-1b-f16.gguf\nmax_model_len: much\n")
    expect(page.locator(".gutter .bad")).to_contain_text("4")
    expect(page.get_by_label("Preview")).to_contain_text("line 4: max_model_len: expected")
    expect(page.get_by_role("button", name="Save", exact=True)).to_be_disabled()
    shot("yaml")
    editor.fill(f"# mine\nid: wrong\nmodel_path: {daemon.home}/models/spare-1b-f16.gguf\nmax_model_len: 512\n")
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_role("heading", name="wrong", level=1).wait_for()
    page.get_by_role("link", name="Edit the recipe").click()
    page.get_by_role("tab", name="YAML").click()
    expect(editor).to_have_value(re.compile("^# mine\nid: wrong"))
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("heading", name="Models", level=1).wait_for()
    wait_until(lambda: "wrong" not in {recipe["id"] for recipe in daemon.admin.get("recipes")})


def test_command_becomes_a_recipe(signed_in: Page, daemon: RunningDaemon) -> None:
    """What is pasted fills the form; what goes elsewhere is told."""
    page = signed_in
    page.get_by_role("link", name="New recipe").click()
    page.get_by_role("tab", name="From a command").click()
    path = daemon.home / "models" / "spare-1b-f16.gguf"
    page.get_by_label("A llama-server command").fill(f"llama-server -m {path} -c 2048 -np 2 --port 9000 --top-k 40")
    page.get_by_role("button", name="Make a recipe of it").click()
    expect(page.get_by_label("Context", exact=True)).to_have_value("1024")
    expect(page.get_by_label("Slots", exact=True)).to_have_value("2")
    expect(page.get_by_label("extra_args")).to_have_value("top-k: 40")
    expect(page.get_by_role("status").filter(has_text="--port")).to_be_visible()
    expect(page.get_by_label("Preview")).to_contain_text("The recipe is good.")


def test_recipe_written_by_hand_is_refused_with_a_reason(signed_in: Page, daemon: RunningDaemon, shot: Shot) -> None:
    """At once, since its comments are worth more than the form; what would become of it can be tried and copied."""
    page = signed_in
    page.goto(f"{page.url.split('#')[0]}#/recipe/tiny")
    expect(page.get_by_label("Name", exact=True)).to_have_value("Tiny chat")
    expect(page.locator(".why.warn").first).to_contain_text("was written by hand, so it is not overwritten here")
    page.get_by_label("Context", exact=True).fill("2048")
    expect(page.get_by_label("Preview")).to_contain_text("2,048 tokens for each")
    expect(page.get_by_label("Preview")).to_contain_text("The recipe is good.")
    expect(page.get_by_role("button", name="Save", exact=True)).to_be_disabled()
    expect(page.get_by_role("button", name="Delete")).to_be_hidden()
    expect(page.get_by_label("Preview").locator("pre").last).to_contain_text("max_model_len: 2048")
    page.get_by_role("button", name="Copy the YAML").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    shot("by-hand")


def new_recipe(page: Page, daemon: RunningDaemon, model: str = "spare-1b-f16") -> None:
    """Open the form for a file on disk."""
    page.get_by_role("link", name="New recipe").click()
    page.get_by_label("GGUF file").fill(str(daemon.home / "models" / f"{model}.gguf"))
    expect(page.get_by_label("Id", exact=True)).not_to_have_value("")
    expect(page.get_by_label("Preview")).to_contain_text("The recipe is good.")


def stored(daemon: RunningDaemon, model: str, **more: object) -> None:
    """Have a recipe that came over HTTP."""
    path = str(daemon.home / "models" / "spare-1b-f16.gguf")
    daemon.admin.post("recipes", body={"id": model, "model_path": path, "max_model_len": 512} | more)


def test_new_recipe_takes_nobodys_place(signed_in: Page, daemon: RunningDaemon) -> None:
    """An id or a name that is taken is told at its field; without an id nothing is saved."""
    page = signed_in
    stored(daemon, "first", aliases=["gpt-4o"])
    new_recipe(page, daemon)
    saving = page.get_by_role("button", name="Save", exact=True)
    expect(saving).to_be_enabled()
    page.get_by_label("Id", exact=True).fill("first")
    expect(page.locator(".field.bad").filter(has=page.get_by_label("Id", exact=True))).to_contain_text("free")
    expect(saving).to_be_disabled()
    page.get_by_label("Id", exact=True).fill("")
    expect(page.get_by_label("Preview")).to_contain_text("id: expected an id")
    expect(saving).to_be_disabled()
    page.get_by_label("Id", exact=True).fill("second")
    expect(saving).to_be_enabled()
    page.get_by_text("Names", exact=True).click()
    page.get_by_label("Aliases").fill("gpt-4o")
    expect(page.locator(".field.bad .told:visible")).to_contain_text("which recipe 'first' has")
    expect(saving).to_be_disabled()
    page.get_by_label("Aliases").fill("")
    expect(saving).to_be_enabled()
    stored(daemon, "second", max_model_len=1024)  # by somebody else, meanwhile
    saving.click()
    expect(page.locator(".note.error")).to_contain_text("there is a recipe 'second' already")
    assert daemon.admin.get("recipes", "second")["max_model_len"] == 1024


def test_id_stays_and_a_copy_gets_another(signed_in: Page, daemon: RunningDaemon) -> None:
    """Duplicate opens the new form with all but the names."""
    page = signed_in
    stored(daemon, "first", name="First", aliases=["gpt-4o"], limits={"nice": 5})
    page.goto(f"{page.url.split('#')[0]}#/recipe/gpt-4o")
    expect(page.get_by_label("Id", exact=True)).to_have_value("first")
    expect(page.get_by_label("Id", exact=True)).not_to_be_editable()
    page.get_by_role("link", name="Duplicate").click()
    expect(page.get_by_label("Id", exact=True)).to_have_value("first-2")
    expect(page.get_by_label("Name", exact=True)).to_have_value("First (copy)")
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_role("heading", name="First (copy)", level=1).wait_for()
    copied = daemon.admin.get("recipes", "first-2")
    assert (copied["max_model_len"], copied["limits"], copied.get("aliases")) == (512, {"nice": 5}, None)


def test_form_and_yaml_lose_nothing_of_each_other(signed_in: Page, daemon: RunningDaemon) -> None:
    """What was edited goes along, comments stay until the form is touched, and a faulty text is not left."""
    page = signed_in
    path = daemon.home / "models" / "spare-1b-f16.gguf"
    text = f"# why it is here\nid: noted\nmodel_path: {path}\nmax_model_len: 512  # enough\n"
    daemon.admin.post_text("recipes", text=text)
    page.goto(f"{page.url.split('#')[0]}#/recipe/noted")
    context = page.get_by_label("Context", exact=True)
    editor = page.get_by_label("The recipe as YAML")
    form, yaml = page.get_by_role("tab", name="Form"), page.get_by_role("tab", name="YAML")
    expect(context).to_have_value("512")
    yaml.click()
    expect(editor).to_have_value(text)
    editor.fill(text.replace("512", "1024"))
    form.click()
    expect(context).to_have_value("1024")
    yaml.click()
    expect(editor).to_have_value(text.replace("512", "1024"))
    form.click()
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_role("heading", name="noted", exact=True).wait_for()
    assert daemon.admin.text("recipes", "noted", "file") == text.replace("512", "1024")
    page.goto(f"{page.url.split('#')[0]}#/recipe/noted")
    context.fill("256")
    yaml.click()
    expect(page.locator(".note")).to_contain_text(["its comments go"])
    expect(editor).to_have_value(re.compile("max_model_len: 256"))
    editor.fill("id: noted\nmax_model_len: [\n")
    form.click()
    expect(page.locator(".note.error")).to_contain_text("The YAML has faults")
    expect(editor).to_be_visible()


def test_leaving_loses_nothing(signed_in: Page, daemon: RunningDaemon) -> None:
    """A link, going back, signing in again: the changes are there, and can be discarded. A reload asks first."""
    page = signed_in
    stored(daemon, "first")
    place = f"{page.url.split('#')[0]}#/recipe/first"
    page.goto(place)
    context = page.get_by_label("Context", exact=True)
    expect(context).to_have_value("512")
    context.fill("1024")
    page.get_by_role("link", name="Usage").click()
    page.get_by_role("heading", name="Usage", level=1).wait_for()
    page.go_back()
    expect(context).to_have_value("1024")
    expect(page.get_by_text("Unsaved changes were kept.")).to_be_visible()
    expect(page.get_by_label("Preview")).to_contain_text(
        "1,024 tokens for each"
    )  # nothing more is asked until one types
    page.context.clear_cookies()
    context.fill("768")
    page.get_by_label("Code or admin key").fill(daemon.admin.post("web", "code")["code"])
    page.keyboard.press("Enter")
    expect(context).to_have_value("768")
    asked: list[str] = []

    def stay(dialog: Dialog) -> None:
        asked.append(dialog.type)
        dialog.dismiss()

    page.once("dialog", stay)
    with page.expect_event("dialog"):
        page.evaluate("setTimeout(() => location.reload())")
    assert asked == ["beforeunload"]
    page.get_by_role("button", name="Discard").click()
    expect(context).to_have_value("512")
    page.get_by_role("link", name="Usage").click()
    page.goto(place)
    expect(context).to_have_value("512")
    expect(page.get_by_text("Unsaved changes were kept.")).to_be_hidden()


def test_what_is_pasted_and_left_out_stays_told(signed_in: Page, daemon: RunningDaemon) -> None:
    """In a list above the form, for as long as one looks at it."""
    page = signed_in
    page.get_by_role("link", name="New recipe").click()
    page.get_by_role("tab", name="Form").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("tab", name="From a command")).to_be_focused()
    expect(page.get_by_role("tabpanel", name="From a command")).to_be_visible()
    path = daemon.home / "models"
    page.get_by_label("A llama-server command").fill(
        f"docker run -p 1:2 -v {path}:/m img -m /m/spare-1b-f16.gguf --no-mmap --mlock --port 1 > log &"
    )
    page.get_by_role("button", name="Make a recipe of it").click()
    notes = page.locator(".told-notes li")
    expect(notes.filter(has_text="--port is left out")).to_be_visible()
    expect(notes.filter(has_text="on this machine")).to_be_visible()
    expect(page.get_by_label("GGUF file")).to_have_value(f"{path}/spare-1b-f16.gguf")
    expect(page.get_by_label("Load mode")).to_have_value("mlock")
    expect(page.get_by_label("Preview")).to_contain_text("The recipe is good.")
    expect(page.get_by_role("button", name="Save", exact=True)).to_be_enabled()


def test_verdict_is_in_sight_on_a_phone(signed_in: Page, daemon: RunningDaemon, shot: Shot) -> None:
    """With the buttons, at the bottom, wherever one is in the form."""
    page = signed_in
    page.set_viewport_size({"width": 360, "height": 740})
    new_recipe(page, daemon)
    for place in (0, 600):
        page.evaluate(f"window.scrollTo(0, {place})")
        bar = page.locator(".form-bar")
        expect(bar).to_contain_text("The recipe is good.")
        expect(bar.get_by_role("button", name="Save", exact=True)).to_be_in_viewport()
    shot("form-phone")


def test_faults_stand_at_their_fields(signed_in: Page, daemon: RunningDaemon) -> None:
    """Also of one part of a list, of a flag, and of a line that is none; what is odd is marked, a default is not."""
    page = signed_in
    new_recipe(page, daemon)
    preview = page.get_by_label("Preview")
    expect(preview.locator("p", has_text="max_model_len is not set")).to_have_class("quiet small")
    page.get_by_text("GPUs and split").click()
    page.get_by_label("Tensor split").fill("3,x")
    at_split = page.locator(".field.bad").filter(has=page.get_by_label("Tensor split"))
    expect(at_split).to_contain_text("found 'x'")
    page.get_by_label("Tensor split").fill("")
    page.get_by_label("Context", exact=True).fill("100000")
    expect(page.locator(".field.odd").filter(has=page.get_by_label("Context", exact=True))).to_contain_text("over the")
    page.get_by_label("Context", exact=True).fill("")
    page.get_by_text("Other flags").click()
    extra = page.get_by_label("extra_args")
    for line in ("# mine", '"top-k": 40', "- top-k 40", "top k 40"):
        extra.fill(f"temp: 0.5\n\n{line}")
        expect(page.locator(".field.bad").filter(has=extra)).to_contain_text("line 3 is not NAME: VALUE")
        expect(page.get_by_role("button", name="Save", exact=True)).to_be_disabled()
    extra.fill("--top-k 40\nswa-full")
    expect(preview).to_contain_text("The recipe is good.")
    expect(preview.locator("pre").last).to_contain_text("top-k: 40")
    extra.fill("top-k: many")
    expect(page.locator(".field.bad").filter(has=extra)).to_contain_text("whole number")
    expect(preview.locator("pre").last).to_contain_text("top-k: many")


def test_check_is_made_again_after_a_restart(page: Page, tmp_path: Path) -> None:
    """What could not be asked is asked when the daemon is back; nothing can be saved meanwhile."""
    (tmp_path / "models").mkdir()
    write_tiny_gguf(tmp_path / "models" / "spare-1b-f16.gguf", TinyModel())
    state = tmp_path / "state"
    state.mkdir()
    saving = page.get_by_role("button", name="Save", exact=True)
    with running_daemon(tmp_path, state_directory=state) as first:
        settings = {"listen": [f"127.0.0.1:{first.port}"]}
        open_page(page, first)
        new_recipe(page, first)
        expect(saving).to_be_enabled()
    expect(page.get_by_label("Preview")).to_contain_text("the daemon cannot be reached")
    expect(saving).to_be_disabled()
    page.get_by_label("Context", exact=True).fill("512")
    with running_daemon(tmp_path, state_directory=state, **settings):
        expect(page.get_by_label("Preview")).to_contain_text("512 tokens for each")
        expect(saving).to_be_enabled()


def test_recipe_that_is_not_there_is_told(signed_in: Page, daemon: RunningDaemon) -> None:
    """And a model without one has none that could be deleted."""
    page = signed_in
    page.goto(f"http://localhost:{daemon.port}/#/recipe/nosuch")
    page.get_by_role("heading", name="There is no such recipe").wait_for()
    expect(page.get_by_role("button", name="Save", exact=True)).to_have_count(0)
    page.goto(f"http://localhost:{daemon.port}/#/recipe/spare-1b-f16")
    expect(page.get_by_role("main")).to_contain_text("It has no recipe yet")
    expect(page.get_by_role("button", name="Save", exact=True)).to_be_enabled()
    expect(page.get_by_role("button", name="Delete")).to_have_count(0)


def test_file_is_picked_from_what_is_on_disk(signed_in: Page, daemon: RunningDaemon, shot: Shot) -> None:
    """With what its header says; by keys as well; the id follows until it is typed."""
    page = signed_in
    page.get_by_role("link", name="New recipe").click()
    path = page.get_by_label("GGUF file")
    path.click()
    options = page.get_by_role("listbox", name="Files on disk").get_by_role("option")
    expect(options).to_have_count(2)
    expect(options.filter(has_text="tiny-chat.gguf")).to_contain_text("has a recipe: tiny")
    expect(options.filter(has_text="tiny-chat.gguf")).to_contain_text("trained for 2,048 tokens")
    shot("files")
    path.fill("spare f16")
    expect(options).to_have_count(1)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(path).to_have_value(str(daemon.home / "models" / "spare-1b-f16.gguf"))
    expect(page.get_by_label("Id", exact=True)).to_have_value("spare-1b-f16")
    path.fill(str(daemon.home / "models" / "tiny-chat.gguf"))
    expect(page.get_by_label("Id", exact=True)).to_have_value("tiny-chat")
    page.get_by_label("Id", exact=True).fill("mine")
    path.click()
    options.filter(has_text="spare").click()
    expect(page.get_by_label("Id", exact=True)).to_have_value("mine")


def test_command_line_can_be_pasted(signed_in: Page, daemon: RunningDaemon) -> None:
    """Into a shell: what has blanks or quotes in it stays one word."""
    page = signed_in
    new_recipe(page, daemon)
    page.get_by_text("Names", exact=True).click()
    page.get_by_label("Served name").fill("it's mine $HOME")
    line = page.get_by_label("Preview").locator("details", has_text="Command line")
    line.locator("summary").click()
    page.get_by_label("Context", exact=True).fill("512")
    expect(page.get_by_label("Preview")).to_contain_text("512 tokens for each")  # it stays open meanwhile
    expect(line.locator("pre")).to_contain_text("--alias 'it'\\''s mine $HOME'")
    assert "it's mine $HOME" in shlex.split(line.locator("pre").inner_text())
    line.get_by_role("button", name="Copy").click()
    expect(line.get_by_role("button", name="Copied")).to_be_visible()


def test_text_can_be_copied_without_tls(signed_in: Page) -> None:
    """A page that comes by plain HTTP from another machine has no clipboard of its own; the focus stays."""
    page = signed_in
    page.evaluate("Object.defineProperty(Navigator.prototype, 'clipboard', {value: undefined})")
    page.get_by_role("link", name="Tiny chat").click()
    line = page.locator("dd", has_text="/v1").first
    line.get_by_role("button", name="Copy").click()
    expect(line.get_by_role("button", name="Copied")).to_be_focused()
    page.get_by_role("link", name="Try it").first.click()
    page.get_by_label("Message").press("Control+V")
    expect(page.get_by_label("Message")).to_have_value(re.compile(r"http://.*/v1"))


def test_try_it_stops_and_embeds(endless: str, signed_in: Page, daemon: RunningDaemon) -> None:
    """A long answer can be stopped; completions and embeddings work; errors tell why."""
    page = signed_in
    page.get_by_role("link", name="Try it").click()
    page.get_by_label("Model", exact=True).select_option(endless)
    page.get_by_label("Tokens at most").fill("100000")
    page.get_by_label("Message").fill("Go on for ever")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".said.assistant div").nth(1)).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".timings").last).to_contain_text("stopped after")
    wait_until(lambda: daemon.admin.get("instances", endless)["in_flight"] == 0)
    page.get_by_role("tab", name="Completion").click()
    page.get_by_label("Model", exact=True).select_option("tiny")
    page.get_by_label("Tokens at most").fill("8")
    page.get_by_label("Text to go on with").fill("Once upon")
    page.keyboard.press("Enter")
    expect(page.locator(".timings").last).to_contain_text("8 written")
    page.get_by_role("tab", name="Embedding").click()
    page.get_by_label("Text to embed").fill("Hello")
    page.keyboard.press("Enter")
    expect(page.locator(".said.assistant .why, .said.assistant pre").last).to_be_visible()
    page.get_by_role("tab", name="Chat").click()
    page.get_by_label("Model", exact=True).select_option("gone")
    page.get_by_label("Message").fill("Hello")
    page.keyboard.press("Enter")
    expect(page.locator(".said .why")).to_contain_text("does not exist")


def test_page_survives_a_restart(page: Page, daemon: RunningDaemon) -> None:
    """The daemon goes and comes back: the page says so, and goes on by itself, still signed in."""
    page.goto(f"http://localhost:{daemon.port}/")
    home, port = daemon.home / "other", daemon.port
    home.mkdir()
    settings = {"listen": [f"127.0.0.1:{port + 1 if port < 65535 else port - 1}"], "keys_file": str(home / "keys")}
    state = home / "state"
    state.mkdir()
    with running_daemon(home, state_directory=state, **settings) as first:
        open_page(page, first)
        expect(page.locator("#link")).to_contain_text("live")
    expect(page.locator("#link")).to_contain_text("connection lost")
    with running_daemon(home, state_directory=state, **settings) as second:
        expect(page.locator("#link")).to_contain_text("live")
        second.put_recipe({"id": "later", "model_path": str(daemon.home / "models" / "tiny-chat.gguf")})
        second.reload()
        expect(page.get_by_role("link", name="later")).to_be_visible()


def test_other_pages(signed_in: Page, daemon: RunningDaemon, shot: Shot) -> None:
    """Usage, keys and settings show what there is."""
    page = signed_in
    daemon.admin.post("keys", body={"name": "laptop", "models": ["tiny"]})
    daemon.ctl("load", "tiny")
    daemon.admin.post("benchmark", query="prompt_tokens=100&max_tokens=16")
    page.get_by_role("link", name="Keys").click()
    expect(page.get_by_role("row", name=re.compile("laptop"))).to_contain_text("tiny")
    daemon.admin.post("keys", body={"name": "phone"})
    expect(page.get_by_role("row", name=re.compile("phone"))).to_contain_text("never")
    shot("keys")
    page.get_by_role("link", name="Settings").click()
    expect(page.get_by_role("row", name=re.compile("idle_timeout"))).to_contain_text("600")
    expect(page.get_by_text("xllamacpp")).to_be_visible()
    page.get_by_role("link", name="Usage").click()
    requests = page.get_by_role("table").get_by_role("row", name=re.compile("^tiny")).get_by_role("cell").first
    expect(requests).to_have_text("1")
    page.wait_for_timeout(6000)  # the metrics are told every five seconds
    daemon.admin.post("benchmark", query="prompt_tokens=100&max_tokens=16")
    expect(requests).to_have_text("2")
    shot("usage")


@pytest.mark.parametrize("place", ["", "model/tiny", "recipe", "recipe/tiny", "try", "usage", "keys", "settings"])
def test_fits_every_screen(signed_in: Page, daemon: RunningDaemon, place: str) -> None:
    """Nothing is wider than the screen, from a phone to a wide one; no cell of the list runs into the next."""
    page = signed_in
    page.goto(f"http://localhost:{daemon.port}/#/{place}")
    page.get_by_role("heading", level=1).wait_for()
    for width in (360, 740, 980, 1280, 2560):
        page.set_viewport_size({"width": width, "height": 740})
        page.wait_for_timeout(300)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        wide = "cells => cells.filter(each => each.scrollWidth > each.clientWidth + 1).map(each => each.outerHTML)"
        assert page.locator(".models td").evaluate_all(wide) == []


@pytest.mark.parametrize("place", ["nowhere", "model/%E0%A4", "model/nobody"])
def test_place_that_is_not_there_is_told(signed_in: Page, daemon: RunningDaemon, place: str) -> None:
    """An old link, or half of one."""
    page = signed_in
    page.goto(f"http://localhost:{daemon.port}/#/{place}")
    expect(page.get_by_role("main")).to_contain_text(re.compile("There is no such (page|model)"))


def test_keyboard_reaches_everything(signed_in: Page, daemon: RunningDaemon) -> None:
    """The first key skips to the content; a model is loaded without a mouse."""
    page = signed_in
    page.get_by_role("button", name="Load Tiny chat").wait_for()
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.get_by_role("button", name="Load Tiny chat").focus()
    page.keyboard.press("Enter")
    expect(row(page, "Tiny chat")).to_contain_text("ready")
    assert daemon.state("tiny") == "ready"


def test_first_paint_is_small(page: Page, daemon: RunningDaemon) -> None:
    """Under 150 kB and under 10 requests until the models are shown."""
    sizes: list[int] = []
    urls: list[str] = []

    def take(url: str, size: int) -> None:
        urls.append(url)
        sizes.append(size)

    page.on("response", lambda answer: take(answer.url, int(answer.headers.get("content-length", "0"))))
    open_page(page, daemon)
    page.get_by_role("link", name="Tiny chat").wait_for()
    assert len(urls) < 10, urls
    assert sum(sizes) < 150_000
    assert all(url.startswith(f"http://localhost:{daemon.port}/") for url in urls)
