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
        return self.explain_end(self.code)

    def explain_end(self, code: int) -> Failure:
        """Return what `explain_exit` would make of another end; a negative code is a signal."""
        if code < 0:
            return explain_exit(result="signal", signal=-code, lines=self.lines)
        return explain_exit(result="exit-code", code=code, lines=self.lines)


def recorded(*, is_jsonl: bool = False) -> list[Run]:
    """Return the recorded runs."""
    return [_run(entry) for entry in json.loads((LOGS / "index.json").read_text()) if entry["jsonl"] == is_jsonl]


def _run(entry: dict[str, Any]) -> Run:
    stem = f"{entry['name']}.{'jsonl' if entry['jsonl'] else 'text'}"
    lines: list[str] = []
    for stream in ("stdout", "stderr"):
        path = LOGS / ("ok" if entry["ok"] else "fail") / f"{stem}.{stream}"
        if path.exists():
            lines += path.read_text(errors="replace").splitlines()
    return Run(entry["name"], entry["category"], entry["ok"], entry["rc"], tuple(lines))


FAILING = [run for run in recorded() if not run.is_ok]
TOLD = [run for run in FAILING if not run.name.startswith("run_")]
"""Those that say why they end; the others were ready, and ended by a signal."""
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


@pytest.mark.parametrize("run", TOLD, ids=lambda run: run.name)
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
    ends = {code: run.explain_end(code) for code in (1, -9, -15, -11, -6)}
    kinds = {code: failure.kind for code, failure in ends.items()}
    assert kinds == {1: "crash", -9: "killed", -15: "killed", -11: "crash", -6: "crash"}
    assert ends[1].message.startswith("it ended with exit code 1")
    assert "signal 11" in ends[-11].message  # and not what a client has had it write


@pytest.mark.parametrize("run", TOLD, ids=lambda run: run.name)
@pytest.mark.parametrize("signal", [9, 15])
def test_whoever_was_killed_did_not_fail(run: Run, signal: int) -> None:
    """A kill from outside is told as one, whatever the log says."""
    assert run.explain_end(-signal).kind == "killed"


def test_a_client_cannot_explain_an_end() -> None:
    """What an invalid grammar has a ready server write, at the start of lines, explains neither a kill nor a crash."""
    healthy = next(run for run in HEALTHY if run.name == "lv4_tiny")
    forged = ["parse: error parsing grammar: expecting name at GGML_ASSERT(", "error loading model: x", "CUDA error: x"]
    lines = (*healthy.lines[:-1], *forged, "0.00.200.000 W got exception: {}", healthy.lines[-1])
    for signal, kind in ((9, "killed"), (11, "crash")):
        failure = explain_exit(result="signal", signal=signal, lines=lines)
        assert failure.kind == kind
        assert "SIGKILL" in failure.message or "signal 11" in failure.message


def test_crash_of_a_ready_server_is_told_by_its_last_words() -> None:
    """The assertion that ended it is in the sentence, though a request was logged before."""
    healthy = next(run for run in HEALTHY if run.name == "lv4_tiny")
    end = ["/src/ggml-cuda.cu:88: CUDA error", "/usr/lib/libggml-base.so.0(ggml_abort+0x14e) [0x7f]"]
    failure = explain_exit(result="core-dump", signal=6, lines=(*healthy.lines, *end))
    assert failure.kind == "gpu_error"
    assert "CUDA error" in failure.message


def test_architecture_names_the_build() -> None:
    """Whoever has an old build is told which."""
    run = next(run for run in FAILING if run.category == "unsupported_arch")
    failure = explain_exit(result="exit-code", code=1, lines=run.lines, build="0.7.0 (build 11669)")
    assert "nosuch" in failure.message or "llamazz" in failure.message
    assert "0.7.0 (build 11669) is too old" in (failure.hint or "")


@pytest.mark.parametrize("run", [run for run in TOLD if run.category == "bad_args"], ids=lambda run: run.name)
def test_refused_setting_is_named(run: Run) -> None:
    """A person can see which flag it is, also where llama-server prints its usage alone."""
    message = run.explain().message
    assert "usage:" not in message
    assert "-" in message or "type" in message or "n_" in message or "V cache" in message


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


# What makes a reason understood


def test_the_telling_line_is_quoted() -> None:
    """llama-server says that a template cannot be used in one line, and why in another."""
    lines = [
        "0.00.001.815 E common_chat_templates_init: error: Unexpected token: } of type 15",
        "0.00.027.142 E srv          init: init: chat template parsing error: std::exception",
    ]
    failure = explain_exit(result="exit-code", code=1, lines=lines)
    assert failure.kind == "chat_template"
    assert "Unexpected token: } of type 15" in failure.message


def test_an_exception_is_told_with_its_words() -> None:
    """The C++ runtime prints the type in one line and the message in the next."""
    lines = ["terminate called after throwing an instance of 'std::runtime_error'", "  what():  it is broken"]
    failure = explain_exit(result="core-dump", signal=6, lines=lines)
    assert (failure.kind, failure.message.endswith("'std::runtime_error': it is broken")) == ("crash", True)
    lines[1] = "  what():  Resource temporarily unavailable"
    assert "threads" in str(explain_exit(result="core-dump", signal=6, lines=lines).hint)


def test_files_are_named_as_outside_of_the_sandbox() -> None:
    """The user's path stands in the sentence; the lines stay as they were."""
    line = "0.00.044.600 E cmn  common_init_: failed to load lora adapter '/run/llmstudio-model/1/a.gguf'"
    failure = explain_exit(
        result="exit-code", code=1, lines=[line], paths={"/run/llmstudio-model/1/a.gguf": "/m/a.gguf"}
    )
    assert "'/m/a.gguf'" in failure.message
    assert failure.lines == (line,)


def test_ready_server_is_not_explained_by_what_only_a_load_can_fail_for() -> None:
    """Its last words decide, and even of these only what can end a server that serves."""
    words = ["error: invalid argument: --x", "0.00.001.000 E llama_model_load: error loading model: x"]
    failure = explain_exit(result="exit-code", code=1, lines=words, was_ready=True)
    assert (failure.kind, failure.message.startswith("it ended with exit code 1")) == ("crash", True)


def test_json_lines_below_an_error_explain_nothing() -> None:
    """With --log-jsonl the level is a field."""
    line = '{"type":"log","time":1,"level":"warn","msg":"error loading model: x\\n"}'
    assert explain_exit(result="exit-code", code=1, lines=[line]).kind == "load_failed"
    assert explain_exit(result="exit-code", code=1, lines=[line.replace("warn", "error")]).kind == "bad_model_file"


def test_forbidden_system_call() -> None:
    """Nobody stopped it by hand."""
    failure = explain_exit(result="core-dump", signal=31)
    assert (failure.kind, "SystemCallFilter" in str(failure.hint)) == ("crash", True)
