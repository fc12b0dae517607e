"""Why a server ended, read from its exit and the last lines of its own run.

A pattern may explain an exit; it must never cause one: any client can put ``GGML_ASSERT(`` at the start of a line of
a healthy server's log, by sending an invalid grammar. So this is asked only while a model loads or after it ended.
Source of the lines: llama.cpp 0.7.0 (build 11669), recorded runs; CUDA's from ggml-cuda.cu.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from llmstudiod.core.lifecycle import Failure

_PREFIX = re.compile(r"^\d+\.\d\d\.\d{3}\.\d{3} ([IWEDT]) ")

# The first rule that any line fits wins over the whole log, so the telling ones stand before the general ones.
_RULES: tuple[tuple[str, str, str, str], ...] = (
    (
        "oom_vram",
        r"cudaMalloc failed: |^(?:CUDA|ROCm|MUSA) error: out of memory|ErrorOutOfDeviceMemory"
        r"|Device memory allocation of size \d+ failed|failed to allocate (?!CPU)\S+ buffer of size \d+",
        "the GPU's memory is too small for it",
        "lower n_gpu_layers, max_model_len or max_num_seqs, or unload another model",
    ),
    (
        "gpu_error",
        r"^(?:CUDA|ROCm|MUSA) error(?::|$)|: (?:CUDA|ROCm|MUSA) error$|ErrorDeviceLost|no device code compatible with",
        "the GPU or its driver reported an error",
        "look at `dmesg` and the driver's version",
    ),
    (
        "oom_host",
        r"ggml_aligned_malloc: insufficient memory|mmap failed: Cannot allocate memory"
        r"|unable to allocate CPU\S* buffer|failed to allocate CPU buffer of size"
        r"|GGML_ASSERT\(ctx->mem_buffer != NULL\)|std::bad_alloc",
        "the machine's memory is too small for it",
        "lower max_model_len or max_num_seqs, or unload another model",
    ),
    (
        "socket",
        r"couldn't bind HTTP server socket, hostname: ",
        "it could not listen on its socket",
        "is another server using the runtime directory?",
    ),
    (
        "permission",
        r"failed to open GGUF file '.*' \(Permission denied\)",
        "the model's file may not be read",
        "make the file readable for everybody (chmod o+r)",
    ),
    (
        "draft",
        r"^(?:srv\s+load_model|common_speculative_init_result): failed to load draft model",
        "the draft model could not be loaded",
        "see draft_model",
    ),
    (
        "mmproj",
        r"load_model: failed to load multimodal model,|^(?:clip_init|mtmd_init_from_file): .*(?i:failed to load)",
        "the multimodal projector could not be loaded",
        "see mmproj: it must belong to this model",
    ),
    (
        "lora",
        r"failed to load lora adapter '",
        "a LoRA adapter could not be loaded",
        "see lora: it must belong to this model",
    ),
    (
        "unsupported_arch",
        r"error loading model: unknown model architecture: '",
        "this build of llama-server does not know the model's architecture",
        "install a newer llama-server",
    ),
    (
        "model_not_found",
        r"failed to open GGUF file '.*' \(No such file or directory\)",
        "the model's file is not there",
        "see model_path",
    ),
    (
        "chat_template",
        r"init: chat template parsing error:|the supplied chat template is not supported",
        "the chat template cannot be used",
        "set chat_template or chat_template_file",
    ),
    (
        "bad_args",
        r'^error: invalid argument: |^error while handling argument "|^usage:$'
        r"|^llama_init_from_model: (?:quantized V cache|[KV] cache type \S+ with block size|n_batch and n_ubatch"
        r"|failed to initialize the context: n_seq_max|model does not support different K)",
        "llama-server refused a setting",
        "`llmstudioctl explain` shows the command line",
    ),
    (
        "download",
        r"exactly one out metadata, path_model, and file must be defined|get_repo_commit: error:"
        r"|failed to download model",
        "it tried to download a model",
        "models must lie on disk; see model_path",
    ),
    (
        "bad_model_file",
        r"^gguf_init_from_\w+: (?:failed|invalid|tensor|key|this GGUF|GGUFv1|number of)"
        r"|error loading model: (?!unknown model arch)",
        "the model's file is damaged or incomplete",
        "download it again",
    ),
    (
        "crash",
        r"GGML_ASSERT\(.*\) failed$|^terminate called after throwing|: fatal error$",
        "llama-server crashed",
        "a newer build may help; the last lines belong into a bug report",
    ),
    (
        "load_failed",
        r"exiting due to (?:model loading|HTTP server) error|failed to create_context with model",
        "llama-server could not load the model",
        "see its last lines",
    ),
)
_COMPILED = tuple((kind, re.compile(pattern), cause, hint) for kind, pattern, cause, hint in _RULES)
_SIGABRT, _SIGKILL, _SIGSEGV, _SIGBUS, _SIGSYS = 6, 9, 11, 7, 31


_RUNTIME = frozenset({"oom_vram", "gpu_error", "oom_host", "crash"})
"""What can end a server that was ready; everything else shows while it loads."""
# The ready mark, or where that is too long ago, what only a server that answers requests writes.
_READY = re.compile(
    r"listening on (?:https?://|unix:)|^\S+ [IWED] slot +(?! |load_model)|got exception: |all slots are idle"
)
# What another line says more clearly than the one by which a kind is known.
_MORE = {
    "chat_template": re.compile(r"common_chat_templates_init: error: (.+)"),
    "crash": re.compile(r"^  what\(\):  (.+)"),
}
_FLAG = re.compile(r"^\s*(--?[a-z][\w-]*)")
_CRASHES = frozenset({_SIGABRT, _SIGSEGV, _SIGBUS, 4, 8})
_QUOTED = 300


def explain_exit(
    *,
    result: str,
    code: int | None = None,
    signal: int | None = None,
    lines: Sequence[str] = (),
    build: str | None = None,
    was_ready: bool | None = None,
    paths: Mapping[str, str] = MappingProxyType({}),
) -> Failure:
    """Return the reason for an end that nobody asked for.

    ``result`` is systemd's word for it (``exit-code``, ``signal``, ``core-dump``, ``oom-kill``, ``timeout``); ``build``
    is llama-server's; ``was_ready`` None: its lines tell. Of a server that was ready only the words right before its
    end count, and only when it ended by a fault of its own: what stands before them clients may have written.
    ``paths`` has the name of each file outside by the one that the server sees.
    """
    failure = _explain(result, code, signal, lines, build, was_ready=was_ready)
    message = failure.message
    for inside, outside in paths.items():
        message = message.replace(inside, outside)
    return replace(failure, message=message)


def _explain(
    result: str,
    code: int | None,
    signal: int | None,
    lines: Sequence[str],
    build: str | None,
    *,
    was_ready: bool | None,
) -> Failure:
    told = tuple(lines)
    if result == "oom-kill":
        hint = "raise limits.memory_max, or lower max_model_len or max_num_seqs"
        return Failure("oom_kill", "the kernel killed it for want of memory", hint, told)
    if was_ready is None:
        was_ready = any(map(_READY.search, lines))
    is_own_fault = signal in _CRASHES or (signal is None and code != 0)
    if is_own_fault:
        words = _last_words(lines) if was_ready else [text for text in map(_error_text, lines) if text is not None]
        for kind, pattern, cause, hint in _COMPILED:
            if was_ready and kind not in _RUNTIME:
                continue
            line = next((text for text in words if pattern.search(text)), None)
            if line is not None:
                return _explained(kind, cause, hint, line, told, build)
    if signal == _SIGKILL:
        hint = "did somebody kill it by hand, or the kernel's OOM killer? see `dmesg`"
        return Failure("killed", "it was killed (SIGKILL) and left no word", hint, told)
    if signal == _SIGSYS:
        hint = "`journalctl -k` names the system call; does a drop-in narrow SystemCallFilter= of its unit?"
        return Failure("crash", "it made a system call that its sandbox forbids (SIGSYS)", hint, told)
    if signal in _CRASHES:
        hint = "a newer build may help; the last lines belong into a bug report"
        return Failure("crash", f"llama-server crashed (signal {signal})", hint, told)
    if signal is not None:
        return Failure("killed", f"it was ended by signal {signal}", "somebody stopped it by hand", told)
    if code == 0:
        # llama-server ends like this for SIGTERM or SIGINT alone.
        return Failure("exited", "it was told to end (SIGTERM, or `systemctl stop`)", "somebody did so by hand", told)
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    said = f": {last[:_QUOTED]}" if last else ""
    kind = "crash" if was_ready else "load_failed"
    return Failure(kind, f"it ended with exit code {code}{said}", "see its last lines", told)


def _explained(kind: str, cause: str, hint: str, line: str, lines: tuple[str, ...], build: str | None) -> Failure:
    """Return a failure that a line of the log has told, with what that kind needs to be understood."""
    quoted = line.strip()
    if kind == "bad_args" and quoted == "usage:":  # which one is told only by the help that follows
        flag = next((found[1] for found in map(_FLAG.match, lines[lines.index(line) :]) if found), None)
        quoted = f"the value of {flag}" if flag else "its usage was printed"
    if kind == "unsupported_arch" and build:
        hint = f"llama-server {build} is too old for it, or the file too new: install a newer llama-server"
    told = next((found[1] for found in map(_MORE[kind].search, lines) if found), "") if kind in _MORE else ""
    if told and told not in quoted:
        quoted = told if kind == "chat_template" else f"{quoted}: {told}"
    if kind == "crash" and told == "Resource temporarily unavailable":
        hint = "it could start no more threads: are LimitNPROC=, LimitAS= or TasksMax= of its unit too small?"
    return Failure(kind, f"{cause}: {quoted[:_QUOTED]}", hint, lines)


def _last_words(lines: Sequence[str]) -> list[str]:
    """Return what a server said right before its end: errors and raw lines, behind which it said nothing else."""
    words: list[str] = []
    for line in reversed(lines):
        text = _error_text(line)
        if text is None:
            break
        words.append(text)
    return words[::-1]


def _error_text(line: str) -> str | None:
    """Return the message of a line, or None for one that llama-server itself does not call an error."""
    if line.startswith('{"type":'):  # --log-jsonl
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            return line
        return str(entry.get("msg", "")).rstrip() if entry.get("level") == "error" else None
    prefix = _PREFIX.match(line)
    if prefix is None:
        return line
    return line[prefix.end() :] if prefix.group(1) == "E" else None
