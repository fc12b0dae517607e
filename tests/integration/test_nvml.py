"""NVIDIA's GPUs by the real bindings of pynvml, against a stub of the driver's library; from there to llmstudioctl."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from llmstudiod.core.devices import Device, DeviceProcess, Machine
from llmstudiod.demo.tiny_gguf import write_tiny_gguf
from tests.integration.nvml_stub import GIB, Bench, build_library, gpu, uuid
from tests.integration.running_daemon import running_daemon, wait_until

UNEQUAL = (24, 8, 80, 12, 48, 16, 11, 6)
OURS = "0::/llmstudio.slice/llmstudio-models.slice/llmstudio-model-qwen3-32b.service\n"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stub, compiled once."""
    return build_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def bench(tmp_path: Path, library: Path) -> Bench:
    """The stub and a root of our own, on which there is no sign of NVIDIA."""
    return Bench(tmp_path, library)


def measured(bench: Bench, scenario: str) -> Machine:
    """Return one measurement."""
    return bench.measure(scenario)[0]


@pytest.mark.parametrize("count", [0, 1, 4, 8])
def test_each_gpu_is_measured(bench: Bench, count: int) -> None:
    """However many there are, of unequal sizes: what NVML tells of each stands in its own place."""
    sizes = UNEQUAL[:count]
    machine = measured(bench, "".join(gpu(number, gib, free=gib * GIB - number) for number, gib in enumerate(sizes)))
    assert machine.devices == tuple(
        Device(
            index=number, name=f"NVIDIA Test {gib}G", kind="CUDA", uuid=uuid(number), total=gib * GIB,
            free=gib * GIB - number, minor=7 - number, utilization_percent=30, temperature_c=45, power_w=70.5,
            power_limit_w=300.0,
        )
        for number, gib in enumerate(sizes)
    )  # fmt: skip
    assert [device.used for device in machine.devices] == list(range(count))
    assert machine.faults == ()


def test_gpus_are_numbered_in_the_order_of_the_bus(bench: Bench) -> None:
    """As CUDA numbers them with CUDA_DEVICE_ORDER=PCI_BUS_ID, whatever order NVML has."""
    machine = measured(bench, gpu(0, 24, bus=0xC1) + gpu(1, 8, bus=0x01) + gpu(2, 12, bus=0x41))
    assert [(device.index, device.uuid) for device in machine.devices] == [(0, uuid(1)), (1, uuid(2)), (2, uuid(0))]


def test_parts_of_a_divided_gpu_are_devices_of_their_own(bench: Bench) -> None:
    """With their own UUIDs, memory and processes, after the whole GPUs, whose numbers are those of nvidia-smi."""
    parts = (
        f"mig 0 0 {40 * GIB} {30 * GIB} MIG-a NVIDIA Test MIG 3g.40gb\n"
        f"mig 0 2 {10 * GIB} {GIB} MIG-b NVIDIA Test MIG 1g.10gb\n"
    )
    machine = measured(bench, gpu(0, 80) + gpu(1, 24) + parts + f"proc 102 compute 4000000 {9 * GIB}\n")
    assert [(device.index, device.uuid, device.is_mig, device.free) for device in machine.devices] == [
        (1, uuid(1), False, 24 * GIB), (2, "MIG-a", True, 30 * GIB), (3, "MIG-b", True, GIB),
    ]  # fmt: skip
    last = machine.devices[2]
    assert (last.name, last.minor, last.power_w, last.temperature_c) == ("NVIDIA Test MIG 1g.10gb", 7, None, 45)
    assert [process.used for process in last.processes] == [9 * GIB]
    assert machine.faults == ()


def test_divided_gpu_without_parts_is_told(bench: Bench) -> None:
    """CUDA sees nothing of it."""
    machine = measured(bench, gpu(0, 80) + "migmode 0\n")
    assert machine.devices == ()
    assert "GPU 0 (NVIDIA Test 80G) is in MIG mode and has no parts" in machine.faults[0]


