"""The OpenAI endpoint: which model a request goes to, what is passed on, and what is answered without a model."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llmstudiod.core.lifecycle import State
from llmstudiod.core.recipe import Recipe
from tests.integration.fake_upstream import SSE_HEAD, Call, answer, chunk, event
from tests.integration.house import CHAT, House, eventually, open_house

ASK = {"model": "tiny"}


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """Three models, none of them running."""
    async with open_house(tmp_path) as house:
        yield house


@pytest.fixture(params=[False, True], ids=["usual way", "fast path"])
async def warm(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    """The same with the first model ready; what a client sees is the same on both ways."""
    async with open_house(tmp_path, has_fast_path=request.param) as house:
        await house.warm_up()
        yield house


# What is passed on


async def test_request_reaches_the_model_as_it_was_sent(warm: House) -> None:
    """Method, path, percent-escapes, query and the body's bytes arrive unchanged."""
    body = b'{ "model" : "tiny",  "x": "\\u00e4" }'
    reply = await warm.post(body, CHAT + "?a=%2F%20&b=c+d&&e")
    assert (reply.status, reply.json) == (200, {"said": "hello"})
    (received,) = warm.tiny.requests
    assert received.line == f"POST {CHAT}?a=%2F%20&b=c+d&&e"
    assert received.body == body
    assert received.header("content-length") == str(len(body))


@pytest.mark.parametrize(
    "name",
    [
        *("Origin", "Referer", "Authorization", "Proxy-Authorization", "Cookie", "X-Api-Key"),
        *("Api-Key", "X-Goog-Api-Key"),
        *("TE", "Expect", "Trailer", "Accept-Encoding", "Keep-Alive", "Proxy-Connection"),
    ],
)
async def test_header_is_not_forwarded(warm: House, name: str) -> None:
    """What identifies the client, or belongs to its connection only, never reaches a model."""
    value = "100-continue" if name == "Expect" else "private"
    client = await warm.connect()
    await client.post(ASK, headers=f"{name}: {value}\r\n")
    if name == "Expect":
        assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
    assert (await client.answer()).status == 200
    assert warm.tiny.requests[0].header(name.lower()) is None


async def test_headers_named_by_connection_are_not_forwarded(warm: House) -> None:
    """A header that the client itself says is for this connection only goes no further."""
    named = "Connection: X-Mine, keep-alive\r\nConnection: x-other\r\nx-mine: 1\r\nX-Other: 2\r\nX-Third: 3\r\n"
    assert (await warm.post(ASK, headers=named)).status == 200
    names = {name for name, _ in warm.tiny.requests[0].headers}
    assert names.isdisjoint({"x-mine", "x-other", "connection"})
    assert "x-third" in names


@pytest.mark.parametrize("scheme", ["http", "HTTPS"])
async def test_absolute_target(warm: House, scheme: str) -> None:
    """A target with a scheme and an authority, as proxies write it, means its path and query."""
    client = await warm.connect()
    for target, line in (("/tokenize?a=http://b", "POST /tokenize?a=http://b"), ("/upstream/tiny/x", "POST /x")):
        await client.post(ASK, f"{scheme}://other.example:99{target}")
        assert (await client.answer()).status == 200
        assert warm.tiny.requests[-1].line == line
    assert (await client.get(f"{scheme}://x/v1/models")).status == 200
    assert (await client.get(f"{scheme}://x")).status == 200


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        (CHAT, "X-A: " + "a" * 8186 + "\r\n"),
        (CHAT, "X-A: " + "a" * 40_000 + "\r\n"),
        (CHAT, "X-" + "A" * 5000 + ": " + "a" * 4000 + "\r\n"),
        (CHAT, "X-A: a\r\n" * 100),
        (CHAT + "?x=" + "a" * 8192, ""),
    ],
    ids=["value", "huge value", "name and value", "many", "query"],
)
async def test_head_too_long_for_the_model(warm: House, path: str, headers: str) -> None:
    """llama-server refuses such a head by an empty 400; ours says what is wrong."""
    reply = await warm.post(ASK, path, headers=headers)
    assert (reply.status, reply.error["kind"], reply.error["type"]) == (431, "bad_request", "invalid_request_error")
    assert warm.tiny.requests == []


