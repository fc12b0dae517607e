"""The embedded engine as a caller sees it: a process, a Unix socket, messages and exit statuses."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp
import pytest

from llmstudiod.demo.tiny_gguf import Fault, TinyModel, write_tiny_gguf
from llmstudiod.engine.__main__ import make_params
from llmstudiod.engine.command_line import ArgumentError, accepted_flags, parse_command_line
from llmstudiod.engine.flags import FLAGS, Flag

xllamacpp = pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.engine

_DEADLINE_S = 30.0
_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of the default tiny model."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmstudiod.engine", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False, env=_ENVIRONMENT)


@contextmanager
def _started(log: Path, *arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "llmstudiod.engine", *map(str, arguments)]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, env=_ENVIRONMENT) as process:
        try:
            yield process
        finally:
            process.kill()


@asynccontextmanager
async def _ready(
    directory: Path, *arguments: str | Path
) -> AsyncIterator[tuple[aiohttp.ClientSession, subprocess.Popen[bytes]]]:
    """Start the engine on a socket in the directory and wait until it is ready."""
    socket = directory / "x.sock"
    with _started(directory / "log", *arguments, "--host", socket, "-t", "1") as process:
        connector = aiohttp.UnixConnector(path=str(socket))
        async with aiohttp.ClientSession("http://engine", connector=connector) as session:
            await _until(lambda: _is_healthy(session), process)
            yield session, process


async def _until(check: Callable[[], Awaitable[bool]], process: subprocess.Popen[bytes]) -> None:
    async with asyncio.timeout(_DEADLINE_S):
        while not await check():
            assert process.poll() is None, "the engine exited early; its log is in the test's directory"
            await asyncio.sleep(0.02)


async def _is_healthy(session: aiohttp.ClientSession) -> bool:
    try:
        async with session.get("/health") as response:
            return response.status == 200
    except aiohttp.ClientConnectionError:
        return False


async def _is_busy(session: aiohttp.ClientSession) -> bool:
    slots = await (await session.get("/slots")).json()
    return any(slot["is_processing"] for slot in slots)


async def test_defaults_are_those_of_llama_server(model: Path, tmp_path: Path) -> None:
    """Without flags there are four slots that share the whole context, the slots endpoint, and no metrics."""
    async with _ready(tmp_path, "-m", model) as (session, _):
        props = await (await session.get("/props")).json()
        assert props["total_slots"] == 4
        assert props["default_generation_settings"]["n_ctx"] == 2048
        assert props["model_path"] == str(model)
        assert (props["endpoint_slots"], props["endpoint_metrics"]) == (True, False)


async def test_flags_reach_the_server(model: Path, tmp_path: Path) -> None:
    """Slots, context, alias, metrics and sampling are as asked for."""
    flags = "-c 1024 -np 2 -a pet --metrics --no-slots --temp 0.5 --spec-type ngram-simple -ts 1,2 -fitt 64"
    async with _ready(tmp_path, "-m", model, *flags.split()) as (session, _):
        props = await (await session.get("/props")).json()
        settings = props["default_generation_settings"]
        assert (props["total_slots"], settings["n_ctx"], props["model_alias"]) == (2, 512, "pet")
        assert settings["params"]["temperature"] == 0.5
        assert "llamacpp:requests_processing" in await (await session.get("/metrics")).text()
        assert (await session.get("/slots")).status == 501


async def test_chat_answers_with_words_and_stops(model: Path, tmp_path: Path) -> None:
    """A reply is words of the vocabulary, ended by the model itself, plain and as a stream."""
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2000, "seed": 1}
    async with _ready(tmp_path, "-m", model) as (session, _):
        reply = await (await session.post("/v1/chat/completions", json=body)).json()
        choice = reply["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert re.fullmatch(r"( [a-z]+)+", choice["message"]["content"])

        lines = (await (await session.post("/v1/chat/completions", json={**body, "stream": True})).text()).split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]
        assert re.fullmatch(r"( [a-z]+)+", "".join(chunk["delta"].get("content") or "" for chunk in chunks))
        assert chunks[-1]["finish_reason"] == "stop"


async def test_embeddings(model: Path, tmp_path: Path) -> None:
    """With ``--embedding --pooling mean`` each text gets a vector of the model's width, a different one each."""
    async with _ready(tmp_path, "-m", model, "--embedding", "--pooling", "mean") as (session, _):
        reply = await (await session.post("/v1/embeddings", json={"input": ["one", "two"]})).json()
        first, second = (item["embedding"] for item in reply["data"])
        assert len(first) == 64
        assert first != second


