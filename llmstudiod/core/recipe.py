"""A recipe: what a model is and how to run it, after every check, with its aliases resolved.

The dataclass names and types the fields of `docs/` and the man page; `llmstudiod.core.recipe_reader` reads
files into it (the annotations below are what it validates against), everybody else only reads it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from llmstudiod.core.bounds import Ge, Interval, Len, MaxLen

ID_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"

MAX_FILE_BYTES = 1 << 20
"""The longest recipe or settings file."""

MAX_CONTEXT = 1 << 24
"""The most tokens that a recipe may ask for; llama-server hangs or is killed at absurd values instead of refusing."""

Tokens = Annotated[int, Interval(ge=1, le=MAX_CONTEXT)]
CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]


class Severity(StrEnum):
    """A fault leaves a recipe out; a warning is told and the recipe is served."""

    FAULT = "fault"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong in a file: where, and in ``message`` what was found and what was expected.

    ``recipe_id`` is the id of the recipe that it is about, so that whoever asks for the model finds the reason;
    ``claims`` are the other names and the model file of a recipe that was left out.
    """

    message: str
    file: str = ""
    line: int | None = None
    key: str | None = None
    hint: str | None = None
    severity: Severity = Severity.FAULT
    recipe_id: str | None = None
    claims: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return one line in the form that compilers use, so that editors can jump to it."""
        place = ":".join(str(part) for part in (self.file, self.line) if part)
        key = f"{self.key}: " if self.key else ""
        hint = f" ({self.hint})" if self.hint else ""
        word = "warning: " if self.severity is Severity.WARNING else ""
        return f"{place}: {word}{key}{self.message}{hint}" if place else f"{word}{key}{self.message}{hint}"


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """A LoRA adapter file and the weight with which it is applied."""

    path: Annotated[str, Len(1, 4096)]
    scale: Annotated[float, Interval(ge=-1000, le=1000)] = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the model's unit. ``memory_max`` in bytes, ``cpu_weight`` and ``io_weight`` as systemd counts them."""

    memory_max: Annotated[int, Ge(1 << 20)] | None = None
    cpu_weight: Annotated[int, Interval(ge=1, le=10000)] | None = None
    io_weight: Annotated[int, Interval(ge=1, le=10000)] | None = None
    allowed_cpus: str | None = None
    nice: Annotated[int, Interval(ge=-20, le=19)] | None = None
    tasks_max: Annotated[int, Interval(ge=16, le=65536)] | None = None


@dataclass(frozen=True, slots=True)
class Sandbox:
    """What a model's unit may do beyond the strict sandbox; each relaxation has a name.

    ``network``: a loopback of its own, or the host's network. ``writable_code``: memory both writable and executable,
    which drivers that compile for the CPU need. ``scheduling``: its own priorities and CPU affinity (``--prio``,
    ``--cpu-mask``, ``--numa``). ``shared_ipc``: the host's IPC and /tmp/nvidia-mps, which CUDA's MPS needs.
    """

    network: Literal["none", "loopback", "host"] = "none"
    writable_code: bool = False
    scheduling: bool = False
    shared_ipc: bool = False

    def relaxations(self) -> tuple[str, ...]:
        """Return what differs from the strict sandbox, by name."""
        return tuple(
            f"{f.name}: {value}" if isinstance(value := getattr(self, f.name), str) else f.name
            for f in fields(self)
            if getattr(self, f.name) != f.default
        )