async def test_head_just_short_enough_for_the_model(warm: House) -> None:
    """The longest line, and the most headers, that llama-server reads are passed on; what stays here may be longer."""
    line = "X-A: " + "a" * 8185
    reply = await warm.post(ASK, headers=f"{line}\r\nCookie: {'c' * 20_000}\r\n" + "X-B: b\r\n" * 97)
    assert reply.status == 200
    assert warm.tiny.requests[0].header("x-a") == "a" * 8185
    assert len(warm.tiny.requests[0].headers) == 100


async def test_headers_that_are_forwarded(warm: House) -> None:
    """Everything else is passed on; the host is ours, since llama-server needs none of the client's."""
    await warm.post(ASK, headers="Accept: text/event-stream\r\nX-Session-Id: 7\r\nX-Session-Id: 8\r\n")
    (received,) = warm.tiny.requests
    assert received.header("accept") == "text/event-stream"
    assert [value for name, value in received.headers if name == "x-session-id"] == ["7", "8"]
    assert received.header("host") == "localhost"
    assert received.header("connection") is None


async def test_head_of_the_answer_is_rewritten(warm: House) -> None:
    """What llama-server says of its own connection and of CORS stays inside; the rest is passed on."""
    dropped = (
        b"Server: llama.cpp\r\nKeep-Alive: timeout=5, max=100\r\nConnection: keep-alive\r\n"
        b"Access-Control-Allow-Origin: https://evil.example\r\nAccess-Control-Allow-Credentials: true\r\n"
    )
    kept = b"Retry-After: 3\r\nX-Other: a b\r\n"

    async def script(call: Call) -> None:
        await call.send(answer(b'{"error":{}}', status=b"503 Service Unavailable", headers=dropped + kept))

    warm.tiny.script = script
    reply = await warm.post(ASK)
    assert reply.raw.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert sorted(reply.headers) == [
        ("content-length", "12"),
        ("content-type", "application/json"),
        ("retry-after", "3"),
        ("x-other", "a b"),
    ]
    assert reply.body == b'{"error":{}}'


async def test_connection_close_of_the_model_is_not_the_clients(warm: House) -> None:
    """An upstream that closes its connection does not cost the client its own."""

    async def script(call: Call) -> None:
        await call.send(answer(headers=b"Connection: close\r\n"))
        call.close()

    warm.tiny.script = script
    client = await warm.connect()
    for _ in range(3):
        await client.post(ASK)
        assert (await client.answer()).header("connection") is None
    assert warm.tiny.connections == 3


async def test_answer_that_ends_with_the_connection(warm: House) -> None:
    """A body without a length ends for the client as it ended for us."""

    async def script(call: Call) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nall of it")
        call.close()

    warm.tiny.script = script
    reply = await warm.post(ASK)
    assert reply.header("connection") == "close"
    assert reply.body == b"all of it"


@pytest.mark.parametrize(
    ("head", "method"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "POST"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "POST"),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", "GET"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", "HEAD"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n!", "POST"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "POST"),
    ],
)
async def test_bytes_after_an_answer_never_reach_the_client(warm: House, head: bytes, method: str) -> None:
    """What an upstream sends beyond the end of its answer is dropped, and its connection with it."""

    async def script(call: Call) -> None:
        await call.send(head + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
        await call.client_gone()

    warm.tiny.script = script
    client = await warm.connect()
    line = f"{method} /upstream/tiny/x HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    for _ in range(2):
        await client.send(line.encode())
        assert (await client.answer(is_head=method == "HEAD")).body in {b"", b"!"}
    client.writer.write_eof()
    assert await client.is_closed()
    assert warm.tiny.connections == 2


async def test_interim_answers_stay_inside(warm: House) -> None:
    """A 100 or 103 of the upstream is not the client's business."""

    async def script(call: Call) -> None:
        await call.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + answer(b"[]"))

    warm.tiny.script = script
    reply = await warm.post(ASK)
    assert (reply.status, reply.body) == (200, b"[]")


