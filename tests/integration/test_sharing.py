"""Models that share a machine, through the real daemon and the embedded engine: what is loaded, and what goes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmstudiod.demo.tiny_gguf import write_tiny_gguf
from tests.integration.running_daemon import RunningDaemon, running_daemon, wait_until


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Four recipes over one small model."""
    (tmp_path / "recipes.d").mkdir()
    write_tiny_gguf(tmp_path / "tiny.gguf")
    for name, more in {"a": {"preload": True}, "b": {}, "c": {}, "d": {"preload": True, "pinned": True}}.items():
        recipe = {"id": name, "model_path": str(tmp_path / "tiny.gguf"), "max_model_len": 512, "threads": 1, **more}
        (tmp_path / "recipes.d" / f"{name}.json").write_text(json.dumps(recipe))
    return tmp_path


@pytest.fixture
def daemon(home: Path) -> Iterator[RunningDaemon]:
    """With one group of each kind."""
    groups = {
        "never": {"members": ["a", "b"], "together": "never"},
        "always": {"members": ["b", "c"], "together": "always"},
    }
    with running_daemon(home, groups=groups) as running:
        yield running


def ready(daemon: RunningDaemon) -> list[str]:
    """Return who is ready."""
    return [each["id"] for each in daemon.admin.get("instances")["instances"] if each["state"] == "ready"]


def test_models_are_loaded_at_start(daemon: RunningDaemon) -> None:
    """Those whose recipe says so, before anybody asks."""
    wait_until(lambda: ready(daemon) == ["a", "d"])


def test_groups_are_kept(daemon: RunningDaemon) -> None:
    """What is never together goes, what is always together comes."""
    wait_until(lambda: ready(daemon) == ["a", "d"])
    assert daemon.ctl("load", "b").returncode == 0
    wait_until(lambda: ready(daemon) == ["b", "c", "d"])
    assert "a: ready -> stopping: evicted" in daemon.log()
    assert daemon.ctl("load", "a").returncode == 0
    wait_until(lambda: ready(daemon) == ["a", "d"])


def test_plan_and_promises_are_shown(daemon: RunningDaemon) -> None:
    """For people and as data; nothing is loaded for it."""
    wait_until(lambda: ready(daemon) == ["a", "d"])
    plan = json.loads(daemon.ctl("explain", "--json", "b").stdout)
    assert (plan["placement"]["evicts"], plan["placement"]["place"]["gpus"]) == (["a"], [])
    (ram,) = plan["placement"]["memory"]
    assert sorted(each["id"] for each in ram["models"]) == ["a", "d"]
    told = daemon.ctl("explain", "b").stdout
    assert "placement: it would go to the CPU" in told
    assert "evicts: a" in told
    assert "PROMISED TO" in told
    running = daemon.ctl("explain", "a").stdout
    assert "placement: it runs on the CPU" in running
    status = json.loads(daemon.ctl("status", "--json", "a").stdout)
    assert status["memory"]["measured"] > 0 < status["memory"]["estimated"]
    assert status["devices"] == []
    assert ready(daemon) == ["a", "d"]


def test_member_that_is_no_model_is_told(home: Path) -> None:
    """And hurts nobody."""
    with running_daemon(home, groups={"x": {"members": ["a", "zzz"], "together": "always"}}) as daemon:
        assert "groups: x: there is no model 'zzz'" in daemon.log()
        wait_until(lambda: ready(daemon) == ["a", "d"])


def test_last_run_teaches(daemon: RunningDaemon) -> None:
    """What a model took is known the next time."""
    wait_until(lambda: ready(daemon) == ["a", "d"])

    def placement() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(daemon.ctl("explain", "--json", "a").stdout)["placement"]
        return found

    wait_until(lambda: placement()["source"] == "its last run")
    first = placement()["place"]["estimate"]["host"]
    path = daemon.home / "recipes.d" / "a.json"  # with other settings it is another run, of which nothing is known
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_model_len": 1024}))
    daemon.reload()
    assert placement()["source"] == "the estimate"
    assert daemon.ctl("load", "a").returncode == 0
    wait_until(lambda: placement()["source"] == "its last run")
    assert daemon.ctl("unload", "a").returncode == 0
    assert placement()["place"]["estimate"]["host"]["kv"] == 2 * first["kv"]
