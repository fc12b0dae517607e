"""The admin interface and the page on the endpoint's port: who gets in, and how."""

import http.client
import json
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import pytest

from llmstudiod.adapters.state_db import StateDb
from llmstudiod.demo.tiny_gguf import write_tiny_gguf
from llmstudiod.http.page import asset_name, page_response
from llmstudiod.http.sessions import CODE_S, COOKIE, MAX_SESSIONS, SESSION_S, Sessions
from tests.integration.running_daemon import RunningDaemon, running_daemon

PAGE = "http://localhost:3000"  # another program of this machine: the same site to a browser, not the same origin
GUARDED = ["/status", "/instances", "/recipes", "/config", "/keys", "/usage", "/events/stats", "/logs", "/api/spec"]


PROBLEM = {"detail", "kind", "hint"}


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body's value."""
        return json.loads(self.body)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    """A daemon with a model, and keys of its own."""
    home = tmp_path_factory.mktemp("sign-in")
    (home / "models").mkdir()
    write_tiny_gguf(home / "models" / "tiny.gguf")
    with running_daemon(home, keys_file=str(home / "keys")) as running:
        yield running


def ask(
    daemon: RunningDaemon, method: str, path: str, body: object = None, *, host: str = "localhost", **headers: str
) -> Answer:
    """Send one request to the endpoint's port."""
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=20)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    content = body if body is None or isinstance(body, bytes) else json.dumps(body)
    try:
        connection.request(method, path, content, {"Host": f"{host}:{daemon.port}", **named})
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read())
    finally:
        connection.close()


def sign_in(daemon: RunningDaemon) -> str:
    """Return the cookie of a new session."""
    code = daemon.admin.post("web", "code")["code"]
    answer = ask(daemon, "POST", "/sign-in", {"code": code})
    assert answer.status == 200, answer.body
    return f"{COOKIE}={SimpleCookie(answer.headers['Set-Cookie'])[COOKIE].value}"


def test_code_opens_one_session(daemon: RunningDaemon) -> None:
    """It works once; the cookie is out of reach of scripts and of other sites."""
    (url,) = daemon.admin.post("web", "code")["urls"]
    address, _, code = url.partition("#code=")
    assert address == f"http://localhost:{daemon.port}/"
    first, second = (ask(daemon, "POST", "/sign-in", {"code": code}) for _ in range(2))
    assert (first.status, second.status) == (200, 401)
    cookie = SimpleCookie(first.headers["Set-Cookie"])[COOKIE]
    assert (cookie["httponly"], cookie["samesite"], cookie["path"]) == (True, "Strict", "/")
    assert "llmstudioctl web" in second.json["hint"]
    assert ask(daemon, "GET", "/status", Cookie=f"{COOKIE}={cookie.value}").json["running"] is False


@pytest.mark.parametrize("path", GUARDED)
def test_nothing_is_told_without_a_session(daemon: RunningDaemon, path: str) -> None:
    """On loopback neither."""
    assert ask(daemon, "GET", path).status == 401
    assert ask(daemon, "GET", path, Cookie=f"{COOKIE}=guessed").status == 401
    assert ask(daemon, "GET", path, Cookie=sign_in(daemon)).status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/launch/tiny"), ("POST", "/evict"), ("POST", "/recipes"), ("DELETE", "/recipes/tiny"), ("POST", "/keys"),
     ("POST", "/web/code"), ("POST", "/api/models/unload"), ("POST", "/instances/tiny/pin"), ("POST", "/reload"),
     ("POST", "/benchmark"), ("GET", "/logs/tiny/stream"), ("GET", "/events"), ("GET", "/metrics")],
)  # fmt: skip
def test_nothing_is_changed_without_a_session(daemon: RunningDaemon, method: str, path: str) -> None:
    """It is refused before anything is looked at."""
    answer = ask(daemon, method, path, {} if method == "POST" else None)
    assert (answer.status, answer.json["kind"]) == (401, "authentication")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Sec_Fetch_Site": "none"}, 200),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Origin": PAGE}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://evil.example"}, 403),
    ],
)
def test_session_serves_our_own_page_alone(daemon: RunningDaemon, headers: dict[str, str], status: int) -> None:
    """A browser sends the cookie to this host whoever asks, another port's page included."""
    cookie = sign_in(daemon)
    assert ask(daemon, "GET", "/status", Cookie=cookie, **headers).status == status
    assert ask(daemon, "POST", "/instances/tiny/unpin", {}, Cookie=cookie, **headers).status == status
    assert ask(daemon, "GET", "/v1/models", Cookie=cookie, **headers).status == status