async def test_head_request(warm: House) -> None:
    """HEAD brings the head that GET would bring, and the connection goes on."""

    async def script(call: Call) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Length: 77\r\nContent-Type: text/plain\r\n\r\n")

    warm.tiny.script = script
    client = await warm.connect()
    for _ in range(2):
        reply = await client.get("/upstream/tiny/health", method="HEAD")
        assert (reply.status, reply.header("content-length")) == (200, "77")
    assert [received.line for received in warm.tiny.requests] == ["HEAD /health"] * 2


async def test_head_request_of_a_chunked_answer_is_told_no_length(warm: House) -> None:
    """A length of 0 would say that GET brings nothing."""

    async def script(call: Call) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")

    warm.tiny.script = script
    client = await warm.connect()
    for _ in range(2):
        reply = await client.get("/upstream/tiny/x", method="HEAD")
        assert (reply.status, reply.header("content-length")) == (200, None)


async def test_errors_of_the_model_pass_unchanged(warm: House) -> None:
    """llama-server's own error is the client's to read."""
    body = b'{"error":{"code":400,"message":"request (423 tokens) exceeds","type":"exceed_context_size_error"}}'

    async def script(call: Call) -> None:
        await call.send(answer(body, status=b"400 Bad Request"))

    warm.tiny.script = script
    reply = await warm.post(ASK)
    assert (reply.status, reply.body) == (400, body)


# Which model


@pytest.mark.parametrize("name", ["tiny", "org/Tiny", "gpt-4o"])
async def test_every_name_of_a_recipe_finds_it(house: House, name: str) -> None:
    """Id, served name and aliases are equal; the body is passed on with the name that was asked for."""
    assert (await house.post({"model": name})).status == 200
    assert json.loads(house.tiny.requests[0].body) == {"model": name}


@pytest.mark.parametrize("name", ["Tiny", "tin", "tiny ", "org", "../tiny", "none\n"])
async def test_unknown_model(house: House, name: str) -> None:
    """There is no fuzzy match: the answer is 404, with what may have been meant."""
    reply = await house.post({"model": name})
    error = reply.error
    assert (reply.status, error["code"], error["kind"], error["param"]) == (404, *["model_not_found"] * 2, "model")
    assert error["type"] == "invalid_request_error"
    assert ("did you mean tiny" in error["hint"]) == (name in {"Tiny", "tin", "tiny ", "../tiny"})
    assert house.launcher.starts == []


async def test_model_from_the_query(house: House) -> None:
    """A body without a model may be helped out by the query; a model in the body wins."""
    assert (await house.post({}, CHAT + "?model=tiny")).status == 200
    assert (await house.post({"model": "tiny"}, CHAT + "?model=other")).status == 200
    assert house.launcher.starts == ["tiny"]


async def test_model_from_a_multipart_field(house: House) -> None:
    """A form names its model in a field, and is passed on as it came."""
    body = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n\0\1\r\n'
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ntiny\r\n--b--\r\n'
    )
    header = "Content-Type: multipart/form-data; boundary=b\r\n"
    reply = await house.post(body, "/v1/audio/transcriptions", headers=header)
    assert reply.status == 200
    (received,) = house.tiny.requests
    assert (received.body, received.header("content-type")) == (body, "multipart/form-data; boundary=b")


async def test_no_model_among_several(house: House) -> None:
    """Nobody guesses which of several models is meant."""
    reply = await house.post({})
    assert (reply.status, reply.error["kind"]) == (400, "bad_request")
    assert "default: true" in reply.error["hint"]


async def test_no_model_but_a_single_recipe(tmp_path: Path) -> None:
    """A single recipe serves what names no model."""
    async with open_house(tmp_path, recipes=(Recipe(id="tiny", model_path="x"),)) as house:
        assert (await house.post({})).status == 200


