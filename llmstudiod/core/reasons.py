"""Why a server ended, read from its exit and the last lines of its own run.

A pattern may explain an exit; it must never cause one: any client can put ``GGML_ASSERT(`` at the start of a line of
a healthy server's log, by sending an invalid grammar. So this is asked only while a model loads or after it ended.
Source of the lines: llama.cpp 0.7.0 (build 11669), recorded runs; CUDA's from ggml-cuda.cu.
"""

import re
from collections.abc import Sequence

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
_SIGABRT, _SIGKILL, _SIGSEGV, _SIGBUS = 6, 9, 11, 7


def explain_exit(
    *, result: str, code: int | None = None, signal: int | None = None, lines: Sequence[str] = ()
) -> Failure:
    """Return the reason for an end that nobody asked for.

    ``result`` is systemd's word for it (``exit-code``, ``signal``, ``core-dump``, ``oom-kill``, ``timeout``).
    """
    told = tuple(lines)
    if result == "oom-kill":
        hint = "raise limits.memory_max, or lower max_model_len or max_num_seqs"
        return Failure("oom_kill", "the kernel killed it for want of memory", hint, told)
    for kind, pattern, cause, hint in _COMPILED:
        line = next((text for text in map(_error_text, lines) if text is not None and pattern.search(text)), None)
        if line is not None:
            return Failure(kind, f"{cause}: {line.strip()[:300]}", hint, told)
    if signal == _SIGKILL:
        hint = "did somebody kill it by hand, or the kernel's OOM killer? see `dmesg`"
        return Failure("killed", "it was killed (SIGKILL) and left no word", hint, told)
    if signal in {_SIGABRT, _SIGSEGV, _SIGBUS}:
        hint = "a newer build may help; the last lines belong into a bug report"
        return Failure("crash", f"llama-server crashed (signal {signal})", hint, told)
    if signal is not None:
        return Failure("killed", f"it was ended by signal {signal}", "somebody stopped it by hand", told)
    if code == 0:
        return Failure("exited", "it ended by itself without an error", "see its last lines", told)
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    said = f": {last[:300]}" if last else ""
    return Failure("load_failed", f"it ended with exit code {code}{said}", "see its last lines", told)


def _error_text(line: str) -> str | None:
    """Return the message of a line, or None for one that llama-server itself does not call an error."""
    prefix = _PREFIX.match(line)
    if prefix is None:
        return line
    return line[prefix.end() :] if prefix.group(1) == "E" else None