@pytest.mark.parametrize("path", ["/", "/page/app.js", "/status", "/sign-in"])
def test_rebound_name_is_refused(daemon: RunningDaemon, path: str) -> None:
    """A page that has its own name point at this machine gets nothing, whatever it holds."""
    method = "POST" if path == "/sign-in" else "GET"
    code = daemon.admin.post("web", "code")["code"]
    body = {"code": code} if method == "POST" else None
    answer = ask(daemon, method, path, body, host="evil.example", Accept="text/html", Cookie=sign_in(daemon))
    assert answer.status == 403
    assert "Set-Cookie" not in answer.headers


def test_cors_does_not_open_the_session(tmp_path: Path) -> None:
    """Pages that may use the models may not use somebody's session."""
    (tmp_path / "models").mkdir()
    with running_daemon(tmp_path, keys_file=str(tmp_path / "keys"), cors_origins=[PAGE]) as running:
        cookie = sign_in(running)
        assert ask(running, "GET", "/v1/models", Origin=PAGE).status == 200
        assert ask(running, "GET", "/status", Origin=PAGE, Cookie=cookie).status == 403
        assert ask(running, "POST", "/sign-in", {"code": "x"}, Origin=PAGE).status == 403


def test_keys_and_their_rights(daemon: RunningDaemon) -> None:
    """An admin key administers and signs in; another one does neither; metrics are a right of their own."""
    made = {name: daemon.admin.post("keys", body={"name": name, **rights}) for name, rights in KEYS.items()}
    try:
        secrets = {name: key["secret"] for name, key in made.items()}
        statuses = {
            name: [
                ask(daemon, "GET", path, Authorization=f"Bearer {secret}").status for path in ("/status", "/metrics")
            ]
            for name, secret in secrets.items()
        }
        assert statuses == {"boss": [200, 200], "prom": [403, 200], "app": [403, 403]}
        assert ask(daemon, "GET", "/status").status == 401
        signed = {name: ask(daemon, "POST", "/sign-in", {"key": secret}).status for name, secret in secrets.items()}
        assert signed == {"boss": 200, "prom": 401, "app": 401}
        cookie = sign_in(daemon)
        assert ask(daemon, "GET", "/v1/models", Cookie=cookie).status == 200  # the page's own way to the models
        assert ask(daemon, "GET", "/", Accept="text/html").status == 200  # whoever comes must be able to sign in
    finally:
        for name in KEYS:
            daemon.admin.delete("keys", name)


KEYS: dict[str, dict[str, Any]] = {"boss": {"admin": True}, "prom": {"metrics": True}, "app": {}}


def test_key_counts_before_the_session(daemon: RunningDaemon) -> None:
    """Who shows a key is judged by it: the session beside it is a browser's doing."""
    secret = daemon.admin.post("keys", body={"name": "small"})["secret"]
    try:
        cookie = sign_in(daemon)
        both = ask(daemon, "GET", "/status", Cookie=cookie, Authorization=f"Bearer {secret}")
        assert (both.status, ask(daemon, "GET", "/status", Cookie=cookie).status) == (403, 200)
        assert ask(daemon, "GET", "/status", Cookie=cookie, x_api_key="wrong").status == 401
    finally:
        daemon.admin.delete("keys", "small")


def test_signing_out_ends_the_session(daemon: RunningDaemon) -> None:
    """The cookie is worth nothing any more, and the browser is told to drop it."""
    cookie = sign_in(daemon)
    answer = ask(daemon, "POST", "/sign-out", {}, Cookie=cookie)
    assert (answer.status, SimpleCookie(answer.headers["Set-Cookie"])[COOKIE]["max-age"]) == (200, "0")
    assert ask(daemon, "GET", "/status", Cookie=cookie).status == 401


@pytest.mark.parametrize("body", [None, [], {}, {"code": 5}, {"code": ""}, {"key": "llms-wrong"}, {"code": "x" * 9999}])
def test_wrong_proofs(daemon: RunningDaemon, body: object) -> None:
    """Each is refused with words, and opens nothing."""
    answer = ask(daemon, "POST", "/sign-in", body)
    assert answer.status in {400, 401}
    assert answer.json["detail"]
    assert "Set-Cookie" not in answer.headers


