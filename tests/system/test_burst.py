"""A burst of first requests to a model that takes its time to load, and what people do while they wait.

The model is written once and kept beside the base trees: 2.5 GB.
"""

import asyncio
import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from llmstudiod.demo.tiny_gguf import write_big_gguf

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .conftest import give_up  # noqa: TID252
from .daemon import BASE_URL, MODELS, Daemon, unit_of, wait_until  # noqa: TID252
from .host import state_dir  # noqa: TID252

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SIZE_BYTES = 2_500_000_000
UNIT = unit_of("big")
RECIPE = {
    "id": "big", "model_path": f"{MODELS}/big.gguf", "load_mode": "none", "max_model_len": 256, "max_num_seqs": 8,
    "cache_ram": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def big_gguf() -> Path:
    """The big model, written if it is not there yet."""
    path = state_dir() / f"big-{SIZE_BYTES}.gguf"
    if not path.exists():
        state_dir().mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(state_dir()).free < 2 * SIZE_BYTES:
            give_up(f"{state_dir()} has less than {2 * SIZE_BYTES / 1e9:.0f} GB free")
        write_big_gguf(path, size_bytes=SIZE_BYTES)
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 1.5 * SIZE_BYTES:
        give_up("less than 4 GB of memory are free")
    return path


@pytest.fixture
def loading(daemon: Daemon, big_gguf: Path) -> Iterator[Daemon]:
    """The daemon, listening, with the big model that nobody has asked for yet."""
    daemon.host.bind(big_gguf, f"{MODELS}/big.gguf")
    daemon.put_recipe(RECIPE)
    daemon.listen()
    yield daemon
    daemon.ctl("unload", "--force", "big")
    daemon.host.run("umount", f"{MODELS}/big.gguf")


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    status: int
    text: str
    first_byte_s: float
    elapsed_s: float

    @property
    def comments(self) -> list[str]:
        """The lines that only say that the server is still there."""
        return [line for line in self.text.splitlines() if line.startswith(": ")]


async def ask(session: aiohttp.ClientSession, *, is_stream: bool) -> Answer:
    """Send one request, as small as can be, and read all of its answer."""
    body = {"model": "big", "prompt": "a", "max_tokens": 1, "stream": is_stream}
    began = time.monotonic()
    async with session.post(f"{BASE_URL}/v1/completions", json=body) as response:
        first_byte_s = time.monotonic() - began
        text = await response.text()
        return Answer(response.status, text, first_byte_s, time.monotonic() - began)


async def test_fifty_first_requests_share_one_load(loading: Daemon) -> None:
    """One unit is started, streams hear that they wait, and every one of the fifty is answered."""
    starts = loading.starts_of("big")
    with loading.host.network():
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            answers = await asyncio.gather(*(ask(session, is_stream=number % 2 == 0) for number in range(50)))
    assert {answer.status for answer in answers} == {200}
    for number, answer in enumerate(answers):
        if number % 2 == 0:
            assert answer.comments
            assert answer.comments[0].startswith(": loading big")
            assert answer.first_byte_s < 4  # wait_comment_interval, and a busy machine
            assert answer.text.rstrip().endswith("data: [DONE]"), answer.text[-200:]
            assert '"finish_reason":"length"' in answer.text
        else:
            assert json.loads(answer.text)["usage"]["completion_tokens"] == 1
    assert loading.starts_of("big") == starts + 1
    assert loading.status("big")["state"] == "ready"


def open_stream(daemon: Daemon) -> threading.Thread:
    """Begin a streaming request in the background; it reads until the first comment and then leaves."""

    async def leave() -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            body = {"model": "big", "prompt": "a", "max_tokens": 1, "stream": True}
            async with session.post(f"{BASE_URL}/v1/completions", json=body) as response:
                line = await response.content.readline()
                assert line.startswith(b": loading big"), line

    def run() -> None:
        with daemon.host.network():
            asyncio.run(leave())

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_client_that_leaves_does_not_disturb_the_load(loading: Daemon) -> None:
    """Its place is given back, other models answer meanwhile, and the model becomes ready for the next one."""
    leaver = open_stream(loading)
    leaver.join(timeout=30)
    assert not leaver.is_alive()
    assert loading.status("big")["state"] in {"starting", "loading"}
    assert loading.chat("tiny")
    wait_until(lambda: loading.status("big")["state"] == "ready", timeout_s=60)
    assert loading.status("big")["in_flight"] == 0
    assert loading.status("big")["queued"] == 0


def test_forced_unload_answers_those_who_wait(loading: Daemon) -> None:
    """Who waits for the load is told that it was unloaded, at once; no unit is left."""
    answers: list[Answer] = []

    async def wait_for_it(is_stream: bool) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            answers.append(await ask(session, is_stream=is_stream))

    def run(is_stream: bool) -> None:
        with loading.host.network():
            asyncio.run(wait_for_it(is_stream))

    waiters = [threading.Thread(target=run, args=(is_stream,)) for is_stream in (True, False)]
    for waiter in waiters:
        waiter.start()
    wait_until(lambda: loading.status("big")["state"] == "loading")
    began = time.monotonic()
    loading.ctl("unload", "--force", "big")
    for waiter in waiters:
        waiter.join(timeout=10)
    assert time.monotonic() - began < 5
    assert len(answers) == 2
    assert all("'big' was unloaded on request" in answer.text for answer in answers), answers
    assert [unit for unit in loading.model_units() if UNIT in unit] == []


@contextlib.contextmanager
def halting(daemon: Daemon) -> Iterator[None]:
    """Let the big model's server run a part of the time only: then its load takes seconds on any machine."""
    is_over = threading.Event()

    def halt() -> None:
        while not is_over.is_set():
            for signal, pause_s in (("STOP", 0.3), ("CONT", 0.05)):
                daemon.systemctl("kill", f"--signal={signal}", UNIT, check=False)
                is_over.wait(pause_s)
        daemon.systemctl("kill", "--signal=CONT", UNIT, check=False)

    thread = threading.Thread(target=halt)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def test_progress_of_a_load_is_told(loading: Daemon) -> None:
    """What is in memory of the file and what the log says make a share that only grows, and ends at one."""
    watching = loading.host.popen("llmstudioctl", "watch", "--json", stdout=-1)
    try:
        assert watching.stdout is not None
        events = (json.loads(line) for line in watching.stdout)
        next(events)
        with halting(loading):
            loading.ctl("load", "big")
        shares: list[float] = []
        for event in events:
            told = event["data"]
            if told.get("recipe_id") == "big" and told.get("progress"):
                shares.append(told["progress"])
            if told.get("to") == "ready":
                break
    finally:
        watching.kill()
    assert shares == sorted(shares)
    assert len({share for share in shares if 0.05 < share < 1}) >= 2, shares
