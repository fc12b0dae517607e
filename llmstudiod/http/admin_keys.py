"""The admin interface's routes for API keys. A secret is told once, when it is made; only its hash is kept."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from llmstudiod.adapters.key_file import new_secret
from llmstudiod.core.errors import BadRequestError, NotFoundError
from llmstudiod.core.keys import NAME, Key, hash_of
from llmstudiod.core.units import parse_duration_s
from llmstudiod.http.answers import json_response

MAX_BODY = 64 << 10


class AdminKeys:
    """Lists, makes and revokes keys.

    ``keys`` returns those in force, ``put`` writes all of them; either raises a ConfigError where that cannot be done.
    ``last_uses`` tells when each was used last, and blocks.
    """

    def __init__(
        self,
        *,
        keys: Callable[[], tuple[Key, ...]],
        put: Callable[[tuple[Key, ...]], Awaitable[None]],
        model_names: Callable[[], frozenset[str]],
        last_uses: Callable[[], dict[str, float]],
    ) -> None:
        self._last_uses = last_uses
        self._keys = keys
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
        raw = await _object(request)
        secret = new_secret()
        key = _key(raw, hash_of(secret))
        async with self._lock:
            warnings = await self._put_new(key)
        return json_response({**_shown(key), "secret": secret, "warnings": warnings}, status=201)

    async def _put_new(self, key: Key) -> list[str]:
        if any(other.name == key.name for other in self._keys()):
            hint = f"`llmstudioctl key revoke {key.name}` takes it away"
            raise BadRequestError(f"name: there is a key '{key.name}' already", hint=hint)
        warnings = [f"there is no model '{name}' now" for name in sorted(set(key.models) - self._model_names())]
        if not self._keys():
            warnings.append("it is the first key: from now on every request to the endpoint needs one")
        await self._put((*self._keys(), key))
        return warnings

    async def _revoke(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        async with self._lock:
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


async def _object(request: web.Request) -> dict[str, Any]:
    try:
        raw = await request.json()
    except ValueError:
        raw = None
    if not isinstance(raw, dict):
        raise BadRequestError('expected a JSON object, such as {"name": "laptop"}')
    return raw


def _key(raw: dict[str, Any], hashed: str) -> Key:
    known = {"name", "admin", "metrics", "models", "expires"}
    if unknown := sorted(raw.keys() - known):
        raise BadRequestError(f"there is no field '{unknown[0][:40]}'; there are {', '.join(sorted(known))}")
    name, models, expires = raw.get("name"), raw.get("models"), raw.get("expires")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadRequestError("name: expected letters, digits and ._@-, 63 at most, beginning with a letter or digit")
    for right in ("admin", "metrics"):
        if not isinstance(raw.get(right, False), bool):
            raise BadRequestError(f"{right}: expected true or false")
    is_list = isinstance(models, list) and models and all(isinstance(model, str) and model for model in models)
    if models is not None and not is_list:
        raise BadRequestError("models: expected a list of at least one name, or nothing for all models")
    now = time.time()
    try:
        valid_s = 0.0 if expires is None else parse_duration_s(expires)
    except (ValueError, TypeError) as error:
        raise BadRequestError(f"expires: {error}") from None
    rights = {right: bool(raw.get(right, False)) for right in ("admin", "metrics")}
    until = now + valid_s if valid_s else 0.0  # 0, never and off: for ever, as elsewhere
    return Key(name, hashed, models=tuple(models or ()), created=now, expires=until, **rights)
