"""A real browser before the real daemon with the embedded engine. Nothing may be complained about in its console."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

from llmstudiod.demo.tiny_gguf import TinyModel, write_tiny_gguf
from tests.integration.nvml_stub import build_library, gpu
from tests.integration.running_daemon import RunningDaemon, running_daemon

expect.set_options(timeout=15_000)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHOTS = Path(os.environ.get("LLMSTUDIO_SCREENSHOTS", Path(__file__).parents[2] / ".screenshots"))
# What a browser says when the daemon is restarted under it, or refuses what the test wants refused.
EXPECTED = ("net::ERR_", "Failed to load resource: the server responded with a status of")


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Debian's chromium, headless. Not for the session: playwright keeps an event loop running in this thread."""
    if CHROMIUM is None:
        if os.environ.get("LLMSTUDIO_TEST_REQUIRE_ALL"):
            pytest.fail("there is no chromium on this machine: apt-get install chromium")
        pytest.skip("there is no chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def stub_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """NVIDIA GPUs that there are not: the file that says which. To be asked for before `daemon`."""
    library = tmp_path / "nvml"
    library.mkdir()
    scenario = library / "scenario"
    scenario.write_text(gpu(0, 24))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(build_library(library)))
    monkeypatch.setenv("STUB_NVML", str(scenario))
    return scenario


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    """A daemon with a model that has a recipe, one that has none, and one whose file is missing."""
    (tmp_path / "models").mkdir()
    for name in ("tiny-chat", "spare-1b-f16"):
        write_tiny_gguf(tmp_path / "models" / f"{name}.gguf", TinyModel(eos_bias=-40))
    with running_daemon(tmp_path, keys_file=str(tmp_path / "keys")) as running:
        path = str(tmp_path / "models" / "tiny-chat.gguf")
        running.put_recipe({"id": "tiny", "name": "Tiny chat", "model_path": path, "max_model_len": 1024})
        running.put_recipe({"id": "gone", "model_path": str(tmp_path / "models" / "gone.gguf")})
        running.reload()
        yield running


@pytest.fixture
def endless(daemon: RunningDaemon) -> str:
    """A model, which is not loaded, that goes on for half a minute if it may."""
    path = daemon.home / "models" / "endless.gguf"
    write_tiny_gguf(path, TinyModel(name="endless", n_layers=8, n_embd=256, context_length=16384, eos_bias=-40))
    daemon.put_recipe({"id": "endless", "model_path": str(path), "max_model_len": 16384, "max_num_seqs": 1})
    daemon.reload()
    return "endless"


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser that knows nothing yet."""
    context = browser.new_context(viewport={"width": 1280, "height": 860}, color_scheme="light")
    context.set_default_timeout(20_000)
    yield context
    context.close()


def complaints_of(page: Page) -> list[str]:
    """Return the list into which errors of scripts, and what the console says of policies and errors, will come."""
    found: list[str] = []

    def take(message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"} and not any(words in message.text for words in EXPECTED):
            found.append(message.text)

    page.on("console", take)
    page.on("pageerror", lambda error: found.append(str(error)))
    return found


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A tab; the test fails if anything was complained about in it."""
    page = context.new_page()
    complaints = complaints_of(page)
    yield page
    assert complaints == []


def open_page(page: Page, daemon: RunningDaemon, place: str = "") -> None:
    """Sign in with a code, and go to a place."""
    page.goto(daemon.admin.post("web", "code")["urls"][0])
    page.get_by_role("heading", name="Models", level=1).wait_for()
    if place:
        page.goto(f"http://localhost:{daemon.port}/#/{place}")


@pytest.fixture
def signed_in(page: Page, daemon: RunningDaemon) -> Page:
    """A tab at the list of models."""
    open_page(page, daemon)
    return page


@pytest.fixture
def shot(page: Page) -> Callable[[str], None]:
    """Keeps a picture of the tab."""
    SHOTS.mkdir(parents=True, exist_ok=True)

    def keep(name: str) -> None:
        page.screenshot(path=SHOTS / f"{name}.png", full_page=True)

    return keep
