"""The OpenAI endpoint: finds the model of each request, asks for a place, and relays.

Every route of llama-server's that takes a model, the list of models, and what llama-swap's and vllm-studio's users
expect beside it. What changes anything beyond using a model belongs to the admin interface.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import cast
from urllib.parse import parse_qs, unquote

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_exceptions import HTTPException
from aiohttp.web_protocol import RequestPayloadError

from llmstudiod.core.errors import (
    AccessDeniedError,
    AuthenticationError,
    BadRequestError,
    BodyTooLargeError,
    LlmstudioError,
    MethodNotAllowedError,
    ModelNotFoundError,
    NotFoundError,
    UnavailableError,
    UpstreamCrashedError,
)
from llmstudiod.core.keys import Key
from llmstudiod.core.lifecycle import Failure, InstanceView, State
from llmstudiod.core.units import format_bytes
from llmstudiod.http import tokens
from llmstudiod.http.access import Access, is_preflight
from llmstudiod.http.answers import error_event, error_response, is_anthropic, raw_error
from llmstudiod.http.body import (
    PARSE_UP_TO,
    Bytes,
    RequestFacts,
    cost_tokens,
    read_json_facts,
    read_multipart_facts,
)
from llmstudiod.http.client import ClientConnection, ClientStream, HeadTooLongError, Relayed, origin_form, read_body
from llmstudiod.http.fast_path import FastExchange
from llmstudiod.http.listing import Listing
from llmstudiod.http.meter import COMPUTING, Meter
from llmstudiod.http.relay import (
    MAX_COLLECTED,
    MAX_LINE_BYTES,
    Exchange,
    Outcome,
    Pools,
    is_head_too_long,
    request_head,
)
from llmstudiod.http.tcp_admin import TcpAdmin
from llmstudiod.supervisor import Supervisor, Ticket

logger = logging.getLogger(__name__)

COUNTING = frozenset(
    {"/tokenize", "/detokenize", "/apply-template", "/v1/chat/completions/input_tokens", "/v1/messages/count_tokens"}
)
FORWARDED_POSTS = COMPUTING | COUNTING
NEVER_STREAMED = COUNTING | {
    "/v1/embeddings", "/embeddings", "/embedding", "/v1/rerank", "/rerank", "/v1/reranking", "/reranking",
}  # fmt: skip
"""What llama-server answers in one piece, whatever ``stream`` says."""
FORWARDED_GETS = frozenset({"/props", "/slots"})
UPSTREAM_PREFIX = "/upstream/"
STUDIO_PREFIX = "/v1/studio/"
"""What the admin interface has below ``/v1/``."""
WHY_TIMEOUT_S = 1.0

_ASSETS = (".ico", ".js", ".mjs", ".css", ".map", ".png", ".jpg", ".svg", ".gif", ".webp", ".woff", ".woff2", ".html")
_NEEDS = "`llmstudioctl key add NAME {}` makes a key that may"
_READ_ONLY = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN_PATHS = FORWARDED_POSTS | FORWARDED_GETS | {"/", "/v1", "/health", "/models", "/running"}
OPEN_PATHS = frozenset({"/health", "/v1/health"})
"""What is answered whoever asks, with next to nothing: whether the daemon can serve."""


class Proxy:
    """Handles every request of the TCP listeners."""

    def __init__(
        self,
        supervisor: Supervisor,
        pools: Pools,
        listing: Listing,
        *,
        max_body: int,
        wait_comment_interval_s: float,
        access: Access,
        meter: Meter,
        admin: TcpAdmin | None = None,
    ) -> None:
        self._admin = admin
        self._meter = meter
        self._supervisor = supervisor
        self.access = access
        self._pools = pools
        self._listing = listing
        self.max_body = max_body
        self.wait_comment_interval_s = wait_comment_interval_s

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; the handler that aiohttp's server calls."""
        response = await self._answer(request, _path(request))
        if isinstance(response, web.Response):
            response.headers.update(self.access.cors_headers(request.headers.get("Origin")))
            if _connection(request).is_draining:
                response.force_close()
        return response

    async def _answer(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        try:
            if is_preflight(request.method, request.headers):
                return web.Response(status=204, headers=self.access.preflight_headers(request.headers))
            if self._admin is not None and (open_answer := await self._admin.open_to_all(request, path)) is not None:
                return open_answer
            try:
                _connection(request).key = self.access.check(
                    request.headers, local_address=local_address(request), is_safe=request.method in _READ_ONLY
                )
            except (AuthenticationError, AccessDeniedError):
                if path in OPEN_PATHS and request.method in _READ_ONLY:
                    return self._listing.bare_health()
                raise
            return await self._route(request, path)
        except LlmstudioError as error:
            return await self._refusal(request, error, path)
        except (HttpProcessingError, HTTPException, RequestPayloadError, web.PayloadAccessError) as error:
            unread = BadRequestError(f"the request cannot be read: {' '.join(str(error).split())}")
            return await self._refusal(request, unread, path)

    async def _refusal(self, request: web.BaseRequest, error: LlmstudioError, path: str) -> web.Response:
        """Return an error in the envelope of the interface to which a path belongs."""
        if self._admin is None or _is_of_the_endpoint(path):
            return error_response(error, path=path)
        return await self._admin.refusal(request, error, path)

    async def _route(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        method = request.method
        if method == "POST" and path in FORWARDED_POSTS:
            return await self._forward_post(request)
        if path.startswith(UPSTREAM_PREFIX):
            return await self._forward_upstream(request)
        if path in tokens.ROUTES:
            self._only(method, "POST", path)
            return await self._count_tokens(request, path)
        if path in FORWARDED_GETS:
            self._only(method, "GET", path)
            model = self._permitted(request, _model_of_query(request))
            self._only_if_loaded(request, model, path)
            return await self._forward(request, _target(request), RequestFacts(model), b"")
        if path in FORWARDED_POSTS:
            self._only(method, "POST", path)
        answer = self._listing.answer(path, _connection(request).key)
        if answer is not None:
            self._only(method, "GET", path)
            return answer
        if self._admin is not None and (admin_answer := await self._admin.answer(request, path)) is not None:
            return admin_answer
        if path.startswith("/api/models/unload"):
            raise AccessDeniedError(
                "unloading a model needs admin rights, which this listener does not give",
                hint="use `llmstudioctl unload`, or the admin socket",
            )
        raise NotFoundError(f"there is no route {method} {path[:200]}", hint="the endpoint's routes begin with /v1/")

    @staticmethod
    def _only(method: str, allowed: str, path: str) -> None:
        if method != allowed and not (allowed == "GET" and method == "HEAD"):
            raise MethodNotAllowedError(f"{path} takes {allowed}, not {method}", details={"allow": allowed})

    # Which model

    def _permitted(self, request: web.BaseRequest, name: str | None) -> str:
        """Return the model of a name, if the request's key may use it."""
        catalogue, key = self._supervisor.catalogue, _connection(request).key
        hint = "GET /v1/models lists what it may use"
        try:
            model = catalogue.resolve(name)
        except ModelNotFoundError as error:
            if key is None or not key.models:
                raise
            raise ModelNotFoundError(error.message, hint=hint) from None  # close names may be none of its business
        if key is not None and not key.may_use(catalogue.entries[model].recipe.names):
            raise AccessDeniedError(f"the API key '{key.name}' may not use '{str(name)[:200]}'", hint=hint)
        return model

    async def _forward_post(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await self._body(request)
        is_multipart = request.headers.get("Content-Type", "").lower().startswith("multipart/form-data")
        facts = await _read_facts(read_multipart_facts if is_multipart else read_json_facts, body)
        if facts.model is None:
            facts = facts._replace(model=_model_of_query(request))
        return await self._forward(request, _target(request), facts, body)

    async def _forward_upstream(self, request: web.BaseRequest) -> web.StreamResponse:
        """Pass ``/upstream/<id>/rest`` on as ``/rest``, percent-escapes and query as they came."""
        path, question, query = _target(request)[len(UPSTREAM_PREFIX) :].partition("?")
        name, _, rest = path.partition("/")
        target = f"/{rest}{question}{query}"
        model = self._permitted(request, unquote(name))
        _refuse_beyond_use(_connection(request).key, request.method, unquote(rest))
        self._only_if_loaded(request, model, target)
        body = await self._body(request) if request.body_exists else b""
        is_stream = False
        if body and body[:1] == b"{":
            is_stream = (await _read_facts(read_json_facts, body)).is_stream
        return await self._forward(request, target, RequestFacts(model, is_stream), body)

    def _only_if_loaded(self, request: web.BaseRequest, model: str, target: str) -> None:
        """Refuse a browser's look around when it would load the model."""
        if request.method not in _READ_ONLY or not _is_browsing(request, target):
            return
        shown = self._supervisor.view(model)
        if shown is None or shown.state is not State.READY:
            raise UnavailableError(f"'{model}' is not loaded, and a browser's look does not load it")

    async def _body(self, request: web.BaseRequest) -> bytes | bytearray:
        body = await read_body(request, limit=self.max_body)
        if body is None:
            raise BodyTooLargeError(
                f"the body is over {format_bytes(self.max_body)}",
                hint="send less, or raise max_body in llmstudiod.yaml",
            )
        return body

    # A place, and the exchange

    async def _forward(
        self, request: web.BaseRequest, target: str, facts: RequestFacts, body: bytes | bytearray
    ) -> web.StreamResponse:
        path = _path(request)
        model = self._permitted(request, facts.model)
        head = _upstream_head(request, target, body)
        is_stream = facts.is_stream and target.partition("?")[0] not in NEVER_STREAMED
        client = ClientStream.of(request, extra_headers=self.access.cors_headers(request.headers.get("Origin")))
        ticket = self._supervisor.ask(model, cost_tokens=self._cost(model, facts, body))
        try:
            if not ticket.is_settled:
                await self._wait(ticket, client, is_stream=is_stream)
            if ticket.error is not None:
                return self._refuse(client, ticket.error, path)
            return await self._exchange(request, client, ticket, head, body)
        finally:
            client.attach(None)
            self._supervisor.end(ticket)

    def _cost(self, model: str, facts: RequestFacts, body: bytes | bytearray) -> int | None:
        """Return what the request may take of a pool that all slots share; without such a pool nobody asks."""
        is_shared = self._supervisor.catalogue.entries[model].recipe.kv_unified
        return cost_tokens(facts, body) if is_shared else None

    async def _wait(self, ticket: Ticket, client: ClientStream, *, is_stream: bool) -> None:
        """Wait for the place; a client that reads a stream is told every few seconds that it is not forgotten."""
        while not ticket.is_settled:
            try:
                async with asyncio.timeout(self.wait_comment_interval_s if is_stream else None):
                    await self._supervisor.settled(ticket)
            except TimeoutError:
                client.comment(self._waiting_for(ticket.model))

    def _waiting_for(self, model: str) -> str:
        shown = self._supervisor.view(model)
        if shown is None:
            return f"waiting for {model}"
        if shown.state is State.READY:
            return f"waiting for a slot of {model}"
        percent = "" if shown.progress is None else f" {shown.progress:.0%}"
        is_loading = shown.is_being_vetted or shown.state in {State.STARTING, State.LOADING}
        return f"loading {model}{percent}" if is_loading else f"waiting for {model}"

    def _refuse(self, client: ClientStream, error: LlmstudioError, path: str) -> web.StreamResponse:
        if not client.is_begun:
            raise error
        client.send_part(error_event(error, path=path))
        client.end()
        return _relayed(client)

    async def _exchange(
        self, request: web.BaseRequest, client: ClientStream, ticket: Ticket, head: bytes, body: Bytes
    ) -> web.StreamResponse:
        path = _path(request)
        pool = self._pools.get(ticket.model, ticket.run)
        if pool is None:
            return self._refuse(client, await self._why(ticket), path)
        exchange = Exchange(
            pool,
            client.write,
            client_is_http11=client.is_http11,
            is_begun=client.is_begun,
            is_head_request=request.method == "HEAD",
            is_last=client.is_last,
        )
        client.attach(exchange)
        outcome: Outcome | None = None
        try:
            outcome = await exchange.run(head, body)
        finally:
            key = _connection(request).key
            name = key.name if key else ""
            self._meter.exchanged(exchange, outcome, model=ticket.model, key=name, path=_asked_path(request))
        if outcome is Outcome.UPSTREAM_LOST:
            return await self._after_loss(client, exchange, ticket, path)
        if exchange.collected is not None:
            client.send_part(_late_event(exchange, path))
            client.end()
            return _relayed(client)
        client.is_last = exchange.is_last
        client.answered()
        return _relayed(client)

    async def _after_loss(
        self, client: ClientStream, exchange: Exchange, ticket: Ticket, path: str
    ) -> web.StreamResponse:
        if exchange.head is not None and not exchange.can_take_event:
            client.abort()
            return _relayed(client)
        error = await self._why(ticket)
        if not client.is_begun and exchange.head is None:
            raise error
        client.send_part(error_event(error, path=path))
        client.end()
        return _relayed(client)

    def after_fast_loss(self, connection: ClientConnection, fast: FastExchange) -> None:
        """Tell a client of the fast path why its answer ends here, as far as that can still be told."""
        _ = self._supervisor.spawn(self._end_fast_loss(connection, fast), f"end of an answer of {fast.ticket.model}")

    async def _end_fast_loss(self, connection: ClientConnection, fast: FastExchange) -> None:
        client = ClientStream(connection)
        if fast.relay.head is not None and not fast.relay.can_take_event:
            client.abort()
            return
        error = await self._why(fast.ticket)
        if fast.relay.head is None:
            client.write(raw_error(error, path=fast.path))
        else:
            client.send_part(error_event(error, path=fast.path))
            client.end()
        client.close()

    async def _why(self, ticket: Ticket) -> LlmstudioError:
        """Return why the upstream is gone; its exit is known some milliseconds after its connections."""
        message, hint = f"'{ticket.model}' ended before it had answered", "see `llmstudioctl status`"
        try:
            async with asyncio.timeout(WHY_TIMEOUT_S):
                while True:
                    shown = self._supervisor.view(ticket.model)
                    failure = _failure(shown, ticket.run) if shown else None
                    if failure is not None:
                        details = {"failure": failure.kind, "lines": list(failure.lines)}
                        return UpstreamCrashedError(
                            f"'{ticket.model}' ended: {failure.message}", hint=failure.hint, details=details
                        )
                    if shown is None or shown.run != ticket.run:
                        break
                    if shown.state in {State.STOPPING, State.STOPPED} and shown.stop_cause is not None:
                        return UpstreamCrashedError(f"'{ticket.model}' was stopped: {shown.stop_cause}")
                    if shown.state is State.STOPPED:
                        break
                    await self._supervisor.changed()
        except TimeoutError:
            message = f"'{ticket.model}' closed the connection before it had answered"
        return UpstreamCrashedError(message, hint=hint)

    async def _count_tokens(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        body = await self._body(request)
        model = self._permitted(request, (await _read_facts(read_json_facts, body)).model)
        ticket = self._supervisor.ask(model)
        try:
            await self._supervisor.settled(ticket)
            if ticket.error is not None:
                raise ticket.error
            socket_path = self._supervisor.socket_of(model)
            shown = self._supervisor.view(model)
            n_ctx = shown.facts.n_ctx if shown and shown.facts else None
            return await tokens.answer(path, body, socket_path=socket_path, n_ctx=n_ctx)
        finally:
            self._supervisor.end(ticket)


def _failure(shown: InstanceView, run: int) -> Failure | None:
    """Return why a run ended; the next one may have been started already."""
    if shown.run == run and shown.failure is not None:
        return shown.failure
    return shown.last_failure[1] if shown.last_failure and shown.last_failure[0] == run else None


async def _read_facts(read: Callable[[Bytes], RequestFacts], body: Bytes) -> RequestFacts:
    """Return what ``read`` finds in a body; a large one takes its time, and others are served meanwhile."""
    return read(body) if len(body) <= PARSE_UP_TO else await asyncio.to_thread(read, body)


def _connection(request: web.BaseRequest) -> ClientConnection:
    return cast("ClientConnection", request.protocol)


def local_address(request: web.BaseRequest) -> str:
    """Return the address at which a request arrived."""
    return _connection(request).local_address


def _target(request: web.BaseRequest) -> str:
    return origin_form(request.raw_path)


def _path(request: web.BaseRequest) -> str:
    return _target(request).partition("?")[0]


def _is_of_the_endpoint(path: str) -> bool:
    """Whether clients of OpenAI's, Anthropic's or llama-server's interface ask at this path, or would."""
    is_v1 = path.startswith("/v1/") and not path.startswith(STUDIO_PREFIX)
    return is_v1 or path in _OWN_PATHS or path.startswith(UPSTREAM_PREFIX)


def _asked_path(request: web.BaseRequest) -> str:
    """Return the path that the model's server is asked for."""
    path = _path(request)
    return "/" + path[len(UPSTREAM_PREFIX) :].partition("/")[2] if path.startswith(UPSTREAM_PREFIX) else path


def _refuse_beyond_use(key: Key | None, method: str, path: str) -> None:
    """Refuse what a key that may only use a model must not reach in its server."""
    first = path.strip("/").partition("/")[0].lower()
    if key is not None and not key.metrics and first == "metrics":
        raise AccessDeniedError(f"the API key '{key.name}' may not read metrics", hint=_NEEDS.format("--metrics"))
    if key is not None and not key.admin and method not in _READ_ONLY and first in {"lora-adapters", "slots", "props"}:
        message = f"the API key '{key.name}' may not change the model for everybody"
        raise AccessDeniedError(message, hint=_NEEDS.format("--admin"))


def _model_of_query(request: web.BaseRequest) -> str | None:
    names = parse_qs(_target(request).partition("?")[2]).get("model")
    return names[-1] if names else None


def _upstream_head(request: web.BaseRequest, target: str, body: Bytes) -> bytes:
    """Return the head for the upstream, which must be one that it reads: it does not say what it refuses."""
    length = len(body) if body or request.method not in _READ_ONLY else None
    head = request_head(request.method, target, request.raw_headers, length)
    if is_head_too_long(head):
        raise HeadTooLongError(
            f"the request's head has a line over {format_bytes(MAX_LINE_BYTES)}, or too many headers",
            hint="llama-server takes no more",
        )
    return head


def _late_event(exchange: Exchange, path: str) -> bytes:
    """Return an answer that is no stream, most often an error, as the last event of the stream begun for it."""
    assert exchange.head is not None
    assert exchange.collected is not None
    if len(exchange.collected) > MAX_COLLECTED:
        message = f"the answer is no stream, and over {format_bytes(MAX_COLLECTED)}"
        return error_event(BadRequestError(message, hint="ask again without `stream`"), path=path)
    name = b"event: error\n" if is_anthropic(path) and exchange.head.status >= 400 else b""
    return name + b"data: " + b" ".join(exchange.collected.splitlines()) + b"\n\n"


def _is_browsing(request: web.BaseRequest, target: str) -> bool:
    """Whether a GET is a browser's look around: icons, scripts, pages."""
    is_asset = target.partition("?")[0].endswith(_ASSETS)
    wants_page = "text/html" in request.headers.get("Accept", "")
    return is_asset or wants_page or "Sec-Fetch-Mode" in request.headers


def _relayed(client: ClientStream) -> web.StreamResponse:
    return cast("web.StreamResponse", Relayed(keep_alive=not client.is_last))


Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
