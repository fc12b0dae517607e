"""Talks to the admin socket with the standard library alone: a command line tool should start in an instant."""

import contextlib
import http.client
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llmstudiod.core.errors import AccessDeniedError, DaemonUnreachableError, LlmstudioError

DEFAULT_SOCKET = "/run/llmstudio/admin.sock"
SOCKET_VARIABLE = "LLMSTUDIO_ADMIN_SOCKET"

NOTICE_S = 3.0
_JSON = {"Content-Type": "application/json"}
_YAML = {"Content-Type": "application/yaml"}
_SEE = "`systemctl status llmstudiod` and `journalctl -u llmstudiod -n 30` tell why"

EXIT_CODES = {
    "bad_request": 2,
    "body_too_large": 2,
    "conflict": 2,
    "stale": 2,
    "config": 3,
    "binary": 3,
    "not_found": 4,
    "model_not_found": 4,
    "access_denied": 5,
    "authentication": 5,
    "queue_full": 6,
    "upstream_crashed": 7,
    "unavailable": 7,
    "load_failed": 7,
    "does_not_fit": 7,
    "backing_off": 7,
    "shutting_down": 7,
    "load_stalled": 7,
    "launcher": 7,
    "daemon_unreachable": 8,
}
"""Exit code by error kind; 0 is success, 1 anything else, 130 an interrupt."""


