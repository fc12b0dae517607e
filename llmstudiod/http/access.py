"""Who may use the endpoint: keys, the Host that a request names, and the page that it comes from.

Without keys the endpoint is open to the programs of this machine, and to nobody else: a web page that a browser
here shows is not one of them. Such a page may send a request anywhere (it then carries its Origin), and may have its
own name point at 127.0.0.1 (the request then carries that name as its Host).
"""

import ipaddress
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmstudiod.core.errors import AccessDeniedError, AuthenticationError
from llmstudiod.core.keys import Key, holder

_SCHEMES = ("http", "https")
LOOPBACK_NAMES = frozenset({"localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback"})


@dataclass(frozen=True, slots=True)
class Rules:
    """What is in force. ``keys`` None: the keys file cannot be read, so nobody is let in."""

    keys: tuple[Key, ...] | None = ()
    allowed_hosts: frozenset[str] = frozenset()
    cors_origins: frozenset[str] = frozenset()
    allows_open_listener: bool = False

    @property
    def needs_key(self) -> bool:
        """Whether a request must show a key."""
        return self.keys is None or bool(self.keys)


class Access:
    """Judges requests by the rules in force."""

    def __init__(self, rules: Rules, *, own_names: frozenset[str], now: Callable[[], float] = time.time) -> None:
        self.rules = rules
        self._own_names = LOOPBACK_NAMES | own_names
        self._now = now

    def check(self, headers: Mapping[str, str], *, local_address: str, is_safe: bool) -> Key | None:
        """Let a request in, and return its key, or None where none is needed.

        ``local_address`` is where the connection arrived; ``is_safe`` tells a request that changes and starts nothing.

        Raises:
            AuthenticationError: It shows no key, or a wrong one.
            AccessDeniedError: It comes from another site's page, or from elsewhere where only this machine may ask.
        """
        key = self._key(headers)
        if key is None:
            self._check_host(headers.get("Host", ""), local_address)
            self._check_origin(headers, is_safe=is_safe)
            if not self.rules.allows_open_listener and not is_loopback(local_address):
                hint = "`llmstudioctl key add NAME` makes a key; allow_open_listener lets everybody in"
                raise AccessDeniedError("this listener is reached from outside, and no keys are set", hint=hint)
        return key

    def cors_headers(self, origin: str | None) -> dict[str, str]:
        """Return what lets an allowed page read an answer."""
        allowed = self.allowed_origin(origin)
        return {"Access-Control-Allow-Origin": allowed, "Vary": "Origin"} if allowed else {}

    def preflight_headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return the answer to a browser that asks before it sends a page's request; no key comes with the question.

        Raises:
            AccessDeniedError: The page is none of those that may.
        """
        origin = headers.get("Origin")
        if self.allowed_origin(origin) is None:
            hint = "add it to cors_origins in llmstudiod.yaml"
            raise AccessDeniedError(f"a web page of '{str(origin)[:100]}' may not use this endpoint", hint=hint)
        asked = headers.get("Access-Control-Request-Headers", "Authorization, Content-Type")
        return {
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": asked if asked.isprintable() else "Authorization, Content-Type",
            "Access-Control-Max-Age": "600",
        }

    def allowed_origin(self, origin: str | None) -> str | None:
        """Return the Origin if its pages may read our answers."""
        allowed = self.rules.cors_origins
        return origin if origin and (origin in allowed or "*" in allowed) else None

    def _key(self, headers: Mapping[str, str]) -> Key | None:
        rules = self.rules
        if not rules.needs_key:
            return None
        scheme, _, secret = headers.get("Authorization", "").partition(" ")
        secret = secret.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
        hint = "send it as `Authorization: Bearer …`; `llmstudioctl key add NAME` makes one"
        if rules.keys is None:
            hint = "`llmstudioctl check` tells the administrator what is wrong with it"
            raise AuthenticationError("the keys file cannot be read, so no key is accepted", hint=hint)
        if not secret:
            raise AuthenticationError("this endpoint needs an API key, and the request has none", hint=hint)
        key = holder(rules.keys, secret)
        if key is None:
            raise AuthenticationError("the API key is not known here", hint=hint)
        if key.is_expired(self._now()):
            raise AuthenticationError(f"the API key '{key.name}' has expired", hint=hint)
        return key

    def _check_host(self, host: str, local_address: str) -> None:
        name = host_name(host)
        rules = self.rules
        is_ours = name in self._own_names or name in rules.allowed_hosts or "*" in rules.allowed_hosts
        if is_ours or name == local_address or is_loopback(name):
            return
        raise AccessDeniedError(
            f"expected a request for this machine, found one for '{name[:100]}'",
            hint="add the name to allowed_hosts in llmstudiod.yaml, or use a key",
        )

    def _check_origin(self, headers: Mapping[str, str], *, is_safe: bool) -> None:
        origin = headers.get("Origin")
        if origin is None:
            if is_safe or headers.get("Sec-Fetch-Site", "none") in {"none", "same-origin"}:
                return
            origin = "another site"
        elif self.allowed_origin(origin) or origin in {f"{scheme}://{headers.get('Host')}" for scheme in _SCHEMES}:
            return
        raise AccessDeniedError(
            f"a web page of '{origin[:100]}' may not use this endpoint",
            hint="add it to cors_origins in llmstudiod.yaml, or let it use a key",
        )


def is_preflight(method: str, headers: Mapping[str, str]) -> bool:
    """Whether a browser asks before it sends a page's request. Source: the Fetch standard, "CORS-preflight request"."""
    return method == "OPTIONS" and "Origin" in headers and "Access-Control-Request-Method" in headers


def host_name(host: str) -> str:
    """Return the name in a Host header, without port and brackets, in small letters.

    >>> host_name("[::1]:8080"), host_name("LOCALHOST:80"), host_name("10.0.0.1")
    ('::1', 'localhost', '10.0.0.1')
    """
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()


def is_loopback(address: str) -> bool:
    """Whether an address is this machine's own, for itself alone.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("10.0.0.1"), is_loopback("127.0.0.1.evil.example")
    (True, True, False, False)
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return bool((mapped or found).is_loopback)
