"""A benchmark reads and writes as many tokens as it is told, and says what it has measured."""

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from llmstudiod.ctl.client import _UnixConnection
from llmstudiod.demo.tiny_gguf import write_tiny_gguf
from tests.integration.running_daemon import RunningDaemon, running_daemon, wait_until

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    """A daemon whose only model is ready, with little context."""
    home = tmp_path_factory.mktemp("benchmark")
    for name in ("models", "recipes.d"):
        (home / name).mkdir()
    path = home / "models" / "tiny.gguf"
    write_tiny_gguf(path)
    recipe = {"id": "tiny", "model_path": str(path), "max_model_len": 512, "max_num_seqs": 1}
    (home / "recipes.d" / "tiny.json").write_text(json.dumps(recipe))
    with running_daemon(home, state_directory=home) as running:
        running.admin.post("launch", "tiny")
        yield running


def ask(daemon: RunningDaemon, method: str, path: str) -> tuple[int, Any]:
    """Return status and value of an answer."""
    connection: http.client.HTTPConnection = _UnixConnection(daemon.admin.socket_path, 60)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("query", "n_read", "n_written"),
    [("?prompt_tokens=60&max_tokens=20", 60, 20), ("?prompt_tokens=1&max_tokens=2", 1, 2), ("", 412, 100)],
)
def test_as_many_tokens_as_are_wanted(daemon: RunningDaemon, query: str, n_read: int, n_written: int) -> None:
    """Whatever the model makes of a word; told nothing, as many as fit."""
    status, answer = ask(daemon, "POST", f"/benchmark{query}")
    measured = answer["benchmark"]
    assert (status, measured["prompt_tokens"], measured["completion_tokens"]) == (200, n_read, n_written)
    assert 0 < measured["generation_tps"] < 500_000


def test_speed_of_one_token_is_not_told(daemon: RunningDaemon) -> None:
    """The clock begins with it."""
    status, answer = ask(daemon, "POST", "/benchmark?prompt_tokens=5&max_tokens=1")
    assert (status, answer["benchmark"]["completion_tokens"], answer["benchmark"]["generation_tps"]) == (200, 1, None)


@pytest.mark.parametrize("query", ["prompt_tokens=500&max_tokens=100", "prompt_tokens=100000", "max_tokens=512"])
def test_more_than_fits_is_refused(daemon: RunningDaemon, query: str) -> None:
    """With the numbers."""
    status, answer = ask(daemon, "POST", f"/benchmark?{query}")
    assert (status, answer["kind"], "512" in answer["detail"]) == (400, "bad_request", True), answer


def test_figures_outlive_the_recipe(daemon: RunningDaemon) -> None:
    """As they do in the list of all; a name without either is unknown."""
    ask(daemon, "POST", "/benchmark?prompt_tokens=300&max_tokens=60")
    assert wait_until(lambda: ask(daemon, "GET", "/peak-metrics")[1]["metrics"])[0]["model_id"] == "tiny"
    (daemon.home / "recipes.d" / "tiny.json").unlink()
    (daemon.home / "models" / "tiny.gguf").unlink()
    daemon.reload()
    assert ask(daemon, "GET", "/recipes")[1] == []
    status, answer = ask(daemon, "GET", "/peak-metrics?model_id=tiny")
    assert (status, answer.get("model_id")) == (200, "tiny")
    assert ask(daemon, "GET", "/peak-metrics?model_id=nobody")[0] == 404
