"""The short way for the requests that come most: a small POST for a model that is ready, with a connection at hand.

Bytes in, bytes out, no task and no request object: half the cost of the way through aiohttp. Whatever is not so
simple (the model must be loaded or has no free slot, an error, a connection to be opened) takes the usual way: the
very same bytes are given to aiohttp's parser, and nothing has happened yet.
"""

import functools
from collections.abc import Callable
from typing import Protocol

from multidict import CIMultiDict

from llmstudiod.core.errors import LlmstudioError
from llmstudiod.http.access import SIGNED_IN, Access, Rules
from llmstudiod.http.body import read_json_facts
from llmstudiod.http.fast_parser import FastHead, FastRequest
from llmstudiod.http.meter import Meter
from llmstudiod.http.relay import Exchange, Outcome, Pools, request_head
from llmstudiod.supervisor import Supervisor, Ticket


class FastClient(Protocol):
    """The client's connection, as far as the fast path needs it."""

    local_address: str

    def write(self, data: bytes) -> None:
        """Put bytes into the connection."""

    def fast_done(self, *, is_last: bool) -> None:
        """The answer is complete."""

    def fast_failed(self, *, is_untouched: bool) -> None:
        """The upstream was lost; ``is_untouched``: no byte of an answer was seen, so the request can go again."""


MAX_JUDGED = 2048


class FastPath:
    """Tries the short way; shared by all connections of the endpoint. ``max_body`` tells the limit now in force."""

    def __init__(
        self,
        supervisor: Supervisor,
        pools: Pools,
        paths: frozenset[str],
        *,
        max_body: Callable[[], int],
        access: Access,
        meter: Meter,
    ) -> None:
        self._access = access
        self._meter = meter
        self._judged: dict[tuple[FastHead, str], str | None] = {}
        self._judged_by: Rules | None = None
        self.max_body = max_body
        self._supervisor = supervisor
        self._pools = pools
        self._paths = paths

    def start(self, client: FastClient, request: FastRequest, data: bytes) -> "FastExchange | None":
        """Begin to serve ``request``, or return None and leave no trace."""
        head = request.head
        key = self._key_of(head, client.local_address) if head.path in self._paths else None
        if key is None:
            return None
        body = data[request.body_start :]
        catalogue = self._supervisor.catalogue
        try:
            facts = read_json_facts(body)
            model = catalogue.resolve(facts.model)
        except LlmstudioError:
            return None  # the usual way finds it again, and words it
        if catalogue.entries[model].recipe.kv_unified:
            return None  # what it may take of the pool must be counted first
        run = self._supervisor.ready_run(model)
        pool = self._pools.get(model, run) if run is not None else None
        connection = pool.take_idle() if pool is not None else None
        if pool is None or connection is None:
            return None
        ticket = self._supervisor.ask(model)
        assert ticket.is_settled
        exchange = FastExchange(self._supervisor, self._meter, client, ticket, head.path, key)
        relay = Exchange(
            pool,
            client.write,
            client_is_http11=True,
            is_begun=False,
            is_head_request=False,
            is_last=False,
            on_done=exchange.relayed,
        )
        exchange.relay = relay
        relay.start_on(connection, _upstream_head(head) + body)
        return exchange

    def _key_of(self, head: FastHead, address: str) -> str | None:
        """Return the name of the key with which a head may come in at an address, "" without; None: it may not.

        It is asked once for each, since a client's heads are mostly the same.

        What needs more than a yes takes the usual way: a page that must be named in the answer, a key that may use
        some models alone or that expires, a session.
        """
        if self._access.rules is not self._judged_by or len(self._judged) > MAX_JUDGED:
            self._judged_by = self._access.rules
            self._judged.clear()
        try:
            return self._judged[head, address]
        except KeyError:
            known = self._judged[head, address] = self._judge(head, address)
            return known

    def _judge(self, head: FastHead, address: str) -> str | None:
        headers = CIMultiDict((name.decode(), value.decode("utf-8", "surrogateescape")) for name, value in head.headers)
        if "Origin" in headers:
            return None
        try:
            key = self._access.check(headers, local_address=address, is_safe=False)
        except LlmstudioError:
            return None  # the usual way finds it again, and words it
        if key is None:
            return ""
        return None if key.models or key.expires or key is SIGNED_IN else key.name


@functools.lru_cache(maxsize=512)
def _upstream_head(head: FastHead) -> bytes:
    return request_head("POST", head.path, head.headers, head.length)


class FastExchange:
    """One request on the short way."""

    __slots__ = ("_client", "_key", "_meter", "_supervisor", "path", "relay", "ticket")

    relay: Exchange

    def __init__(
        self, supervisor: Supervisor, meter: Meter, client: FastClient, ticket: Ticket, path: str, key: str
    ) -> None:
        self._supervisor = supervisor
        self._meter = meter
        self._key = key
        self._client = client
        self.ticket = ticket
        self.path = path

    def relayed(self, outcome: Outcome) -> None:
        """Take the relay's end."""
        self._supervisor.end(self.ticket)
        is_again = outcome is Outcome.UPSTREAM_LOST and not self.relay.sent_anything  # then the usual way notes it
        if not is_again:
            self._meter.exchanged(self.relay, outcome, model=self.ticket.model, key=self._key, path=self.path)
        if outcome is Outcome.COMPLETE:
            self._client.fast_done(is_last=self.relay.is_last)
        else:
            self._client.fast_failed(is_untouched=not self.relay.sent_anything)

    def client_lost(self) -> None:
        """The client is gone: cut the upstream off, so that the slot is free at once."""
        self.relay.cut()
        self._meter.exchanged(self.relay, None, model=self.ticket.model, key=self._key, path=self.path)
        self._supervisor.end(self.ticket)