BAD_JSON = {
    "deep": b"[" * 4000,
    "deep object": b'{"code": ' + b"[" * 900 + b"]" * 900 + b"}",
    "surrogate code": b'{"code": "\\ud800"}',
    "surrogate key": b'{"key": "\\ud800"}',
    "integer": b'{"code": ' + b"9" * 5000 + b"}",
    "no UTF-8": b'{"code": "\xff"}',
}


@pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON)
@pytest.mark.parametrize(
    "path", ["/sign-in", "/recipes", "/recipes/check", "/recipes/from-command", "/vram-calculator", "/keys"]
)
def test_bad_json_is_the_clients_fault(daemon: RunningDaemon, path: str, body: bytes) -> None:
    """Whoever sends it, and however deep it is."""
    answer = ask(daemon, "POST", path, body, Cookie=sign_in(daemon))
    assert (answer.status, answer.json["kind"]) == (400, "bad_request"), answer.body
    assert "Traceback" not in daemon.log()


@pytest.mark.parametrize("body", [{}, {"code": ""}, {"key": None}])
def test_nothing_to_sign_in_with(daemon: RunningDaemon, body: object) -> None:
    """It is a mistake, not a wrong secret."""
    answer = ask(daemon, "POST", "/sign-in", body)
    assert (answer.status, '{"code": "…"}' in answer.json["detail"]) == (400, True)


@pytest.mark.parametrize("has_key", [False, True])
@pytest.mark.parametrize(
    ("method", "path", "status", "names"),
    [
        ("GET", "/status", 401, PROBLEM),
        ("POST", "/recipes", 401, PROBLEM),
        ("GET", "/v1/studio/models", 401, PROBLEM),
        ("POST", "/api/models/unload", 401, PROBLEM),
        ("GET", "/sign-in", 405, PROBLEM),
        ("GET", "/nothing", 404, PROBLEM | {"error"}),
        ("GET", "/v2/models", 404, PROBLEM | {"error"}),
        ("GET", "/v1/nothing", 404, {"error"}),
        ("GET", "/v1/models/nothing", 404, {"error"}),
        ("POST", "/v1/models", 405, {"error"}),
        ("POST", "/tokenize", 400, {"error"}),
        ("GET", "/upstream/nothing/x", 404, {"error"}),
    ],
)
def test_errors_have_the_envelope_of_their_interface(
    daemon: RunningDaemon, method: str, path: str, status: int, names: set[str], *, has_key: bool
) -> None:
    """Also while keys are set, before anybody has shown one; where nothing is, clients of both find theirs."""
    if has_key:
        daemon.admin.post("keys", body={"name": "one"})
    try:
        answer = ask(daemon, method, path, b"[]" if method == "POST" else None)
    finally:
        if has_key:
            daemon.admin.delete("keys", "one")
    is_open = path == "/sign-in"
    assert (answer.status, set(answer.json)) == (401 if has_key and not is_open else status, names)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind", "allow"),
    [
        ("PATCH", "/recipes", None, 405, "method_not_allowed", "GET, HEAD, POST"),
        ("POST", "/status", None, 405, "method_not_allowed", "GET, HEAD"),
        ("GET", "/sign-out", None, 405, "method_not_allowed", "POST"),
        ("DELETE", "/logs/tiny", None, 405, "method_not_allowed", "GET"),
        ("POST", "/recipes", b"x" * (3 << 20), 413, "body_too_large", None),
        ("GET", "/instances/tiny/nothing", None, 404, "not_found", None),
    ],
)
def test_refusals_have_kinds_of_their_own(
    daemon: RunningDaemon, method: str, path: str, body: bytes | None, status: int, kind: str, allow: str | None
) -> None:
    """A client can branch on them; 405 says which methods there are. Source: RFC 9110, section 15.5.6."""
    answer = ask(daemon, method, path, body, Cookie=sign_in(daemon))
    assert (answer.status, answer.json["kind"], answer.headers.get("Allow")) == (status, kind, allow)


def test_code_is_made_at_the_machine_alone(daemon: RunningDaemon) -> None:
    """A session that was taken cannot make others."""
    assert ask(daemon, "POST", "/web/code", {}, Cookie=sign_in(daemon)).status == 403


