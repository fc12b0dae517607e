"""The scenes of the documents' pictures: a machine with two GPUs and models in every state."""

import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from llmstudiod.demo.tiny_gguf import TinyModel, write_tiny_gguf
from tests.integration.nvml_stub import GIB, gpu
from tests.integration.running_daemon import RunningDaemon, running_daemon, wait_until
from tests.page.conftest import open_page

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

MODELS = {
    "qwen3-8b-q4_k_m": "Qwen3 8B",
    "gemma-3-12b-it-q4_k_m": "Gemma 3 12B",
    "bge-m3-f16": "BGE M3",
    "llama-3.2-3b-q6_k": "Llama 3.2 3B",
    "mistral-small-24b-q4_k_m": "Mistral Small 24B",
}


@pytest.fixture
def machine(stub_gpus: Path) -> Iterator[tuple[RunningDaemon, Path]]:
    """A daemon with five models, one of which has lost its file."""
    home = Path(tempfile.mkdtemp(prefix="machine-"))
    try:
        (home / "models").mkdir()
        (home / "recipes.d").mkdir()
        for number, (model, name) in enumerate(MODELS.items()):
            path = home / "models" / f"{model}.gguf"
            write_tiny_gguf(path, TinyModel(eos_bias=-40, seed=number))
            recipe = {"id": model, "name": name, "model_path": str(path), "max_model_len": 2048, "threads": 1}
            (home / "recipes.d" / f"{model}.json").write_text(json.dumps(recipe))
        (home / "models" / "mistral-small-24b-q4_k_m.gguf").unlink()
        with running_daemon(home) as running:
            yield running, stub_gpus
    finally:
        shutil.rmtree(home, ignore_errors=True)


def test_models_in_every_state(page: Page, machine: tuple[RunningDaemon, Path], shot: Callable[[str], None]) -> None:
    """Ready with what they hold of each GPU, loading with how far, failed with why."""
    daemon, scenario = machine
    up = ["qwen3-8b-q4_k_m", "gemma-3-12b-it-q4_k_m", "bge-m3-f16"]
    for model in up:
        daemon.ctl("load", model)
    pids = [daemon.admin.get("instances", model)["pid"] for model in up]
    held = [(0, pids[0], 6.2), (0, pids[2], 1.4), (1, pids[1], 9.3)]
    told = gpu(0, 24) + gpu(1, 24) + f"used 0 {int(9.1 * GIB)}\nused 1 {int(9.3 * GIB)}\n"
    scenario.write_text(told + "".join(f"proc {at} compute {pid} {int(size * GIB)}\n" for at, pid, size in held))
    daemon.ctl("load", "mistral-small-24b-q4_k_m")
    open_page(page, daemon)
    page.get_by_role("button", name="Load Llama 3.2 3B").click()
    pid = wait_until(lambda: daemon.admin.get("instances", "llama-3.2-3b-q6_k")["pid"])
    os.kill(pid, signal.SIGSTOP)
    try:
        for model in up[:2]:
            daemon.admin.post("benchmark", query=f"model={model}&prompt_tokens=400&max_tokens=64")
        devices = page.get_by_label("Devices")
        expect(devices).to_contain_text("qwen3-8b-q4_k_m 6.2 GiB")
        expect(devices).to_contain_text("gemma-3-12b-it-q4_k_m 9.3 GiB")
        expect(page.get_by_role("progressbar")).to_be_visible()
        row = page.get_by_role("row", name="Qwen3 8B").first
        expect(row).to_contain_text("6.2 GiB GPU")
        expect(row.locator('[data-title="Tokens/s"]')).to_have_text(re.compile(r"\d"))
        expect(row).to_contain_text("expected")
        expect(page.get_by_role("table", name="Models").or_(page.get_by_role("table"))).to_contain_text(
            "does not exist"
        )
        wide = "cells => cells.filter(each => each.scrollWidth > each.clientWidth + 1).map(each => each.outerHTML)"
        for width in (360, 980, 1100, 1280):
            page.set_viewport_size({"width": width, "height": 860})
            page.wait_for_timeout(300)
            assert page.locator(".models td").evaluate_all(wide) == []
        page.evaluate("window.scrollTo(0, 0)")
        shot("models")
    finally:
        os.kill(pid, signal.SIGCONT)
    page.get_by_role("link", name="New recipe").click()
    page.get_by_label("GGUF file").fill(str(daemon.home / "models" / "llama-3.2-3b-q6_k.gguf"))
    page.keyboard.press("Tab")
    page.get_by_label("Id", exact=True).fill("llama-long")
    page.get_by_label("Context", exact=True).fill("999999")
    verdict = page.get_by_label("Preview")
    expect(verdict.locator(".warn").first).to_be_visible()
    shot("recipe")