async def test_no_model_but_a_default(tmp_path: Path) -> None:
    """The recipe marked default serves what names no model."""
    recipes = (Recipe(id="other", model_path="x"), Recipe(id="tiny", model_path="x", default=True))
    async with open_house(tmp_path, recipes=recipes) as house:
        assert (await house.post({})).status == 200
        assert house.launcher.starts == ["tiny"]


# /upstream/


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("/upstream/tiny/v1/x", "GET /v1/x"),
        ("/upstream/tiny/a%2Fb%20c?d=%26&e=/f", "GET /a%2Fb%20c?d=%26&e=/f"),
        ("/upstream/tiny", "GET /"),
        ("/upstream/tiny/", "GET /"),
        ("/upstream/tiny?a=/b", "GET /?a=/b"),
        ("/upstream/tiny//b", "GET //b"),
        ("/upstream/org%2FTiny/b", "GET /b"),
    ],
)
async def test_upstream_path(house: House, path: str, line: str) -> None:
    """The rest of the path goes to the model as it came."""
    await house.supervisor.load("tiny")
    assert (await house.get(path)).status == 200
    assert house.tiny.requests[0].line == line


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "POST"])
async def test_upstream_takes_any_method(house: House, method: str) -> None:
    """Methods are the model's to judge."""
    client = await house.connect()
    await client.send(f"{method} /upstream/tiny/x HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi".encode())
    assert (await client.answer()).status == 200
    assert (house.tiny.requests[0].line, house.tiny.requests[0].body) == (f"{method} /x", b"hi")


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/upstream/tiny/favicon.ico", ""),
        ("/upstream/tiny/bundle.js?v=1", ""),
        ("/upstream/tiny/index.html", ""),
        ("/upstream/tiny/", "Accept: text/html,application/xhtml+xml\r\n"),
        ("/upstream/tiny/props", "Sec-Fetch-Mode: cors\r\n"),
        ("/props?model=tiny", "Sec-Fetch-Mode: no-cors\r\n"),
        ("/slots?model=tiny", "Accept: text/html\r\n"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_browsers_look_starts_nothing(house: House, path: str, headers: str, method: str) -> None:
    """A tab left open does not load a model, but sees one that is loaded."""
    reply = await house.get(path, method=method, headers=headers)
    assert reply.status == 503
    assert house.launcher.starts == []
    if method == "GET":
        await house.supervisor.load("tiny")
        assert (await house.get(path, headers=headers)).status == 200


async def test_upstream_of_an_unknown_model(house: House) -> None:
    """The model's name is checked before anything else."""
    for path in ("/upstream/nobody/favicon.ico", "/upstream//x", "/upstream/", "/upstream/%zz/x", "/upstream/%ff"):
        assert (await house.get(path)).error["kind"] == "model_not_found"


# Own routes


async def test_models(house: House) -> None:
    """Every recipe that is not unlisted, in OpenAI's form, with our state beside it."""
    await house.supervisor.load("tiny")
    found = (await house.get("/v1/models")).json
    assert found["object"] == "list"
    assert [model["id"] for model in found["data"]] == ["org/Tiny", "other"]
    for path in ("/models", "/v1/models?x=y"):
        assert (await house.get(path)).json == found
    tiny, other = found["data"]
    assert tiny | {"meta": None} == {
        "id": "org/Tiny",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "llmstudiod",
        "active": True,
        "status": "ready",
        "aliases": ["tiny", "gpt-4o"],
        "max_model_len": 4096,
        "meta": None,
    }
    assert (other["active"], other["status"], other["max_model_len"]) == (False, "stopped", None)


async def test_one_model(house: House) -> None:
    """A model is found by each of its names, also an unlisted one."""
    for path in ("/v1/models/tiny", "/v1/models/org%2FTiny", "/v1/models/org/Tiny", "/v1/models/gpt-4o"):
        assert (await house.get(path)).json["id"] == "org/Tiny"
    assert (await house.get("/v1/models/hidden")).status == 200
    reply = await house.get("/v1/models/tinny")
    assert (reply.status, reply.error["kind"], reply.error["hint"]) == (404, "model_not_found", "did you mean tiny?")


async def test_health(house: House) -> None:
    """The daemon is well before any model runs; what runs is told."""
    found = (await house.get("/health")).json
    assert (found["status"], found["inference_ready"], found["running_model"]) == ("ok", False, None)
    assert found["models"] == {"stopped": 3}
    await house.supervisor.load("tiny")
    found = (await house.get("/v1/health")).json
    assert (found["inference_ready"], found["running_model"]) == (True, "tiny")
    assert found["models"] == {"ready": 1, "stopped": 2}


async def test_running(house: House) -> None:
    """llama-swap's list of what is up."""
    assert (await house.get("/running")).json == {"running": []}
    await house.supervisor.load("tiny")
    assert (await house.get("/running")).json == {"running": [{"model": "tiny", "state": "ready"}]}


async def test_props_of_a_model(house: House) -> None:
    """llama-server's own facts, of the model in the query."""
    assert (await house.get("/props?model=tiny")).json == {"said": "hello"}
    assert house.tiny.requests[0].line == "GET /props?model=tiny"
    assert (await house.get("/props")).error["kind"] == "bad_request"
    assert (await house.get("/slots?model=nobody")).error["kind"] == "model_not_found"


@pytest.mark.parametrize("path", ["/api/models/unload", "/api/models/unload/tiny", "/api/models/unload?x=y"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_unloading_is_not_for_this_listener(house: House, path: str, method: str) -> None:
    """Nobody unloads a model without admin rights."""
    await house.supervisor.load("tiny")
    reply = await house.get(path, method=method)
    assert (reply.status, reply.error["kind"]) == (403, "access_denied")
    assert house.state() is State.READY


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", CHAT),
        ("PUT", CHAT),
        ("OPTIONS", CHAT),
        ("DELETE", "/v1/embeddings"),
        ("GET", "/v1/tokenize"),
        ("POST", "/v1/models"),
        ("DELETE", "/v1/models/tiny"),
        ("POST", "/health"),
        ("POST", "/props"),
        ("POST", "/"),
    ],
)
async def test_method_not_allowed(house: House, method: str, path: str) -> None:
    """A route that exists says which method it takes."""
    reply = await house.get(path, method=method)
    assert (reply.status, reply.error["kind"]) == (405, "method_not_allowed")
    assert reply.header("allow") in {"POST", "GET"}


@pytest.mark.parametrize(
    "path",
    [
        *("/nothing", "/v1", "/v1/", "/v1/chat/completions/", "//v1/chat/completions", "/V1/models", "/v1/../health"),
        *("/%2e%2e/health", "/v1/chat%2Fcompletions", "/" + "a" * 8000, "/v1/models#x"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_unknown_route(house: House, method: str, path: str) -> None:
    """What is no route of ours is 404 in the envelope that every error has."""
    reply = await house.get(path, method=method)
    assert (reply.status, reply.error["kind"]) == (404, "not_found")
    assert len(reply.body) < 1000


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST http://evil.example/v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"POST * HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A: 1\r\n folded\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n{}",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 40_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X-A: a\r\n" * 500 + b"\r\n",
    ],
)
async def test_odd_request_is_refused(house: House, request_bytes: bytes) -> None:
    """What is no request to us is a 4xx in our envelope; nothing is started and no error is logged."""
    client = await house.connect()
    await client.send(request_bytes)
    reply = await client.answer()
    assert 400 <= reply.status < 500
    assert reply.error["type"] == "invalid_request_error"
    assert house.launcher.starts == []


# Error envelopes


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b"{", 400, "invalid_request_error"),
        (b'{"model":"nobody"}', 404, "not_found_error"),
        (b" " * (2 << 20), 413, "request_too_large"),
    ],
)
async def test_anthropics_envelope(tmp_path: Path, body: bytes, status: int, word: str) -> None:
    """Clients of /v1/messages read errors in Anthropic's form."""
    async with open_house(tmp_path, max_body=1 << 20) as house:
        for path in ("/v1/messages", "/v1/messages/count_tokens", "/v1/messages?beta=true"):
            reply = await house.post(body, path)
            assert reply.status == status
            assert set(reply.json) == {"type", "error"}
            assert (reply.json["type"], reply.json["error"]["type"]) == ("error", word)
            assert reply.json["error"]["message"]


