"""Which device nodes a unit gets, for NVIDIA, AMD and Vulkan, from what a machine has."""

import pytest

from llmstudiod.core.errors import AccessDeniedError
from llmstudiod.core.gpu_nodes import gpu_nodes, nvidia_minors, with_gpus
from llmstudiod.core.launch import Decisions, LaunchRequest

# As the driver writes them; the second GPU of the bus has the minor 0.
INFORMATION = {
    "0000:41:00.0": "Model: \t\t X\nGPU UUID: \t GPU-bbbb\nDevice Minor: \t 0\n",
    "0000:01:00.0": "Model: \t\t X\nGPU UUID: \t GPU-aaaa\nDevice Minor: \t 1\n",
}  # fmt: skip
MINORS = [("GPU-aaaa", 1), ("GPU-bbbb", 0)]
CONTROL = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")
CAPS = ("/dev/nvidia-caps/nvidia-cap1", "/dev/nvidia-caps/nvidia-cap2")
DRI = ("/dev/dri/renderD128", "/dev/dri/renderD129")
NODES = (*CONTROL, "/dev/nvidia0", "/dev/nvidia1", *CAPS, *DRI, "/dev/kfd")


def test_minors_are_in_the_order_of_the_bus() -> None:
    """The minor is not the index."""
    assert nvidia_minors(INFORMATION) == MINORS


def test_what_the_driver_does_not_say_is_left_out() -> None:
    """A file of another driver's costs nothing."""
    assert nvidia_minors({"x": "Model: ?\n", "y": ""}) == []


@pytest.mark.parametrize(
    ("backends", "gpus", "expected"),
    [
        (["CUDA0", "CUDA1"], None, (*CONTROL, "/dev/nvidia1", "/dev/nvidia0")),
        (["CUDA0", "CUDA1"], ["0"], (*CONTROL, "/dev/nvidia1")),
        (["CUDA0", "CUDA1"], ["GPU-bbbb"], (*CONTROL, "/dev/nvidia0")),
        (["CUDA0"], ["7"], ()),
        (["CUDA0"], ["MIG-1234"], (*CONTROL, "/dev/nvidia1", "/dev/nvidia0", *CAPS)),
        (["Vulkan0"], None, (*CONTROL, "/dev/nvidia1", "/dev/nvidia0", *DRI)),
        (["ROCm0"], None, (*DRI, "/dev/kfd")),
        (["SYCL0"], None, DRI),
        (["CPU", "BLAS"], None, ()),
        ([], None, ()),
    ],
)
def test_nodes_are_those_of_the_gpus(backends: list[str], gpus: list[str] | None, expected: tuple[str, ...]) -> None:
    """Exactly those of the assigned GPUs, with what their driver needs besides."""
    assert gpu_nodes(backends, gpus, minors=MINORS, nodes=NODES) == expected


def test_node_that_is_not_there_is_not_asked_for() -> None:
    """A unit with DeviceAllow= for a missing node would not get it later either."""
    assert gpu_nodes(["CUDA0"], None, minors=MINORS, nodes=["/dev/nvidiactl", "/dev/nvidia1"]) == (
        "/dev/nvidiactl",
        "/dev/nvidia1",
    )


def request_of(**environment: str) -> LaunchRequest:
    """A request before its GPUs are known."""
    return LaunchRequest("m", "sha256:0", None, ("llama-server",), environment, "/run/x")


@pytest.mark.parametrize(
    ("allowed", "asked", "visible", "nodes"),
    [
        (None, (), None, ("/dev/nvidia1", "/dev/nvidia0")),
        (("1",), (), "GPU-bbbb", ("/dev/nvidia0",)),
        (("GPU-aaaa", "1"), ("GPU-bbbb",), "GPU-bbbb", ("/dev/nvidia0",)),
        (None, ("GPU-aaaa",), "GPU-aaaa", ("/dev/nvidia1",)),
        ("none", (), None, ()),
    ],
)
def test_cuda_sees_its_gpus_by_uuid(
    allowed: tuple[str, ...] | None, asked: tuple[str, ...], visible: str | None, nodes: tuple[str, ...]
) -> None:
    """With the nodes of some GPUs alone an index would mean another one."""
    found = with_gpus(request_of(), allowed, asked, backends=["CUDA0"], minors=MINORS, nodes=NODES)
    assert found.environment.get("CUDA_VISIBLE_DEVICES") == visible
    assert found.devices == ((*CONTROL, *nodes) if nodes else ())


@pytest.mark.parametrize(("allowed", "asked"), [(("0",), "GPU-bbbb"), ("none", "GPU-aaaa"), (("GPU-aaaa",), "GPU-x")])
def test_gpu_that_the_recipe_does_not_allow_is_refused(allowed: tuple[str, ...], asked: str) -> None:
    """Whoever asks for it."""
    with pytest.raises(AccessDeniedError, match=f"does not allow {asked}"):
        with_gpus(request_of(), allowed, (asked,), backends=["CUDA0"], minors=MINORS, nodes=NODES)


def test_model_that_lies_on_the_cpu_gets_no_gpu() -> None:
    """Nobody asked for one, which is not the same as for any."""
    placed = LaunchRequest("m", "", None, (), {"CUDA_VISIBLE_DEVICES": ""}, "", decisions=Decisions(n_gpu_layers=0))
    assert with_gpus(placed, None, (), backends=["CUDA0"], minors=MINORS, nodes=NODES) == placed
