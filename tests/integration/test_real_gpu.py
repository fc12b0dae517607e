"""NVIDIA's GPUs that are really there: measured, given to a model, and counted as the estimate says."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmstudiod.adapters.devices import Devices
from tests.integration.running_daemon import RunningDaemon, running_daemon, wait_until
from tests.model_zoo import ZOO, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="there is no NVIDIA GPU"),
]


def cuda_server() -> str | None:
    """Return the llama-server of this machine, if it uses CUDA."""
    found = shutil.which("llama-server")
    if found is None:
        return None
    listed = subprocess.run([found, "--list-devices"], capture_output=True, text=True, timeout=60, check=False)
    return found if "CUDA0" in listed.stdout else None


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    """A daemon with a model that may use the GPUs."""
    server = cuda_server()
    if server is None:
        pytest.skip("no llama-server on PATH uses CUDA")
    write(tmp_path / "wide.gguf", ZOO["llama-gqa"])
    recipe = {"id": "wide", "model_path": str(tmp_path / "wide.gguf"), "max_model_len": 16384, "cache_ram": 0}
    (tmp_path / "recipes.d").mkdir()
    (tmp_path / "recipes.d" / "wide.json").write_text(json.dumps(recipe))
    with running_daemon(tmp_path, llama_server=server) as running:
        yield running


def test_gpus_are_measured() -> None:
    """Through the driver's own library."""
    machine = Devices().measure()
    assert machine.faults == ()
    gpus = [device for device in machine.devices if device.kind == "CUDA"]
    assert gpus
    for each in gpus:
        assert each.uuid
        assert each.uuid.startswith(("GPU-", "MIG-"))
        assert each.total is None or (each.free is not None and 0 < each.free <= each.total)


def test_model_lies_where_it_was_placed(daemon: RunningDaemon) -> None:
    """All its layers are on one GPU, which has its process, and it has no more than was estimated."""
    assert daemon.ctl("load", "wide").returncode == 0
    (device,) = json.loads(daemon.ctl("status", "--json", "wide").stdout)["devices"]
    assert device["layers"] > 1
    assert "offloaded" in daemon.ctl("logs", "wide").stdout
    (gpu,) = [each for each in daemon.admin.get("gpus")["gpus"] if each["uuid"] == device["uuid"]]
    assert [each["id"] for each in gpu["promised"]] == ["wide"]
    assert [each["model"] for each in gpu["processes"] if each["model"]] == ["wide"]
    if device["measured"] is not None:
        assert 0.5 * device["estimated"] < device["measured"] <= device["estimated"]
    assert daemon.ctl("unload", "wide").returncode == 0
    wait_until(lambda: json.loads(daemon.ctl("explain", "--json", "wide").stdout)["placement"]["source"] != "")
