"""What a machine has: GPUs of AMD and Intel from /sys, RAM and its limits, and how that is told.

The trees are written after the kernel's documentation; NVIDIA's GPUs are in tests/integration/test_nvml.py.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmstudiod.adapters.devices import Devices
from llmstudiod.adapters.host_memory import read_host_memory
from llmstudiod.adapters.sysfs_gpus import read_sysfs_gpus
from llmstudiod.core.devices import Device, DeviceProcess, HostMemory, Machine, with_listed
from llmstudiod.ctl import gpus
from llmstudiod.ctl.client import Client
from llmstudiod.http.admin_gpus import machine_answer

GIB = 1 << 30
HOST = HostMemory(64 * GIB, 40 * GIB)
Tree = Mapping[str, str | bytes]

DISCRETE_AMD: Tree = {
    "vendor": "0x1002\n", "device": "0x744c\n", "uevent": "DRIVER=amdgpu\nPCI_SLOT_NAME=0000:03:00.0\n",
    "mem_info_vram_total": f"{24 * GIB}\n", "mem_info_vram_used": f"{5 * GIB}\n", "mem_info_vram_vendor": "samsung\n",
    "mem_info_gtt_total": f"{32 * GIB}\n", "mem_info_gtt_used": "0\n", "gpu_busy_percent": "17\n",
    "gpu_metrics": b"\x78\x00\x01\x03rest", "power/runtime_status": "active\n", "hwmon/hwmon3/temp1_input": "61500\n",
    "hwmon/hwmon3/power1_average": "212000000\n", "hwmon/hwmon3/power1_cap": "303000000\n",
}  # fmt: skip
APU: Tree = {
    "vendor": "0x1002\n", "device": "0x1586\n", "uevent": "DRIVER=amdgpu\nPCI_SLOT_NAME=0000:c5:00.0\n",
    "mem_info_vram_total": f"{GIB}\n", "mem_info_vram_used": f"{GIB // 2}\n",
    "mem_info_gtt_total": f"{60 * GIB}\n", "mem_info_gtt_used": f"{2 * GIB}\n",
    "gpu_metrics": b"\x08\x01\x03\x00", "hwmon/hwmon0/power1_input": "15123456\n",
}  # fmt: skip
INTEGRATED_INTEL: Tree = {
    "vendor": "0x8086\n", "device": "0xa7a0\n", "uevent": "DRIVER=i915\nPCI_SLOT_NAME=0000:00:02.0\n"
}  # fmt: skip
XE: Tree = {
    "vendor": "0x8086\n", "device": "0xe20b\n", "uevent": "DRIVER=xe\nPCI_SLOT_NAME=0000:04:00.0\n",
    "tile0/physical_vram_size_bytes": f"{12 * GIB}\n",
}  # fmt: skip
ARC_OF_PLAIN_I915: Tree = {
    "vendor": "0x8086\n", "device": "0x56a0\n", "uevent": "DRIVER=i915\nPCI_SLOT_NAME=0000:05:00.0\n"
}  # fmt: skip
ASPEED: Tree = {"vendor": "0x1a03\n", "device": "0x2000\n", "uevent": "DRIVER=ast\nPCI_SLOT_NAME=0000:02:00.0\n"}


def put(root: Path, files: Tree, below: str = "") -> Path:
    """Write files below a root; return the root."""
    for name, content in files.items():
        path = root / below / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def cards(root: Path, *trees: Tree) -> list[Device]:
    """Return what is found with these cards; what has no vendor of ours and connectors of cards lie beside them."""
    for number, tree in enumerate(trees):
        put(root, tree, f"sys/class/drm/card{number}/device")
    put(root, {"status": "connected\n"}, "sys/class/drm/card0-HDMI-A-1")
    put(root, {"vendor": "0x1002\n"}, "sys/class/drm/renderD128/device")
    return read_sysfs_gpus(root, HOST)


# AMD and Intel


def test_card_of_amd_is_measured(tmp_path: Path) -> None:
    """Its own memory counts, and not what it may borrow."""
    assert cards(tmp_path, DISCRETE_AMD) == [
        Device(
            index=0, name="AMD GPU 744c", kind="ROCm", total=24 * GIB, free=19 * GIB, utilization_percent=17,
            temperature_c=61, power_w=212.0, power_limit_w=303.0,
        )
    ]  # fmt: skip


def test_apu_shares_the_hosts_memory(tmp_path: Path) -> None:
    """Its part of RAM and what it may use of the rest, as far as that is available."""
    found = cards(tmp_path, APU)[0]
    assert (found.shares_host_memory, found.power_w) == (True, 15.1)
    assert (found.total, found.free) == (61 * GIB, GIB // 2 + 40 * GIB)


@pytest.mark.parametrize(
    ("without", "is_apu"), [({"gpu_metrics"}, False), ({"gpu_metrics", "mem_info_vram_vendor"}, True)]
)
def test_apu_is_known_without_metrics(tmp_path: Path, without: set[str], *, is_apu: bool) -> None:
    """Old chips have none: then by whether its memory has a vendor."""
    tree = {name: content for name, content in DISCRETE_AMD.items() if name not in without}
    assert cards(tmp_path, tree)[0].shares_host_memory is is_apu


def test_card_that_sleeps_is_left_asleep(tmp_path: Path) -> None:
    """Its memory is known; its sensors would wake it."""
    found = cards(tmp_path, {**DISCRETE_AMD, "power/runtime_status": "suspended\n"})[0]
    assert (found.total, found.free, found.shares_host_memory) == (24 * GIB, 19 * GIB, False)
    assert (found.utilization_percent, found.temperature_c, found.power_w) == (None, None, None)


def test_gpus_of_intel_are_found(tmp_path: Path) -> None:
    """In the order of the bus. What is not told is not guessed: a card is not taken for a part of the processor."""
    found = cards(tmp_path, XE, ARC_OF_PLAIN_I915, INTEGRATED_INTEL)
    assert [(each.index, each.name, each.kind, each.total, each.free, each.shares_host_memory) for each in found] == [
        (0, "Intel GPU a7a0", "Vulkan", None, None, True),
        (1, "Intel GPU e20b", "Vulkan", 12 * GIB, None, False),
        (2, "Intel GPU 56a0", "Vulkan", None, None, False),
    ]
    put(tmp_path, {"lmem_total_bytes": f"{16 * GIB}\n"}, "sys/class/drm/card1")
    assert read_sysfs_gpus(tmp_path, HOST)[2].total == 16 * GIB


def test_chip_that_only_shows_a_picture_is_no_gpu(tmp_path: Path) -> None:
    """Every server has one."""
    assert cards(tmp_path, ASPEED) == []
    assert read_sysfs_gpus(tmp_path / "nothing", HOST) == []


def test_card_has_the_name_that_it_says(tmp_path: Path) -> None:
    """Datacentre cards do; one that cannot be shown is not."""
    named = [{**DISCRETE_AMD, "product_name": text} for text in ("AMD Instinct MI210\n", "Radeon Pro\n", "a\x1b[2Jb\n")]
    assert [each.name for each in cards(tmp_path, *named)] == ["AMD Instinct MI210", "AMD Radeon Pro", "AMD GPU 744c"]


@pytest.mark.parametrize("rubbish", ["", "\n", "-1\n", "N/A\n", "\x00\xff", "9" * 5000])
def test_rubbish_in_sys_is_nothing_that_is_known(tmp_path: Path, rubbish: str) -> None:
    """Each file on its own; nobody raises."""
    tree = {name: rubbish for name in DISCRETE_AMD if name != "vendor"}
    found = cards(tmp_path, {**tree, "vendor": "0x1002\n"})[0]
    assert (found.total, found.free, found.power_w, found.name) == (None, None, None, "AMD GPU")


def test_other_gpus_are_numbered_after_nvidias(tmp_path: Path) -> None:
    """Devices puts them together; here is no NVIDIA GPU, so they begin at 0."""
    cards(tmp_path, DISCRETE_AMD, INTEGRATED_INTEL)
    machine = Devices(root=tmp_path).measure()
    assert [(each.index, each.kind) for each in machine.devices] == [(0, "Vulkan"), (1, "ROCm")]
    assert machine.host.total == psutil.virtual_memory().total
    assert machine.faults == ()


# RAM


def limits(own: str, **by_path: str) -> Tree:
    """Return a tree of cgroups: the daemon's own, and what `memory.max` says by path."""
    files = {f"sys/fs/cgroup{path}/memory.max": f"{text}\n" for path, text in by_path.items()}
    return {"proc/self/cgroup": f"4:memory:/old\n0::{own}\n", **files}


