"""The llama.cpp backend's command line: a recipe in, argv and environment out. The one place that spells flags.

What the flags really do is less than their names promise; the reasons stand at the lines below.
Source: `llama-server --help` of llama.cpp 0.7.0, and what that binary did when it was tried.
"""

import posixpath
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from llmstudiod.core.errors import LoadFailedError
from llmstudiod.core.flags import modernize, render_flag
from llmstudiod.core.recipe import MAX_CONTEXT, Recipe

DEFAULT_SLOTS = 4
DEFAULT_CONTEXT = 8192
"""Tokens for one request where neither the recipe nor a small model sets less; a full context may not fit."""

DEFAULT_CACHE_RAM_MIB = 8192
MAX_TOTAL_CONTEXT = 1 << 26
SUN_PATH_BYTES = 107
"""Longest path of a Unix socket, without the closing NUL. Source: unix(7)."""

DRY_RUN_MARK = "fit_memory_breakdown"

INSIDE = "/run/llmstudio-model"
"""Where a sandboxed unit finds its files, one directory for each, since two files may share a name."""


@dataclass(frozen=True, slots=True)
class ServerBinary:
    """The program that will run: its first words, what it says of itself, and the flags that it accepts.

    ``devices`` are the names of its backends' devices (``CUDA0``), with their labels and sizes, 0 where not told.
    ``executables`` are the paths that it must be able to execute: itself and its libraries; none: not known.
    """

    argv: tuple[str, ...]
    source: str
    version: str = ""
    known_flags: frozenset[str] = frozenset()
    devices: tuple[str, ...] = ()
    device_labels: tuple[str, ...] = ()
    device_bytes: tuple[int, ...] = ()
    is_engine: bool = False
    executables: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the binary of which ``values`` is the `as_dict`."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**{**fields, "known_flags": frozenset(values["known_flags"])})

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return {**asdict(self), "known_flags": sorted(self.known_flags)}


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of a model, as found on disk: the shards of the model itself, then whatever else the recipe names."""

    model: tuple[str, ...]
    mmproj: str | None = None
    draft_model: str | None = None
    chat_template_file: str | None = None
    lora: tuple[str, ...] = ()
    n_ctx_train: int | None = None

    def groups(self) -> list[tuple[str, ...]]:
        """Return the files in groups that must stay in one directory."""
        singles = (self.mmproj, self.draft_model, self.chat_template_file, *self.lora)
        return [self.model, *[(path,) for path in singles if path]]


@dataclass(frozen=True, slots=True)
class BoundFile:
    """A file of the host, and the path under which the model's unit sees it."""

    host: str
    inside: str