STRICT = Sandbox()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One model. None means: the daemon decides, and says what it decided."""

    id: Annotated[str, Len(1, 63)]
    model_path: Annotated[str, Len(1, 4096)]
    name: str | None = None
    description: str | None = None
    tags: tuple[str, ...] = ()
    backend: Literal["llamacpp"] = "llamacpp"

    served_model_name: Annotated[str, Len(1, 200)] | None = None
    aliases: Annotated[tuple[Annotated[str, Len(1, 200)], ...], MaxLen(100)] = ()
    default: bool = False
    unlisted: bool = False

    max_model_len: Tokens | None = None
    max_num_seqs: Annotated[int, Interval(ge=1, le=256)] | None = None
    kv_unified: bool = False

    tensor_parallel_size: Annotated[int, Interval(ge=1, le=64)] | None = None
    gpus: tuple[str, ...] | Literal["none"] | None = None
    n_gpu_layers: Annotated[int, Ge(0)] | Literal["auto", "all"] = "auto"
    split_mode: Literal["none", "layer", "row", "tensor"] | None = None
    tensor_split: tuple[Annotated[float, Interval(ge=0, le=1_000_000)], ...] | None = None
    main_gpu: Annotated[int, Ge(0)] | None = None

    flash_attn: bool | Literal["auto"] = "auto"
    n_batch: Annotated[int, Interval(ge=1, le=1 << 20)] | None = None
    n_ubatch: Annotated[int, Interval(ge=1, le=1 << 20)] | None = None
    cache_type_k: CacheType | None = None
    cache_type_v: CacheType | None = None
    threads: Annotated[int, Interval(ge=1, le=1024)] | None = None
    load_mode: Literal["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"] | None = None
    cache_ram: Annotated[int, Interval(ge=0, le=1 << 24)] | None = None  # MiB, as llama-server counts it

    mmproj: str | None = None
    draft_model: str | None = None
    spec_type: str | None = None
    spec_draft_n_max: Annotated[int, Interval(ge=0, le=1024)] | None = None
    spec_draft_n_min: Annotated[int, Interval(ge=0, le=1024)] | None = None
    spec_draft_p_min: Annotated[float, Interval(ge=0, le=1)] | None = None
    spec_draft_n_gpu_layers: Annotated[int, Ge(0)] | Literal["auto", "all"] | None = None
    lora: tuple[LoraAdapter, ...] = ()
    chat_template: str | None = None
    chat_template_file: str | None = None
    reasoning_format: Literal["none", "auto", "deepseek", "deepseek-legacy"] | None = None
    embedding: bool = False
    rerank: bool = False
    pooling: Literal["none", "mean", "cls", "last", "rank"] | None = None
    n_cpu_moe: Annotated[int, Ge(0)] | None = None
    override_tensor: str | None = None

    idle_timeout: Annotated[float, Ge(0)] | None = None  # seconds; 0: never
    pinned: bool = False
    preload: bool = False
    priority: Annotated[int, Interval(ge=-1000, le=1000)] = 0
    concurrency_limit: Annotated[int, Interval(ge=1, le=4096)] | None = None
    load_stall_timeout: Annotated[float, Ge(1)] | None = None
    drain_timeout: Annotated[float, Ge(0)] | None = None
    restart: Literal["on-request", "always", "never"] | None = None
    restart_limit: Annotated[int, Interval(ge=0, le=100)] | None = None
    restart_window: Annotated[float, Ge(1)] | None = None

    limits: Limits = Limits()
    sandbox: Sandbox = STRICT
    env_vars: Mapping[str, str] = field(default_factory=dict)
    extra_args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def alias(self) -> str:
        """The name under which the upstream knows itself: one, since llama-server splits it at commas and sorts."""
        return self.served_model_name or self.id

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a request may use, the id first."""
        return tuple(dict.fromkeys((self.id, self.alias, *self.aliases)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the recipe of which ``values`` is the `as_dict`; nothing is checked again."""
        fixed: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        if "lora" in fixed:
            fixed["lora"] = tuple(LoraAdapter(**adapter) for adapter in fixed["lora"])
        for name, kind in (("limits", Limits), ("sandbox", Sandbox)):
            if name in fixed:
                fixed[name] = kind(**fixed[name])
        return cls(**fixed)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, by the names of the documentation."""
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        reference = Recipe(id=self.id, model_path=self.model_path)
        return {
            name: value
            for name, value in values.items()
            if name in {"id", "model_path"} or value != _plain(getattr(reference, name))
        }


@dataclass(frozen=True, slots=True)
class RecipeEntry:
    """A recipe with where it came from and what was noted about it. ``file`` is None for a GGUF without a recipe."""

    recipe: Recipe
    file: str | None = None
    line: int | None = None
    warnings: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadedRecipes:
    """What a directory or a file holds: the good recipes, and the faults of the others."""

    entries: tuple[RecipeEntry, ...]
    faults: tuple[Fault, ...]


def recipe_hash(recipe: Recipe) -> str:
    """Return ``sha256:…`` over the recipe's meaning: comments, order and spelling of the file do not count."""
    canonical = json.dumps(recipe.as_dict(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def _plain(value: object) -> object:
    """Return ``value`` as JSON can hold it."""
    if isinstance(value, Sandbox):
        return {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}
    if isinstance(value, Limits | LoraAdapter):
        return {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) is not None}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