MODELS = "/llmstudio.slice/llmstudio-models.slice"
SERVICE = "/llmstudio.slice/llmstudiod.service"


@pytest.mark.parametrize(
    ("own", "by_path", "models_are_units", "expected"),
    [
        (SERVICE, {"/llmstudio.slice": "max", MODELS: "max"}, True, None),
        (SERVICE, {"/llmstudio.slice": "900", MODELS: "1000"}, True, 900),
        (SERVICE, {"/llmstudio.slice": "max", MODELS: "1000", SERVICE: "5"}, True, 1000),
        (SERVICE, {"/llmstudio.slice": "900", SERVICE: "5"}, False, 5),
        (SERVICE, {}, True, None),
        (f"/box{SERVICE}", {"/box": "700", f"/box{MODELS}": "max"}, True, 700),
        ("/user.slice/session.scope", {"/user.slice": "800", MODELS: "3"}, True, 800),
        ("/", {"": "600"}, False, 600),
        ("/../../elsewhere", {"": "600"}, True, 600),
        (SERVICE, {"/llmstudio.slice": "rubbish", MODELS: "1000"}, True, 1000),
    ],
)
def test_least_limit_above_the_models_counts(
    tmp_path: Path, own: str, by_path: dict[str, str], expected: int | None, *, models_are_units: bool
) -> None:
    """Of the slices where models are units, and not the daemon's own; of its own where they are its children."""
    put(tmp_path, limits(own, **by_path))
    assert read_host_memory(tmp_path, models_are_units=models_are_units).limit == expected