def test_gpu_without_memory_of_its_own_has_the_hosts(bench: Bench) -> None:
    """`nvidia-smi` shows [N/A] for Grace, Orin and Spark."""
    machine = measured(bench, "gpu 1 -1 -1 5 40 -1 -1 0 GPU-a NVIDIA GB10\n")
    device = machine.devices[0]
    assert (device.total, device.free) == (machine.host.total, machine.host.available)
    assert device.shares_host_memory
    assert (device.utilization_percent, device.temperature_c, device.power_w) == (5, 40, None)
    assert machine.faults == ()


@pytest.mark.parametrize("failing", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetName"])
def test_lost_gpu_is_told_and_the_others_keep_their_numbers(bench: Bench, failing: str) -> None:
    """NVML says so at whatever call comes; a number that is skipped is better than another GPU under it."""
    machine = measured(bench, gpu(0, 24) + gpu(1, 8) + gpu(2, 12) + f"fail {failing} 1 15\n")
    assert [(device.index, device.uuid) for device in machine.devices] == [(0, uuid(0)), (2, uuid(2))]
    assert len(machine.faults) == 1
    assert machine.faults[0].startswith("GPU 1 ")
    assert "GPU is lost; restart the machine or reset it" in machine.faults[0]


@pytest.mark.parametrize(
    ("function", "changed"),
    [
        ("nvmlDeviceGetName", {"name": "NVIDIA GPU"}),
        ("nvmlDeviceGetUUID", {"uuid": None}),
        ("nvmlDeviceGetMinorNumber", {"minor": None}),
        ("nvmlDeviceGetUtilizationRates", {"utilization_percent": None}),
        ("nvmlDeviceGetTemperature", {"temperature_c": None}),
        ("nvmlDeviceGetPowerUsage", {"power_w": None}),
        ("nvmlDeviceGetPowerManagementLimit", {"power_limit_w": None}),
        ("nvmlDeviceGetMemoryInfo", {"total": None, "free": None}),
        ("nvmlDeviceGetComputeRunningProcesses", {"processes": ()}),
        ("nvmlDeviceGetGraphicsRunningProcesses", {}),
        ("nvmlDeviceGetPciInfo", {}),
        ("nvmlDeviceGetMigMode", {}),
        ("nvmlSystemGetProcessName", {}),
    ],
)
def test_one_call_that_fails_costs_one_value(bench: Bench, function: str, changed: dict[str, object]) -> None:
    """Whatever it is; memory that is not known is a fault as well, since a placement needs it."""
    bench.put("proc/77/comm", "python3\n")
    scenario = gpu(0, 24) + "proc 0 compute 77 5\n"
    good, bad = bench.measure(scenario, scenario + f"fail {function} -1 999\n")
    names = Device.__dataclass_fields__
    found = {name: getattr(bad.devices[0], name) for name in names}
    assert found == {name: getattr(good.devices[0], name) for name in names} | changed
    is_memory = function == "nvmlDeviceGetMemoryInfo"
    assert ["cannot be measured: Unknown Error" in fault for fault in bad.faults] == [True] * is_memory


def test_processes_are_named_and_ours_are_known(bench: Bench) -> None:
    """By their cgroup; one that both computes and draws stands there once, and a long name is not cut off."""
    bench.put("proc/11/comm", "llama-server\n")
    bench.put("proc/11/cgroup", OURS)
    bench.put("proc/12/comm", "text-generation\n")
    bench.put("proc/12/cmdline", "/opt/bin/text-generation-launcher\0--port\x001\0")
    bench.put("proc/12/cgroup", "0::/user.slice/session-1.scope\n")
    bench.put("proc/13/comm", "evil\x1b[2J\n")
    processes = (
        f"proc 0 compute 11 {GIB}\nproc 0 compute 12 -1\nproc 0 graphics 12 4096\nproc 0 graphics 13 7\n"
        "proc 0 compute 14 8\nname 14 /usr/bin/other\nproc 0 compute 15 -1\n"
    )
    assert measured(bench, gpu(0, 24) + processes).devices[0].processes == (
        DeviceProcess(11, "llama-server", GIB, "qwen3-32b"),
        DeviceProcess(12, "text-generation-launcher", 4096),
        DeviceProcess(14, "other", 8),
        DeviceProcess(15, "pid 15", None),
        DeviceProcess(13, "evil?[2J", 7),
    )


def test_library_is_initialised_once(bench: Bench) -> None:
    """It takes a second for each GPU; nothing that was measured is kept."""
    machines = bench.measure(gpu(0, 24), gpu(0, 24) + f"used 0 {GIB}\n", gpu(0, 24) + gpu(1, 8))
    assert [[device.free for device in machine.devices] for machine in machines] == [
        [24 * GIB], [23 * GIB], [24 * GIB, 8 * GIB],
    ]  # fmt: skip
    assert bench.calls == ["init"]


@pytest.mark.parametrize(("code", "word"), [(1, "Uninitialized"), (18, "different versions"), (15, "GPU is lost")])
def test_driver_that_was_reloaded_is_initialised_again(bench: Bench, code: int, word: str) -> None:
    """At the next measurement; while it is away, that is told."""
    away = gpu(0, 24) + f"fail nvmlDeviceGetCount -1 {code}\n"
    before, during, after = bench.measure(gpu(0, 24), away, gpu(0, 24) + gpu(1, 8))
    assert (len(before.devices), len(during.devices), len(after.devices)) == (1, 0, 2)
    assert word in during.faults[0]
    assert (before.faults, after.faults) == ((), ())
    assert bench.calls == ["init", "shutdown", "init"]


@pytest.mark.parametrize(
    ("code", "next_step"),
    [(9, "modprobe nvidia"), (4, "/dev/nvidiactl"), (18, "restart the machine"), (999, "nvidia-smi")],
)
@pytest.mark.parametrize("sign", ["driver", "bus", "sound", None])
def test_driver_that_cannot_be_used_is_told_where_there_is_a_gpu(
    bench: Bench, code: int, next_step: str, sign: str | None
) -> None:
    """A machine without an NVIDIA GPU lacks nothing, though it has the library; a card's sound alone is no GPU."""
    if sign == "driver":
        bench.put("proc/driver/nvidia/version", "NVRM version: …")
    elif sign:
        bench.put("sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
        bench.put("sys/bus/pci/devices/0000:01:00.0/class", "0x030200\n" if sign == "bus" else "0x040300\n")
    machine = measured(bench, f"fail nvmlInitWithFlags -1 {code}\n")
    assert machine.devices == ()
    assert machine.host.total > 0
    assert [next_step in fault for fault in machine.faults] == [True] * (sign in {"driver", "bus"})


def test_missing_library_is_told_where_there_is_a_gpu(bench: Bench, tmp_path: Path) -> None:
    """And named, with the package."""
    bench.put("proc/driver/nvidia/version")
    fault = bench.measure("", environment={"LD_LIBRARY_PATH": str(tmp_path)})[0].faults[0]
    assert "libnvidia-ml.so.1" in fault
    assert "libnvidia-ml1" in fault


def test_missing_bindings_are_told_where_there_is_a_gpu(bench: Bench, tmp_path: Path) -> None:
    """Debian's package only suggests them."""
    (tmp_path / "pynvml.py").write_text("raise ImportError('no bindings')\n")
    environment = {**bench.environment, "PYTHONPATH": str(tmp_path)}
    assert bench.measure(gpu(0, 24), environment=environment)[0].faults == ()
    bench.put("proc/driver/nvidia/version")
    assert "python3-pynvml" in bench.measure(gpu(0, 24), environment=environment)[0].faults[0]


def test_driver_that_hangs_holds_nobody_up(bench: Bench) -> None:
    """A call into it may never return when a GPU falls off the bus; nor does the process wait for it at its end."""
    bench.patience_s = 0.3
    began = time.monotonic()
    machines = bench.measure(gpu(0, 24) + "hang nvmlDeviceGetMemoryInfo 30\n", gpu(0, 24))
    assert time.monotonic() - began < 15
    assert [machine.devices for machine in machines] == [(), ()]
    assert all("did not answer" in machine.faults[0] for machine in machines)


# From the daemon to the terminal


def test_gpus_are_shown(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """`llmstudioctl gpus` shows what the daemon measures at that moment, with vllm-studio's names of fields."""
    for name, value in bench.environment.items():
        monkeypatch.setenv(name, value)
    pid = os.getpid()
    scenario = bench.home / "scenario"
    scenario.write_text(gpu(0, 24) + gpu(1, 8) + f"used 1 {GIB}\nproc 1 compute {pid} {GIB}\n")
    with running_daemon(bench.home) as daemon:
        answer = json.loads(daemon.ctl("gpus", "--json").stdout)
        shown = daemon.ctl("gpus")
        scenario.write_text(gpu(0, 24))
        later = daemon.admin.get("gpus")
    assert (answer["count"], later["count"]) == (2, 1)
    second = answer["gpus"][1]
    old = {
        "index": 1, "name": "NVIDIA Test 8G", "memory_total": 8 * GIB, "memory_used": GIB, "memory_free": 7 * GIB,
        "utilization": 30, "temperature": 45, "power_draw": 70.5, "power_limit": 300.0,
    }  # fmt: skip
    assert {name: second[name] for name in old} == old
    assert (second["uuid"], second["kind"], second["promised"]) == (uuid(1), "CUDA", [])
    assert [(each["pid"], each["memory_used"], each["model"]) for each in second["processes"]] == [(pid, GIB, None)]
    assert answer["host"]["memory_total"] > answer["host"]["memory_available"] > 0
    assert shown.returncode == 0
    assert "1    NVIDIA Test 8G   1.0 GiB / 8.0 GiB  30%   45 °C  70 of 300 W" in shown.stdout
    assert f", pid {pid}, 1.0 GiB, not ours" in shown.stdout
    assert "RAM  " in shown.stdout.splitlines()[-1]


@pytest.mark.engine
def test_metrics_are_those_of_the_manual(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its name and labels, and no other; every value is one of its kind."""
    for name, value in bench.environment.items():
        monkeypatch.setenv(name, value)
    (bench.home / "scenario").write_text(gpu(0, 24))
    (bench.home / "models").mkdir()
    write_tiny_gguf(bench.home / "models" / "tiny.gguf")
    with running_daemon(bench.home) as daemon:
        daemon.ctl("load", "tiny")
        daemon.admin.post("benchmark", query="prompt_tokens=50&max_tokens=8")
        wait_until(lambda: "model_memory_bytes" in daemon.admin.text("metrics"), timeout_s=60)
        text = daemon.admin.text("metrics")
    page = (Path(__file__).parents[2] / "docs" / "man" / "llmstudiod.8").read_text()
    section = page.partition(".Sh METRICS\n")[2].partition("\n.Sh ")[0]
    rows = re.findall(r"^\.It ([a-z_]+) Ta ([a-z_, ]*)Ta ", section, re.MULTILINE)
    told = {name: {word for word in labels.replace(",", " ").split() if word} for name, labels in rows}
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"llmstudio_([a-z_]+)(?:\{(.*)\})? (\S+)", line)
        assert match is not None, line
        found[match[1]] = set(re.findall(r"([a-z_]+)=\"", match[2] or ""))
        assert float(match[3]) >= 0
    assert found == told
    kinds = dict(re.findall(r"^# TYPE llmstudio_(\S+) (\S+)$", text, re.MULTILINE))
    assert {name: kind == "counter" for name, kind in kinds.items()} == {
        name: name.endswith("_total") for name in found
    }


def test_machine_without_gpus_is_shown(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no failure, and neither is a GPU that cannot be measured; the next step is told."""
    for name, value in bench.environment.items():
        monkeypatch.setenv(name, value)
    (bench.home / "scenario").write_text("fail nvmlDeviceGetCount -1 999\n")
    with running_daemon(bench.home) as daemon:
        failing = daemon.ctl("gpus")
        (bench.home / "scenario").write_text("")
        bare = daemon.ctl("gpus")
    assert bare.stdout.splitlines()[0] == failing.stdout.splitlines()[0] == "no GPU was found"
    assert "available" in bare.stdout
    assert (bare.returncode, bare.stderr) == (0, "")
    assert failing.returncode == 0
    assert "the NVIDIA GPUs cannot be counted: Unknown Error; `nvidia-smi` tells more" in failing.stderr
