"""The admin interface and the page on the endpoint's port: who must have signed in, and how one does.

Everything here but the page's own files needs a session, or a key with the admin right, on loopback too: any program
of this machine, and any page that a browser here shows, reaches the port.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

from aiohttp import web

from llmstudiod.core.errors import (
    AccessDeniedError,
    AuthenticationError,
    BadRequestError,
    LlmstudioError,
    MethodNotAllowedError,
)
from llmstudiod.core.keys import Key
from llmstudiod.http.access import Access, session_tokens
from llmstudiod.http.admin_answers import error_answer
from llmstudiod.http.answers import envelope, error_headers, json_response
from llmstudiod.http.client import ClientConnection, read_body
from llmstudiod.http.page import asset_name, page_response
from llmstudiod.http.sessions import COOKIE, SESSION_S, Sessions
from llmstudiod.http.streams import STILL_COUNTS

SIGN_IN, SIGN_OUT = "/sign-in", "/sign-out"
_SIGNS = frozenset({SIGN_IN, SIGN_OUT})
METRICS = "/metrics"
MAX_BODY = 4096
_HINT = (
    "`llmstudioctl web` prints an address that signs you in; programs use a key made with "
    "`llmstudioctl key add NAME --admin`"
)


class TcpAdmin:
    """Answers what the endpoint's own routes do not.

    ``admin_key`` returns the key with a secret, if it has the admin right. ``has_route`` tells whether the admin
    interface knows a request's path, ``handle`` answers it.
    """

    def __init__(
        self,
        *,
        access: Access,
        sessions: Sessions,
        admin_key: Callable[[str], Key | None],
        has_route: Callable[[web.Request], Awaitable[bool]],
        handle: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> None:
        self._access = access
        self._sessions = sessions
        self._admin_key = admin_key
        self._has_route = has_route
        self._handle = handle

    async def open_to_all(self, request: web.BaseRequest, path: str) -> web.Response | None:
        """Answer what needs no session: the page's files, signing in and out. None: it is something else.

        Programs that ask for ``/`` get a text, which is the endpoint's own.
        """
        if path in _SIGNS:
            if request.method != "POST":
                message = f"{path} takes POST, not {request.method}"
                raise MethodNotAllowedError(message, details={"allow": "POST"})
            return await self._sign(request, path)
        name = asset_name(path) if request.method in {"GET", "HEAD"} else None
        if name is None or (path == "/" and "text/html" not in request.headers.get("Accept", "")):
            return None
        self._access.check_page(request.headers, local_address=_connection(request).local_address)
        return page_response(name, request.headers)

    async def _sign(self, request: web.BaseRequest, path: str) -> web.Response:
        try:
            self._access.check_sign_in(request.headers, local_address=_connection(request).local_address)
            if path == SIGN_OUT:
                for token in session_tokens(request.headers):
                    await asyncio.to_thread(self._sessions.close, token)
                return _with_cookie(json_response({"success": True}), "", 0)
            key = await self._proof(request)
        except LlmstudioError as error:
            return _refused(error)
        token = await asyncio.to_thread(self._sessions.open, key)
        return _with_cookie(json_response({"success": True}), token, int(SESSION_S))

    async def _proof(self, request: web.BaseRequest) -> str:
        """Return the hash of the admin key that a request shows, or nothing where it is a code."""
        from llmstudiod.http.questions import Proof, validated  # slow to import: nobody waits for it at a start

        proof = validated(Proof, await read_body(request, limit=MAX_BODY) or b"")
        if proof.code:
            if not self._sessions.redeem(proof.code):
                hint = "`llmstudioctl web` prints a new one; each can be used once, within ten minutes"
                raise AuthenticationError("the code is not valid any more", hint=hint)
            return ""
        if not proof.key:
            raise BadRequestError('expected {"code": "…"} or {"key": "…"}')
        key = self._admin_key(proof.key)
        if key is None:
            raise AuthenticationError("that is no key with the admin right", hint=_HINT)
        return key.hash

    async def answer(self, request: web.BaseRequest, path: str) -> web.StreamResponse | None:
        """Answer a request to the admin interface; None: it has no such route."""
        key = _connection(request).key
        if not isinstance(request, web.Request) or not await self._has_route(request):
            return None
        if not _may(key, path):
            error: LlmstudioError = AuthenticationError("the admin interface needs you to sign in", hint=_HINT)
            if key is not None:
                error = AccessDeniedError(f"the API key '{key.name}' has no admin right", hint=_HINT)
            return _refused(error)
        request[STILL_COUNTS] = lambda: self._still_counts(request, path)
        response = await self._handle(request)
        if isinstance(response, web.Response):
            response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
            response.headers["X-Content-Type-Options"] = "nosniff"
            response.headers["Cache-Control"] = "no-store"
        return response

    async def refusal(self, request: web.BaseRequest, error: LlmstudioError, path: str) -> web.Response:
        """Return an error in this interface's envelope.

        Where nothing is at the path it has OpenAI's beside it: who asks there may be a client of either interface.
        """
        is_known = path in _SIGNS or (isinstance(request, web.Request) and await self._has_route(request))
        return _refused(error, beside=None if is_known else envelope(error, path=path))

    def _still_counts(self, request: web.Request, path: str) -> bool:
        """Whether a request would be let in if it came now."""
        address = _connection(request).local_address
        try:
            return _may(self._access.check(request.headers, local_address=address, is_safe=True), path)
        except LlmstudioError:
            return False


def _may(key: Key | None, path: str) -> bool:
    return key is not None and (key.admin or (path == METRICS and key.metrics))


def _refused(error: LlmstudioError, *, beside: Mapping[str, Any] | None = None) -> web.Response:
    answer = {**error_answer(error), **(beside or {})}
    return json_response(answer, status=error.status, headers=error_headers(error))


def _connection(request: web.BaseRequest) -> ClientConnection:
    return cast("ClientConnection", request.protocol)


def _with_cookie(response: web.Response, token: str, max_age_s: int) -> web.Response:
    response.set_cookie(COOKIE, token, max_age=max_age_s, httponly=True, samesite="Strict", path="/")
    return response
