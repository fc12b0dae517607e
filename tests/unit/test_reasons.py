"""Why a server ended: every recorded failure of llama-server gets its category, and nothing else gets one."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmstudiod.core.lifecycle import Failure
from llmstudiod.core.reasons import explain_exit

LOGS = Path(__file__).parents[1] / "data" / "llama-server-logs"


@dataclass(frozen=True, slots=True)
class Run:
    """One recorded run: its lines as the daemon reads them, and how it ended."""

    name: str
    category: str
    is_ok: bool
    code: int
    lines: tuple[str, ...]

    def explain(self) -> Failure:
        """Return what `explain_exit` makes of it."""
        if self.code < 0:
            return explain_exit(result="signal", signal=-self.code, lines=self.lines)
        return explain_exit(result="exit-code", code=self.code, lines=self.lines)


def recorded(*, is_jsonl: bool = False) -> list[Run]:
    """Return the recorded runs; of JSON lines only what they call errors, and raw lines."""
    return [_run(entry) for entry in json.loads((LOGS / "index.json").read_text()) if entry["jsonl"] == is_jsonl]


def _run(entry: dict[str, Any]) -> Run:
    stem = f"{entry['name']}.{'jsonl' if entry['jsonl'] else 'text'}"
    lines: list[str] = []
    for stream in ("stdout", "stderr"):
        path = LOGS / ("ok" if entry["ok"] else "fail") / f"{stem}.{stream}"
        if path.exists():
            lines += filter(None, map(_text, path.read_text(errors="replace").splitlines()))
    return Run(entry["name"], entry["category"], entry["ok"], entry["rc"], tuple(lines))


def _text(line: str) -> str:
    if not line.startswith('{"type"'):
        return line
    entry = json.loads(line)
    return str(entry.get("msg", "")).rstrip() if entry.get("level") == "error" else ""


FAILING = [run for run in recorded() if not run.is_ok]
HEALTHY = [run for run in recorded() if run.is_ok and run.name != "router_with_bad_model"]
"""Without the router: it prints the failures of its children, and llmstudiod starts none."""


def test_there_are_records() -> None:
    """The record is there and has failures of many kinds, so that the tests below say something."""
    assert len(FAILING) >= 40
    assert len({run.category for run in FAILING}) >= 12
    assert len(HEALTHY) >= 8


@pytest.mark.parametrize("is_jsonl", [False, True])
def test_recorded_failures_get_their_category(is_jsonl: bool) -> None:
    """Each recorded failure is explained rightly, as a line of text and as the message of a JSON line."""
    runs = [run for run in recorded(is_jsonl=is_jsonl) if not run.is_ok]
    missed = {run.name: (run.category, run.explain().kind) for run in runs if run.explain().kind != run.category}
    assert missed == {}


@pytest.mark.parametrize("run", FAILING, ids=lambda run: run.name)
def test_reason_is_a_sentence_with_the_telling_line(run: Run) -> None:
    """A failure says the cause in words, quotes one line of the log, names a next step, and keeps the lines."""
    failure = run.explain()
    cause, _, quoted = failure.message.partition(": ")
    assert cause
    assert quoted
    assert any(quoted[:100] in line for line in run.lines)
    assert "\n" not in failure.message
    assert failure.hint
    assert failure.lines == run.lines


@pytest.mark.parametrize("run", HEALTHY, ids=lambda run: run.name)
def test_healthy_logs_hold_no_reason(run: Run) -> None:
    """What a server printed that became ready explains nothing, though some of it sounds fatal."""
    assert run.explain().kind == "exited"


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (
            "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 512.00 MiB on device 0: "
            "cudaMalloc failed: out of memory",
            "oom_vram",
        ),
        ("CUDA error: out of memory", "oom_vram"),
        ("ROCm error: out of memory", "oom_vram"),
        ("ggml_vulkan: Requested buffer size exceeds device buffer size limit: ErrorOutOfDeviceMemory", "oom_vram"),
        ("0.00.123.456 E failed to allocate CUDA0 buffer of size 1073741824", "oom_vram"),
        ("0.00.123.456 E failed to allocate CPU buffer of size 1073741824", "oom_host"),
        ("CUDA error: an illegal memory access was encountered", "gpu_error"),
        ("/src/ggml-cuda.cu:109: CUDA error", "gpu_error"),
        ("ggml_cuda_compute_forward: no device code compatible with CUDA arch 610", "gpu_error"),
        ("0.00.123.456 E error loading model: mmap failed: Cannot allocate memory", "oom_host"),
        ("terminate called after throwing an instance of 'std::runtime_error'", "crash"),
        ("terminate called after throwing an instance of 'std::bad_alloc'", "oom_host"),
        ("./src/llama-context.cpp:2624: GGML_ASSERT(n_outputs >= 1) failed", "crash"),
        ("0.00.123.456 E error loading model: unknown model architecture: 'llamazz'", "unsupported_arch"),
    ],
)
def test_single_lines(line: str, kind: str) -> None:
    """Lines that no record holds, from llama.cpp's source: CUDA's and ROCm's, asserts, uncaught exceptions."""
    assert explain_exit(result="exit-code", code=1, lines=["before", line, "after"]).kind == kind


def test_telling_line_wins_over_the_general_one() -> None:
    """The cause is named though the last lines only say that loading failed, whatever the order."""
    lines = ["cudaMalloc failed: out of memory", "0.00.123.456 E srv llama_server: exiting due to model loading error"]
    assert {explain_exit(result="exit-code", code=1, lines=order).kind for order in (lines, lines[::-1])} == {
        "oom_vram"
    }


@pytest.mark.parametrize("level", "IWDT")
def test_lines_that_the_server_does_not_call_errors_explain_nothing(level: str) -> None:
    """Warnings and talk may sound fatal; only errors and raw lines count."""
    line = f"0.00.123.456 {level} common_fit_params: error loading model: failed to allocate CUDA0 buffer of size 1"
    assert explain_exit(result="exit-code", code=1, lines=[line]).kind == "load_failed"


@pytest.mark.parametrize(
    ("result", "code", "signal", "kind"),
    [
        ("oom-kill", None, 9, "oom_kill"),
        ("signal", None, 9, "killed"),
        ("signal", None, 15, "killed"),
        ("core-dump", None, 6, "crash"),
        ("core-dump", None, 11, "crash"),
        ("signal", None, 7, "crash"),
        ("exit-code", 1, None, "load_failed"),
        ("success", 0, None, "exited"),
    ],
)
def test_exit_without_a_word(result: str, code: int | None, signal: int | None, kind: str) -> None:
    """Without a telling line the exit itself is told."""
    failure = explain_exit(result=result, code=code, signal=signal)
    assert failure.kind == kind
    assert failure.hint


def test_kernel_kill_wins_over_the_log() -> None:
    """What systemd knows for certain is not overruled by a line that a client may have written."""
    failure = explain_exit(result="oom-kill", signal=9, lines=["./x.cpp:1: GGML_ASSERT(false) failed"])
    assert failure.kind == "oom_kill"


def test_quoted_line_is_bounded() -> None:
    """A line of any length leaves a message that can be read."""
    line = "0.00.000.001 E error loading model: " + "x" * 10_000
    assert len(explain_exit(result="exit-code", code=1, lines=[line]).message) < 400