def test_machine_without_cgroups_has_no_limit(tmp_path: Path) -> None:
    """Nor one with the old hierarchies alone."""
    assert read_host_memory(tmp_path, models_are_units=True).limit is None
    put(tmp_path, {"proc/self/cgroup": "4:memory:/old\n"})
    assert read_host_memory(tmp_path, models_are_units=False).limit is None


def test_hidden_meminfo_leaves_the_kernels_other_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox may hide /proc/meminfo."""
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    found = read_host_memory(tmp_path, models_are_units=True)
    monkeypatch.undo()
    assert found.total == pytest.approx(psutil.virtual_memory().total, rel=0.01)
    assert found.total > found.available > 0


# How it is told

PROCESSES = (
    DeviceProcess(11, "llama-server", 2 * GIB, "qwen3-32b"),
    DeviceProcess(12, "python3", None),
    DeviceProcess(13, "pid 13", 5 * GIB),
    DeviceProcess(14, "llama-server", GIB),
)
SHOWN = Machine(
    HostMemory(64 * GIB, 40 * GIB, 32 * GIB),
    (
        Device(0, "NVIDIA H100", "CUDA", uuid="GPU-a", total=80 * GIB, free=60 * GIB, utilization_percent=3,
               temperature_c=40, power_w=99.6, processes=PROCESSES),
        Device(1, "Intel GPU a7a0", "Vulkan", shares_host_memory=True),
        Device(2, "Intel GPU e20b", "Vulkan", total=12 * GIB),
    ),
)  # fmt: skip


PROMISED = {"GPU-a": [{"id": "qwen3-32b", "state": "loading", "memory": 21 * GIB, "layers": 65}]}


def answer(machine: Machine, ours: Mapping[int, str] | None = None) -> dict[str, Any]:
    """Return what a client reads."""
    read: dict[str, Any] = json.loads(json.dumps(machine_answer(machine, ours or {}, PROMISED)))
    return read


def test_answer_has_the_names_of_old_clients() -> None:
    """In their units; what is not known is null."""
    told = answer(SHOWN)
    assert told["count"] == len(told["gpus"]) == 3
    old = ("index", "name", "memory_total", "memory_used", "memory_free", "utilization", "temperature", "power_draw")
    assert [told["gpus"][0][name] for name in old] == [0, "NVIDIA H100", 80 * GIB, 20 * GIB, 60 * GIB, 3, 40, 99.6]
    assert [told["gpus"][1][name] for name in old] == [1, "Intel GPU a7a0", *[None] * 6]
    assert told["host"] == {
        "memory_total": 64 * GIB, "memory_used": 24 * GIB, "memory_available": 40 * GIB, "memory_limit": 32 * GIB,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "listed", "expected"),
    [
        ((), ("Vulkan0",), [(0, "Vulkan", "llvmpipe (LLVM 21)", 24 * GIB)]),
        ((Device(0, "H100", "CUDA"),), ("Vulkan0",), []),  # the same one by another name
        ((Device(2, "H100", "CUDA"),), ("CUDA0", "Vulkan0"), [(3, "Vulkan", "llvmpipe (LLVM 21)", 24 * GIB)]),
        ((Device(0, "H100", "CUDA"),), (), []),
    ],
)
def test_devices_that_llama_server_alone_knows_are_shown(
    found: tuple[Device, ...], listed: tuple[str, ...], expected: list[tuple[int, str, str, int]]
) -> None:
    """Such as one that the processor plays."""
    labels, sizes = ("llvmpipe (LLVM 21)",) * len(listed), (24 * GIB,) * len(listed)
    every = with_listed(found, listed, labels, sizes)
    assert every[: len(found)] == found
    assert [(each.index, each.kind, each.name, each.total) for each in every[len(found) :]] == expected


def test_promises_are_told() -> None:
    """What a model may take, whatever it has taken of that yet."""
    told = answer(SHOWN)
    assert [len(each["promised"]) for each in told["gpus"]] == [1, 0, 0]
    assert (
        "     promised to qwen3-32b (loading): 21.0 GiB, 65 layers"
        in gpus.gpus_text(told, with_bars=False).splitlines()
    )


def test_process_that_is_no_unit_is_known_by_its_pid() -> None:
    """The subprocess launcher's models have no cgroup of their own."""
    processes = answer(SHOWN, {14: "tiny"})["gpus"][0]["processes"]
    assert [each["model"] for each in processes] == ["qwen3-32b", None, None, "tiny"]


