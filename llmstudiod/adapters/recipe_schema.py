"""The JSON schema of recipe files, for editors: generated from the code that reads recipes, so that both agree.

It describes what people may write, not what the daemon makes of it: `10m`, `8GiB`, one name instead of a list.
Keys that have no meaning are let through, since the reader only warns of them. It is narrower than the reader in this:
numbers in quotes, units in capitals (`10M` for minutes), keys with dashes instead of underscores are not looked into,
and `model_path` must stand at the top. The daemon's own word is `llmstudioctl check FILE`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import TypeAdapter

from llmstudiod.core.flag_table import FLAGS, Flag, FlagKind
from llmstudiod.core.recipe import ID_PATTERN, Recipe
from llmstudiod.core.recipe_names import ALIASES, DENIED_ENVIRONMENT, FOREIGN, IGNORED, SINGLE_LINE_FIELDS

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"

NAMES_OF_BINARIES = ("llama_server_path", "llama_server", "llama_bin", "launch_command", "custom_command")
"""Keys that no recipe may have: a recipe cannot choose what is executed."""

DESCRIPTIONS: Mapping[str, str] = {
    "id": "Names the unit and the socket; the file's name without its ending where the file holds one recipe.",
    "model_path": "The GGUF file, the first of its parts, or a directory that holds one model.",
    "name": "What people call it; shown.",
    "description": "What it is for; shown.",
    "tags": "Words for sorting; shown.",
    "backend": "The kind of program that serves it.",
    "served_model_name": "The name under which it is listed; requests may use it beside the id.",
    "aliases": "More names that requests may use.",
    "default": "Serves requests that name no model.",
    "unlisted": "Can be used, but is not in /v1/models.",
    "max_model_len": "Tokens that one request may use; llama-server's -c is this times the slots.",
    "max_num_seqs": "Slots: how many requests are answered at the same time.",
    "kv_unified": "All slots share one pool of max_model_len tokens.",
    "tensor_parallel_size": "1: one GPU.",
    "gpus": "Which GPUs may be used: UUIDs (or indices), auto, none.",
    "n_gpu_layers": "How many layers lie on the GPU: a number, auto (as many as fit), all.",
    "split_mode": "How the model is split over several GPUs.",
    "tensor_split": "Proportions in which the GPUs take the model, such as [3, 1]; never indices.",
    "main_gpu": "The GPU that is used with split_mode none, or holds the small tensors with row.",
    "flash_attn": "Flash attention.",
    "n_batch": "The logical batch, in tokens.",
    "n_ubatch": "The physical batch, in tokens.",
    "cache_type_k": "The type of the KV cache's keys.",
    "cache_type_v": "The type of the KV cache's values; another type than f16 needs flash_attn.",
    "threads": "CPU threads.",
    "load_mode": "How the file is read.",
    "cache_ram": "MiB of RAM for cached prompts; 0: none.",
    "mmproj": "The multimodal projector, a GGUF file.",
    "draft_model": "The draft model for speculative decoding, a GGUF file.",
    "spec_type": "The kinds of speculative decoding.",
    "spec_draft_n_max": "The most tokens that are drafted at once.",
    "spec_draft_n_min": "The fewest tokens that are drafted at once.",
    "spec_draft_p_min": "The probability below which no draft is made.",
    "spec_draft_n_gpu_layers": "Like n_gpu_layers, for the draft model.",
    "lora": "LoRA adapters: paths, or path and scale.",
    "chat_template": "A Jinja template, or the name of one that llama-server has.",
    "chat_template_file": "A file that holds the Jinja template.",
    "reasoning_format": "Where a model's reasoning goes in the answer.",
    "embedding": "Serves embeddings only.",
    "rerank": "Serves reranking only.",
    "pooling": "How embeddings are pooled.",
    "n_cpu_moe": "The experts of this many layers stay in RAM.",
    "override_tensor": "Patterns of tensors and where they lie, such as exps=CPU.",
    "idle_timeout": "Unload it when nobody has asked for this long; 0 or off: never.",
    "pinned": "It is never evicted, and never unloaded for being idle.",
    "preload": "Load it when the daemon starts.",
    "priority": "Higher is evicted later and admitted first.",
    "concurrency_limit": "How many requests it answers at the same time, where that shall be fewer than its slots.",
    "load_stall_timeout": "How long a load may stand still before it counts as failed.",
    "drain_timeout": "How long requests in flight may go on when it is to stop.",
    "restart": "When it fails: the next request starts it again, it comes back by itself, or it stays down.",
    "restart_limit": "How many failures within restart_window leave it down for the rest of that time; 0: no limit.",
    "restart_window": "The time in which failures are counted.",
    "limits": "Limits of the model's unit, as systemd knows them.",
    "sandbox": "Relaxations of the sandbox, each by its name.",
    "env_vars": "Environment variables of the model's server.",
    "extra_args": "Other flags of llama-server, without their dashes.",
    "limits.memory_max": "MemoryMax=; MemorySwapMax=0 goes with it. By default a quarter more than the model can need.",
    "limits.cpu_weight": "CPUWeight=",
    "limits.io_weight": "IOWeight=",
    "limits.allowed_cpus": "AllowedCPUs=, such as 0-7,16.",
    "limits.nice": "Nice=",
    "limits.tasks_max": "TasksMax=",
    "sandbox.network": "none; loopback: one of its own; host: the host's network.",
    "sandbox.writable_code": "Memory both writable and executable, which drivers that compile for the CPU need.",
    "sandbox.scheduling": "Its own priorities and CPU affinity: --prio, --cpu-mask.",
    "sandbox.shared_ipc": "The host's IPC and /tmp/nvidia-mps, which CUDA's MPS needs.",
    "lora.path": "A GGUF file.",
    "lora.scale": "The weight with which it is applied.",
}
"""What each field is for, in a sentence; the manual page llmstudio-recipe(5) tells the rest."""

_WORD: Schema = {"type": "string", "pattern": r"^[^\x00-\x1f\x7f]*$"}
_DURATION: Schema = {
    "type": "string",
    "pattern": r"^\s*(never|off|\d+(\.\d+)?|(\d+(\.\d+)?\s*(ms|s|sec|m|min|h|d|w)\s*)+)\s*$",
    "examples": ["10m", "90s", "1h 30m", "off"],
}
_SIZE: Schema = {
    "type": "string",
    "pattern": r"^\s*\d+(\.\d+)?\s*([kKmMgGtT]([iI]?[bB])?|[bB])?\s*$",
    "examples": ["8GiB", "512MiB", "16G"],
}
_NAME: Schema = {
    "type": "string",
    "pattern": r"^[^\s,\x00-\x1f\x7f]([^,\x00-\x1f\x7f]*[^\s,\x00-\x1f\x7f])?$",
    "maxLength": 200,
}
_CPUS: Schema = {"type": "string", "pattern": r"^\d{1,4}(-\d{1,4})?([, ]+\d{1,4}(-\d{1,4})?)*$"}
_GPU: Schema = {"type": "string", "pattern": r"^\s*(\d{1,3}|(GPU|MIG)-[0-9A-Za-z/-]{1,80})\s*$"}
_GPUS: Schema = {
    "type": "string",
    "pattern": r"^\s*(\d{1,3}|(GPU|MIG)-[0-9A-Za-z/-]+)(\s*,\s*(\d{1,3}|(GPU|MIG)-[0-9A-Za-z/-]+))*\s*$",
}
_INDEX: Schema = {"type": "integer", "minimum": 0, "maximum": 999}
# The daemon reads YAML 1.1, where these are true and false; an editor that reads YAML 1.2 takes them for texts.
_TRUTH: Schema = {"enum": ["yes", "no", "on", "off"]}
_NULL: Schema = {"type": "null"}  # `key:` with nothing behind it says nothing

# What may be written beside the form that the field has in the end; an empty first item replaces that form.
_SPELLINGS: Mapping[str, tuple[Schema, ...]] = {
    "tags": ({"type": "string"},),
    "aliases": (_NAME,),
    "cache_type_k": ({"const": "auto"},),
    "cache_type_v": ({"const": "auto"},),
    "flash_attn": (_TRUTH,),
    "gpus": ({}, {"enum": ["auto", "none", ""]}, _INDEX, _GPUS, {"type": "array", "items": {"anyOf": [_INDEX, _GPU]}}),
    "idle_timeout": (_DURATION, {"const": False}),
    "drain_timeout": (_DURATION, {"const": False}),
    "load_stall_timeout": (_DURATION,),
    "restart_window": (_DURATION,),
    "override_tensor": ({"type": "array", "items": {"type": "string"}},),
    "spec_type": ({"type": "array", "items": {"type": "string"}},),
    "tensor_split": ({"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*([,/]\s*\d+(\.\d+)?\s*)*$"},),
    "sandbox": ({"const": "strict"},),
    "limits.memory_max": (_SIZE,),
    "limits.allowed_cpus": (
        {},
        _CPUS,
        {"type": "integer", "minimum": 0, "maximum": 9999},
        {"type": "array", "minItems": 1, "items": {"anyOf": [_CPUS, {"type": "integer", "minimum": 0}]}},
    ),
}


def recipe_schema() -> Schema:
    """Return the JSON schema of a recipe file: one recipe, a list of them, or vllm-studio's export of a list."""
    recipe = TypeAdapter(Recipe).json_schema()
    parts = recipe.pop("$defs")
    fields = {name: _field(name, schema, parts) for name, schema in recipe["properties"].items()}
    fields["extra_args"]["properties"] = _flags(fields)
    for name, schema in _words(fields).items():
        fields.setdefault(name, schema)
    one = {"$ref": "#/$defs/recipe"}
    several = {
        "type": "array",
        "minItems": 1,
        "items": one,
        # A recipe that stands alone is named by its file.
        "if": {"minItems": 2},
        "then": {"items": {"required": ["id"]}},
    }
    return {
        "$schema": DIALECT,
        "title": "llmstudiod recipes",
        "description": "What a model is and how to run it. See llmstudio-recipe(5).",
        "anyOf": [one, several, {"type": "object", "required": ["recipes"], "properties": {"recipes": several}}],
        "$defs": {
            "recipe": {
                "type": "object",
                "description": "One model.",
                "required": ["model_path"],
                "properties": fields,
                "additionalProperties": True,
            }
        },
    }