async def test_queue_full(tmp_path: Path) -> None:
    """More than max_queue waiting requests are refused at once, with the time after which to try again."""
    async with open_house(tmp_path, max_queue=1) as house:
        house.tiny.is_ready = False
        first = await house.connect()
        await first.post(ASK)
        await eventually(lambda: house.queued() == 1)
        reply = await house.post(ASK)
        assert (reply.status, reply.error["kind"], reply.error["type"]) == (429, "queue_full", "rate_limit_error")
        assert int(reply.header("retry-after") or 0) >= 1
        house.tiny.is_ready = True
        assert (await first.answer()).status == 200


# The client's connection


async def test_client_keeps_its_connection(warm: House) -> None:
    """Answers of the model, of ours, and errors follow each other on one connection."""

    async def script(call: Call) -> None:
        await call.send(SSE_HEAD + event("one") + chunk(b"") if b"stream" in call.received.body else answer())

    warm.tiny.script = script
    client = await warm.connect()
    for _ in range(3):
        await client.post(ASK)
        assert (await client.answer()).body == b"{}"
        await client.post(ASK | {"stream": True})
        assert (await client.answer()).body == b"data: one\n\n"
        assert (await client.get("/v1/models")).status == 200
        await client.post(b"{")
        assert (await client.answer()).status == 400


