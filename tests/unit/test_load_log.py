"""What the log of a load tells: how far it is, and what is not as it was asked for."""

from pathlib import Path
from typing import Any

import pytest

from llmstudiod.core.load_log import Expected, LoadFacts, expected, read_load
from llmstudiod.core.memory import Estimate, Run, Share
from llmstudiod.core.placement import Placement
from llmstudiod.core.recipe import Recipe

OK = Path(__file__).parents[1] / "data" / "llama-server-logs" / "ok"
ON_GPU = Expected(is_on_gpu=True, n_gpu_layers=3)
FORGED = [
    "context size reduced from 8192 to 4096",
    "offloaded 1/17 layers to GPU",
    "failed to mlock",
    "warning: no usable GPU found",
]


def lines_of(name: str) -> list[str]:
    """Return the lines of a recorded run."""
    return (OK / f"{name}.text.stderr").read_text(errors="replace").splitlines()


def facts(name: str, wanted: Expected = Expected()) -> LoadFacts:  # noqa: B008 - frozen
    """Return what a recorded run tells."""
    return read_load(lines_of(name), wanted)


@pytest.mark.parametrize(
    ("name", "wanted", "says"),
    [
        ("ngl99_no_gpu", ON_GPU, "no GPU is used"),
        ("lv4_ngl_no_gpu", ON_GPU, "no GPU is used"),
        ("draft_vocab_mismatch", Expected(has_draft=True), "the draft model is not used"),
        ("lv4_mlock", Expected(), "could not be locked"),
        ("lv4_ctx_too_large", Expected(), "2048 tokens, which the model was trained for"),
    ],
)
def test_what_is_not_as_asked_is_told(name: str, wanted: Expected, says: str) -> None:
    """Servers that became ready, though not with all that was asked for."""
    told = facts(name, wanted)
    assert told.is_ready
    assert len(told.warnings) == 1, told.warnings
    assert says in told.warnings[0]


@pytest.mark.parametrize(
    "name",
    [
        "normal",
        "lv4_tiny",
        "lv4_qwen3",
        "lv4_embed",
        "lv4_four_slots",
        "lv4_unified",
        "lv4_fa_off",
        "big_q4k",
        "vulkan_ok",
        "lv4_draft_mismatch",
    ],
)
def test_nothing_is_told_of_what_is_as_asked(name: str) -> None:
    """No warning on a healthy log, whatever sounds bad in it."""
    assert facts(name, ON_GPU if name == "vulkan_ok" else Expected(has_draft="draft" in name)) == LoadFacts(
        "ready", 1.0, (), True
    )


def test_draft_model_without_a_use() -> None:
    """Newer builds load it and leave it at that, unless --spec-type says what it is for."""
    (told,) = facts("lv4_tiny", Expected(has_draft=True)).warnings
    assert told.startswith("the draft model is not used")
    assert "spec_type" in told


def test_fewer_layers_than_asked_for() -> None:
    """llama.cpp's own fitting says so in one line of information."""
    lines = [line.replace("offloaded 3/3", "offloaded 2/3") for line in lines_of("vulkan_ok")]
    assert read_load(lines, ON_GPU).warnings == (
        "2 of 3 layers are on the GPU, and 3 were to be; the others run on the CPU",
    )
    assert read_load(lines, Expected(is_on_gpu=True, n_gpu_layers=2)).warnings == ()


@pytest.mark.parametrize(
    "line",
    [
        "ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected",
        "0.00.004.000 E ggml_cuda_init: failed to initialize ROCm: no ROCm-capable device is detected",
    ],
)
def test_library_without_a_device(line: str) -> None:
    """CUDA's library is there and finds no device: the server runs on the CPU and says 200."""
    told = read_load([line, *lines_of("lv4_tiny")], ON_GPU).warnings
    assert len(told) == 1
    assert "capable device is detected" in told[0]
    assert read_load([line, *lines_of("lv4_tiny")], Expected()).warnings == ()


ON_CPU, ON_ONE = (Placement(gpus, Run(0, n_gpu_layers=11), Estimate(Share())) for gpus in ((), (0,)))


@pytest.mark.parametrize(
    ("fields", "placement", "lists_gpus", "has_gpus", "is_wanted", "n_wanted"),
    [
        ({}, ON_ONE, True, True, True, 11),
        ({}, ON_CPU, True, True, False, None),  # it fits nowhere else, or is not to
        ({}, ON_CPU, False, True, True, None),  # CUDA found nothing, so there was no place
        ({}, ON_CPU, False, False, False, None),
        ({}, None, True, True, True, None),  # another vendor's, or found by a daemon that knows no more
        ({}, None, False, False, False, None),
        ({"n_gpu_layers": 5}, None, True, True, True, 5),
        ({"n_gpu_layers": "all"}, None, False, False, True, None),
        ({"n_gpu_layers": 0}, None, True, True, False, 0),
        ({"gpus": "none", "n_gpu_layers": 5}, None, True, True, False, 5),
    ],
)
def test_what_was_expected(
    fields: dict[str, Any],
    placement: Placement | None,
    lists_gpus: bool,
    has_gpus: bool,
    is_wanted: bool,
    n_wanted: int | None,
) -> None:
    """A GPU is expected where there is one, unless the recipe or the planner has said otherwise."""
    recipe = Recipe(id="a", model_path="a.gguf", draft_model="b.gguf", **fields)
    found = expected(recipe, placement, lists_gpus=lists_gpus, has_gpus=has_gpus)
    assert found == Expected(is_wanted, n_wanted, has_draft=True)


def test_context_that_was_reduced_is_told() -> None:
    """llama.cpp's own fitting shortens it where memory is too small, and says so in a line of information."""
    line = "0.00.100.000 I llama_params_fit_impl: context size reduced from 8192 to 4096 -> need 96 MiB less memory"
    (told,) = read_load([line, *lines_of("lv4_tiny")], Expected()).warnings
    assert "4096 tokens instead of 8192" in told
    assert "max_model_len" in told


@pytest.mark.parametrize("name", ["lv4_tiny", "lv4_forged"])
def test_clients_tell_nothing(name: str) -> None:
    """Behind the ready mark anybody may write."""
    lines = lines_of(name)
    ready = next(number for number, line in enumerate(lines) if "listening on" in line)
    assert read_load([*lines[: ready + 1], *FORGED, *lines[ready + 1 :]], ON_GPU).warnings == ()


@pytest.mark.parametrize("name", ["lv4_tiny", "big_q4k", "vulkan_ok", "normal", "lv4_embed"])
def test_progress_only_grows(name: str) -> None:
    """From nothing to ready, a line at a time."""
    lines = lines_of(name)
    shares = [read_load(lines[:count], Expected()).progress for count in range(len(lines) + 1)]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)


def test_failing_loads_are_never_ready() -> None:
    """A load that fails gets no further than its failure."""
    for path in (OK.parent / "fail").glob("lv4_*.text.stderr"):
        told = read_load(path.read_text(errors="replace").splitlines(), Expected())
        assert not told.is_ready, path.name
        assert told.progress < 1.0
