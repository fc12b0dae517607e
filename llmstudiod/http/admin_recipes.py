"""Recipes over HTTP: read, checked, written and removed.

Writing keeps vllm-studio's ways: POST and PUT take a recipe as JSON, and answer ``{success, id}``. A recipe may also
come as YAML, which is stored as it is, comments and all.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from aiohttp import web

from llmstudiod.adapters.planner import Planner
from llmstudiod.adapters.recipe_writer import MARK, RecipeWriter
from llmstudiod.core import strict
from llmstudiod.core.errors import (
    BadRequestError,
    ConfigError,
    ConflictError,
    LlmstudioError,
    ModelNotFoundError,
    StaleError,
)
from llmstudiod.core.recipe import Fault, LoadedRecipes, Recipe, RecipeEntry, Severity
from llmstudiod.core.settings import Settings
from llmstudiod.http.admin_answers import (
    as_meant,
    error_answer,
    fault_answer,
    filled_in,
    plan_answer,
    recipe_answer,
)
from llmstudiod.http.admin_gpus import preview_answer
from llmstudiod.http.answers import json_response
from llmstudiod.http.json_body import json_object
from llmstudiod.http.query import truth
from llmstudiod.supervisor import Supervisor

YAML_KINDS = frozenset({"application/yaml", "application/x-yaml", "text/yaml"})
MAX_BYTES = 1 << 20
_AS_YAML = "a recipe is a JSON object, or YAML with Content-Type application/yaml"
_RENAME = "store it as a new recipe, and delete this one"


class AdminRecipes:
    """The routes below ``/recipes``. ``reload`` puts what was written into force."""

    def __init__(
        self,
        *,
        supervisor: Supervisor,
        planner: Planner,
        writer: RecipeWriter,
        settings: Callable[[], Settings],
        reload: Callable[[], Awaitable[None]],
        launcher_name: str,
    ) -> None:
        self._supervisor = supervisor
        self._planner = planner
        self._writer = writer
        self._settings = settings
        self._reload = reload
        self._launcher_name = launcher_name
        self._writing = asyncio.Lock()  # of two at once the second sees what the first wrote

    def routes(self) -> list[web.RouteDef]:
        """Return the routes."""
        return [
            web.get("/recipes", self._list),
            web.post("/recipes", self._post),
            web.post("/recipes/check", self._check),
            web.post("/recipes/from-command", self._from_command),
            web.get("/recipes/{id}/file", self._file),
            web.get("/recipes/{id}", self._show),
            web.put("/recipes/{id}", self._put),
            web.delete("/recipes/{id}", self._delete),
        ]

    def _answer(self, entry: RecipeEntry) -> dict[str, Any]:
        return recipe_answer(entry, self._supervisor.view(entry.recipe.id))

    async def _list(self, _: web.Request) -> web.Response:
        return json_response([self._answer(entry) for entry in self._supervisor.catalogue.entries.values()])

    async def _show(self, request: web.Request) -> web.Response:
        model = self._supervisor.catalogue.resolve(request.match_info["id"])
        return json_response(self._answer(self._supervisor.catalogue.entries[model]))

    async def _post(self, request: web.Request) -> web.Response:
        text, recipe = await self._read(request, model=None)
        is_new = request.headers.get("If-None-Match") == "*"  # old clients store, whether there is one or not
        async with self._writing:
            if is_new and any(fault.key == "id" for fault in self._supervisor.catalogue.clashes(recipe, is_new=True)):
                hint = "give it another id, or edit that one"
                raise ConflictError(f"there is a recipe '{recipe.id}' already", hint=hint)
            return await self._write(text, recipe)

    async def _put(self, request: web.Request) -> web.Response:
        text, recipe = await self._read(request, model=request.match_info["id"])
        async with self._writing:
            if (match := request.headers.get("If-Match")) is not None:
                await self._refuse_stale(recipe.id, match)
            return await self._write(text, recipe)

    async def _refuse_stale(self, model: str, match: str) -> None:
        """Refuse to write over a recipe that has another text than the client has seen, or none any more."""
        hint = "read it anew, or store without If-Match to write over it"
        try:
            tag = _tag(await self._text(model))
        except ModelNotFoundError:
            raise StaleError(f"the recipe '{model}' was removed meanwhile", hint=hint) from None
        if match != "*" and tag not in match:  # a proxy may have put W/ before it
            raise StaleError(f"the recipe '{model}' was changed meanwhile", hint=hint)

    async def _write(self, text: str, recipe: Recipe) -> web.Response:
        # The launcher refuses it too, but cannot know better than that root may write such a file by hand.
        if faults := self._supervisor.catalogue.clashes(recipe, is_new=False):
            told = "; ".join(map(str, faults[:3]))
            details = {"faults": [fault_answer(fault) for fault in faults]}
            raise ConflictError(f"the recipe cannot be stored: {told}", hint=faults[0].hint, details=details)
        await self._writer.put(self._file_of(recipe.id), text)
        await self._reload()
        return json_response({"success": True, "id": recipe.id}, headers={"ETag": _tag(text)})

    async def _delete(self, request: web.Request) -> web.Response:
        """Remove a recipe by its id; other names are for reading and for using it."""
        name = request.match_info["id"]
        file, entry = self._place(name)
        if entry is not None and entry.recipe.id != name:
            hint = f"it is a name of '{entry.recipe.id}'"
            raise ModelNotFoundError(f"there is no recipe with the id '{name[:200]}'", hint=hint)
        if file is None and entry is not None:
            message = f"'{name}' has no recipe: it is served because '{entry.recipe.model_path}' is there"
            raise ConflictError(message, hint="remove the file, or set auto_recipes: false in the settings")
        await self._writer.delete(PurePath(file or "").name)
        await self._reload()
        return json_response({"success": True})

    async def _check(self, request: web.Request) -> web.Response:
        """Say what is wrong with a recipe that is not stored, and what would become of it. Changes nothing.

        ``?new=true`` judges it as a POST with ``If-None-Match: *`` does, ``?id=`` as a PUT to that recipe.
        """
        model = request.query.get("id") or None
        raw, file = await self._raw(request, model=model)
        loaded = _parsed(raw, file)
        faults = [*loaded.faults, *(fault for entry in loaded.entries for fault in entry.warnings)]
        is_trusted = truth(request, "trusted")  # of a file that root writes by hand, which may hold several
        by_hand = None if is_trusted or model is None else await self._by_hand(model)
        faults += [by_hand] if by_hand else []
        entry = loaded.entries[0] if len(loaded.entries) == 1 or (is_trusted and loaded.entries) else None
        text = raw.decode("utf-8", "replace")  # of a faulty one too, so that it can be mended as YAML
        answer: dict[str, Any] = {"recipe": None, "yaml": text, "plan": None, "placement": None, "error": None}
        if entry is not None:
            if not is_trusted:
                faults += await asyncio.to_thread(self._refused, entry.recipe)
                faults += self._misnamed(entry.recipe, model, is_new=truth(request, "new"))
            answer["recipe"] = entry.recipe.as_dict()
            judged, odd = await self._judged(entry)
            answer |= judged
            faults += odd
        elif loaded.entries:
            faults.append(Fault(f"holds {len(loaded.entries)} recipes; only root edits such a file"))
        answer["faults"] = [fault_answer(fault) for fault in faults]
        answer["ok"] = entry is not None and all(fault.severity is not Severity.FAULT for fault in faults)
        answer["by_hand"] = by_hand is not None
        return json_response(answer)

    async def _from_command(self, request: web.Request) -> web.Response:
        """Make a recipe of a llama-server command line."""
        # Slow to import: nobody waits for it at a start.
        from llmstudiod.core.from_command import recipe_from_command
        from llmstudiod.http.questions import CommandLine, parsed

        is_for_file = truth(request, "trusted")
        made = recipe_from_command((await parsed(CommandLine, request)).command, over_http=not is_for_file)
        return json_response({"yaml": yaml_text(made.recipe), "recipe": made.recipe, "notes": made.notes})

    async def _file(self, request: web.Request) -> web.Response:
        """Answer the text of a recipe's file, comments and all; for a GGUF without one, that which it could have."""
        text = await self._text(request.match_info["id"])
        headers = {"Server": "llmstudiod", "ETag": _tag(text)}
        return web.Response(text=text, content_type="application/yaml", headers=headers)

    async def _text(self, name: str) -> str:
        file, entry = self._place(name)
        if file is None and entry is not None:
            return yaml_text(entry.recipe.as_dict())
        return await asyncio.to_thread(_text_of_file, file or "")

    async def _judged(self, entry: RecipeEntry) -> tuple[dict[str, Any], list[Fault]]:
        """Return what would become of a recipe, and what is odd about it as its model is seen."""
        try:
            wish, _ = await self._planner.vet(entry, is_thorough=False, is_draft=True)
            found = await self._supervisor.preview(entry.recipe.id, wish, entry.recipe)
            plan = await self._planner.plan(entry, found.placement if found else None, is_draft=True)
        except LlmstudioError as error:
            return {"error": error_answer(error)}, []
        context = plan.command.context
        odd = [note for note in context.notes if note not in context.defaults]
        return {
            "plan": plan_answer(plan, launcher=self._launcher_name),
            "placement": found and preview_answer(found, wish),
        }, [Fault(note, key="max_model_len", severity=Severity.WARNING) for note in odd]

    def _refused(self, recipe: Recipe) -> list[Fault]:
        directories = self._settings().model_dirs
        return [*strict.refused_over_http(recipe), *strict.files_outside(recipe, directories, os.path.realpath)]

    def _place(self, name: str) -> tuple[str | None, RecipeEntry | None]:
        """Return the file of a recipe, and the recipe; None for one that is left out for its faults."""
        catalogue = self._supervisor.catalogue
        try:
            entry = catalogue.entries[catalogue.resolve(name)]
        except ModelNotFoundError:
            if (file := catalogue.broken_file(name)) is None:
                raise
            return file, None
        return entry.file, entry

    def _misnamed(self, recipe: Recipe, model: str | None, *, is_new: bool) -> list[Fault]:
        """Return what is wrong with the names: the path of a PUT decides on the id, other recipes on what is free."""
        faults = self._supervisor.catalogue.clashes(recipe, is_new=is_new)
        if model is not None and recipe.id != model:
            faults.append(Fault(f"expected '{model}', as in the path, found '{recipe.id}'", key="id", hint=_RENAME))
        return faults

    async def _by_hand(self, model: str) -> Fault | None:
        """Return a fault that tells that a person wrote a recipe's file, if so."""
        entry = self._supervisor.catalogue.entries.get(model)
        if entry is None or entry.file is None or not await self._writer.is_foreign(PurePath(entry.file).name):
            return None
        return Fault(f"'{entry.file}' {strict.BY_HAND}", hint="change it there: the page does not overwrite it")

    def _file_of(self, model: str) -> str:
        """Return the name of the file that holds a recipe, or will."""
        catalogue = self._supervisor.catalogue
        entry = catalogue.entries.get(model)
        file = entry.file if entry else catalogue.broken_file(model)
        return PurePath(file).name if file else f"{model}.yaml"

    async def _read(self, request: web.Request, *, model: str | None) -> tuple[str, Recipe]:
        """Return the text to be stored and the one recipe that it holds.

        Raises:
            LlmstudioError: It is none; ``details['faults']`` says where.
        """
        raw, file = await self._raw(request, model=model)
        loaded = _parsed(raw, file)
        faults = [fault for fault in loaded.faults if fault.severity is Severity.FAULT]
        if len(loaded.entries) == 1:  # the launcher judges it again, but can tell no more than that it may not be
            faults += await asyncio.to_thread(self._refused, loaded.entries[0].recipe)
        if faults or len(loaded.entries) != 1:
            told = "; ".join(_told(fault, request) for fault in faults[:3])
            told = told or f"expected one recipe, found {len(loaded.entries)}"
            hint = next((fault.hint for fault in faults if fault.hint), None)
            details = {"faults": [fault_answer(fault) for fault in faults]}
            raise ConfigError(f"the recipe is faulty: {told}", hint=hint, details=details)
        recipe = loaded.entries[0].recipe
        if model is not None and recipe.id != model:
            raise BadRequestError(f"id: expected '{model}', as in the path, found '{recipe.id}'")
        return raw.decode(), recipe

    def _as_meant(self, values: dict[str, Any], model: str | None) -> dict[str, Any]:
        entry = self._supervisor.catalogue.entries.get(model or str(values.get("id")))
        if entry is None:
            return as_meant(values, filled={}, said={})
        filled = filled_in(entry.recipe, self._supervisor.view(entry.recipe.id))
        return as_meant(values, filled=filled, said=entry.recipe.as_dict())

    async def _raw(self, request: web.Request, *, model: str | None) -> tuple[bytes, str]:
        """Return the text of a recipe and the name of its file; none where only the text can say what its id is."""
        body = await request.read()
        if len(body) > MAX_BYTES:
            raise BadRequestError(f"expected a recipe of at most {MAX_BYTES} bytes, found {len(body)}")
        if request.content_type in YAML_KINDS:
            return body, f"{model}.yaml" if model else ""
        values = json_object(body, hint=_AS_YAML)
        meant = self._as_meant(values, model)
        return _text_of(meant, model).encode(), f"{model}.yaml" if model else ""