def _field(name: str, schema: Schema, parts: Mapping[str, Schema]) -> Schema:
    """Return the schema of one field as people may write it, from the one of the field itself."""
    known = {"description": DESCRIPTIONS[name]}
    if name in {"limits", "sandbox"}:
        inner = _object(name, parts[name.capitalize()])
        return {**known, "anyOf": [inner, *_SPELLINGS.get(name, ()), _NULL]}
    if name == "lora":
        adapter = {**_object("lora", parts["LoraAdapter"]), "required": ["path"]}
        one = [{"type": "string", "minLength": 1}, adapter]
        return {**known, "anyOf": [*one, {"type": "array", "items": {"anyOf": one}}, _NULL]}
    if name == "env_vars":
        values = {"type": ["string", "number", "boolean", "null"]}
        names = {"pattern": f"^(?!{_denied_names()})[A-Za-z_][A-Za-z0-9_]*$"}
        return {**known, "type": ["object", "null"], "propertyNames": names, "additionalProperties": values}
    if name == "extra_args":
        return {**known, "type": ["object", "null"], "additionalProperties": True}
    if "default" in schema and schema["default"] is not None:
        known["default"] = schema["default"]
    members = [_checked(name, member) for member in schema.get("anyOf", [schema]) if member != _NULL]
    members += [_TRUTH] if schema.get("type") == "boolean" else []
    extra = _SPELLINGS.get(name, ())
    members = [*extra[1:]] if extra[:1] == ({},) else [*members, *extra]
    return {**known, "anyOf": [*members, *([] if name == "model_path" else [_NULL])]}


