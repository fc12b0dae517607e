"""GPUs in plans: which of them memory is planned on, which a recipe means, and what a start is told."""

from dataclasses import replace
from pathlib import Path

import pytest

from llmstudiod.adapters.planner import Planner
from llmstudiod.adapters.program import LocalProgram
from llmstudiod.core.devices import Device, HostMemory, Machine
from llmstudiod.core.errors import LoadFailedError
from llmstudiod.core.gpus import plannable, positions, with_gpus
from llmstudiod.core.launch import Decisions, decided
from llmstudiod.core.launcher_protocol import Verb
from llmstudiod.core.ledger import Memory
from llmstudiod.core.placement import Room, place
from llmstudiod.core.recipe import Recipe
from llmstudiod.core.settings import Settings
from llmstudiod.launchers.privileged import launch
from tests.model_zoo import ZOO, write
from tests.unit.fake_server import write_program
from tests.unit.test_planner import NoLauncher, entry

GIB = 1 << 30
LISTED = "Available devices:\\n  CUDA0: A (1 MiB, 1 MiB free)\\n  CUDA1: A (1 MiB, 1 MiB free)\\n"
SERVER = f"""
    case "$1" in
        --list-devices) printf '{LISTED}' ;;
        *) echo "version: 1" ;;
    esac
"""


def gpu(index: int, gib: float = 24, **changes: object) -> Device:
    """A GPU of NVIDIA's."""
    device = Device(index, "A", "CUDA", uuid=f"GPU-{index}", total=int(gib * GIB), free=int(gib * GIB))
    return replace(device, **changes)  # type: ignore[arg-type]


def machine(*devices: Device) -> Machine:
    """A machine with these GPUs."""
    return Machine(HostMemory(64 * GIB, 60 * GIB), devices)


@pytest.mark.parametrize(
    ("devices", "backends", "planned"),
    [
        ((gpu(1), gpu(0)), ("CUDA0", "CUDA1"), [0, 1]),
        ((gpu(0),), (), []),  # a llama-server without a GPU
        ((gpu(0),), ("Vulkan0",), []),
        ((gpu(0),), ("CUDA0", "Vulkan0"), []),
        ((gpu(0),), ("CUDA0", "CUDA1"), []),  # one of them was not measured
        ((gpu(0), gpu(1, free=None)), ("CUDA0", "CUDA1"), []),
        ((gpu(0, uuid=None),), ("CUDA0",), []),
        ((gpu(0, shares_host_memory=True),), ("CUDA0",), []),
        ((gpu(0), Device(1, "B", "Vulkan")), ("CUDA0",), [0]),
    ],
)
def test_memory_is_planned_where_every_gpu_is_known(
    devices: tuple[Device, ...], backends: tuple[str, ...], planned: list[int]
) -> None:
    """Half a machine cannot be planned: llama-server would use what nobody counts."""
    assert [each.index for each in plannable(machine(*devices), backends)] == planned


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [(None, None), ("none", ()), (("5",), (1,)), (("GPU-5", "2"), (1, 0)), (("GPU-2",), (0,))],
)
def test_recipe_means_gpus_by_index_or_uuid(gpus: object, expected: tuple[int, ...] | None) -> None:
    """Their places among those that are planned, since indices may have gaps."""
    recipe = Recipe(id="m", model_path="/m.gguf", gpus=gpus)  # type: ignore[arg-type]
    assert positions(recipe, [gpu(2), gpu(5)]) == expected


def test_gpu_that_is_not_there_is_refused() -> None:
    """With those that are."""
    with pytest.raises(LoadFailedError) as caught:
        positions(Recipe(id="m", model_path="/m.gguf", gpus=("7",)), [gpu(0), gpu(1)])
    assert "there is no GPU '7' that can be used; there are 0 (GPU-0), 1 (GPU-1)" in caught.value.message
    assert "llmstudioctl gpus" in str(caught.value.hint)