def _told(fault: Fault, request: web.Request) -> str:
    """Return a fault in a sentence; the lines of what came as JSON are our own, which nobody has seen."""
    line = f"line {fault.line}: " if fault.line and request.content_type in YAML_KINDS else ""
    return f"{line}{replace(fault, line=None)}"


def _text_of(values: dict[str, Any], model: str | None) -> str:
    """Return a recipe's text."""
    kept = {name: value for name, value in values.items() if value is not None}
    if model is not None:
        kept = {"id": model} | kept
        kept["id"] = model  # the path decides
    return yaml_text(kept)


def yaml_text(values: dict[str, Any]) -> str:
    """Return a recipe's file for these values."""
    import yaml  # slow to import, and needed only here

    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def _tag(text: str) -> str:
    """Return the ETag of a recipe's text, whatever its lines end with: a file's are read as one newline."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return f'"{strict.digest(lines.encode())}"'


def _text_of_file(file: str) -> str:
    try:
        text = Path(file).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConflictError(f"'{file}' cannot be read: {error}", hint="edit it at the machine") from None
    return text.partition("\n")[2] if text.startswith(MARK) else text


def _parsed(raw: bytes, file: str) -> LoadedRecipes:
    from llmstudiod.core.recipe_reader import parse_recipe_bytes  # slow to import: nobody waits for it at a start

    loaded = parse_recipe_bytes(raw, file=file)
    entries = tuple(replace(entry, file=file or f"{entry.recipe.id}.yaml") for entry in loaded.entries)
    return LoadedRecipes(entries, tuple(replace(fault, file="") for fault in loaded.faults))
