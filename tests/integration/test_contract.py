"""Clients written for vllm-studio's controller go on working: each recorded exchange, by each field's name and type."""

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmstudiod.ctl.client import _UnixConnection
from llmstudiod.demo.tiny_gguf import write_tiny_gguf
from tests.integration.running_daemon import RunningDaemon, running_daemon, wait_until

EXCHANGES = yaml.safe_load((Path(__file__).parents[1] / "data" / "vllm-studio-exchanges.yaml").read_text())
TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "number": (int, float),
    "bool": (bool,),
    "list": (list,),
    "map": (dict,),
}
pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    """A daemon with one GGUF; the exchanges come in the order of the file, as a client has them."""
    home = tmp_path_factory.mktemp("contract")
    (home / "models").mkdir()
    write_tiny_gguf(home / "models" / "tiny.gguf")
    with running_daemon(home, keys_file=str(home / "keys")) as running:
        yield running


def send(daemon: RunningDaemon, request: str, body: object, *, via: str = "admin") -> tuple[int, Any]:
    """Return status and value of an answer."""
    method, _, path = request.partition(" ")
    connection: http.client.HTTPConnection = _UnixConnection(daemon.admin.socket_path, 60)
    if via == "endpoint":
        connection = http.client.HTTPConnection("localhost", daemon.port, timeout=60)
    content = None if body is None else json.dumps(body).replace("$MODEL", str(daemon.home / "models" / "tiny.gguf"))
    try:
        connection.request(method, path, content, {"Content-Type": "application/json"} if content else {})
        response = connection.getresponse()
        raw, kind = response.read().decode(), response.getheader("Content-Type", "")
        return response.status, json.loads(raw) if kind.startswith("application/json") else f"{kind}\n{raw}"
    finally:
        connection.close()


def differences(wanted: Any, found: Any, place: str = "answer") -> list[str]:
    """Return where an answer is not as it was recorded."""
    if isinstance(wanted, dict):
        if not isinstance(found, dict):
            return [f"{place}: expected an object, found {found!r}"]
        missing = [f"{place}.{name}: missing" for name in wanted.keys() - found.keys()]
        return missing + [
            each
            for name in wanted.keys() & found.keys()
            for each in differences(wanted[name], found[name], f"{place}.{name}")
        ]
    if isinstance(wanted, list):
        if not isinstance(found, list):
            return [f"{place}: expected a list, found {found!r}"]
        return [each for n, item in enumerate(found) for each in differences(wanted[0], item, f"{place}[{n}]")]
    kind = str(wanted)
    if found is None and kind.endswith("|null"):
        return []
    types = TYPES[kind.removesuffix("|null")]
    is_good = isinstance(found, types) and (bool in types or not isinstance(found, bool))
    return [] if is_good else [f"{place}: expected {kind}, found {found!r}"]


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda exchange: exchange["name"])
def test_exchange(daemon: RunningDaemon, exchange: dict[str, Any]) -> None:
    """The request is understood, and the answer has every field with its type."""
    body = exchange.get("body")
    if "echo" in exchange:
        _, body = send(daemon, exchange["echo"], None)
    if "before" in exchange:
        send(daemon, exchange["before"], None)
    status, answer = send(daemon, exchange["request"], body, via=exchange.get("via", "admin"))
    assert (status, differences(exchange["answer"], answer)) == (exchange.get("status", 200), []), answer
    assert "type" not in exchange or answer.startswith(exchange["type"])