async def test_api_key_from_the_environment(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in llama-server, LLAMA_API_KEY is the key, which a command line would show to everybody."""
    monkeypatch.setitem(_ENVIRONMENT, "LLAMA_API_KEY", "secret")
    async with _ready(tmp_path, "-m", model) as (session, _):
        assert (await session.get("/props")).status == 401
        assert (await session.get("/props", headers={"Authorization": "Bearer secret"})).status == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_stops_at_once_even_with_a_request_in_flight(
    model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """The exit status is 0 within two seconds, though a client waits for a reply that has no end."""
    endless = {"prompt": "x", "ignore_eos": True, "n_predict": -1}
    async with _ready(tmp_path, "-m", model) as (session, process), asyncio.TaskGroup() as tasks:
        request = tasks.create_task(_lost(session, endless))
        await _until(lambda: _is_busy(session), process)
        started = time.monotonic()
        process.send_signal(number)
        assert await asyncio.to_thread(process.wait, _DEADLINE_S) == 0
        assert time.monotonic() - started < 2
        await request


async def _lost(session: aiohttp.ClientSession, body: dict[str, object]) -> None:
    with pytest.raises(aiohttp.ClientConnectionError):
        await session.post("/completion", json=body)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault.MISSING_KEY, "key not found in model: llama.block_count"),
        (Fault.MISSING_TENSOR, "'blk.0.ffn_down.weight' not found"),
        (Fault.WRONG_SHAPE, "'blk.0.attn_q.weight' has wrong shape"),
        (Fault.UNKNOWN_ARCHITECTURE, "unknown model architecture: 'nosuch'"),
        (Fault.TRUNCATED, "data is not within the file bounds"),
    ],
)
def test_broken_model(tmp_path: Path, fault: Fault, reason: str) -> None:
    """A file that cannot be loaded gives llama.cpp's reason, then one last line, and exit status 1."""
    write_tiny_gguf(tmp_path / "m.gguf", TinyModel(fault=fault))
    result = _run("-m", tmp_path / "m.gguf", "--host", tmp_path / "x.sock")
    assert result.returncode == 1
    assert reason in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"error: cannot serve '{tmp_path / 'm.gguf'}'")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--bogus", "error: invalid argument: --bogus"),
        ("stray", "error: invalid argument: stray"),
        ("-c 4k", "error while handling argument \"-c\": expected a whole number, found '4k'"),
        ("-c -5", 'error while handling argument "-c": expected a number from 0'),
        ("-c", 'error while handling argument "-c": expected value for argument'),
        ("--port 70000", 'error while handling argument "--port": expected a number from 0 to 65535'),
        ("-np 0", 'error while handling argument "-np": error: invalid value for n_parallel'),
        ("-fa maybe", "error while handling argument \"-fa\": error: unknown value for --flash-attn: 'maybe'"),
        ("-ctk q9", 'error while handling argument "-ctk": Unsupported cache type: q9'),
        ("-sm foo", 'error while handling argument "-sm": invalid value'),
        ("--device CUDA0", 'error while handling argument "--device": invalid device: CUDA0'),
        ("--temp hot", 'error while handling argument "--temp": expected a number'),
        ("--api-key-file /nosuch", "error: failed to open file '/nosuch'"),
        ("--chat-template-kwargs {", 'error while handling argument "--chat-template-kwargs": '),
    ],
)
def test_wrong_arguments(arguments: str, message: str) -> None:
    """A flag that is wrong is told in llama-server's words."""
    with pytest.raises(ArgumentError, match=re.escape(message)):
        parse_command_line([*arguments.split(), "--version"] if arguments != "-c" else ["-c"])