def test_table_shows_gpus_processes_and_ram() -> None:
    """And nothing that is not known."""
    assert gpus.gpus_text(answer(SHOWN), with_bars=False).splitlines() == [
        "GPU  NAME                         MEMORY               UTIL  TEMP   POWER",
        "0    NVIDIA H100                  20.0 GiB / 80.0 GiB  3%    40 °C  100 W",
        "     model qwen3-32b, pid 11, 2.0 GiB",
        "     python3, pid 12, not ours",
        "     pid 13, 5.0 GiB, not ours",
        "     llama-server, pid 14, 1.0 GiB, not ours",
        "     promised to qwen3-32b (loading): 21.0 GiB, 65 layers",
        "1    Intel GPU a7a0 (shares RAM)  not known",
        "2    Intel GPU e20b               ? / 12.0 GiB",
        "",
        "RAM  24.0 GiB / 64.0 GiB, 40.0 GiB available; models may use 32.0 GiB in all",
    ]


def test_terminal_is_shown_how_full_they_are() -> None:
    """A bar of ten cells; none where it is not known."""
    lines = gpus.gpus_text(answer(SHOWN), with_bars=True).splitlines()
    assert "20.0 GiB / 80.0 GiB  ██░░░░░░░░  3%" in lines[1]
    assert "░" not in lines[7] + lines[8]
    assert "64.0 GiB  ████░░░░░░, 40.0 GiB available" in lines[-1]


def test_faults_are_told_beside_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """And are no failure: whoever asked got what there is."""

    class Fake(Client):
        def get(self, *_: str, query: str = "", timeout_s: float | None = None) -> Any:
            return answer(Machine(HOST, (), ("the NVIDIA GPUs cannot be measured: `modprobe nvidia`",)))

    assert gpus.command(Fake("/nowhere"), argparse.Namespace(json=False)) == 0
    told = capsys.readouterr()
    assert told.out == "no GPU was found\n\nRAM  24.0 GiB / 64.0 GiB, 40.0 GiB available\n"
    assert told.err == "\nthe NVIDIA GPUs cannot be measured: `modprobe nvidia`\n"
