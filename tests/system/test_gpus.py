"""Models that share four unequal GPUs: who is placed where, who must go, and that it never comes to too much.

The GPUs are a stub of NVIDIA's library, and llama-server is a program that takes its part of them before it becomes the
real one; see `gpus.py`. `LLMSTUDIO_TEST_GPU_SECONDS` and `LLMSTUDIO_TEST_GPU_SEED` set how long the clients of the
long test ask, and for what.
"""

import asyncio
import json
import os
import random
import re
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from tests.integration.nvml_stub import GIB, uuid

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .daemon import BASE_URL, SERVICE, Daemon, unit_of, wait_until  # noqa: TID252
from .gpus import SERVER, SIZES_GIB, Gpus, Model, Watch, install_gpus, node  # noqa: TID252
from .host import Host  # noqa: TID252

PATIENCE_S = 150.0
STEP = re.compile(r"^(\S+): (\w+) -> (\w+): (.*)$", re.MULTILINE)

# By llmstudiod's count, of what it may use of the GPUs (1.5, 2.5, 3.5 and 5.5 GiB).
ZOO = (
    Model("mouse", 4, 24576),  # 0.7 GiB
    Model("hare", 6, 49152),  # 1.1
    Model("badger", 4, 98304, recipe={"pinned": True}),  # 1.4
    Model("wolf", 12, 65536, recipe={"priority": 10}),  # 2.1
    Model("owl", 10, 81920, recipe={"gpus": ["1"]}),  # 2.2
    Model("bear", 16, 81920, recipe={"tensor_parallel_size": 1}),  # 3.1: only on the larger two
    Model("whale", 16, 131072, recipe={"tensor_parallel_size": 1}),  # 4.6: only on the largest
    Model("herd", 24, 131072),  # 7.3: on two
)


