"""What llama-server tells of its memory, and what becomes of the estimate."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmstudiod.core.learned import (
    AS_ESTIMATED,
    Correction,
    Told,
    corrected,
    correction,
    told_by_breakdown,
    told_by_log,
)
from llmstudiod.core.memory import MIB, Estimate, Share

LOGS = Path(__file__).parents[1] / "data" / "llama-server-logs" / "ok"
NEED = Estimate(
    host=Share(weights=100 * MIB, kv=8 * MIB, compute=30 * MIB, runtime=64 * MIB),
    devices=(Share(weights=500 * MIB, kv=56 * MIB, compute=70 * MIB, runtime=512 * MIB, layers=9), Share()),
)


def event(*rows: dict[str, object]) -> str:
    """A line of a dry run."""
    return json.dumps({"type": "fit_memory_breakdown", "data": {"unit": "MiB", "rows": list(rows)}})


def row(context: int, compute: int, name: str = "Host") -> dict[str, object]:
    """A device of it."""
    return {"kind": "host", "name": name, "self": 0, "model": 9, "context": context, "compute": compute}


def test_breakdown_of_a_dry_run_is_added_up() -> None:
    """Over the devices; the buffer for logits is not in it."""
    told = told_by_breakdown(event(row(10, 20), row(30, 40, "CUDA0")), output=5)
    assert told == Told(kv=40 * MIB, compute=60 * MIB + 5, step=MIB, n=2)


@pytest.mark.parametrize(
    "line",
    ["", "0.00.1 I load_tensors: fit_memory_breakdown", '{"type":"log","msg":"\\"fit_memory_breakdown\\""}',
     event({"context": "x", "compute": 1}), '{"type":"fit_memory_breakdown","data":[]}', event({"compute": 1})],
)  # fmt: skip
def test_other_lines_tell_nothing(line: str) -> None:
    """Also those that look like it."""
    assert told_by_breakdown(line, output=0) is None


def test_log_of_a_load_is_added_up() -> None:
    """Kinds of buffers over the devices, and devices over the kinds."""
    told = told_by_log(
        [
            "load_tensors:   CPU_Mapped model buffer size =   110.47 MiB",
            "load_tensors:        CUDA0 model buffer size =   500.00 MiB",
            "llama_context:        CPU  output buffer size =     0.50 MiB",
            "llama_kv_cache:      CUDA0 KV buffer size =    10.00 MiB",
            "llama_kv_cache:      CUDA0 KV buffer size =     2.00 MiB",
            "llama_memory_recurrent:        CPU RS buffer size =     2.00 MiB",
            "sched_reserve:      CUDA0 compute buffer size =    30.25 MiB",
            "sched_reserve:        CPU compute buffer size =     1.00 MiB",
            "srv  llama_server: listening on unix:///x.sock",
        ]
    )
    assert told is not None
    assert (told.kv, told.compute, told.n) == (14 * MIB, int(31.75 * MIB), 8)
    assert told.devices["CUDA0"] == int(542.25 * MIB)
    assert told_by_log(["load_tensors: CPU model buffer size = 1.00 MiB"]) is None


@pytest.mark.parametrize(
    ("kv", "compute", "expected"),
    [
        (64 * MIB, 100 * MIB, (1.0, 1.0)),
        (64 * MIB + 2000, 100 * MIB - 2000, (1.0, 1.0)),  # as its log rounds
        (128 * MIB, 50 * MIB, (2.0, 0.5)),
        (0, 1_000_000 * MIB, (0.1, 1000.0)),  # nobody is off by more: it was something else
    ],
)
def test_correction_is_a_factor(kv: int, compute: int, expected: tuple[float, float]) -> None:
    """What lies within the rounding is confirmed."""
    found = correction(NEED, Told(kv, compute, step=MIB // 100), source="x")
    assert (found.kv, found.compute) == pytest.approx(expected, rel=0.001)


def test_what_was_not_estimated_is_not_corrected() -> None:
    """A factor of nothing is nothing."""
    assert correction(Estimate(Share()), Told(5, 5, 1), source="x").kv == 1.0


def test_corrected_estimate() -> None:
    """Factors on the terms, the GPU's runtime where there is one, and what it had more in RAM; then it is sure."""
    unsure = replace(NEED, is_validated=False)
    need = corrected(unsure, Correction(kv=0.5, compute=2.0, runtime=200 * MIB, host=MIB, source="a dry run"))
    assert need.devices[0] == Share(500 * MIB, 28 * MIB, 140 * MIB, 200 * MIB, 9)
    assert need.devices[1] == Share()
    assert need.host == Share(100 * MIB, 4 * MIB, 60 * MIB, 65 * MIB)
    assert need.is_validated
    assert corrected(unsure, AS_ESTIMATED) is unsure


@pytest.mark.parametrize(
    "values",
    [{"kv": 0.0}, {"compute": 1e9}, {"kv": "x"}, {"host": -1}, {"runtime": -1}, {"no": 1}, {"kv": float("nan")}],
)
def test_damaged_correction_is_none(values: dict[str, object]) -> None:
    """A state file is not trusted."""
    with pytest.raises((TypeError, ValueError)):
        Correction.from_dict(values)
    good = Correction(kv=1.5, runtime=5, source="its last run")
    assert Correction.from_dict(json.loads(json.dumps(good.as_dict()))) == good
    assert good.is_of_a_run


def test_recorded_logs_tell() -> None:
    """All that were recorded at the level of the memory lines."""
    logs = [path.read_text(errors="replace") for path in sorted(LOGS.rglob("*")) if path.is_file()]
    telling = [text for text in logs if "compute buffer size" in text]
    assert telling
    for text in telling:
        told = told_by_log(text.splitlines())
        assert told is not None
        assert told.compute > 0