def _checked(name: str, member: Schema) -> Schema:
    """Return a member of a field's union with what the reader checks beyond its type."""
    bare = {key: value for key, value in member.items() if key not in {"title", "default", "description"}}
    if name == "id":
        return {**bare, "pattern": ID_PATTERN}
    if name == "served_model_name":
        return _NAME
    if name == "aliases":
        return {**bare, "items": _NAME}
    return {**bare, **_WORD} if name in SINGLE_LINE_FIELDS and bare.get("type") == "string" else bare


def _object(name: str, part: Schema) -> Schema:
    """Return the schema of an inner mapping, where a name that does not exist is a fault."""
    properties: dict[str, Schema] = {}
    for inner, schema in part["properties"].items():
        members = [member for member in schema.get("anyOf", [schema]) if member != _NULL]
        extra = _SPELLINGS.get(f"{name}.{inner}", (_TRUTH,) if schema.get("type") == "boolean" else ())
        bare = [{key: value for key, value in member.items() if key not in {"title", "default"}} for member in members]
        properties[inner] = {
            "description": DESCRIPTIONS[f"{name}.{inner}"],
            **({"default": schema["default"]} if schema.get("default") is not None else {}),
            "anyOf": [*([] if extra[:1] == ({},) else bare), *(item for item in extra if item)],
        }
        if name != "lora":  # the reader leaves out a limit or relaxation that says nothing
            properties[inner]["anyOf"].append(_NULL)
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _words(fields: Mapping[str, Schema]) -> dict[str, Schema]:
    """Return the keys that are no fields: other spellings, what has no effect here, what no recipe may say."""
    words = {
        alias: {**fields[name], "description": f"Another spelling of {name}. {fields[name]['description']}"}
        for alias, name in ALIASES.items()
    }
    for key, why in {**IGNORED, **FOREIGN}.items():
        words[key] = {"description": f"It has no effect here: {why}.", "deprecated": True}
    for key in NAMES_OF_BINARIES:
        words[key] = {"description": "Not allowed: a recipe cannot choose what is executed.", "not": {}}
    return words


