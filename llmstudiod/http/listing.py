"""What the endpoint tells of its models without starting one: /v1/models, /health, /running."""

from collections import Counter
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from llmstudiod import __version__
from llmstudiod.core.errors import ModelNotFoundError
from llmstudiod.core.keys import Key
from llmstudiod.core.lifecycle import InstanceView, State
from llmstudiod.core.recipe import RecipeEntry
from llmstudiod.http.answers import json_response
from llmstudiod.supervisor import Supervisor

HOME = f"""llmstudiod {__version__}

The OpenAI endpoint is at /v1 (point your app's base URL there); /v1/models lists the models, /health tells the state.
`llmstudioctl list` and `llmstudioctl status` tell more.
"""


class Listing:
    """Answers the routes that only read."""

    def __init__(self, supervisor: Supervisor, *, created: int) -> None:
        self._supervisor = supervisor
        self._created = created

    def answer(self, path: str, key: Key | None = None) -> web.Response | None:
        """Return the answer for ``path``, or None when it is none of ours.

        Raises:
            ModelNotFoundError: ``/v1/models/<id>`` names no model.
        """
        match path:
            case "/":
                return web.Response(text=HOME, headers={"Server": "llmstudiod"})
            case "/health" | "/v1/health":
                return json_response(self.health(key))
            case "/v1/models" | "/models":
                entries = self._supervisor.catalogue.entries.values()
                shown = [entry for entry in entries if not entry.recipe.unlisted and _may_see(key, entry)]
                data = [self.model(entry) for entry in shown]
                return json_response({"object": "list", "data": data})
            case "/running":
                known = self._supervisor.catalogue.entries
                seen = {model for model, entry in known.items() if _may_see(key, entry)}
                running = [_running(shown) for shown in self._views() if _is_up(shown) and shown.id in seen]
                return json_response({"running": running})
        if path.startswith("/v1/models/"):
            catalogue = self._supervisor.catalogue
            name = unquote(path[len("/v1/models/") :])
            try:
                entry = catalogue.entries[catalogue.resolve(name)]
            except ModelNotFoundError:
                if key is None or not key.models:
                    raise
                entry = None
            if entry is None or not _may_see(key, entry):
                raise ModelNotFoundError(f"there is no model '{name[:200]}' for this key")
            return json_response(self.model(entry))
        return None

    def bare_health(self) -> web.Response:
        """Return what is told to whoever may not ask anything else."""
        is_ready = any(shown.state is State.READY for shown in self._views())
        return json_response({"status": "ok", "inference_ready": is_ready})

    def health(self, key: Key | None = None) -> dict[str, Any]:
        """Return whether the daemon can serve, and how many models are in which state, of those that the key sees."""
        catalogue = self._supervisor.catalogue
        seen = {model for model, entry in catalogue.entries.items() if _may_see(key, entry)}
        views = [shown for shown in self._views() if shown.id in seen]
        ready = [shown.id for shown in views if shown.state is State.READY]
        return {
            "status": "ok",
            "version": __version__,
            "inference_ready": bool(ready),
            "running_model": ready[0] if ready else None,
            "models": dict(Counter(str(shown.state) for shown in views)),
            "faulty_recipes": len(catalogue.faulty()),
        }

    def model(self, entry: RecipeEntry) -> dict[str, Any]:
        """Return one model in OpenAI's form, with what we know beside it."""
        recipe = entry.recipe
        shown = self._supervisor.view(recipe.id)
        facts = shown.facts if shown else None
        return {
            "id": recipe.alias,
            "object": "model",
            "created": self._created,
            "owned_by": "llmstudiod",
            "active": bool(shown and shown.state is State.READY),
            "status": str(shown.state if shown else State.STOPPED),
            "aliases": [name for name in recipe.names if name != recipe.alias],
            "max_model_len": facts.n_ctx if facts else recipe.max_model_len,
            "meta": {"name": recipe.name, "description": recipe.description, "tags": list(recipe.tags)},
        }

    def _views(self) -> list[InstanceView]:
        return self._supervisor.views()


def _may_see(key: Key | None, entry: RecipeEntry) -> bool:
    return key is None or key.may_use(entry.recipe.names)


def _is_up(shown: InstanceView) -> bool:
    return shown.state not in {State.STOPPED, State.FAILED}


def _running(shown: InstanceView) -> dict[str, Any]:
    return {"model": shown.id, "state": str(shown.state)}
