"""The GGUF files of this machine, what each would need, and recipes from a command line that somebody has already."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from llmstudiod.adapters.gguf_file import BadModelFileError, read_header
from llmstudiod.adapters.model_files import FoundModel, find_models, resolve_model
from llmstudiod.adapters.model_recipes import real_paths
from llmstudiod.core.command import plan_context
from llmstudiod.core.devices import Machine
from llmstudiod.core.errors import BadRequestError, LlmstudioError, LoadFailedError, NotFoundError
from llmstudiod.core.memory import Estimate, estimate
from llmstudiod.core.model_shape import ModelShape, model_shape
from llmstudiod.core.needs import run_of
from llmstudiod.core.recipe import Recipe
from llmstudiod.core.settings import Settings
from llmstudiod.http.answers import json_response
from llmstudiod.supervisor import Supervisor

GIB = 1 << 30


class AdminModels:
    """The routes about files. ``measure`` blocks."""

    def __init__(
        self, supervisor: Supervisor, settings: Callable[[], Settings], measure: Callable[[], Machine]
    ) -> None:
        self._supervisor = supervisor
        self._settings = settings
        self._measure = measure

    def routes(self) -> list[web.RouteDef]:
        """Return the routes."""
        return [web.get("/v1/studio/models", self._list), web.post("/vram-calculator", self._calculate)]

    async def _list(self, _: web.Request) -> web.Response:
        """Answer every GGUF in the model directories, with what its header says and whether it fits."""
        return json_response(await asyncio.to_thread(self._found))

    def _found(self) -> dict[str, Any]:
        settings, machine = self._settings(), self._measure()
        recipes = self._recipes_by_path()
        models: list[dict[str, Any]] = []
        roots = []
        for directory in settings.model_dirs:
            root = Path(directory)
            found, faults = find_models(root) if root.is_dir() else ([], [])
            mine = [_recipes_of(each, recipes) for each in found]
            ids = sorted({model for ids in mine for model in ids})
            told = [fault.message for fault in faults[:100]]
            roots.append(
                {"path": directory, "exists": root.is_dir(), "sources": ["setting"], "recipe_ids": ids, "faults": told}
            )
            models += [_shown(each, ids, machine) for each, ids in zip(found, mine, strict=True)]
        return {
            "models": models,
            "roots": roots,
            "configured_models_dir": next(iter(settings.model_dirs), None),
        }

    def _recipes_by_path(self) -> dict[Path, list[str]]:
        """Return the recipes of each file by its real path: a recipe may name a link, a directory, or a short path."""
        found: dict[Path, list[str]] = {}
        directories = self._settings().model_dirs
        for model, entry in self._supervisor.catalogue.entries.items():
            if entry.file is None:  # served without one
                continue
            places = real_paths(entry.recipe.model_path, directories)[1:]  # a relative one is not looked up below /
            path = next(filter(_is_there, places), None)
            if path is not None:
                found.setdefault(_file_of(path), []).append(model)
        return found

    async def _calculate(self, request: web.Request) -> web.Response:
        """Answer what a file needs with some settings, in vllm-studio's words and gibibytes."""
        from llmstudiod.http.questions import VramQuestion, parsed  # slow to import: nobody waits for it at a start

        question = await parsed(VramQuestion, request)
        return json_response(
            await asyncio.to_thread(self._needs, {**question.model_dump(), "cache_type": question.cache_type()})
        )

    def _needs(self, question: dict[str, Any]) -> dict[str, Any]:
        path = self._inside(str(question["model"]))
        try:
            file = resolve_model(path)
        except BadModelFileError as error:  # of the question, not of a model that is to be served
            raise BadRequestError(error.message, hint=error.hint) from error
        shape = model_shape(file.header.metadata, file.tensors)
        if shape is None:
            raise BadRequestError(f"'{path}' is no model: it does not tell its layers and width")
        machine = self._measure()
        gpus = machine.devices[: question["tp_size"]]
        recipe = Recipe(
            id="estimate",
            model_path=str(path),
            max_model_len=question["context_length"],
            max_num_seqs=question["max_num_seqs"],
            cache_type_k=question["cache_type"],
            cache_type_v=question["cache_type"],
        )
        try:
            context = plan_context(recipe, shape.n_ctx_train)
        except LoadFailedError as error:
            message = error.message.partition(": ")[2]
            raise BadRequestError(message, hint="lower context_length or max_num_seqs") from error
        shares = (1.0,) * max(1, len(gpus) or question["tp_size"])
        layers = shape.n_layers + 1 if question["n_gpu_layers"] is None else question["n_gpu_layers"]
        need = estimate(
            shape,
            run_of(recipe, context, cache_ram_mib=None, n_gpu_layers=layers, proportions=shares if layers else ()),
        )
        return _calculated(need, shape, machine, context.n_ctx, context.n_parallel)

    def _inside(self, name: str) -> Path:
        """Return the file that a request names, below one of the model directories.

        Raises:
            LlmstudioError: There is none, or it lies elsewhere.
        """
        roots = [Path(directory).resolve() for directory in self._settings().model_dirs]
        for root in roots:
            try:
                path = (root / name).resolve()
                if any(path.is_relative_to(each) for each in roots) and path.exists():
                    return path
            except (OSError, RuntimeError, ValueError):  # too long, a loop, a NUL
                continue
        raise NotFoundError(
            f"there is no '{name[:200]}' in the model directories", hint="GET /v1/studio/models lists what there is"
        )


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _file_of(path: Path) -> Path:
    """Return the file of a model, which may be given as the directory that holds it alone."""
    try:
        return resolve_model(path).path.resolve() if path.is_dir() else path
    except (LlmstudioError, OSError, RuntimeError):  # what is wrong with it is told where the model is wanted
        return path