def _flags(fields: Mapping[str, Schema]) -> dict[str, Schema]:
    """Return each flag of llama-server by each of its names: what it takes, or that no recipe may give it."""
    flags: dict[str, Schema] = {}
    for flag in FLAGS:
        for name in _keys(flag.names):
            flags[name] = fields.get(name) or _flag(flag, fields)
        for name in _keys(flag.negated):
            flags[name] = _flag(flag, fields, is_negated=True)
    return flags


def _keys(spellings: Iterable[str]) -> list[str]:
    return [name.lstrip("-").replace("-", "_") for name in spellings]


def _flag(flag: Flag, fields: Mapping[str, Schema], *, is_negated: bool = False) -> Schema:
    if flag.denied:
        return {"description": f"Not allowed: {flag.denied}.", "not": {}}
    if is_negated:
        return {"description": f"The opposite of {flag.names[0]}.", "anyOf": [*_KINDS[FlagKind.SWITCH], _NULL]}
    if flag.field:
        return {**fields[flag.field], "description": f"The same as the field {flag.field}."}
    return {"description": f"{flag.names[0]} of llama-server.", "anyOf": [*_KINDS[flag.kind], _NULL]}


_SCALAR: Schema = {"type": ["string", "number"]}
_NOT_GIVEN: Schema = {"const": False}  # the flag is left out
_KINDS: Mapping[FlagKind, tuple[Schema, ...]] = {
    FlagKind.SWITCH: ({"type": "boolean"}, _TRUTH),
    FlagKind.VALUE: (_SCALAR, _NOT_GIVEN),
    FlagKind.NUMBER: (
        {"type": "number"},
        {"type": "string", "pattern": r"^[+-]?[0-9.]+([eE][+-]?[0-9]+)?$"},
        _NOT_GIVEN,
    ),
    FlagKind.INTEGER: ({"type": "integer"}, {"type": "string", "pattern": r"^[+-]?[0-9]+$"}, _NOT_GIVEN),
    FlagKind.LIST: (_SCALAR, {"type": "array", "items": _SCALAR}, _NOT_GIVEN),
    FlagKind.JSON: ({"type": ["string", "object", "array"]}, _NOT_GIVEN),
    FlagKind.ON_OFF_AUTO: ({"type": "boolean"}, {"enum": ["on", "off", "auto"]}),
}


def _denied_names() -> str:
    """Return a pattern of the environment variables that no recipe may set, in any case."""
    letters = (
        "".join(f"[{letter}{letter.lower()}]" if letter.isalpha() else letter for letter in start)
        for start, _ in DENIED_ENVIRONMENT
    )
    return f"({'|'.join(letters)})"