def test_some_of_each_gpu_is_left_to_others() -> None:
    """Of what there is, and of what is free; a GPU's own number counts, by its index or UUID."""
    reserved = {"gpu": GIB, "ram": 0, "GPU-5": 2 * GIB, "5": 7 * GIB, "6": 3 * GIB}
    devices = [gpu(0, 24, free=3 * GIB), gpu(3, 8, free=0), gpu(5, 8), gpu(6, 8)]
    memory = with_gpus(Memory(1.0, Room(10), Room(5)), devices, reserved)
    assert memory.capacity == Room(10, (23 * GIB, 7 * GIB, 6 * GIB, 5 * GIB))
    assert memory.free.devices[:2] == (2 * GIB, 0)
    assert (memory.names, memory.uuids) == (
        ("GPU 0", "GPU 3", "GPU 5", "GPU 6"),
        ("GPU-0", "GPU-3", "GPU-5", "GPU-6"),
    )


PLACED = Decisions(n_gpu_layers=33, tensor_split=(20, 13), gpus=("GPU-0", "GPU-1"))


@pytest.mark.parametrize(
    ("fields", "decisions", "expected"),
    [
        ({}, PLACED, {"n_gpu_layers": 33, "split_mode": "layer", "tensor_split": (20.0, 13.0), "gpus": PLACED.gpus}),
        ({}, Decisions(n_gpu_layers=5, gpus=("GPU-1",)),
         {"n_gpu_layers": 5, "split_mode": "none", "tensor_split": None}),
        ({}, Decisions(n_gpu_layers=0), {"n_gpu_layers": 0, "gpus": "none"}),
        ({"n_gpu_layers": "all", "split_mode": "row", "tensor_split": (1.0, 1.0)}, PLACED,
         {"n_gpu_layers": "all", "split_mode": "row", "tensor_split": (1.0, 1.0), "gpus": PLACED.gpus}),
        ({}, Decisions(), {"n_gpu_layers": "auto", "gpus": None, "max_num_seqs": None}),
        ({}, Decisions(max_num_seqs=2), {"max_num_seqs": 2}),
        ({"max_num_seqs": 3}, Decisions(max_num_seqs=2), {"max_num_seqs": 3}),
        ({"main_gpu": 1}, Decisions(n_gpu_layers=5, gpus=("GPU-1",)), {"main_gpu": 0}),
        ({"main_gpu": 1}, PLACED, {"main_gpu": 1}),
    ],
)  # fmt: skip
def test_place_becomes_a_recipe(
    fields: dict[str, object], decisions: Decisions, expected: dict[str, object]
) -> None:  # fmt: skip
    """What the recipe sets stays; what it leaves open is what was chosen."""
    recipe = decided(Recipe(id="m", model_path="/m.gguf", **fields), decisions)  # type: ignore[arg-type]
    assert {name: getattr(recipe, name) for name in expected} == expected


def planner_of(tmp_path: Path, *devices: Device) -> Planner:
    """A planner of a machine with these GPUs, and a llama-server that lists two."""
    settings = Settings(llama_server=str(write_program(tmp_path / "llama-server", SERVER)))
    return Planner(settings, NoLauncher(), LocalProgram(settings, {}), measure=lambda: machine(*devices))


async def test_gpus_that_cannot_be_measured_any_more_keep_their_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """NVML that fails in the middle must not send a model to the CPU: what was promised counts then. Told once."""
    machines = [machine(gpu(0, 24, free=3 * GIB), gpu(1, 8)), Machine(HostMemory(1, 1), (), ("NVML: Unknown Error",))]
    settings = Settings(llama_server=str(write_program(tmp_path / "llama-server", SERVER)))
    planner = Planner(settings, NoLauncher(), LocalProgram(settings, {}), measure=lambda: machines[0])
    assert planner.gpus() == ()  # llama-server has not been asked yet
    await planner.binary()
    assert [each.free for each in planner.gpus()] == [3 * GIB, 8 * GIB]
    del machines[0]
    for _ in range(3):
        assert [(each.uuid, each.free) for each in planner.gpus()] == [("GPU-0", 24 * GIB), ("GPU-1", 8 * GIB)]
    assert caplog.text.count("other programs' use is not known: NVML: Unknown Error") == 1
    machines.insert(0, machine(gpu(0, 24, free=GIB), gpu(1, 8)))
    assert [each.free for each in planner.gpus()] == [GIB, 8 * GIB]


