"""Who is let in at the endpoint: keys, foreign pages, foreign names, listeners that others reach."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from llmstudiod.core.errors import AccessDeniedError, AuthenticationError
from llmstudiod.core.keys import Key, hash_of
from llmstudiod.http.access import Access, Rules
from tests.integration.house import CHAT, House, open_house

BODY = b'{"model": "tiny", "messages": []}'
KEYS = (
    Key("all", hash_of("secret-all")),
    Key("one", hash_of("secret-one"), models=("other",)),
    Key("old", hash_of("secret-old"), expires=1.0),
)
PAGE = "https://chat.example.org"
RULES = {
    "plain": Rules(),
    "keys": Rules(keys=KEYS),
    "broken": Rules(keys=None),
    "cors": Rules(cors_origins=frozenset({PAGE}), allowed_hosts=frozenset({"gpu-box"})),
    "both": Rules(keys=KEYS, cors_origins=frozenset({PAGE})),
}


@pytest.fixture(params=[True, False], ids=["fast way", "usual way"])
async def house(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[House]:
    """The endpoint with its models ready, on the short way and on the usual one."""
    async with open_house(tmp_path, has_fast_path=request.param) as opened:
        await opened.warm_up("tiny")
        await opened.warm_up("other")
        yield opened


async def post(house: House, *headers: str, path: str = CHAT, body: bytes = BODY, host: str = "localhost") -> int:
    """Send a POST with these header lines, twice on one connection, and return the status, which is the same."""
    head = "".join(f"{line}\r\n" for line in headers)
    raw = f"POST {path} HTTP/1.1\r\nHost: {host}\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    client = await house.connect()
    statuses = []
    for _ in range(2):
        await client.send(raw)
        statuses.append((await client.answer()).status)
    assert statuses[0] == statuses[1]
    return statuses[0]


@pytest.mark.parametrize(
    ("rules", "headers", "status"),
    [
        ("plain", [], 200),
        ("plain", ["Authorization: Bearer anything"], 200),
        ("keys", [], 401),
        ("keys", ["Authorization: Bearer secret-all"], 200),
        ("keys", ["authorization: bearer   secret-all"], 200),
        ("keys", ["x-api-key: secret-all"], 200),
        ("keys", ["Authorization: Bearer secret-al"], 401),
        ("keys", ["Authorization: Basic secret-all"], 401),
        ("keys", ["Authorization: Bearer secret-old"], 401),
        ("keys", ["Authorization: Bearer secret-one"], 403),
        ("keys", ["Authorization: Bearer secret-all", f"Origin: {PAGE}"], 200),
        ("broken", ["Authorization: Bearer secret-all"], 401),
        ("plain", [f"Origin: {PAGE}"], 403),
        ("plain", ["Origin: null"], 403),
        ("plain", ["Origin: http://localhost"], 200),
        ("plain", ["Origin: https://localhost"], 200),
        ("plain", ["Origin: foo://localhost"], 403),
        ("plain", ["Sec-Fetch-Site: cross-site"], 403),
        ("plain", ["Sec-Fetch-Site: same-site"], 403),
        ("plain", ["Sec-Fetch-Site: same-origin"], 200),
        ("cors", [f"Origin: {PAGE}"], 200),
        ("cors", ["Origin: https://evil.example"], 403),
    ],
)
async def test_request_is_let_in_or_not(house: House, rules: str, headers: list[str], status: int) -> None:
    """On either way, the first time and the next time on the same connection."""
    house.proxy.access.rules = RULES[rules]
    assert await post(house, *headers) == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8080", 200), ("127.0.0.1:8080", 200), ("127.8.8.8", 200), ("[::1]:8080", 200), ("LOCALHOST", 200),
        ("localhost.:80", 200), ("gpu-box:8080", 200), ("evil.example", 403), ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403), ("10.0.0.1", 403), ("", 403),
    ],
)  # fmt: skip
async def test_name_that_is_not_ours_is_refused(house: House, host: str, status: int) -> None:
    """A page may have its own name point at this machine; its requests then carry that name."""
    house.proxy.access.rules = RULES["cors"]
    assert await post(house, host=host) == status


async def test_rules_count_from_the_next_request_on(house: House) -> None:
    """Also on connections that were let in before."""
    client = await house.connect()
    raw = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
    for name, status in (("plain", 200), ("keys", 401), ("plain", 200), ("broken", 401)):
        house.proxy.access.rules = RULES[name]
        await client.send(raw)
        assert (await client.answer()).status == status


async def test_key_sees_its_models_alone(house: House) -> None:
    """In the list, by name, and in use."""
    house.proxy.access.rules = RULES["keys"]
    client = await house.connect()
    seen = {}
    for secret in ("secret-all", "secret-one"):
        await client.send(f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {secret}\r\n\r\n".encode())
        seen[secret] = {model["id"] for model in (await client.answer()).json["data"]}
    assert seen == {"secret-all": {"org/Tiny", "other"}, "secret-one": {"other"}}
    await client.send(b"GET /v1/models/tiny HTTP/1.1\r\nHost: x\r\nx-api-key: secret-one\r\n\r\n")
    assert (await client.answer()).status == 404
    other = b'{"model": "other", "messages": []}'
    assert await post(house, "x-api-key: secret-one", body=other) == 200
    for path in ("/upstream/tiny/completion", "/v1/tokenize"):
        assert await post(house, "x-api-key: secret-one", path=path, body=b'{"model": "tiny", "prompt": "x"}') == 403


async def get(house: House, path: str, *headers: str, method: str = "GET") -> tuple[int, dict[str, Any]]:
    """Ask for something; return status and JSON."""
    client = await house.connect()
    head = "".join(f"{line}\r\n" for line in headers)
    await client.send(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode())
    answer = await client.answer()
    return answer.status, answer.json


async def test_key_learns_nothing_of_other_models(house: House) -> None:
    """No name that is nearly the one that was asked for, and no count of what it does not see."""
    house.proxy.access.rules = RULES["keys"]
    for path in ("/v1/models/tin", "/upstream/tin/props", "/props?model=tin"):
        status, body = await get(house, path, "x-api-key: secret-one")
        assert (status, "Tiny" in str(body), "tiny" in str(body)) == (404, False, False), path
    status, body = await get(house, "/props?model=tiny", "x-api-key: secret-one")
    assert (status, "Tiny" in str(body)) == (403, False)
    assert "tiny" in str((await get(house, "/props?model=tin", "x-api-key: secret-all"))[1])
    health = (await get(house, "/health", "x-api-key: secret-one"))[1]
    assert (health["models"], health["running_model"]) == ({"ready": 1}, "other")
    assert (await get(house, "/health", "x-api-key: secret-all"))[1]["models"] == {"ready": 2, "stopped": 1}


@pytest.mark.parametrize(
    ("method", "path", "right"),
    [
        ("GET", "metrics", "metrics"),
        ("GET", "metrics/?x=1", "metrics"),
        ("GET", "%6Detrics", "metrics"),
        ("POST", "lora-adapters", "admin"),
        ("POST", "slots/0?action=erase", "admin"),
        ("POST", "props", "admin"),
    ],
)
async def test_key_may_use_a_model_and_not_change_it(house: House, method: str, path: str, right: str) -> None:
    """What concerns all who use it needs a right of its own."""
    more = Key("more", hash_of("secret-more"), admin=right == "admin", metrics=right == "metrics")
    house.proxy.access.rules = Rules(keys=(KEYS[0], more))
    status, body = await get(house, f"/upstream/tiny/{path}", "x-api-key: secret-all", method=method)
    assert (status, f"--{right}" in str(body)) == (403, True)
    sent = len(house.tiny.requests)
    await get(house, f"/upstream/tiny/{path}", "x-api-key: secret-more", "Content-Length: 0", method=method)
    assert len(house.tiny.requests) == sent + 1


async def test_health_is_open_and_tells_next_to_nothing(house: House) -> None:
    """Whoever watches the machine needs no key; whoever has none learns no name, version or count."""
    house.proxy.access.rules = RULES["keys"]
    client = await house.connect()
    await client.send(b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n")
    answer = await client.answer()
    assert (answer.status, answer.json) == (200, {"status": "ok", "inference_ready": True})
    house.proxy.access.rules = RULES["plain"]
    await client.send(b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n")
    assert (await client.answer()).json == {"status": "ok", "inference_ready": True}
    house.proxy.access.rules = RULES["keys"]
    await client.send(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
    refused = await client.answer()
    assert refused.status == 401
    assert refused.json["error"]["type"] == "authentication_error"
    assert "laptop" not in refused.raw.decode()


async def test_key_does_not_reach_the_model(house: House) -> None:
    """Nor does anything else that says who somebody is."""
    house.proxy.access.rules = RULES["keys"]
    assert await post(house, "Authorization: Bearer secret-all", "Cookie: a=b") == 200
    sent = repr(house.tiny.requests).lower().encode()
    assert b"secret" not in sent
    assert b"cookie" not in sent


async def test_allowed_page_may_ask_and_read(house: House) -> None:
    """A browser asks first, without a key, and lets the page read an answer that names it."""
    house.proxy.access.rules = RULES["both"]
    client = await house.connect()
    ask = f"OPTIONS {CHAT} HTTP/1.1\r\nHost: localhost\r\nAccess-Control-Request-Method: POST\r\nOrigin: {{}}\r\n"
    await client.send((ask.format(PAGE) + "Access-Control-Request-Headers: authorization\r\n\r\n").encode())
    answer = await client.answer()
    assert (answer.status, answer.header("access-control-allow-origin")) == (204, PAGE)
    assert answer.header("access-control-allow-headers") == "authorization"
    await client.send((ask.format("https://evil.example") + "\r\n").encode())
    refused = await client.answer()
    assert (refused.status, refused.header("access-control-allow-origin")) == (403, None)
    head = f"Origin: {PAGE}\r\nAuthorization: Bearer secret-all\r\nContent-Length: {len(BODY)}\r\n"
    await client.send(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode() + BODY)
    served = await client.answer()
    assert (served.status, served.header("access-control-allow-origin"), served.header("vary")) == (200, PAGE, "Origin")


@pytest.mark.parametrize(
    ("rules", "address", "error"),
    [
        (Rules(), "127.0.0.1", None),
        (Rules(), "::1", None),
        (Rules(), "::ffff:127.0.0.1", None),
        (Rules(), "192.168.1.5", AccessDeniedError),
        (Rules(), "::ffff:192.168.1.5", AccessDeniedError),
        (Rules(), "fe80::1%eth0", AccessDeniedError),
        (Rules(allows_open_listener=True), "192.168.1.5", None),
        (Rules(keys=KEYS), "192.168.1.5", AuthenticationError),
    ],
)
def test_listener_that_others_reach_needs_keys(rules: Rules, address: str, error: type[Exception] | None) -> None:
    """Unless the setting says otherwise; the daemon never exits for it."""
    access = Access(rules, own_names=frozenset({"gpu-box"}), is_session=lambda _: False, now=time.time)
    headers = {"Host": address if ":" not in address else f"[{address}]"}
    if error is None:
        assert access.check(headers, local_address=address, is_safe=False) is None
    else:
        with pytest.raises(error):
            access.check(headers, local_address=address, is_safe=False)


# Stopping


async def test_draining_endpoint_answers_what_still_comes(tmp_path: Path) -> None:
    """A connection that was open gets one more answer, which is its last; one at rest is closed after a moment."""
    async with open_house(tmp_path) as house:
        await house.warm_up("tiny")
        busy, resting = await house.connect(), await house.connect()
        raw = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
        await busy.send(raw)
        assert (await busy.answer()).status == 200
        draining = asyncio.ensure_future(house.endpoint.drain(within_s=5))  # noqa: TID251 - awaited below
        await asyncio.sleep(0.05)
        await busy.send(raw)
        answer = await busy.answer()
        assert (answer.status, answer.header("connection")) == (200, "close")
        async with asyncio.timeout(3):
            assert await resting.reader.read() == b""
            await draining
