"""The admin interface's routes for API keys. A secret is told once, when it is made; only its hash is kept."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from llmstudiod.adapters.key_file import new_secret
from llmstudiod.core.errors import BadRequestError, NotFoundError
from llmstudiod.core.keys import MAX_KEYS, Key, hash_of
from llmstudiod.http.answers import json_response


class AdminKeys:
    """Lists, makes and revokes keys.

    ``keys`` returns those in force, after ``reread`` those that are in the file now; ``put`` writes all of them.
    Both raise a ConfigError where that cannot be done.
    ``last_uses`` tells when each was used last, and blocks.
    """

    def __init__(
        self,
        *,
        keys: Callable[[], tuple[Key, ...]],
        reread: Callable[[], Awaitable[None]],
        put: Callable[[tuple[Key, ...]], Awaitable[None]],
        model_names: Callable[[], frozenset[str]],
        last_uses: Callable[[], dict[str, float]],
    ) -> None:
        self._last_uses = last_uses
        self._keys = keys
        self._reread = reread
        self._put = put
        self._model_names = model_names
        self._lock = asyncio.Lock()  # between reading them and writing them nobody else may

    def routes(self) -> list[web.RouteDef]:
        """Return the routes."""
        return [
            web.get("/keys", self._list),
            web.post("/keys", self._add),
            web.delete("/keys/{name}", self._revoke),
        ]

    async def _list(self, _: web.Request) -> web.Response:
        keys = self._keys()
        used = await asyncio.to_thread(self._last_uses)
        return json_response({"keys": [{**_shown(key), "last_used": used.get(key.name)} for key in keys]})

    async def _add(self, request: web.Request) -> web.Response:
        from llmstudiod.http.questions import NewKey, parsed  # slow to import: nobody waits for it at a start

        wanted = await parsed(NewKey, request)
        secret, now, valid_s = new_secret(), time.time(), wanted.valid_s()
        key = Key(
            wanted.name,
            hash_of(secret),
            admin=wanted.admin,
            metrics=wanted.metrics,
            models=tuple(wanted.models or ()),
            created=now,
            expires=now + valid_s if valid_s else 0.0,  # 0, never and off: for ever, as elsewhere
        )
        async with self._lock:
            await self._reread()
            warnings = await self._put_new(key)
        return json_response({**_shown(key), "secret": secret, "warnings": warnings}, status=201)

    async def _put_new(self, key: Key) -> list[str]:
        if any(other.name == key.name for other in self._keys()):
            hint = f"`llmstudioctl key revoke {key.name}` takes it away"
            raise BadRequestError(f"name: there is a key '{key.name}' already", hint=hint)
        if len(self._keys()) >= MAX_KEYS:
            raise BadRequestError(f"there are {MAX_KEYS} keys, which is the most", hint="revoke one that is not used")
        warnings = [f"there is no model '{name}' now" for name in sorted(set(key.models) - self._model_names())]
        if not self._keys():
            warnings.append("it is the first key: from now on every request to the endpoint needs one")
        await self._put((*self._keys(), key))
        return warnings

    async def _revoke(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        async with self._lock:
            await self._reread()
            keys = self._keys()
            rest = tuple(key for key in keys if key.name != name)
            if len(rest) == len(keys):
                raise NotFoundError(f"there is no key '{name[:100]}'", hint="`llmstudioctl key list` lists them")
            await self._put(rest)
        warnings = [] if rest else ["it was the last key: the endpoint is open to the programs of this machine again"]
        return json_response({"success": True, "name": name, "warnings": warnings})


def _shown(key: Key) -> dict[str, Any]:
    return {
        "name": key.name,
        "admin": key.admin,
        "metrics": key.metrics,
        "models": list(key.models) or None,
        "created": key.created,
        "expires": key.expires or None,
    }