def test_page_is_closed_to_everything_else(daemon: RunningDaemon) -> None:
    """Nothing from other hosts, no markup from strings, no frame round it."""
    answer = ask(daemon, "GET", "/", Accept="text/html")
    policy = answer.headers["Content-Security-Policy"]
    for part in (
        "default-src 'none'",
        "script-src 'self'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ):
        assert part in policy
    assert "unsafe" not in policy
    assert (answer.headers["Cross-Origin-Resource-Policy"], answer.headers["Referrer-Policy"]) == (
        "same-origin",
        "no-referrer",
    )
    assert b"<script type" in answer.body


def test_programs_get_a_text_at_the_root(daemon: RunningDaemon) -> None:
    """As before there was a page."""
    assert ask(daemon, "GET", "/").body.startswith(b"llmstudiod")


@pytest.mark.parametrize(
    "path", ["/page/../pyproject.toml", "/page/%2e%2e/x.js", "/page/no.js", "/page/app.py", "/page/"]
)
def test_page_serves_its_own_files_alone(daemon: RunningDaemon, path: str) -> None:
    """No other file of the machine or the package."""
    answer = ask(daemon, "GET", path)
    assert answer.status == (200 if path == "/page/" else 404)


def test_page_is_sent_small_and_once() -> None:
    """Compressed where that is understood, and not again while it has not changed."""
    plain = page_response("app.js", {})
    assert plain is not None
    zipped = page_response("app.js", {"Accept-Encoding": "gzip, br"})
    assert zipped is not None
    assert isinstance(plain.body, bytes)
    assert isinstance(zipped.body, bytes)
    assert len(zipped.body) < len(plain.body) / 2
    again = page_response("app.js", {"If-None-Match": plain.headers["ETag"]})
    assert again is not None
    assert again.status == 304
    assert asset_name("/page/.hidden") is None


class Clock:
    """Seconds since 1970, as a test wants them."""

    def __init__(self) -> None:
        self.at = 1_000_000.0

    def __call__(self) -> float:
        """The time now."""
        return self.at


def test_sessions_end_and_outlast_the_daemon(tmp_path: Path) -> None:
    """They live in the state's file, as hashes; old ones and too many go."""
    clock, path = Clock(), tmp_path / "state.db"
    known = {"sha256:1"}
    first = Sessions(StateDb(path), known.__contains__, clock)
    token = first.open("")
    assert token.encode() not in path.read_bytes()
    later = Sessions(StateDb(path), known.__contains__, clock)
    assert later.is_open(token)
    assert not later.is_open("x")
    clock.at += SESSION_S + 1
    assert not later.is_open(token)
    tokens = [later.open("") for _ in range(MAX_SESSIONS + 2)]
    assert not later.is_open(tokens[0])
    assert later.is_open(tokens[-1])
    later.close_all()
    assert not Sessions(StateDb(path), known.__contains__, clock).is_open(tokens[-1])


def test_sessions_are_opened_and_closed_at_once() -> None:
    """In threads, as the daemon does it, with codes redeemed and cookies looked at meanwhile; there is one memory."""
    state = StateDb(None)
    sessions = Sessions(state, lambda _: True)

    def work(_: int) -> None:
        for number in range(150):
            token = sessions.open("key")
            assert sessions.is_open(token)
            if number % 3:
                sessions.close(token)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(work, range(8)))
    finally:
        sys.setswitchinterval(before)
    assert len(state.all("sessions")) == 8 * 50
    sessions.close_all()
    assert state.all("sessions") == {}


def test_session_ends_with_the_key_that_opened_it(daemon: RunningDaemon) -> None:
    """Revoked is revoked; what a code has opened stays."""
    secret = daemon.admin.post("keys", body={"name": "lost", "admin": True})["secret"]
    answer = ask(daemon, "POST", "/sign-in", {"key": secret})
    cookie = f"{COOKIE}={SimpleCookie(answer.headers['Set-Cookie'])[COOKIE].value}"
    other = sign_in(daemon)
    assert ask(daemon, "GET", "/status", Cookie=cookie).status == 200
    daemon.admin.delete("keys", "lost")
    assert ask(daemon, "GET", "/status", Cookie=cookie).status == 401
    assert ask(daemon, "GET", "/status", Cookie=other).status == 200
    assert daemon.admin.post("web", "sign-out")["success"] is True
    assert ask(daemon, "GET", "/status", Cookie=other).status == 401