def test_events_have_the_old_names_and_form(daemon: RunningDaemon) -> None:
    """Stages with progress while a model is launched, and every few seconds status, gpu and metrics."""
    (daemon.home / "models" / "again.gguf").unlink(missing_ok=True)
    write_tiny_gguf(daemon.home / "models" / "again.gguf")
    daemon.reload()
    wait_until(lambda: any(item["id"] == "again" for item in daemon.admin.get("instances")["instances"]))
    connection = _UnixConnection(daemon.admin.socket_path, 30)
    connection.request("GET", "/events")
    response = connection.getresponse()
    assert response.getheader("Content-Type") == "text/event-stream"
    daemon.admin.post("launch", "again", query="wait=false")
    seen: dict[str, list[Any]] = {"launch_progress": [{"stage": ""}]}
    name, has_id = "", False
    while not {"status", "gpu", "metrics"} <= seen.keys() or seen["launch_progress"][-1]["stage"] != "ready":
        line = response.readline().decode().rstrip("\n")
        if line.startswith("id: "):
            has_id = True
        elif line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            value = json.loads(line[6:])
            assert set(value) == {"data", "timestamp"}
            assert has_id or name in {"status", "gpu", "metrics", "instances"}
            seen.setdefault(name, []).append(value["data"])
            has_id = False
    connection.close()
    progress = [told for told in seen["launch_progress"][1:] if told["recipe_id"] == "again"]
    stages = [told["stage"] for told in progress]
    assert stages[0] == "launching"
    assert stages[-1] == "ready"
    assert set(stages) <= {"preempting", "evicting", "launching", "waiting", "ready"}
    shares = [told["progress"] for told in progress if told["progress"] is not None]
    assert all(0 <= share <= 1 for share in shares)
    assert shares[-1] == 1
    assert (
        differences(
            {"running": "bool", "process": "map|null", "inference_port": "int", "launching": "str|null"},
            seen["status"][0],
        )
        == []
    )
    assert differences({"count": "int", "gpus": "list"}, seen["gpu"][0]) == []
    assert differences(METRICS, seen["metrics"][0]) == []


def test_log_is_replayed_and_followed(daemon: RunningDaemon) -> None:
    """As much of it as GET answers, each line with the session that it belongs to."""
    for _ in range(3):  # some fifty lines each
        daemon.admin.post("launch", "tiny")
        daemon.admin.post("evict", "tiny")
    known = daemon.admin.get("logs", "tiny")["logs"]
    assert len(known) > 100
    connection = _UnixConnection(daemon.admin.socket_path, 30)
    connection.request("GET", "/logs/tiny/stream")
    response = connection.getresponse()
    told: list[Any] = []
    while len(told) < len(known):
        line = response.readline().decode()
        if line.startswith("data: "):
            told.append(json.loads(line[6:])["data"])
    connection.close()
    assert told == [{"session_id": "tiny", "line": line} for line in known]


STATUS = {"running": "bool", "process": "map|null", "inference_port": "int", "launching": "str|null"}
METRICS = {
    "lifetime_prompt_tokens": "int",
    "lifetime_completion_tokens": "int",
    "lifetime_requests": "int",
    "lifetime_uptime_hours": "number",
    "kwh_per_million_input": "number|null",
    "kwh_per_million_output": "number|null",
    "kv_cache_usage": "number",
    "lifetime_prompt_tokens_total": "int",
    "lifetime_completion_tokens_total": "int",
    "lifetime_requests_total": "int",
    "lifetime_energy_kwh": "number",
    "lifetime_uptime_seconds": "number",
    "current_power_watts": "number",
    "running_requests": "int",
    "pending_requests": "int",
    "prompt_tokens_total": "int",
    "generation_tokens_total": "int",
    "prompt_throughput": "number",
    "generation_throughput": "number",
    "peak_prefill_tps": "number|null",
    "peak_generation_tps": "number|null",
    "peak_ttft_ms": "number|null",
}


def test_configuration_tells_what_is(tmp_path: Path) -> None:
    """Whether a key is needed, and where the state is kept, if it is."""
    with running_daemon(tmp_path, keys_file=str(tmp_path / "keys")) as running:
        told = running.admin.get("config")["config"]
        assert (told["api_key_configured"], told["data_dir"], told["db_path"]) == (False, "", "")
        running.admin.post("keys", body={"name": "one"})
        assert running.admin.get("config")["config"]["api_key_configured"] is True
    state = tmp_path / "state"
    state.mkdir()
    with running_daemon(tmp_path, state_directory=state, keys_file=str(tmp_path / "keys")) as running:
        told = running.admin.get("config")["config"]
        found = (told["api_key_configured"], told["data_dir"], told["db_path"])
        assert found == (True, str(state), str(state / "state.db"))