@dataclass(frozen=True, slots=True)
class Context:
    """How many tokens the server holds: ``n_ctx_total`` is its ``-c``, ``n_ctx`` what one request may use.

    ``defaults``: those of the ``notes`` that tell what an open field became, and are nothing to worry about.
    """

    n_ctx: int
    n_parallel: int
    n_ctx_total: int
    notes: tuple[str, ...] = ()
    defaults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Command:
    """Everything that is executed, and what the daemon decided where the recipe left it open."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    context: Context
    notes: tuple[str, ...] = ()
    files: tuple[BoundFile, ...] = field(default=())


def bind_files(files: ModelFiles, *, is_sandboxed: bool) -> tuple[BoundFile, ...]:
    """Return each file of the model with the path under which its server will see it."""
    bound: dict[str, BoundFile] = {}
    for index, group in enumerate(files.groups()):
        for host in group:
            inside = posixpath.join(INSIDE, str(index), posixpath.basename(host)) if is_sandboxed else host
            bound.setdefault(host, BoundFile(host, inside))
    return tuple(bound.values())


def plan_context(recipe: Recipe, n_ctx_train: int | None) -> Context:
    """Return slots and context.

    ``-c`` is the total of all slots unless they share one pool, and llama-server rounds each slot up to 256 tokens.

    >>> plan_context(Recipe(id="m", model_path="/m.gguf", max_model_len=8192, max_num_seqs=4), None).n_ctx_total
    32768
    """
    notes: list[str] = []
    slots = recipe.max_num_seqs or DEFAULT_SLOTS
    length = recipe.max_model_len
    if length is None:
        length = min(n_ctx_train or DEFAULT_CONTEXT, DEFAULT_CONTEXT, MAX_CONTEXT)
        notes.append(
            f"max_model_len is not set: {length} tokens for one request (the model: {n_ctx_train or 'unknown'})"
        )
    defaults = tuple(notes)
    if n_ctx_train and length > n_ctx_train:
        notes.append(f"max_model_len {length} is over the model's {n_ctx_train} tokens: llama-server caps each request")
    padded = -(-length // 256) * 256
    total = padded if recipe.kv_unified else padded * slots
    if total > MAX_TOTAL_CONTEXT:
        raise LoadFailedError(
            f"cannot load '{recipe.id}': {slots} slots of {length} tokens are {total} in all, over {MAX_TOTAL_CONTEXT}",
            hint="lower max_model_len or max_num_seqs",
        )
    return Context(n_ctx=padded, n_parallel=slots, n_ctx_total=total, notes=tuple(notes), defaults=defaults)


def build_command(
    recipe: Recipe, files: ModelFiles, binary: ServerBinary, *, socket_path: str, is_sandboxed: bool
) -> Command:
    """Return the command line that serves ``recipe`` on ``socket_path``.

    Raises:
        LoadFailedError: The recipe asks for what this binary cannot do, or the socket's path is too long.
    """
    check_socket_path(socket_path, recipe.id)
    bound = bind_files(files, is_sandboxed=is_sandboxed)
    inside = {file.host: file.inside for file in bound}
    context = plan_context(recipe, files.n_ctx_train)
    known = binary.known_flags
    argv = [*binary.argv, "-m", inside[files.model[0]], "--alias", recipe.alias, "--host", socket_path]
    argv += _service_flags(known, context)
    argv += _context_flags(recipe, context)
    argv += _device_flags(recipe, binary)
    argv += _model_flags(recipe, known)
    argv += _file_flags(recipe, files, inside.__getitem__)
    notes = list(context.notes)
    try:
        modern = modernize(recipe.extra_args, known=known)
        notes += modern.notes
        for key, value in modern.extra_args.items():
            argv += render_flag(key, value, known=known)
    except ValueError as error:
        raise LoadFailedError(
            f"cannot load '{recipe.id}': extra_args: {error}",
            hint="`llama-server --help` lists the flags of the installed build",
            details={"failure": "bad_args"},
        ) from error
    return Command(tuple(argv), _environment(recipe, binary), context, tuple(notes), bound)


def can_dry_run(binary: ServerBinary) -> bool:
    """Whether the binary can tell what memory it would take before it takes it."""
    return {"--log-jsonl", "-fit"} <= binary.known_flags


def dry_run(argv: Iterable[str], *, socket_path: str = "/tmp/dry-run.sock") -> tuple[str, ...]:  # noqa: S108 - a unit's
    """Return the command line of a dry run: whoever reads its output ends it at the line with `DRY_RUN_MARK`.

    Until then llama-server has read the file's header, and taken no memory.
    """
    words = list(argv)
    words[words.index("--host") + 1] = socket_path
    words[words.index("-fit") + 1] = "on"
    return (*words, "--log-jsonl")


def check_socket_path(socket_path: str, model: str) -> None:
    """Refuse a path that bind(2) would refuse: llama-server only says that it could not bind.

    Raises:
        LoadFailedError: The path is longer than a socket's address holds.
    """
    length = len(socket_path.encode())
    if length > SUN_PATH_BYTES:
        raise LoadFailedError(
            f"cannot load '{model}': the socket's path has {length} bytes, a Unix socket holds {SUN_PATH_BYTES}: "
            f"{socket_path}",
            hint="give the recipe a shorter id, or set a shorter runtime_dir",
        )


def _service_flags(known: frozenset[str], context: Context) -> list[str]:
    """How the server behaves as our upstream, whatever the model."""
    argv = ["-lv", "4"]  # level 4 has the memory lines and no prompts
    # A burst of connections beyond the fixed thread pool stalls /health for seconds.
    argv += ["--threads-http", str(max(16, 2 * context.n_parallel + 8))]
    for flag in ("--no-ui", "--no-webui"):  # renamed between builds
        if flag in known:
            argv.append(flag)
            break
    if "--offline" in known:
        argv.append("--offline")
    if "--metrics" in known:
        argv.append("--metrics")
    return argv


def _context_flags(recipe: Recipe, context: Context) -> list[str]:
    # -np alone switches the unified cache off, and -kvu on again; without -np llama-server chooses both.
    argv = ["-c", str(context.n_ctx_total), "-np", str(context.n_parallel)]
    if recipe.kv_unified:
        argv.append("--kv-unified")
    return argv


def _device_flags(recipe: Recipe, binary: ServerBinary) -> list[str]:
    argv: list[str] = []
    if recipe.gpus == "none":
        argv += ["--device", "none"]
    elif recipe.gpus and binary.devices and all(name.startswith("CUDA") for name in binary.devices):
        # Without it a GPU that CUDA cannot use is left out, and the model runs on the CPU without an error.
        argv += ["--device", _join(f"CUDA{number}" for number in range(len(recipe.gpus)))]
    if recipe.n_gpu_layers != "auto" and (binary.devices or recipe.gpus != "none"):
        argv += ["-ngl", str(recipe.n_gpu_layers)]
    if recipe.split_mode or recipe.tensor_parallel_size == 1:
        argv += ["--split-mode", recipe.split_mode or "none"]
    if recipe.tensor_split:
        argv += ["--tensor-split", _join(f"{part:g}" for part in recipe.tensor_split)]
    if recipe.main_gpu is not None:
        argv += ["--main-gpu", str(recipe.main_gpu)]
    # Left to itself, llama-server lowers context and layers until they fit, without a word in the log.
    is_fixed = recipe.n_gpu_layers != "auto" or recipe.gpus == "none" or not binary.devices
    return [*argv, "-fit", "off" if is_fixed else "on"]


def _model_flags(recipe: Recipe, known: frozenset[str]) -> list[str]:
    values: list[tuple[str, object]] = [
        ("--flash-attn", {True: "on", False: "off", "auto": None}[recipe.flash_attn]),  # it needs a value
        ("--batch-size", recipe.n_batch),
        ("--ubatch-size", recipe.n_ubatch),
        ("--cache-type-k", recipe.cache_type_k),
        ("--cache-type-v", recipe.cache_type_v),
        ("--threads", recipe.threads),
        ("--load-mode", recipe.load_mode),
        ("--cache-ram", cache_ram_mib(recipe, known)),
        ("--pooling", recipe.pooling),
        ("--reasoning-format", recipe.reasoning_format),
        ("--chat-template", recipe.chat_template),
        ("--n-cpu-moe", recipe.n_cpu_moe),
        ("--override-tensor", recipe.override_tensor),
        ("--spec-type", recipe.spec_type or _default_spec_type(recipe, known)),
        ("--spec-draft-n-max", recipe.spec_draft_n_max),
        ("--spec-draft-n-min", recipe.spec_draft_n_min),
        ("--spec-draft-p-min", recipe.spec_draft_p_min),
        ("--spec-draft-ngl", recipe.spec_draft_n_gpu_layers),
    ]
    argv: list[str] = []
    for flag, value in values:
        if value is not None:
            argv += [flag, str(value)]
    argv += ["--embedding"] if recipe.embedding else []
    argv += ["--rerank"] if recipe.rerank else []
    return argv


def _default_spec_type(recipe: Recipe, known: frozenset[str]) -> str | None:
    """Newer builds load a draft model and then leave it unused, unless they are told how to use it."""
    return "draft-simple" if recipe.draft_model and "--spec-type" in known else None


def cache_ram_mib(recipe: Recipe, known: frozenset[str]) -> int | None:
    """Return MiB of host memory for the prompt cache; said even where it is llama-server's own default, 8 GiB.

    It grows for days and is in nobody's estimate, so it should stand where somebody looks.
    """
    if recipe.cache_ram is not None or "--cache-ram" not in known:
        return recipe.cache_ram
    return 0 if recipe.embedding or recipe.rerank else DEFAULT_CACHE_RAM_MIB


def _file_flags(recipe: Recipe, files: ModelFiles, inside: Callable[[str], str]) -> list[str]:
    argv: list[str] = []
    for flag, path in (
        ("--mmproj", files.mmproj),
        ("--model-draft", files.draft_model),
        ("--chat-template-file", files.chat_template_file),
    ):
        if path:
            argv += [flag, inside(path)]
    for path in files.lora:
        if "," in inside(path) or ":" in inside(path):  # --lora-scaled takes them as its own separators
            message = f"cannot load '{recipe.id}': a LoRA adapter may not have a comma or colon in its path: {path}"
            raise LoadFailedError(message, hint="rename the file, or link to it under another name")
    adapters = list(zip(files.lora, recipe.lora, strict=True))
    if adapters:
        argv += ["--lora-scaled", _join(f"{inside(path)}:{adapter.scale:g}" for path, adapter in adapters)]
    return argv


def _environment(recipe: Recipe, binary: ServerBinary) -> dict[str, str]:
    """A clean environment: 149 LLAMA_ARG_* variables would change the server behind our back."""
    environment = {"LC_ALL": "C.UTF-8", **recipe.env_vars}
    if recipe.gpus is None:
        return environment
    visible = "" if recipe.gpus == "none" else ",".join(recipe.gpus)
    # CUDA numbers the fastest GPU first unless told otherwise; nvidia-smi and NVML go by the bus.
    environment |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}
    for prefix, name in (("Vulkan", "GGML_VK_VISIBLE_DEVICES"), ("ROCm", "HIP_VISIBLE_DEVICES")):
        if any(device.startswith(prefix) for device in binary.devices):
            environment[name] = visible
    return environment


def _join(parts: Iterable[str]) -> str:
    return ",".join(parts)
