"""What the page costs a browser: 200 recipes, 20 models that answer requests, for as long as it is watched.

Debian's chromium before the real daemon with the embedded engine. Printed are the first paint's requests and bytes,
and the tasks of the main thread: how many lasted over 50 ms, the longest, and the share of the time that it was busy.
The daemon and its models give way to the browser, which in life has a processor of its own.

    python benchmarks/bench_page.py [--seconds 30] [--recipes 200] [--models 20]
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from llmstudiod.demo.tiny_gguf import TinyModel, write_tiny_gguf

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.integration.running_daemon import RunningDaemon, running_daemon

WATCH = """
window.longTasks = [];
new PerformanceObserver((list) => { for (const each of list.getEntries()) window.longTasks.push(each.duration); })
  .observe({ type: "longtask", buffered: true });
"""
PAUSE_S = 2.0


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--recipes", type=int, default=200)
    parser.add_argument("--models", type=int, default=20)
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("there is no chromium on this machine: apt-get install chromium", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="page-") as directory, sync_playwright() as playwright:
        home = Path(directory)
        _write_recipes(home, arguments.recipes)
        with running_daemon(home, max_instances=arguments.models, idle_timeout=0) as daemon:
            os.setpriority(os.PRIO_PROCESS, daemon.process.pid, 10)
            names = [f"model-{number}" for number in range(arguments.models)]
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda name: daemon.admin.post("launch", name), names))
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            is_over = threading.Event()
            clients = [threading.Thread(target=_ask, args=(daemon, name, is_over)) for name in names]
            for client in clients:
                client.start()
            try:
                page = browser.new_page(viewport={"width": 1280, "height": 900})
                page.add_init_script(WATCH)
                for place in ("", "model/model-0", "usage"):
                    _report(page, daemon, place, arguments.seconds)
            finally:
                is_over.set()
                for client in clients:
                    client.join()
                browser.close()
    return 0


def _write_recipes(home: Path, number: int) -> None:
    (home / "models").mkdir()
    (home / "recipes.d").mkdir()
    gguf = home / "tiny.gguf"
    write_tiny_gguf(gguf, TinyModel(eos_bias=-40))
    for each in range(number):
        recipe = {"id": f"model-{each}", "name": f"Model {each}", "model_path": str(gguf), "max_model_len": 512}
        more = {"threads": 1, "max_num_seqs": 1, "cache_ram": 0}
        (home / "recipes.d" / f"model-{each}.json").write_text(json.dumps(recipe | more))


def _ask(daemon: RunningDaemon, model: str, is_over: threading.Event) -> None:
    """Chat again and again, with a pause."""
    body = {"model": model, "max_tokens": 32, "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    headers = {"Content-Type": "application/json"}
    while not is_over.is_set():
        request = urllib.request.Request(f"{daemon.base_url}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            answer.read()
        is_over.wait(PAUSE_S)


def _report(page: Page, daemon: RunningDaemon, place: str, seconds: float) -> None:
    """Open a place anew, watch it for a while, and print what that took."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    session.send("Network.enable")
    packed: dict[str, bool] = {}
    sizes: Counter[str] = Counter()

    def began_to_answer(told: dict[str, Any]) -> None:
        packed[told["requestId"]] = "content-encoding" in told["response"]["headers"]

    def received(told: dict[str, Any]) -> None:
        request = told["requestId"]
        sizes[request] += told["encodedDataLength" if packed[request] else "dataLength"]

    session.on("Network.responseReceived", began_to_answer)
    session.on("Network.dataReceived", received)
    if not place:
        page.goto(daemon.admin.post("web", "code")["urls"][0])
    else:
        page.goto("about:blank")
        page.goto(f"http://localhost:{daemon.port}/#/{place}")
    page.get_by_role("heading", level=1).wait_for()
    page.wait_for_timeout(300)
    session.send("Network.disable")
    size = sizes.total()
    before, began = _metrics(session), time.monotonic()
    page.wait_for_timeout(seconds * 1000)
    after, lasted = _metrics(session), time.monotonic() - began
    tasks: list[float] = page.evaluate("window.longTasks")
    busy = (after["TaskDuration"] - before["TaskDuration"]) / lasted
    longest, heap = max(tasks, default=0), after["JSHeapUsedSize"] / 1e6
    print(f"{place or 'overview':14} first paint {len(packed):2} requests, {size / 1000:5.1f} kB;", end=" ")
    print(f"{lasted:.0f} s: main thread busy {busy:.1%}, tasks over 50 ms {len(tasks)},", end=" ")
    print(f"the longest {longest:.0f} ms; heap {heap:.1f} MB", flush=True)


def _metrics(session: Any) -> dict[str, float]:  # noqa: ANN401 - playwright does not export its type
    return {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}


if __name__ == "__main__":
    sys.exit(main())
