"""Kept connections to a real llama-server, which closes them after 5 s of rest or 100 requests."""

import asyncio

import aiohttp
import pytest

from llmstudiod.demo.tiny_gguf import write_tiny_gguf

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .daemon import BASE_URL, MODELS, Daemon  # noqa: TID252
from .host import Host  # noqa: TID252

REQUESTS = 10_000
CLIENTS = 8


@pytest.mark.slow
def test_ten_thousand_requests_without_one_error(installed_host: Host, tmp_path: object) -> None:
    """Every request is answered, though the upstream has closed some hundred connections meanwhile."""
    daemon = Daemon(installed_host)
    daemon.reset()
    write_tiny_gguf(daemon.host.path(f"{MODELS}/tiny.gguf"))
    daemon.listen()
    with daemon.host.network():
        failures = asyncio.run(_ask_all())
    assert not failures
    assert daemon.starts_of("tiny") == 1


async def _ask_all() -> list[str]:
    """Send all requests from some clients, with a rest now and then; return what went wrong."""
    failures: list[str] = []
    body = {"model": "tiny", "content": "Hello"}

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        for index in range(REQUESTS // CLIENTS):
            async with session.post(f"{BASE_URL}/tokenize", json=body) as answer:
                if answer.status != 200:
                    failures.append(f"{answer.status}: {await answer.text()}")
                else:
                    await answer.read()
            # Around the upstream's own limit of rest, where a race between its close and our request would show.
            if index % 400 == 399:
                await asyncio.sleep(4.8 + 0.1 * number / CLIENTS)

    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session,
        asyncio.timeout(300),
        asyncio.TaskGroup() as clients,
    ):
        for number in range(CLIENTS):
            clients.create_task(client(session, number))
    return failures