async def test_pipelined_requests_are_answered_in_order(warm: House) -> None:
    """Requests sent ahead wait for their turn."""

    async def script(call: Call) -> None:
        await call.send(answer(call.received.body))

    warm.tiny.script = script
    client = await warm.connect()
    for number in range(40):
        await client.post({"model": "tiny", "number": number})
        await client.send(b"GET /running HTTP/1.1\r\nHost: x\r\n\r\n")
    for number in range(40):
        assert (await client.answer()).json["number"] == number
        assert "running" in (await client.answer()).json


async def test_connection_close_is_obeyed(warm: House) -> None:
    """A client that wants its connection closed is told so, and gets it."""
    client = await warm.connect()
    await client.post(ASK, headers="Connection: close\r\n")
    reply = await client.answer()
    assert (reply.header("connection"), reply.body) == ("close", b'{"said":"hello"}')
    assert await client.is_closed()


async def test_offer_of_http2_is_ignored(warm: House) -> None:
    """Java's client offers h2c with every request; it is answered in HTTP/1.1."""
    client = await warm.connect()
    for _ in range(2):
        await client.post(ASK, headers="Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAM\r\n")
        assert (await client.answer()).json == {"said": "hello"}
    assert warm.tiny.requests[0].header("upgrade") is None


async def test_http10_answer_with_a_length_keeps_the_connection(warm: House) -> None:
    """An HTTP/1.0 client that asks to stay connected stays so while lengths are known."""
    client = await warm.connect()
    for _ in range(2):
        await client.post(ASK, headers="Connection: keep-alive\r\n", version="1.0")
        reply = await client.answer()
        assert (reply.header("connection"), reply.json) == ("keep-alive", {"said": "hello"})


@pytest.mark.parametrize("headers", ["", "Connection: keep-alive\r\n"])
async def test_http10_stream_has_no_chunks(warm: House, headers: str) -> None:
    """An HTTP/1.0 client knows no chunks: it gets the bytes, and the end of the connection."""

    async def script(call: Call) -> None:
        await call.send(SSE_HEAD + event("one"))
        await call.send(event("two") + b"0\r\nTrailer: x\r\n\r\n")

    warm.tiny.script = script
    client = await warm.connect()
    await client.post(ASK, headers=headers, version="1.0")
    reply = await client.answer()
    assert reply.header("transfer-encoding") is None
    assert reply.body == b"data: one\n\ndata: two\n\n"
