"""The models' logs in the admin interface. They are the journal's, which is not ours to delete."""

import contextlib
import sys
import time

from aiohttp import web

from llmstudiod.core.errors import LlmstudioError, MethodNotAllowedError
from llmstudiod.core.lifecycle import State
from llmstudiod.http.admin_answers import OLD_WORDS, error_answer
from llmstudiod.http.answers import json_response
from llmstudiod.http.query import whole_number
from llmstudiod.http.streams import Streams, Write, event_bytes
from llmstudiod.launchers.base import Launcher
from llmstudiod.supervisor import Supervisor

USUAL_LINES, MAX_LINES = 2000, 20_000


class AdminLogs:
    """The routes below ``/logs``."""

    def __init__(self, supervisor: Supervisor, launcher: Launcher, streams: Streams) -> None:
        self._supervisor = supervisor
        self._launcher = launcher
        self._streams = streams

    def routes(self) -> list[web.RouteDef]:
        """Return the routes."""
        return [
            web.get("/logs", self._list),
            web.get("/logs/{id}", self._show),
            web.delete("/logs/{id}", self._delete),
            web.get("/logs/{id}/stream", self._follow),
        ]

    async def _list(self, _: web.Request) -> web.Response:
        """Answer whose logs there are: those of every model that has been started, the latest first."""
        sessions = []
        for shown in self._supervisor.views():
            entry = self._supervisor.catalogue.entries.get(shown.id)
            if entry is None or not shown.story:
                continue
            began = next((step.at for step in reversed(shown.story) if step.new is State.STARTING), shown.story[0].at)
            age_s = time.monotonic() - began
            sessions.append(
                {
                    "id": shown.id,
                    "recipe_id": shown.id,
                    "recipe_name": entry.recipe.name or shown.id,
                    "model_path": entry.recipe.model_path,
                    "model": entry.recipe.alias,
                    "backend": entry.recipe.backend,
                    "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - age_s)),
                    "status": OLD_WORDS[shown.state],
                }
            )
        sessions.sort(key=lambda session: str(session["created_at"]), reverse=True)
        return json_response({"sessions": sessions})

    async def _show(self, request: web.Request) -> web.Response:
        model = self._model(request)
        lines = await self._launcher.lines(model, limit=_limit(request))
        return json_response({"id": model, "logs": lines, "content": "\n".join(lines)})

    async def _delete(self, request: web.Request) -> web.Response:
        model = self._model(request)
        hint = "`journalctl --vacuum-time=…` removes old entries of all units"
        raise MethodNotAllowedError(
            f"the log of '{model}' is in the system's journal, which is not ours to delete",
            hint=hint,
            details={"allow": "GET"},
        )

    async def _follow(self, request: web.Request) -> web.StreamResponse:
        """Send the last lines, then every new one, until the reader goes; a slow one loses lines, nobody waits."""
        model, limit = self._model(request), _limit(request)
        await self._launcher.lines(model, limit=1)  # what keeps it from being read is an answer, not an empty stream
        return await self._streams.answer(request, lambda write: self.tell(model, limit, write))

    async def tell(self, model: str, limit: int, write: Write) -> None:
        """Write the last lines, then every new one."""
        async with contextlib.aclosing(self._launcher.follow(model, limit=limit)) as lines:  # type: ignore[type-var]
            try:
                async for line in lines:
                    await write(event_bytes("log", {"session_id": model, "line": line}))
            except LlmstudioError as error:
                await write(event_bytes("failure", error_answer(error)))

    def _model(self, request: web.Request) -> str:
        return self._supervisor.catalogue.resolve(request.match_info["id"])


def _limit(request: web.Request) -> int:
    """Return how many lines are asked for; more than there may be are as many as there may be, as ever."""
    return min(MAX_LINES, whole_number(request, "limit", default=USUAL_LINES, least=0, most=sys.maxsize))