def _recipes_of(model: FoundModel, recipes: dict[Path, list[str]]) -> list[str]:
    try:
        return sorted(recipes.get(model.path.resolve(), []))
    except (OSError, RuntimeError):
        return []


def _shown(model: FoundModel, recipes: list[str], machine: Machine) -> dict[str, Any]:
    header = None
    try:
        header = read_header(model.path)
        shape = model_shape(header.metadata, resolve_model(model.path).tensors)
    except LlmstudioError:
        shape = None
    return {
        "path": str(model.path),
        "name": model.path.name,
        "id": model.model_id,
        "title": header.name if header else None,
        "size_bytes": model.total_bytes,
        "modified_at": _modified(model.path),
        "architecture": model.architecture,
        "quantization": model.file_type,
        "context_length": shape.n_ctx_train if shape else None,
        "layers": shape.n_layers if shape else None,
        "shards": len(model.shards),
        "recipe_ids": recipes,
        "has_recipe": bool(recipes),
        "fits": fits(model.weights_bytes, machine),
    }


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def fits(n_bytes: int, machine: Machine) -> str:
    """Return where a file's weights have room, were nothing else there: ``gpu``, ``gpu+ram``, ``ram`` or ``no``."""
    on_gpus = sum(device.total or 0 for device in machine.devices if not device.shares_host_memory)
    if n_bytes <= on_gpus:
        return "gpu"
    host = machine.host.total or 0
    if n_bytes <= host:
        return "gpu+ram" if on_gpus else "ram"
    return "gpu+ram" if on_gpus and n_bytes <= host + on_gpus else "no"


def _calculated(need: Estimate, shape: ModelShape, machine: Machine, n_ctx: int, n_parallel: int) -> dict[str, Any]:
    def gib(n_bytes: float) -> float:
        return round(n_bytes / GIB, 3)

    on_gpu = [device.total for device in need.devices]
    free = [device.free or 0 for device in machine.devices[: len(on_gpu)]]
    weights = need.host.weights + sum(device.weights for device in need.devices)
    kv = need.kv
    total = need.host_total + sum(on_gpu)
    room = sum(device.total or 0 for device in machine.devices[: len(on_gpu)]) or machine.host.total or 0
    wanted = sum(on_gpu) if machine.devices else total
    is_fitting = (
        len(free) == len(on_gpu) and all(has >= needs for has, needs in zip(free, on_gpu, strict=True))
        if machine.devices
        else total <= (machine.host.available or 0)
    )
    return {
        "model_size_gb": gib(weights),
        "context_memory_gb": gib(kv),
        "overhead_gb": gib(total - weights - kv),
        "total_gb": gib(total),
        "fits_in_vram": is_fitting and bool(machine.devices),
        "fits": is_fitting,
        "utilization_percent": round(100 * wanted / room, 1) if room else None,
        "breakdown": {
            "model_weights_gb": gib(weights),
            "kv_cache_gb": gib(kv),
            "activations_gb": gib(total - weights - kv),
            "per_gpu_gb": gib(max(on_gpu, default=0)),
            "total_gb": gib(total),
        },
        "n_ctx": n_ctx,
        "n_parallel": n_parallel,
        "layers": shape.n_layers,
        "estimate": need.as_dict(),
    }