def test_wrong_argument_exits_with_1() -> None:
    """The message alone is on stderr, and the exit status is 1."""
    result = _run("-np", "x", "--version")
    expected = "error while handling argument \"-np\": expected a whole number, found 'x'\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", expected)


def test_version_last_validates_the_rest() -> None:
    """With ``--version`` at the end the arguments are checked and nothing is loaded."""
    result = _run("-m", "nosuch.gguf", "-c", "4096", "--chat_template", "x", "--version")
    assert result.returncode == 0
    assert re.fullmatch(r"version: xllamacpp [\d.]+\n", result.stdout)


def test_model_is_needed() -> None:
    """Without ``-m`` llama-server becomes a router; the engine says what is missing."""
    result = _run("-c", "512")
    assert (result.returncode, result.stderr) == (1, "error: no model: give its GGUF file with -m FILE\n")


def test_missing_package_is_told_with_the_next_step() -> None:
    """Where xllamacpp is not installed, one line says how to install it."""
    program = "import sys; sys.modules['xllamacpp'] = None; from llmstudiod.engine.__main__ import main; "
    command = [sys.executable, "-c", program + "sys.exit(main(['-m', 'x.gguf']))"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    expected = "error: the embedded engine needs the package xllamacpp: pip install 'llmstudiod[engine]'\n"
    assert (result.returncode, result.stderr) == (1, expected)


def test_queries() -> None:
    """``--list-devices``, ``--completion-bash`` and ``--help`` answer in llama-server's form."""
    assert _run("--list-devices").stdout == "Available devices:\n  (none)\n"
    options = re.search(r'^ {4}opts="(.*) "$', _run("--completion-bash").stdout, re.MULTILINE)
    assert options is not None
    assert options.group(1).split() == accepted_flags()
    assert "--ctx-size" in _run("--help").stdout


def test_spellings_are_unique() -> None:
    """No spelling belongs to two flags."""
    names = [name for flag in FLAGS for name in (*flag.names, *flag.off_names)]
    assert len(names) == len(set(names))


def test_repeated_flags() -> None:
    """LoRA adapters, template values and overrides add up; of other flags the last counts."""
    line = '--lora a,b --lora-scaled c:0.5 -ncmoe 2 -ot x=CPU --reasoning off --chat-template-kwargs {"k":1}'
    settings = parse_command_line(f"{line} -c 1 -c 2 --no-jinja --jinja".split()).settings
    assert [(item.path, item.scale) for item in settings["lora_adapters"]] == [("a", 1.0), ("b", 1.0), ("c", 0.5)]
    assert len(settings["tensor_buft_overrides"]) == 3
    assert settings["default_template_kwargs"] == {"enable_thinking": "false", "k": "1"}
    assert (settings["n_ctx"], settings["use_jinja"]) == (2, True)


_VALUES = ("1", "0.5", "none", "on", "mean", "f16", "layer", "draft-simple", "distribute", "x=CPU", "linear", "{}")


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: str(flag.names[-1]))
def test_every_flag_is_something_that_xllamacpp_takes(flag: Flag, tmp_path: Path) -> None:
    """Each line of the table names attributes that exist, with values of their type."""
    (tmp_path / "f").write_text("x")
    lines = [[name] for name in flag.names + flag.off_names]
    if flag.read is not None:
        values = (*_VALUES, str(tmp_path), str(tmp_path / "f"), "a:1")
        lines = [[flag.names[0], value] for value in values if _is_accepted(flag, value)]
    assert lines
    for line in lines:
        make_params(xllamacpp, parse_command_line(line).settings)


def _is_accepted(flag: Flag, value: str) -> bool:
    assert flag.read is not None
    try:
        flag.read(value)
    except ValueError:
        return False
    return True
