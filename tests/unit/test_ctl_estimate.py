"""``llmstudioctl estimate``: terms and totals, on the CPU and on a GPU, for good files and bad ones."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llmstudiod.core.memory import Run, estimate
from llmstudiod.ctl.main import main
from tests.model_zoo import TYPES, ZOO, write
from tests.unit.test_memory import shape_of


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of gemma's kind."""
    return write(tmp_path / "gemma.gguf", ZOO["gemma3"])


def test_table_shows_cpu_and_gpu(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what the file says of itself, and the context that counts."""
    assert main(["estimate", str(model), "--n-ctx", "4096", "--n-parallel", "2"]) == 0
    told = capsys.readouterr().out
    assert "gemma: gemma3, 12 layers, trained for 32768 tokens, 322.3 MiB" in told
    assert "2 slots of 4096 tokens, 8192 in all" in told
    assert "without a GPU" in told
    assert "all layers on one GPU" in told
    assert "KV cache  92.0 MiB" in told


def test_json_is_what_the_estimator_says(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In bytes, for the layers that were asked for."""
    argv = ["estimate", str(model), "--json", "--n-ctx", "4096", "--n-parallel", "2", "--n-gpu-layers", "5"]
    assert main([*argv, "--cache-type-k", "q8_0", "--no-flash-attn", "--n-ubatch", "256"]) == 0
    told = json.loads(capsys.readouterr().out)
    run = Run(8192, n_seq=2, type_k="q8_0", flash_attn=False, n_ubatch=256, n_gpu_layers=5, proportions=(1.0,))
    need = estimate(shape_of(ZOO["gemma3"], tmp_path), run)
    assert (told["architecture"], told["n_ctx_total"]) == ("gemma3", 8192)
    (one,) = told["estimates"]
    assert one == {"name": "5 of 13 layers on one GPU", **need.as_dict()}


def test_files_beside_the_model_count(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A draft model and an encoder."""
    assert main(["estimate", str(model), "--json", "--draft-model", str(model), "--mmproj", str(model)]) == 0
    both = json.loads(capsys.readouterr().out)["estimates"][1]["devices"][0]
    assert main(["estimate", str(model), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)["estimates"][1]["devices"][0]
    assert both["kv"] == 2 * alone["kv"]
    assert both["weights"] > 2 * alone["weights"]


def test_architecture_that_was_not_compared_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its figures are formulas, no more."""
    assert main(["estimate", str(write(tmp_path / "m.gguf", ZOO["mixtral"]))]) == 0
    assert "not validated for experts (llama)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["{tmp}/nothing.gguf"], 3, "does not exist"),
        (["{tmp}/text.gguf"], 3, "is not GGUF"),
        (["{tmp}/gemma.gguf", "--mmproj", "{tmp}/text.gguf"], 3, "is not GGUF"),
        (["{tmp}/gemma.gguf", "--n-ctx", "16777216", "--n-parallel", "256"], 7, "lower max_model_len"),
    ],
)
def test_bad_file_is_told(
    argv: list[str], code: int, says: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one sentence, with an exit code of its own."""
    (tmp_path / "text.gguf").write_text("a text")
    assert main(["estimate", *(word.format(tmp=tmp_path) for word in argv)]) == code
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--n-ctx", "0"], ["--n-ctx", "x"], ["--cache-type-k", "q9"], ["--n-gpu-layers", "-1"]]
)
def test_bad_number_is_wrong_usage(argv: list[str], model: Path) -> None:
    """Exit code 2, as for every wrong usage."""
    with pytest.raises(SystemExit) as caught:
        main(["estimate", str(model), *argv])
    assert caught.value.code == 2


def test_first_look_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of 40 GB with a vocabulary of 32,000 tokens, of which the header alone is read."""
    big = replace(ZOO["llama-wide"], layers=80, embd=8192, ff=28672, heads=64, weights=TYPES.Q4_0)
    path = write(tmp_path / "big.gguf", big)
    assert path.stat().st_size > 36e9
    began = time.perf_counter()
    assert main(["estimate", str(path)]) == 0
    assert time.perf_counter() - began < 2  # 0.05 s on an idle machine; the bound is for a busy one
    assert "80 layers" in capsys.readouterr().out