def test_codes_end() -> None:
    """Within minutes, and with their first use."""
    clock = Clock()
    sessions = Sessions(StateDb(None), lambda _: True, clock)
    old, used = sessions.new_code(), sessions.new_code()
    assert (sessions.redeem(used), sessions.redeem(used)) == (True, False)
    clock.at += CODE_S + 1
    assert not sessions.redeem(old)


def test_open_streams_do_not_hold_the_daemon_up(tmp_path: Path) -> None:
    """Readers of events and logs, over TCP and on the socket, are let go when it stops."""
    (tmp_path / "models").mkdir()
    write_tiny_gguf(tmp_path / "models" / "tiny.gguf")
    with running_daemon(tmp_path, keys_file=str(tmp_path / "keys"), drain_timeout="30s") as running:
        cookie = sign_in(running)
        connections = []
        for path in ("/events", "/logs/tiny/stream"):
            connection = http.client.HTTPConnection("localhost", running.port, timeout=20)
            connection.request("GET", path, headers={"Cookie": cookie})
            connections.append((connection, connection.getresponse()))
        began = time.monotonic()
        running.process.terminate()
        assert running.process.wait(20) == 0
        assert time.monotonic() - began < 8
        for connection, response in connections:
            response.read()
            connection.close()


def test_stream_ends_with_what_opened_it(daemon: RunningDaemon) -> None:
    """A key that is revoked or expires, and a session that is signed out of, in whichever way; the others go on."""
    keys = {name: daemon.admin.post("keys", body=BOSS | {"name": name})["secret"] for name in ("lost", "kept")}
    keys["brief"] = daemon.admin.post("keys", body=BOSS | {"name": "brief", "expires": "3s"})["secret"]
    headers = {name: {"Authorization": f"Bearer {secret}"} for name, secret in keys.items()}
    headers |= {name: {"Cookie": sign_in(daemon)} for name in ("one", "all")}
    readers = {
        (name, path): opened(daemon, path, shown)
        for name, shown in headers.items()
        for path in ("/events", "/instances/tiny/live", "/logs/tiny/stream")
    }
    try:
        daemon.admin.delete("keys", "lost")
        assert ended(readers, "lost")
        ask(daemon, "POST", "/sign-out", {}, **headers["one"])
        assert ended(readers, "one")
        assert ended(readers, "brief")
        daemon.admin.post("web", "sign-out")
        assert ended(readers, "all")
        _, response = readers["kept", "/events"]
        daemon.admin.post("reload")
        assert any(b"event: reloaded" in response.readline() for _ in range(1000))
    finally:
        for name in ("kept", "brief"):
            daemon.admin.delete("keys", name)
        for connection, _ in readers.values():
            connection.close()


BOSS = {"admin": True}


@pytest.mark.parametrize("path", ["/events", "/instances/tiny/live", "/logs/tiny/stream"])
def test_head_of_a_stream_is_all(daemon: RunningDaemon, path: str) -> None:
    """No body, and an end."""
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=5) as sock:
        lines = [f"HEAD {path} HTTP/1.1", "Host: localhost", f"Cookie: {sign_in(daemon)}", "Connection: close"]
        sock.sendall("\r\n".join([*lines, "\r\n"]).encode())
        told = b"".join(iter(lambda: sock.recv(4096), b""))
    assert told.startswith(b"HTTP/1.1 200 ")
    assert told.partition(b"\r\n\r\n")[2] == b""


def opened(
    daemon: RunningDaemon, path: str, headers: dict[str, str]
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """Return a stream that has begun."""
    connection = http.client.HTTPConnection("localhost", daemon.port, timeout=10)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    assert response.status == 200
    return connection, response


def ended(
    readers: dict[tuple[str, str], tuple[http.client.HTTPConnection, http.client.HTTPResponse]], name: str
) -> bool:
    """Whether each stream of a name comes to its end within a few seconds; a TimeoutError where it does not."""
    for (each, _), (_, response) in readers.items():
        if each == name:
            deadline = time.monotonic() + 10
            while response.readline():
                assert time.monotonic() < deadline
    return True
