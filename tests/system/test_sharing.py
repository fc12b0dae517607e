"""Memory that models share, with Debian's llama-server: dry runs, evictions, what a daemon remembers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.memory_cases import told
from tests.model_zoo import ZOO, write

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .daemon import MODELS, Daemon, unit_of, wait_until  # noqa: TID252

GIB = 1 << 30
CONTEXT = 131_072
STATE = "/var/lib/llmstudio/state.db"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights are holes, and whose KV cache is what it needs."""
    path = tmp_path_factory.mktemp("wide") / "wide.gguf"
    write(path, ZOO["llama-gqa"])
    path.parent.chmod(0o755)
    return path


@pytest.fixture
def sharing(daemon: Daemon, wide: Path) -> Iterator[Daemon]:
    """Two recipes over one model; one of them fits into what the settings leave, and not two."""
    daemon.host.bind(wide, f"{MODELS}/wide.gguf")
    for name in ("a", "b"):
        recipe = {
            "id": name, "model_path": f"{MODELS}/wide.gguf", "max_model_len": CONTEXT, "max_num_seqs": 1,
            "cache_ram": 0, "threads": 1,
        }  # fmt: skip
        daemon.put_recipe(recipe)
    daemon.listen()
    need = explained(daemon, "a")["estimate"]["host"]["total"]
    available = int(daemon.host.run("grep", "MemAvailable", "/proc/meminfo").stdout.split()[1]) << 10
    if available < need + GIB:
        pytest.skip("too little memory is free")
    daemon.use_settings(reserved_memory={"ram": available - need * 3 // 2})
    daemon.systemctl("reload", "llmstudiod")
    yield daemon
    for name in ("a", "b"):
        daemon.ctl("unload", "--force", name)
    daemon.systemctl("stop", "llmstudiod.service")
    daemon.host.run("umount", f"{MODELS}/wide.gguf")
    daemon.host.run("sh", "-c", f"rm -f {STATE}*")


def explained(daemon: Daemon, model: str, *flags: str) -> dict[str, Any]:
    """Return the plan of a model."""
    plan: dict[str, Any] = json.loads(daemon.host.run("llmstudioctl", "explain", "--json", *flags, model).stdout)
    return plan


def learned(daemon: Daemon) -> list[str]:
    """Return who told what the daemon knows of models."""
    rows = f"sqlite3.connect('{STATE}').execute('SELECT value FROM learned')"
    done = daemon.host.run("python3", "-c", f"import sqlite3\nfor value, in {rows}: print(value)")
    return [json.loads(line)["source"] for line in done.stdout.splitlines()]


def test_dry_run_tells_what_the_run_takes(sharing: Daemon) -> None:
    """In the model's sandbox, from the very command line; it takes no memory and leaves no unit behind."""
    before = explained(sharing, "a")["placement"]
    assert before["source"] == "the estimate"
    after = explained(sharing, "a", "--dry-run")["placement"]
    assert after["source"] == "a dry run"
    assert learned(sharing) == ["a dry run"]
    units = sharing.systemctl("list-units", "--all", "--plain", "--no-legend", "llmstudio-question*")
    assert units == ""
    assert sharing.model_units() == []
    sharing.ctl("load", "a")
    seen = told(sharing.host.journal(unit_of("a")).splitlines())
    host = after["place"]["estimate"]["host"]
    assert host["kv"] == pytest.approx(seen.cache * 2**20, rel=0.01)
    assert host["compute"] == pytest.approx(seen.compute * 2**20, rel=0.05)
    wait_until(lambda: learned(sharing) == ["its last run"])
    sharing.ctl("unload", "a")
    again = explained(sharing, "a")["placement"]
    assert again["source"] == "its last run"
    assert again["place"]["ram"] == pytest.approx(after["place"]["ram"], rel=0.05)


def test_idle_one_goes_for_the_next(sharing: Daemon) -> None:
    """Before it goes llama-server itself has told what the next one needs, and the story says for whom."""
    sharing.ctl("load", "a")
    plan = explained(sharing, "b")["placement"]
    assert (plan["evicts"], plan["error"]) == (["a"], None)
    assert sharing.chat("b")
    assert sharing.status("a")["state"] == "stopped"
    assert [step["cause"] for step in sharing.status("a")["story"]][-2] == "evicted for b"
    assert "promised" not in sharing.ctl("gpus")


def test_daemon_that_comes_back_knows_who_holds_what(sharing: Daemon) -> None:
    """Also when it was killed: a model that it finds counts as what it was promised."""
    sharing.ctl("load", "a")
    pid = sharing.pid(unit_of("a"))
    sharing.systemctl("kill", "--signal=SIGKILL", "llmstudiod.service")
    wait_until(lambda: sharing.pid() != 0 and sharing.state("llmstudiod.service") == "active")
    wait_until(lambda: sharing.status("a")["state"] == "ready")
    plan = explained(sharing, "b")["placement"]
    assert plan["evicts"] == ["a"]
    (ram,) = plan["memory"]
    ((holder, size),) = [(each["id"], each["memory"]) for each in ram["models"]]
    assert (holder, size) == ("a", explained(sharing, "a")["placement"]["place"]["ram"])
    assert sharing.pid(unit_of("a")) == pid


def test_lost_state_costs_only_what_it_held(sharing: Daemon) -> None:
    """The daemon says so, makes a new one, and serves."""
    sharing.ctl("load", "a")
    sharing.systemctl("stop", "llmstudiod.service")
    sharing.host.run("sh", "-c", f"rm -f {STATE}-*; echo nonsense > {STATE}")
    sharing.systemctl("start", "llmstudiod.service")
    assert sharing.chat("a")
    assert "what it held is lost" in sharing.host.journal("llmstudiod.service")
    assert explained(sharing, "a")["placement"]["is_running"]
    sharing.ctl("unload", "a")
    sharing.ctl("load", "a")
    wait_until(lambda: learned(sharing) == ["its last run"])
    first = explained(sharing, "a")["placement"]["place"]["ram"]
    assert first == pytest.approx(explained(sharing, "b")["placement"]["memory"][0]["models"][0]["memory"], rel=0.01)
