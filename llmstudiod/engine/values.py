"""From the text after a flag to settings of xllamacpp's ``CommonParams``; used by the table in ``flags``.

Each function here builds a reader for one flag: called with the text, it returns what that sets or raises
``ValueError`` with llama-server's words (common/arg.cpp, 0.7.0). Numbers are strict: ``4k`` is not 4.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Path of an attribute of CommonParams -> plain value, EnumMember, Lora, or a list or dict of them.
Settings = dict[str, Any]
Reader = Callable[[str], Settings]

OVERRIDES = "tensor_buft_overrides"
SAMPLING_BITS = "sampling.user_sampling_config"

_ON, _OFF, _AUTO = ("on", "enabled", "true", "1"), ("off", "disabled", "false", "0"), ("auto", "-1")
_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
_SPECULATIVE_TYPES = (
    "none", "draft-simple", "draft-eagle3", "draft-mtp", "draft-dflash", "draft-dspark",
    "ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache",
)  # fmt: skip
_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"  # LLM_FFN_EXPS_REGEX in common/common.h


@dataclass(frozen=True, slots=True)
class EnumMember:
    """A member of one of xllamacpp's enums, by name: its number may change with the build."""

    enum: str
    member: str


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA adapter and how strongly it applies."""

    path: str
    scale: float


def text(path: str) -> Reader:
    """Take the text as it is."""
    return lambda value: {path: value}


def texts(path: str) -> Reader:
    """Take a comma-separated list."""
    return lambda value: {path: [item.strip() for item in value.split(",") if item.strip()]}


def integer(*paths: str, low: int = -(2**31), high: int = 2**31 - 1) -> Reader:
    """Take a whole number and set every path to it."""
    return lambda value: dict.fromkeys(paths, _integer(value, low, high))


def threads(path: str) -> Reader:
    """Take a number of threads; 0 and less: as many as there are processors."""
    return lambda value: {path: max(0, _integer(value)) or os.cpu_count() or 1}


def number(path: str, low: float = -math.inf) -> Reader:
    """Take a number and raise it to ``low``."""
    return lambda value: {path: max(low, _number(value))}


def user_set(bit: str, reader: Reader) -> Reader:
    """Mark a sampling parameter as the user's choice, which the model's own metadata does not override."""
    member = EnumMember("common_params_sampling_config", f"COMMON_PARAMS_SAMPLING_CONFIG_{bit}")
    return lambda value: {**reader(value), SAMPLING_BITS: [member]}


def on_off(path: str, flag: str) -> Reader:
    """Take on or off."""
    return lambda value: {path: _on_off_auto(value, flag, auto=False)}


def enum(path: str, name: str, *words: str, **renamed: str) -> Reader:
    """Take one of the words, or of the renamed ones, as a member of the enum, whose members start with its name."""
    members = {word: word.upper().replace("-", "_") for word in words} | renamed

    def read(value: str) -> Settings:
        if value not in members:
            raise ValueError("invalid value")
        return {path: EnumMember(name, f"{name.upper()}_{members[value]}")}

    return read


def cache_type(path: str) -> Reader:
    """Take the type of the K or V cache."""

    def read(value: str) -> Settings:
        if value not in _CACHE_TYPES:
            raise ValueError(f"Unsupported cache type: {value}")
        return {path: EnumMember("ggml_type", f"GGML_TYPE_{value.upper()}")}

    return read


def flash_attention(value: str) -> Settings:
    """Read ``--flash-attn``."""
    state = {True: "ENABLED", False: "DISABLED", None: "AUTO"}[_on_off_auto(value, "--flash-attn")]
    return {"flash_attn_type": EnumMember("llama_flash_attn_type", f"LLAMA_FLASH_ATTN_TYPE_{state}")}


def load_mode(value: str) -> Settings:
    """Read ``--load-mode``."""
    modes = {"mmap+mlock": "MMAP_MLOCK", "dio": "DIRECT_IO"}
    return enum("load_mode", "llama_load_mode", "auto", "none", "mmap", "mlock", **modes)(value)


def reasoning(value: str) -> Settings:
    """Read ``--reasoning``: the template hears of it as ``enable_thinking``."""
    state = _on_off_auto(value, "--reasoning")
    if state is None:
        return {"enable_reasoning": -1}
    return {"enable_reasoning": int(state), "default_template_kwargs": {"enable_thinking": json.dumps(state)}}


def reasoning_format(value: str) -> Settings:
    """Read ``--reasoning-format``."""
    try:
        reader = enum("reasoning_format", "common_reasoning_format", "none", "auto", "deepseek", "deepseek-legacy")
        return reader(value)
    except ValueError:
        raise ValueError(f"Unknown reasoning format: {value}") from None


def template_kwargs(value: str) -> Settings:
    """Read ``--chat-template-kwargs``: a JSON object, whose values llama.cpp wants as JSON text."""
    found = json.loads(value)
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object")
    return {"default_template_kwargs": {key: json.dumps(item) for key, item in found.items()}}


def speculative_types(value: str) -> Settings:
    """Read ``--spec-type``."""
    found = []
    for word in value.split(","):
        if word not in _SPECULATIVE_TYPES:
            raise ValueError(f"unknown speculative type: {word}")
        member = f"COMMON_SPECULATIVE_TYPE_{word.upper().replace('-', '_')}"
        found.append(EnumMember("common_speculative_type", member))
    return {"speculative.types": found}


def ctx_size(value: str) -> Settings:
    """Read ``--ctx-size``: an explicit 0 asks for the model's own size, which ``--fit`` may then not reduce."""
    n_ctx = _integer(value, low=0)
    return {"n_ctx": n_ctx} if n_ctx else {"n_ctx": 0, "fit_params_min_ctx": -1}


