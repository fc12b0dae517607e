"""How the admin interface shows what is not its own: faults, plans, recipes, errors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmstudiod.adapters.planner import Plan
from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.lifecycle import InstanceView, State
from llmstudiod.core.recipe import Fault, Recipe, RecipeEntry
from llmstudiod.core.recipe_names import ALIASES, FOREIGN
from llmstudiod.core.settings import Settings

OLD_WORDS = {
    State.STOPPED: "stopped",
    State.STARTING: "starting",
    State.LOADING: "starting",
    State.READY: "running",
    State.DRAINING: "running",
    State.STOPPING: "stopped",
    State.FAILED: "error",
}
"""Our states in vllm-studio's words."""

OLD_FIELDS: Mapping[str, Any] = {
    "env_vars": None,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "max_model_len": 32768,
    "gpu_memory_utilization": 0.9,
    "kv_cache_dtype": "auto",
    "max_num_seqs": 256,
    "trust_remote_code": True,
    "tool_call_parser": None,
    "reasoning_parser": None,
    "enable_auto_tool_choice": False,
    "quantization": None,
    "dtype": None,
    "host": "0.0.0.0",  # noqa: S104 - the old default, which means nothing here
    "port": 8000,
    "python_path": None,
    "extra_args": {},
    "max_thinking_tokens": None,
    "thinking_mode": "conservative",
}
"""What old clients find in every recipe, with its default; source: vllm-studio's schema, v0.3.1."""


def recipe_answer(entry: RecipeEntry, shown: InstanceView | None) -> dict[str, Any]:
    """Return a recipe as clients read it: every old field, then ours. ``old`` names what the recipe does not say."""
    state = shown.state if shown else State.STOPPED
    said = entry.recipe.as_dict()
    filled = filled_in(entry.recipe, shown)
    return {
        **filled,
        **said,
        "status": OLD_WORDS[state],
        "state": str(state),
        "file": entry.file,
        "old": sorted(filled),
        "warnings": [fault_answer(fault) for fault in entry.warnings],
    }


def filled_in(recipe: Recipe, shown: InstanceView | None) -> dict[str, Any]:
    """Return what an answer says in place of what a recipe does not set: the value in force, or the default."""
    facts = shown.facts if shown else None
    in_force: dict[str, Any] = {"max_model_len": facts.n_ctx, "max_num_seqs": facts.n_parallel} if facts else {}
    if recipe.cache_type_k is not None:
        in_force["kv_cache_dtype"] = recipe.cache_type_k
    ours = {"name": recipe.name or recipe.id, "backend": recipe.backend, "served_model_name": recipe.alias}
    said = recipe.as_dict()
    return {name: value for name, value in {**OLD_FIELDS, **in_force, **ours}.items() if name not in said}


ADDED = frozenset({"status", "state", "file", "old", "warnings"})
"""What `recipe_answer` adds to a recipe."""


def as_meant(values: Mapping[str, Any], *, filled: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe that a client sends without what an answer of ours had added to it.

    ``filled`` and ``said``: the recipe that is stored, see `filled_in`. Clients send back what they have read, with
    ``old`` or only the fields that they know, and something changed: what they have left as it was, and the recipe
    does not set, is the daemon's to choose again tomorrow. Whoever sends none of vllm-studio's own fields has not
    read them here, and means what it says.
    """
    old = values.get("old")
    named = {name for name in old if isinstance(name, str)} if isinstance(old, list) else set()
    is_read_here = bool(named) or not FOREIGN.keys().isdisjoint(values.keys() & OLD_FIELDS.keys())
    meant = {
        name: value
        for name, value in values.items()
        if name not in ADDED
        and not (is_read_here and name in filled and filled[name] == value)
        and not (name in named and name in OLD_FIELDS and OLD_FIELDS[name] == value)
    }
    for name, field in ALIASES.items():  # a new value under one name, and what it replaces under the other
        if meant.get(name) is not None and field in meant and meant[field] == said.get(field) != meant[name]:
            del meant[field]
    return meant


def plan_answer(plan: Plan, *, launcher: str) -> dict[str, Any]:
    """Return a plan: command line, environment, files, context, estimate."""
    context, request = plan.command.context, plan.request
    return {
        "argv": list(request.argv),
        "environment": dict(request.environment),
        "files": [{"path": file.host, "inside": file.inside} for file in request.files],
        "socket": request.socket_path,
        "n_ctx": context.n_ctx,
        "n_parallel": context.n_parallel,
        "n_ctx_total": context.n_ctx_total,
        "notes": list(plan.command.notes),
        "defaults": list(context.defaults),
        "estimate": plan.estimate.as_dict() if plan.estimate else None,
        "llama_server": {"version": plan.binary.version, "source": plan.binary.source},
        "launcher": launcher,
    }


def fault_answer(fault: Fault) -> dict[str, Any]:
    """Return a fault of a file."""
    return {
        "file": fault.file,
        "line": fault.line,
        "key": fault.key,
        "recipe_id": fault.recipe_id,
        "message": fault.message,
        "hint": fault.hint,
        "severity": str(fault.severity),
    }


def error_answer(error: LlmstudioError) -> dict[str, Any]:
    """Return an error in this interface's envelope."""
    answer = {"detail": error.message, "kind": error.kind, "hint": error.hint}
    return answer | {name: error.details[name] for name in ("failure", "lines", "faults") if error.details.get(name)}


def old_config(
    settings: Settings, ports: Sequence[int], views: Sequence[InstanceView], *, needs_key: bool, database: Path | None
) -> dict[str, Any]:
    """Return what vllm-studio's clients read of the configuration: one controller, one endpoint, no secrets.

    ``database`` None: nothing is kept; they expect a text.
    """
    port = next(iter(ports), None)
    is_up = any(shown.state is State.READY for shown in views)
    here = f"http://localhost:{port}" if port else None
    services = [
        ("llmstudiod", "running" if port else "stopped", "the endpoint, the admin interface and the page"),
        ("llama-server", "running" if is_up else "stopped", "the models, each in a unit of its own"),
    ]
    return {
        "config": {
            "host": "localhost",
            "port": port,
            "inference_port": port,
            "api_key_configured": needs_key,
            "models_dir": next(iter(settings.model_dirs), None),
            "data_dir": str(database.parent) if database else "",
            "db_path": str(database or ""),
            "sglang_python": None,
            "tabby_api_dir": None,
        },
        "services": [
            {
                "name": name,
                "port": port,
                "internal_port": port,
                "protocol": "http",
                "status": status,
                "description": text,
            }
            for name, status, text in services
        ],
        "environment": {
            "controller_url": here,
            "inference_url": here and f"{here}/v1",
            "litellm_url": None,
            "frontend_url": here,
        },
    }
