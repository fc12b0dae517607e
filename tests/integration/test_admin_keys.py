"""The admin interface's keys: made, listed, revoked, and never lost between two who do so at once."""

import asyncio
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from llmstudiod.core.errors import BadRequestError, NotFoundError
from llmstudiod.core.keys import Key, hash_of, holder
from llmstudiod.http.admin_keys import AdminKeys


class Keys:
    """The keys in force; writing takes a while."""

    def __init__(self) -> None:
        self.keys: tuple[Key, ...] = ()

    async def reread(self) -> None:
        """Nobody else changes them."""

    async def put(self, keys: tuple[Key, ...]) -> None:
        """Write them."""
        await asyncio.sleep(0.01)
        self.keys = keys


@web.middleware
async def errors(request: web.Request, handler: Any) -> web.StreamResponse:
    """As the admin interface does."""
    try:
        response: web.StreamResponse = await handler(request)
    except (BadRequestError, NotFoundError) as error:
        return web.json_response({"detail": error.message}, status=error.status)
    return response


@pytest.fixture
def keys() -> Keys:
    """No keys yet."""
    return Keys()


@pytest.fixture
async def client(keys: Keys, aiohttp_client: Any) -> aiohttp.ClientSession:
    """A client of the routes."""
    names = frozenset({"tiny"})
    routes = AdminKeys(
        keys=lambda: keys.keys, reread=keys.reread, put=keys.put, model_names=lambda: names, last_uses=dict
    )
    app = web.Application(middlewares=[errors])
    app.add_routes(routes.routes())
    session: aiohttp.ClientSession = await aiohttp_client(app)
    return session


async def test_keys_that_are_made_at_once_are_all_kept(client: aiohttp.ClientSession, keys: Keys) -> None:
    """Also while others are revoked."""
    for name in ("old0", "old1"):
        await client.post("/keys", json={"name": name})
    made = [client.post("/keys", json={"name": f"k{n}"}) for n in range(6)]
    gone = [client.delete(f"/keys/old{n}") for n in range(2)]
    answers = await asyncio.gather(*made, *gone)
    assert [answer.status for answer in answers] == [201] * 6 + [200] * 2
    assert {key.name for key in keys.keys} == {f"k{n}" for n in range(6)}
    secrets = [(await answer.json())["secret"] for answer in answers[:6]]
    assert [holder(keys.keys, secret).name for secret in secrets] == [f"k{n}" for n in range(6)]  # type: ignore[union-attr]


async def test_first_and_last_key_change_who_is_served(client: aiohttp.ClientSession) -> None:
    """Which is told."""
    first = await (await client.post("/keys", json={"name": "a"})).json()
    second = await (await client.post("/keys", json={"name": "b", "models": ["nope", "tiny"]})).json()
    assert first["warnings"] == ["it is the first key: from now on every request to the endpoint needs one"]
    assert second["warnings"] == ["there is no model 'nope' now"]
    assert (await (await client.delete("/keys/a")).json())["warnings"] == []
    assert (
        "open to the programs of this machine again" in (await (await client.delete("/keys/b")).json())["warnings"][0]
    )


@pytest.mark.parametrize("models", [[], [""], "tiny", [5], {}])
async def test_key_for_no_model_is_refused(client: aiohttp.ClientSession, keys: Keys, models: object) -> None:
    """Nothing means all of them, so an empty list must not."""
    answer = await client.post("/keys", json={"name": "a", "models": models})
    assert (answer.status, "at least one name" in (await answer.json())["detail"]) == (400, True)
    assert keys.keys == ()


@pytest.mark.parametrize(
    ("expires", "ends"), [(None, False), ("never", False), ("off", False), (0, False), ("1h", True)]
)
async def test_key_may_be_for_ever(client: aiohttp.ClientSession, keys: Keys, expires: object, *, ends: bool) -> None:
    """By the words that mean it elsewhere too."""
    await client.post("/keys", json={"name": "a", "expires": expires})
    assert bool(keys.keys[0].expires) == ends


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"expires": "999999999d"}, "expires: expected 36500d at most"),
        ({"expires": "soon"}, "expires: expected a duration"),
        ({"expires": True}, "expires"),
        ({"models": [f"m{n}" for n in range(1001)]}, "models"),
        ({"admin": 1}, "admin"),
        ({"rights": "all"}, "rights"),
        ({"name": "not a name"}, "name"),
    ],
)
async def test_key_that_could_not_be_read_is_not_made(
    client: aiohttp.ClientSession, keys: Keys, more: dict[str, Any], says: str
) -> None:
    """It would shut everybody out; the answer names the field."""
    answer = await client.post("/keys", json={"name": "a"} | more)
    assert (answer.status, says in (await answer.json())["detail"]) == (400, True), await answer.json()
    assert keys.keys == ()


async def test_there_are_a_thousand_keys_at_most(client: aiohttp.ClientSession, keys: Keys) -> None:
    """The next one is refused, and the others count on."""
    keys.keys = tuple(Key(f"k{n}", hash_of(str(n))) for n in range(1000))
    answer = await client.post("/keys", json={"name": "a"})
    assert (answer.status, "1000 keys" in (await answer.json())["detail"]) == (400, True)
    assert len(keys.keys) == 1000