def n_parallel(value: str) -> Settings:
    """Read ``--parallel``; negative: auto."""
    found = _integer(value)
    if found == 0:
        raise ValueError("error: invalid value for n_parallel")
    return {"n_parallel": found}


def gpu_layers(path: str) -> Reader:
    """Take a number of layers, ``auto`` or ``all``."""
    return lambda value: {path: {"auto": -1, "all": -2}.get(value) or _integer(value)}


def device_none(*paths: str) -> Reader:
    """Take ``none``: there is no other device than the processor here."""

    def read(value: str) -> Settings:
        if value != "none":
            raise ValueError(f"invalid device: {value}")
        return dict.fromkeys(paths, value)

    return read


def proportions(path: str) -> Reader:
    """Take numbers separated by commas or slashes."""
    return lambda value: {path: [_number(item) for item in value.replace("/", ",").split(",")]}


def mebibytes(path: str) -> Reader:
    """Take a comma-separated list of MiB, as bytes."""
    return lambda value: {path: [_integer(item, low=0) << 20 for item in value.split(",")]}


def rope_scale(value: str) -> Settings:
    """Read ``--rope-scale``, which is the inverse of ``--rope-freq-scale``."""
    factor = _number(value)
    if factor == 0:
        raise ValueError("invalid value")
    return {"rope_freq_scale": 1 / factor}


def seed(value: str) -> Settings:
    """Read ``--seed``: an unsigned 32-bit number, where -1 is "random"."""
    return {"sampling.seed": _integer(value, -1, 2**32 - 1) % 2**32}


def lora(value: str) -> Settings:
    """Read ``--lora``."""
    return {"lora_adapters": [Lora(path, 1.0) for path in value.split(",")]}


def lora_scaled(value: str) -> Settings:
    """Read ``--lora-scaled``."""
    adapters = []
    for item in value.split(","):
        path, colon, scale = item.rpartition(":")
        if not colon:
            raise ValueError("lora-scaled format: FNAME:SCALE")
        adapters.append(Lora(path, _number(scale)))
    return {"lora_adapters": adapters}


def override_tensor(path: str) -> Reader:
    """Take ``PATTERN=BUFFER,...``; the one buffer type here is ``CPU``."""

    def read(value: str) -> Settings:
        for item in value.split(","):
            if item.partition("=")[2] != "CPU":
                raise ValueError("unknown buffer type" if "=" in item else "invalid value")
        return {path: value.split(",")}

    return read


def cpu_moe(path: str) -> Settings:
    """Return what ``--cpu-moe`` sets."""
    return {path: [_EXPERTS]}


def n_cpu_moe(path: str) -> Reader:
    """Take the number of layers whose experts stay on the processor."""
    return lambda value: {path: [rf"blk\.{layer}{_EXPERTS}" for layer in range(_integer(value, low=0))]}


def file_text(path: str) -> Reader:
    """Take the content of the file that is named."""
    return lambda value: {path: _file_text(value)}


def api_key_file(value: str) -> Settings:
    """Read ``--api-key-file``: a key a line, ``#`` starts a comment."""
    lines = _file_text(value).splitlines()
    return {"api_keys": [line for line in lines if line and not line.startswith("#")]}


def directory(path: str) -> Reader:
    """Take a directory that exists; llama.cpp wants it with the slash."""

    def read(value: str) -> Settings:
        if not Path(value).is_dir():
            raise ValueError(f"not a directory: {value}")
        return {path: value if value.endswith("/") else f"{value}/"}

    return read


def _integer(value: str, low: int = -(2**31), high: int = 2**31 - 1) -> int:
    # int() alone also takes "1_000" and " 4 ".
    if not value.removeprefix("-").removeprefix("+").isdecimal():
        raise ValueError(f"expected a whole number, found '{value}'")
    if not low <= int(value) <= high:
        raise ValueError(f"expected a number from {low} to {high}, found '{value}'")
    return int(value)


def _number(value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        raise ValueError(f"expected a number, found '{value}'") from None
    if not math.isfinite(found):
        raise ValueError(f"expected a finite number, found '{value}'")
    return found


def _on_off_auto(value: str, flag: str, *, auto: bool = True) -> bool | None:
    if value in _ON:
        return True
    if value in _OFF:
        return False
    if auto and value in _AUTO:
        return None
    raise ValueError(f"error: unknown value for {flag}: '{value}'")


def _file_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        raise ValueError(f"error: failed to open file '{path}'") from None