class AnswerError(LlmstudioError):
    """The daemon answered with an error."""

    def __init__(self, status: int, answer: dict[str, Any]) -> None:
        super().__init__(str(answer.get("detail") or f"the daemon answered {status}"), hint=answer.get("hint"))
        self.answer = answer
        self.answer_kind = str(answer.get("kind") or "internal")
        self._status = status

    def with_hint(self, hint: str) -> "AnswerError":
        """Return it with another next step, which is known here."""
        return AnswerError(self._status, {**self.answer, "hint": hint})


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect to the Unix socket instead of a host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@dataclass(frozen=True, slots=True)
class Client:
    """Requests to the daemon, which has ``patience_s`` seconds to answer where an answer takes no time of its own."""

    socket_path: str
    patience_s: float = 60

    @classmethod
    def from_environment(cls, given: str | None) -> "Client":
        """Return the client for the socket that was given, named in the environment, or the usual one."""
        return cls(given or os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET)

    def get(self, *parts: str, query: str = "", timeout_s: float | None = None) -> Any:  # noqa: ANN401 - JSON holds anything
        """Return the answer to a GET; ``parts`` are the path's, still unquoted."""
        return self._ask("GET", _path(parts) + (f"?{query}" if query else ""), timeout_s or self.patience_s)

    def post(self, *parts: str, query: str = "", body: object = None, timeout_s: float | None = None) -> Any:  # noqa: ANN401
        """Return the answer to a POST; by default for as long as it takes."""
        content = None if body is None else json.dumps(body).encode()
        return self._ask("POST", _path(parts) + (f"?{query}" if query else ""), timeout_s, content)

    def text(self, *parts: str) -> str:
        """Return the answer to a GET as text."""
        return self.tagged_text(*parts)[0]

    def tagged_text(self, *parts: str) -> tuple[str, str | None]:
        """Return the answer to a GET as text, and its ETag."""
        response = self._send("GET", _path(parts), self.patience_s)
        raw = response.read()
        if response.status >= 400:
            raise AnswerError(response.status, _object(raw))
        return raw.decode("utf-8", "replace"), response.getheader("ETag")

    def post_text(self, *parts: str, text: str, query: str = "") -> Any:  # noqa: ANN401
        """Return the answer to a POST of YAML."""
        path = _path(parts) + (f"?{query}" if query else "")
        return self._ask("POST", path, self.patience_s, text.encode(), _YAML)

    def put_text(self, *parts: str, text: str, tag: str | None) -> Any:  # noqa: ANN401
        """Return the answer to a PUT of YAML, which takes the place of the text with this ETag only."""
        match = {} if tag is None else {"If-Match": tag}
        return self._ask("PUT", _path(parts), self.patience_s, text.encode(), _YAML | match)

    def delete(self, *parts: str) -> Any:  # noqa: ANN401
        """Return the answer to a DELETE."""
        return self._ask("DELETE", _path(parts), self.patience_s)

    def events(self, *parts: str, query: str = "", last_id: str | None = None) -> Iterator[dict[str, Any]]:
        """Return the server-sent events, each with its name as ``event`` and its ``id``, until the stream ends.

        ``last_id`` is the last one that was seen. How a stream ends is not told: a daemon that is killed and one that
        stops look alike to whoever would ask again.

        Raises:
            AnswerError: The daemon refuses.
            DaemonUnreachableError: There is none.
        """
        headers = {} if last_id is None else {"Last-Event-ID": last_id}
        path = _path(parts) + (f"?{query}" if query else "")
        response = self._send("GET", path, self.patience_s, headers=headers, is_stream=True)
        if response.status >= 400:
            raise AnswerError(response.status, _object(response.read()))
        return _events(response)

    def _ask(
        self,
        method: str,
        path: str,
        timeout_s: float | None,
        body: bytes | None = None,
        headers: Mapping[str, str] = _JSON,
    ) -> Any:  # noqa: ANN401
        response = self._send(method, path, timeout_s, body, headers)
        try:
            answer = json.loads(response.read() or b"null")
        except (OSError, http.client.HTTPException) as error:
            raise DaemonUnreachableError("the daemon was gone before it had answered", hint=_SEE) from error
        except ValueError:
            answer = {"detail": f"the daemon's answer to {method} {path} is no JSON", "kind": "internal"}
        if response.status >= 400:
            raise AnswerError(response.status, answer if isinstance(answer, dict) else {})
        return answer

    def _send(
        self,
        method: str,
        path: str,
        timeout_s: float | None,
        body: bytes | None = None,
        headers: Mapping[str, str] = _JSON,
        *,
        is_stream: bool = False,
    ) -> http.client.HTTPResponse:
        if timeout_s is None:  # what may take for ever is asked of a daemon that answers
            self._send("GET", "/health", self.patience_s).read()
        connection = _UnixConnection(self.socket_path, timeout_s)
        try:
            with contextlib.nullcontext() if timeout_s is None else _notice():
                connection.request(method, path, body, dict(headers))
                response = connection.getresponse()
        except TimeoutError as error:
            raise DaemonUnreachableError(
                f"the daemon did not answer within {timeout_s:.0f} s",
                hint=_SEE,
            ) from error
        except PermissionError as error:
            hint = "use sudo, or join the group llmstudio-admin"
            raise AccessDeniedError(f"you may not use the admin socket {self.socket_path}", hint=hint) from error
        except (OSError, http.client.HTTPException) as error:
            exists = Path(self.socket_path).exists()
            # The service alone would only be shown as inactive: it is a socket that failed.
            units = "llmstudiod.socket llmstudiod-admin.socket llmstudiod.service"
            hint = f"`systemctl status {units}`" if exists else "`systemctl start llmstudiod`"
            raise DaemonUnreachableError(
                f"cannot reach the daemon at {self.socket_path}: {reason_of(error)}",
                hint=f"{hint}, or name another socket with --socket or {SOCKET_VARIABLE}",
            ) from error
        if connection.sock is not None and is_stream:
            connection.sock.settimeout(None)  # a stream may be silent for as long as nothing happens
        return response


@contextlib.contextmanager
def _notice() -> Iterator[None]:
    """Say on a terminal what is waited for: with socket activation, connecting tells nothing of the daemon."""
    if not sys.stderr.isatty():
        yield
        return
    text = "waiting for the daemon to start and answer … (`systemctl status llmstudiod` tells how it is)"
    timer = threading.Timer(NOTICE_S, lambda: print(text, file=sys.stderr))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    told: dict[str, Any] = {}
    with contextlib.suppress(OSError, http.client.HTTPException):
        for raw in response:
            name, _, value = raw.decode("utf-8", "replace").rstrip("\r\n").partition(": ")
            if name in {"event", "id"}:
                told[name] = value
            elif name == "data":
                yield told | json.loads(value)
                told = {}


def reason_of(error: Exception) -> str:
    """Return what a failed connection says, without its number."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _object(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _path(parts: tuple[str, ...]) -> str:
    return "/" + "/".join(quote(part, safe="") for part in parts)
