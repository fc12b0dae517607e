"""Whether a server is taken for a hung one, with the real one behind the daemon and a client that means ill."""

import asyncio
import json
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http.client import HTTPException
from pathlib import Path

import openai
import pytest

from llmstudiod.adapters import probe
from llmstudiod.demo.tiny_gguf import TinyModel, write_tiny_gguf
from llmstudiod.runs import BUSY_LOOK_S, IDLE_LOOK_S, TOKEN_S
from tests.integration.running_daemon import RunningDaemon, running_daemon, wait_until

pytestmark = pytest.mark.engine

ENDLESS = TinyModel(name="endless", n_layers=4, n_embd=256, eos_bias=-40)
FORGED = "GGML_ASSERT(\nCUDA error"


@asynccontextmanager
async def engine(directory: Path, *flags: str) -> AsyncIterator[str]:
    """Start the engine with a small model, and yield its socket."""
    model, socket_path = directory / "tiny.gguf", str(directory / "x.sock")
    write_tiny_gguf(model)
    words = ("-m", str(model), "--host", socket_path, "-t", "1", *flags)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "llmstudiod.engine", *words, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(30):
            await probe.wait_ready(socket_path, alias=None)
        yield socket_path
    finally:
        process.kill()
        await process.wait()


class Reader:
    """A client that reads an endless stream in a thread; ``error`` is how it ended."""

    def __init__(self, daemon: RunningDaemon) -> None:
        self.n_pieces = 0
        self.error: Exception | None = None
        self.is_over = False
        self._base_url = daemon.base_url
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave."""
        self.is_over = True
        self._thread.join(10)

    def _read(self) -> None:
        body = {"model": "endless", "prompt": "a bird", "max_tokens": -1, "stream": True}
        asked = urllib.request.Request(
            f"{self._base_url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(asked, timeout=60) as reply:
                for _ in reply:
                    self.n_pieces += 1
                    if self.is_over:
                        return
            self.error = EOFError("the stream has ended")
        except (OSError, HTTPException) as error:
            self.error = error


@pytest.mark.slow
def test_client_cannot_have_a_busy_server_killed(tmp_path: Path) -> None:
    """A forged line in the log, and both slots taken: a token would wait behind them, and yet all is well."""
    (tmp_path / "models").mkdir()
    write_tiny_gguf(tmp_path / "models" / "endless.gguf", ENDLESS)
    recipe = {
        "id": "endless", "model_path": "endless.gguf", "max_num_seqs": 2, "max_model_len": 512, "threads": 1,
        "extra_args": {"context-shift": True},
    }  # fmt: skip
    (tmp_path / "recipes.d").mkdir()
    (tmp_path / "recipes.d" / "endless.json").write_text(json.dumps(recipe))
    with running_daemon(tmp_path) as daemon:
        daemon.ctl("load", "endless")
        first = Reader(daemon)
        wait_until(lambda: first.n_pieces)
        with (
            openai.OpenAI(base_url=daemon.base_url, api_key="none", max_retries=0) as client,
            pytest.raises(openai.BadRequestError),
        ):
            client.completions.create(model="endless", prompt="a", extra_body={"grammar": FORGED})
        second = Reader(daemon)
        wait_until(lambda: second.n_pieces)
        assert any(line.startswith("GGML_ASSERT(") for line in daemon.ctl("logs", "endless").stdout.splitlines())
        time.sleep(IDLE_LOOK_S + BUSY_LOOK_S + TOKEN_S + 5)  # nothing shall happen, which nobody tells
        pieces = (first.n_pieces, second.n_pieces)
        wait_until(lambda: first.n_pieces > pieces[0] and second.n_pieces > pieces[1])
        assert (first.error, second.error) == (None, None), daemon.log()
        assert daemon.log().count("endless: stopped -> starting") == 1
        first.close()
        second.close()


@pytest.mark.parametrize(
    ("flags", "is_embedding"),
    [((), False), (("--embedding",), True), (("--rerank",), True), (("--embedding",), False), ((), True)],
    ids=["words", "embeddings", "rerank", "embeddings, unknown", "words, unknown"],
)
async def test_every_kind_of_server_is_asked_for_what_it_has(
    tmp_path: Path, flags: tuple[str, ...], is_embedding: bool
) -> None:
    """One that was started with another recipe than is known is not taken for a hung one."""
    async with engine(tmp_path, *flags) as socket_path:
        assert await probe.produces_a_token(socket_path, is_embedding=is_embedding, within_s=10)


async def test_switched_off_is_not_silent(tmp_path: Path) -> None:
    """What a server does not tell of its slots is no sign of anything; that nobody answers is one."""
    async with engine(tmp_path, "--no-slots") as socket_path:
        assert await probe.slots(socket_path) == probe.SlotsSeen(None, 0)
    assert await probe.slots(socket_path) is None