async def test_placement_becomes_a_command_line(tmp_path: Path) -> None:
    """The GPUs by UUID, in the order of the bus; layers and parts; nothing that llama-server may change silently."""
    path = write(tmp_path / "m.gguf", ZOO["llama-gqa"])
    planner = planner_of(tmp_path, gpu(0, 1), gpu(1, 1))
    wanted = entry(path)
    wish = (await planner.plan(wanted)).wish
    assert wish is not None
    assert (wish.gpus, wish.n_gpu_layers) == (None, None)
    placement = place(wish, Room(60 * GIB, (700 << 20, 1 << 30)))
    assert placement is not None
    placement = replace(placement, uuids=tuple(f"GPU-{index}" for index in placement.gpus))
    assert len(placement.gpus) == 2
    request = (await planner.plan(wanted, placement)).request
    argv, split = request.argv, [str(int(part)) for part in placement.run.proportions]
    assert argv[argv.index("-ngl") + 1] == str(placement.run.n_gpu_layers)
    assert argv[argv.index("--tensor-split") + 1] == ",".join(split)
    assert argv[argv.index("--split-mode") + 1] == "layer"
    assert argv[argv.index("-fit") + 1] == "off"
    assert request.environment["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-1"
    assert request.environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    told = launch(Verb.START, request)
    assert (told.gpus, told.n_gpu_layers) == (("GPU-0", "GPU-1"), placement.run.n_gpu_layers)


async def test_main_gpu_is_the_one_that_is_used(tmp_path: Path) -> None:
    """Where the model lies on one alone; a place among those that the recipe allows."""
    path = write(tmp_path / "m.gguf", ZOO["llama-gqa"])
    planner = planner_of(tmp_path, gpu(0, 24), gpu(1, 24))
    for fields, expected in (
        ({"main_gpu": 1, "split_mode": "none"}, (1,)),
        ({"main_gpu": 0, "split_mode": "none", "gpus": ("1", "0")}, (1,)),
        ({"main_gpu": 1}, None),
    ):
        wish = (await planner.plan(entry(path, **fields))).wish
        assert wish is not None
        assert wish.gpus == expected


async def test_model_that_fits_on_no_gpu_sees_none(tmp_path: Path) -> None:
    """It takes no memory there, not even for a context."""
    path = write(tmp_path / "m.gguf", ZOO["llama-gqa"])
    planner = planner_of(tmp_path, gpu(0, 1), gpu(1, 1))
    wish = (await planner.plan(entry(path))).wish
    assert wish is not None
    placement = place(wish, Room(60 * GIB, (0, 0)))
    assert placement is not None
    assert (placement.gpus, placement.run.n_gpu_layers) == ((), 0)
    assert placement.notes == ("0 of 17 layers on the GPU: more does not fit",)
    request = (await planner.plan(entry(path), placement)).request
    assert request.argv[request.argv.index("--device") + 1] == "none"
    assert request.environment["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"gpus": ("4",)}, "there is no GPU '4'"),
        ({"tensor_split": (1.0, 1.0, 1.0)}, "tensor_split has 3 parts, and there are 2 GPUs"),
        ({"main_gpu": 2, "split_mode": "none"}, "main_gpu: expected 0 to 1, a place among the GPUs"),
        ({"main_gpu": 1, "tensor_parallel_size": 1, "gpus": ("1",)}, "main_gpu: expected 0 to 0"),
        ({"tensor_split": (1.0, 1.0), "gpus": ("0",)}, "tensor_split has 2 parts, and there are 1 GPUs"),
    ],
)
async def test_gpus_that_are_not_there_are_told(tmp_path: Path, fields: dict[str, object], says: str) -> None:
    """Before anything is started or evicted."""
    path = write(tmp_path / "m.gguf", ZOO["llama-gqa"])
    with pytest.raises(LoadFailedError, match=says):
        await planner_of(tmp_path, gpu(0), gpu(1)).plan(entry(path, **fields))