@pytest.fixture(scope="module")
def gpu_host(installed_host: Host, tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The installed host, with four GPUs and a program that uses them."""
    install_gpus(installed_host, tmp_path_factory.mktemp("gpus"))
    return installed_host


@pytest.fixture
def gpus(gpu_host: Host, daemon: Daemon, tmp_path: Path) -> Gpus:
    """The GPUs with nobody on them, and the daemon listening, without models but the small one."""
    daemon.use_settings(llama_server=SERVER, drain_timeout="30s", wait_comment_interval="1s")
    return Gpus(daemon, tmp_path)


@dataclass(frozen=True)
class Answer:
    """What came back for one request: its text, or why there is none."""

    model: str
    text: str
    fault: str
    elapsed_s: float


async def ask(session: aiohttp.ClientSession, model: str, *, is_stream: bool, max_tokens: int) -> Answer:
    """Send a chat and read all of its answer."""
    body = {
        "model": model, "messages": [{"role": "user", "content": "a bird"}], "max_tokens": max_tokens,
        "stream": is_stream,
    }  # fmt: skip
    began = time.monotonic()
    text = fault = ""
    try:
        async with session.post(f"{BASE_URL}/v1/chat/completions", json=body) as response:
            raw = await response.text()
            if response.status != 200:
                fault = f"{response.status}: {raw}"
            elif is_stream:
                text, fault = told_by_stream(raw)
            else:
                text = json.loads(raw)["choices"][0]["message"]["content"] or ""
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError) as error:
        fault = repr(error)
    return Answer(model, text, fault or ("" if text else "no text"), time.monotonic() - began)


def told_by_stream(raw: str) -> tuple[str, str]:
    """Return the text of a stream, and what was wrong with it."""
    events = [line.removeprefix("data: ") for line in raw.splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        return "", f"the stream ends with {raw[-300:]!r}"
    chunks = [json.loads(event) for event in events[:-1]]
    if faults := [chunk for chunk in chunks if "error" in chunk]:
        return "", str(faults[0])
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]), ""


def chat(daemon: Daemon, model: str) -> Answer:
    """Ask one model once."""

    async def once() -> Answer:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as session:
            return await ask(session, model, is_stream=False, max_tokens=4)

    with daemon.host.network():
        return asyncio.run(once())


def refused(daemon: Daemon, model: str) -> dict[str, str]:
    """Ask a model that cannot be served, and return the error of a 503."""
    answer = chat(daemon, model)
    status, _, raw = answer.fault.partition(": ")
    assert status == "503", answer
    error: dict[str, str] = json.loads(raw)["error"]
    return error


def placed(daemon: Daemon, model: str) -> list[int]:
    """Return the GPUs that a unit may use: those whose UUIDs its CUDA sees, and it has no other's device node."""
    shown = daemon.systemctl("show", unit_of(model), "--property=Environment", "--property=DeviceAllow")
    found = re.search(r'CUDA_VISIBLE_DEVICES=([^\s"]*)', shown)
    assert found, shown
    numbers = [number for number in range(len(SIZES_GIB)) if uuid(number) in found[1].split(",")]
    assert ",".join(uuid(number) for number in numbers) == found[1]
    assert set(re.findall(r"/dev/nvidia\d+", shown)) == {node(number) for number in numbers}
    return numbers


def steps(daemon: Daemon, model: str) -> list[tuple[str, ...]]:
    """Return a model's changes of state, by the daemon's journal: from, to, and why."""
    return [found[1:] for found in STEP.findall(daemon.host.journal(SERVICE)) if found[0] == model]


def story(daemon: Daemon, model: str) -> list[tuple[str, ...]]:
    """Return the same as ``llmstudioctl status`` tells it."""
    return [(step["from"], step["to"], step["cause"]) for step in daemon.status(model)["story"]]


def is_eviction(step: Sequence[str]) -> bool:
    """Whether a model was made to go."""
    return step[1] in {"draining", "stopping"} and step[2].startswith("evicted for ")


def test_first_model_of_all_goes_to_a_gpu(gpus: Gpus) -> None:
    """The daemon has only just been started, and has not asked llama-server for its devices before; the tightest."""
    gpus.put(Model("swift", 4, 24576))
    gpus.daemon.listen()
    assert chat(gpus.daemon, "swift").text
    assert placed(gpus.daemon, "swift") == [0]
    assert [each.number for each in gpus.held() if each.is_alive] == [0]


def test_model_that_fits_nowhere_is_refused_with_the_sum(gpus: Gpus) -> None:
    """It says what it needs and what each GPU has, costs nobody his place, and starts nothing."""
    daemon = gpus.daemon
    gpus.put(Model("sparrow", 4, 24576), Model("mountain", 32, 262144))
    daemon.listen()
    assert chat(daemon, "sparrow").text
    error = refused(daemon, "mountain")
    assert error["kind"] == "does_not_fit"
    assert re.search(r"needs 1[67]\.\d GiB .*KV cache 16(\.0)? GiB", error["message"])
    assert all(f"GPU {number}" in error["message"] for number in range(len(SIZES_GIB)))
    assert error["hint"]
    assert daemon.status("sparrow")["state"] == "ready"
    assert daemon.starts_of("mountain") == 0
    assert gpus.refusals == []


def test_other_programs_are_told_and_left_alone(gpus: Gpus) -> None:
    """Their memory is nobody's: a model goes elsewhere, over two GPUs if it may, and is refused if it may not."""
    daemon = gpus.daemon
    gpus.put(
        Model("heron", 16, 130048, recipe={"tensor_parallel_size": 1}),
        Model("stork", 16, 130048),
    )
    daemon.host.run("systemd-run", "--quiet", "--unit=game", "sleep", "infinity")
    pid = daemon.pid("game.service")
    gpus.take(3, pid=pid, size=3 * GIB // 2)
    daemon.listen()
    assert f"sleep, pid {pid}, 1.5 GiB, not ours" in daemon.ctl("gpus")
    error = refused(daemon, "heron")
    assert error["kind"] == "does_not_fit"
    assert re.search(r"GPU 3 has 4(\.0)? GiB free, .*other programs use 1\.5 GiB", error["message"])
    assert chat(daemon, "stork").text
    assert len(placed(daemon, "stork")) > 1
    daemon.systemctl("stop", "game.service")
    assert gpus.refusals == []


def test_model_that_loads_is_not_taken_for_another_program(gpus: Gpus) -> None:
    """Whoever needs its GPU while it loads waits until it has answered, and then takes its place."""
    daemon = gpus.daemon
    only = {"tensor_parallel_size": 1}
    gpus.put(Model("crane", 16, 131072, load_s=4, recipe=only), Model("goose", 15, 131072, recipe=only))
    daemon.listen()

    async def both() -> tuple[Answer, Answer]:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as session:
            first = asyncio.gather(ask(session, "crane", is_stream=False, max_tokens=4))
            async with asyncio.timeout(20):
                while not gpus.held():  # noqa: ASYNC110 - it is another process that does it
                    await asyncio.sleep(0.02)
            second = await ask(session, "goose", is_stream=False, max_tokens=4)
            return (await first)[0], second

    with daemon.host.network():
        answers = asyncio.run(both())
    assert [answer.fault for answer in answers] == ["", ""]
    assert placed(daemon, "goose") == [3]
    assert any(map(is_eviction, story(daemon, "crane")))
    assert gpus.refusals == []


def test_model_that_needs_more_than_was_thought_gets_a_second_try(gpus: Gpus) -> None:
    """llama-server runs out of memory beside an idle model: that one goes, and the client never hears of it."""
    daemon = gpus.daemon
    # By the estimate both fit on GPU 1; really the second one needs nearly all of it.
    only = {"gpus": ["1"]}
    gpus.put(
        Model("finch", 4, 24576, recipe=only),
        Model("cuckoo", 6, 49152, runtime=2171 << 20, recipe=only),
    )
    daemon.listen()
    assert chat(daemon, "finch").text
    answer = chat(daemon, "cuckoo")
    assert answer.text, answer.fault
    assert [line.split()[0] for line in gpus.refusals] == ["cuckoo"]
    assert any(map(is_eviction, story(daemon, "finch")))
    assert any("too small" in cause for *_, cause in story(daemon, "cuckoo"))
    assert placed(daemon, "cuckoo") == [1]


async def client(daemon: Daemon, seed: str, until: float) -> list[Answer]:
    """Ask one model after the other until the time is over."""
    chance, answers = random.Random(seed), []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as session:
        while time.monotonic() < until:
            model = chance.choice(ZOO).id
            is_stream, max_tokens = chance.random() < 0.5, chance.randint(2, 24)
            answers.append(await ask(session, model, is_stream=is_stream, max_tokens=max_tokens))
            await asyncio.sleep(chance.random() / 2)
    return answers


def say(line: str) -> None:
    """Leave a line in the test's output, which pytest shows when it fails."""
    sys.stdout.write(f"{line}\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_models_share_four_gpus(gpus: Gpus) -> None:
    """Several clients, a minute: never too much on a GPU, all are answered, and each eviction can be read."""
    daemon = gpus.daemon
    seconds = float(os.environ.get("LLMSTUDIO_TEST_GPU_SECONDS") or 60)
    seed = os.environ.get("LLMSTUDIO_TEST_GPU_SEED") or secrets.token_hex(4)
    say(f"LLMSTUDIO_TEST_GPU_SEED={seed}")
    gpus.put(*ZOO)
    daemon.listen()
    daemon.ctl("load", "badger")

    async def traffic() -> list[Answer]:
        until = time.monotonic() + seconds
        found = await asyncio.gather(*(client(daemon, f"{seed}-{number}", until) for number in range(6)))
        return [answer for answers in found for answer in answers]

    with Watch(gpus) as watch, daemon.host.network():
        answers = asyncio.run(traffic())
    assert watch.looks > 5 * seconds
    assert watch.over == []
    assert gpus.refusals == []
    assert [answer for answer in answers if answer.fault] == []
    wait_until(lambda: all(daemon.status(model.id)["state"] in {"ready", "stopped"} for model in ZOO))

    told = {model.id: steps(daemon, model.id) for model in ZOO}
    evictions = [(model, step) for model, found in told.items() for step in found if is_eviction(step)]
    slowest = max(answer.elapsed_s for answer in answers)
    say(f"{len(answers)} answers, the slowest after {slowest:.1f} s; {len(evictions)} evictions; {watch.looks} looks")
    say(f"most held, in GiB: {[round(most / GIB, 2) for most in watch.most]}")
    assert len(evictions) >= min(5, seconds / 10)
    assert told["badger"] == story(daemon, "badger")
    assert [new for _, new, _ in told["badger"]] == ["starting", "loading", "ready"]
    for model, found in told.items():
        # Nothing is left out: one step follows the other, each start is told, and so it stands in the status.
        assert [old for old, *_ in found] == ["stopped", *(new for _, new, _ in found[:-1])]
        assert sum(new == "starting" for _, new, _ in found) == daemon.starts_of(model)
        assert story(daemon, model) == found[-64:]

    where = {}
    for each in ZOO:
        assert chat(daemon, each.id).text
        where[each.id] = placed(daemon, each.id)
    say(f"placed: {where}")
    assert (where["badger"], where["owl"], where["whale"]) == ([0], [1], [3])
    assert where["bear"] in ([2], [3])
    assert len(where["herd"]) > 1
    wait_until(lambda: all(each.is_alive for each in gpus.held()))
    assert gpus.refusals == []
