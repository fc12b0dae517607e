"""GET /api/spec: the admin interface in OpenAPI 3.1, made from the models that its requests are checked by."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from llmstudiod import __version__
from llmstudiod.adapters.recipe_schema import recipe_schema
from llmstudiod.http import questions as q
from llmstudiod.http import schema as s

REF = "#/components/schemas/{model}"
TEXT, EVENTS = "text/plain", "text/event-stream"

_WHOLE = {"type": "integer"}
_TRUTH = {"type": "boolean"}
_WORD = {"type": "string"}


@dataclass(frozen=True, slots=True)
class Query:
    """A parameter of a query, or a header."""

    name: str
    schema: dict[str, Any]
    text: str
    place: str = "query"


@dataclass(frozen=True, slots=True)
class Operation:
    """A route: what it does, takes and answers.

    ``answers``: models by status, or a media type's name; ``is_open``: nobody need have signed in.
    """

    method: str
    path: str
    text: str
    answers: dict[int, type[BaseModel] | str | tuple[type[BaseModel], ...] | list[type[BaseModel]]]
    body: type[BaseModel] | str | None = None
    is_open: bool = False
    query: Sequence[Query] = field(default_factory=tuple)


_FORCE = Query("force", _TRUTH, "do not wait for requests in flight")
_BRIEF = Query("brief", {"type": "boolean"}, "the snapshot without what is null")
_MODEL = Query("model", {"type": "string"}, "whose slots and log are told as well")
_LIMIT = Query("limit", {"type": "integer", "minimum": 0, "maximum": 20000}, "lines")
_TRUSTED = Query("trusted", _TRUTH, "judge it as a file that root writes by hand")
_N_TOKENS = {"type": "integer", "minimum": 1, "maximum": 100000}
_NEW = Query("new", _TRUTH, "judge it as one that is to be made: an id that is taken is a fault")
_ID = Query("id", _WORD, "judge it as this recipe's new text: another id is a fault, and `by_hand` tells of the file")
_NONE_MATCH = Query("If-None-Match", {"const": "*"}, "store it only if there is no recipe of this id", place="header")
_MATCH = Query("If-Match", _WORD, "store it only if the recipe's text is that of this ETag still", place="header")
RECIPE = "recipe"

OPERATIONS = (
    Operation("get", "/health", "whether the daemon can serve", {200: s.Health}),
    Operation("get", "/status", "the daemon and its models", {200: s.Status}),
    Operation("get", "/config", "the settings in force", {200: s.Config}),
    Operation("get", "/instances", "every model", {200: s.Instances}),
    Operation("get", "/instances/{id}", "a model with its story", {200: s.WholeInstance, 404: s.Problem}),
    Operation("get", "/instances/{id}/history", "its last hour", {200: s.History, 404: s.Problem}),
    Operation("get", "/instances/{id}/slots", "what its slots do", {200: s.Slots, 404: s.Problem}),
    Operation("get", "/instances/{id}/live", "its slots and last hour, as they change", {200: EVENTS, 404: s.Problem}),
    Operation("post", "/instances/{id}/stop", "unload a model", {200: s.Evicted, 404: s.Problem}, query=(_FORCE,)),
    Operation(
        "post", "/instances/{id}/restart", "unload a model and load it again",
        {200: s.Launched, 404: s.Problem, 503: s.Refused},
    ),
    Operation("post", "/instances/{id}/reset", "forget a model's failures", {200: s.Told, 404: s.Problem}),
    Operation("post", "/instances/{id}/pin", "keep a model loaded, from now on", {200: s.Told, 404: s.Problem}),
    Operation("post", "/instances/{id}/unpin", "let a model go again", {200: s.Told, 404: s.Problem, 409: s.Problem}),
    Operation(
        "post",
        "/launch/{id}",
        "load a model",
        {200: s.Launched, 202: s.Launched, 404: s.Problem, 503: s.Refused},
        query=(Query("wait", _TRUTH, "answer when it is ready"),),
    ),
    Operation("post", "/launch/{id}/cancel", "give a load up", {200: s.Told, 404: s.Problem, 409: s.Problem}),
    Operation("post", "/evict", "unload every model", {200: s.Evicted}, query=(_FORCE,)),
    Operation("post", "/evict/{id}", "unload a model", {200: s.Evicted, 404: s.Problem}, query=(_FORCE,)),
    Operation("post", "/api/models/unload", "unload every model", {200: s.Evicted}, query=(_FORCE,)),
    Operation("post", "/api/models/unload/{id}", "unload a model", {200: s.Evicted, 404: s.Problem}, query=(_FORCE,)),
    Operation(
        "get",
        "/wait-ready",
        "wait until a model is ready",
        {200: s.WaitReady, 400: s.Problem},
        query=(Query("timeout", {"type": "number", "minimum": 0, "maximum": 3600}, "seconds"),),
    ),
    Operation(
        "get",
        "/explain/{id}",
        "what a start of a model would do",
        {200: s.Explained, 404: s.Problem, 503: s.Problem},
        query=(Query("dry_run", _TRUTH, "ask llama-server itself what it needs"),),
    ),
    Operation("get", "/recipes", "all recipes", {200: [s.Recipe]}),
    Operation(
        "post", "/recipes", "store a recipe",
        {200: s.Saved, 400: s.Problem, 409: s.Problem},
        body=RECIPE, query=(_NONE_MATCH,),
    ),
    Operation(
        "post", "/recipes/check", "judge a recipe",
        {200: s.Check, 400: s.Problem},
        body=RECIPE, query=(_TRUSTED, _NEW, _ID),
    ),
    Operation(
        "post", "/recipes/from-command", "make a recipe of a llama-server command",
        {200: s.FromCommand, 400: s.Problem},
        body=q.CommandLine, query=(_TRUSTED,),
    ),
    Operation("get", "/recipes/{id}", "a recipe", {200: s.Recipe, 404: s.Problem}),
    Operation(
        "get", "/recipes/{id}/file", "the text of a recipe's file",
        {200: "application/yaml", 404: s.Problem, 409: s.Problem},
    ),
    Operation(
        "put", "/recipes/{id}", "store a recipe under this id",
        {200: s.Saved, 400: s.Problem, 409: s.Problem, 412: s.Problem},
        body=RECIPE, query=(_MATCH,),
    ),
    Operation("delete", "/recipes/{id}", "remove a recipe", {200: s.Success, 404: s.Problem, 409: s.Problem}),
    Operation(
        "post", "/sign-in", "open a session, over TCP alone; the answer sets its cookie",
        {200: s.Success, 401: s.Problem, 403: s.Problem},
        body=q.Proof, is_open=True,
    ),
    Operation(
        "post", "/sign-out", "end the session of the request's cookie, over TCP alone",
        {200: s.Success, 403: s.Problem},
        is_open=True,
    ),
    Operation("post", "/web/code", "make a code that signs in at the page, at the machine alone", {200: s.WebCode}),
    Operation("post", "/web/sign-out", "end every session of the page", {200: s.Told}),
    Operation("post", "/reload", "read settings, recipes and keys again", {200: s.Reloaded}),
    Operation("get", "/gpus", "the GPUs and RAM, measured now", {200: s.Gpus}),
    Operation("get", "/logs", "whose logs there are", {200: s.LogSessions}),
    Operation("get", "/logs/{id}", "a model's log", {200: s.Log, 400: s.Problem, 404: s.Problem}, query=(_LIMIT,)),
    Operation("delete", "/logs/{id}", "refused: the journal is not ours to delete", {404: s.Problem, 405: s.Problem}),
    Operation(
        "get", "/logs/{id}/stream", "a model's log as it is written",
        {200: EVENTS, 400: s.Problem, 404: s.Problem},
        query=(_LIMIT,),
    ),
    Operation(
        "get", "/events", "what happens, as it happens; begins with a snapshot; of one model its slots and log too",
        {200: EVENTS, 400: s.Problem},
        query=(_MODEL, _BRIEF),
    ),
    Operation("get", "/events/stats", "how many read along", {200: s.EventStats}),
    Operation("get", "/metrics", "Prometheus' text format", {200: TEXT}),
    Operation("get", "/usage", "what was used", {200: s.Usage}),
    Operation(
        "get",
        "/peak-metrics",
        "the best that models have shown",
        {200: (s.Peaks, s.Peak, s.NoPeak), 404: s.Problem},
        query=(Query("model_id", _WORD, "of this model alone"),),
    ),
    Operation("get", "/lifetime-metrics", "the sums of all times", {200: s.Lifetime}),
    Operation(
        "post",
        "/benchmark",
        "let a ready model answer one request, and measure",
        {200: s.Benchmark, 400: s.Problem, 404: s.Problem, 503: s.Problem},
        query=(
            Query("model", _WORD, "default: the first that is ready"),
            Query("prompt_tokens", _N_TOKENS, "how many to read; default: 1000, or as many as fit"),
            Query("max_tokens", _N_TOKENS, "how many to write"),
        ),
    ),
    Operation("get", "/v1/studio/models", "the GGUFs of this machine", {200: s.StudioModels}),
    Operation(
        "post", "/vram-calculator", "what a file would need",
        {200: s.Vram, 400: s.Problem, 404: s.Problem},
        body=q.VramQuestion,
    ),
    Operation("get", "/keys", "the API keys", {200: s.Keys, 500: s.Problem}),
    Operation("post", "/keys", "make an API key", {201: s.KeyMade, 400: s.Problem, 409: s.Problem}, body=q.NewKey),
    Operation("delete", "/keys/{name}", "revoke an API key", {200: s.KeyRevoked, 404: s.Problem, 409: s.Problem}),
    Operation("get", "/api/spec", "this document", {200: "application/json"}),
)  # fmt: skip


TCP_ALONE = frozenset({"/sign-in", "/sign-out"})
"""Paths that the admin socket does not have: whoever reaches it need not sign in."""

_REFUSALS = {401: s.Problem, 403: s.Problem}
_WORDS = {200: "done", 201: "made", 202: "under way", 401: "sign in first", 403: "without the right", 413: "too large"}


def openapi() -> dict[str, Any]:
    """Return the document."""
    models = sorted({model for each in OPERATIONS for model in _models(each)}, key=lambda model: model.__name__)
    _, found = models_json_schema([(model, "serialization") for model in models], ref_template=REF)
    schemas = found["$defs"]
    for model in models:
        if issubclass(model, q.Question):
            schemas[model.__name__] = model.model_json_schema(ref_template=REF) | {"title": model.__name__}
            schemas[model.__name__].pop("$defs", None)
    paths: dict[str, dict[str, Any]] = {}
    for each in OPERATIONS:
        paths.setdefault(each.path, {})[each.method] = _operation(each)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "llmstudiod's admin interface",
            "version": __version__,
            "description": (
                "On the Unix socket for administrators; over TCP with a session or an admin key. "
                "Another method than those of a path is answered with 405 (MethodNotAllowed)."
            ),
        },
        "security": [{"key": []}, {"session": []}],
        "paths": paths,
        "components": {
            "responses": {"MethodNotAllowed": _METHOD_NOT_ALLOWED},
            "schemas": {**schemas, "RecipeFile": recipe_schema()["$defs"]["recipe"]},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "session": {"type": "apiKey", "in": "cookie", "name": "llmstudio_session"},
            },
        },
    }


_METHOD_NOT_ALLOWED = {
    "description": "the path takes other methods, which Allow names",
    "headers": {"Allow": {"required": True, "schema": {"type": "string"}}},
    "content": {"application/json": {"schema": {"$ref": REF.format(model="Problem")}}},
}


def _models(operation: Operation) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = [s.Problem]
    for answer in operation.answers.values():
        if isinstance(answer, list | tuple):
            found += answer
        elif not isinstance(answer, str):
            found.append(answer)
    if operation.body is not None and not isinstance(operation.body, str):
        found.append(operation.body)
    return found


def _operation(operation: Operation) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in ("id", "name")
        if f"{{{name}}}" in operation.path
    ]
    parameters += [
        {"name": query.name, "in": query.place, "description": query.text, "schema": query.schema}
        for query in operation.query
    ]
    answers = {400: s.Problem, **_REFUSALS, **operation.answers}
    if operation.is_open:
        answers = {400: s.Problem, **operation.answers}
    if operation.body is not None and operation.path not in TCP_ALONE:
        answers[413] = s.Problem
    told: dict[str, Any] = {
        "summary": operation.text,
        "operationId": f"{operation.method} {operation.path}",
        "parameters": parameters,
        "responses": {str(status): _response(status, answer) for status, answer in sorted(answers.items())},
    }
    if operation.is_open:
        told["security"] = []
    if operation.body is not None:
        told["requestBody"] = {"required": True, "content": _body(operation.body)}
    return told


def _response(
    status: int, answer: type[BaseModel] | str | tuple[type[BaseModel], ...] | list[type[BaseModel]]
) -> dict[str, Any]:
    words = _WORDS.get(status, "refused")
    if isinstance(answer, str):
        return {"description": words, "content": {answer: {}}}
    content: dict[str, Any]
    if isinstance(answer, list):
        content = {"type": "array", "items": _reference(answer[0])}
    elif isinstance(answer, tuple):
        content = {"anyOf": [_reference(model) for model in answer]}
    else:
        content = _reference(answer)
    return {"description": words, "content": {"application/json": {"schema": content}}}


def _body(body: type[BaseModel] | str) -> dict[str, Any]:
    if isinstance(body, str):
        recipe = {"schema": {"$ref": REF.format(model="RecipeFile")}}
        return {"application/json": recipe, "application/yaml": {"schema": {"type": "string"}}}
    return {"application/json": {"schema": _reference(body)}}


def _reference(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": REF.format(model=model.__name__)}
