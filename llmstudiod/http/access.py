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
from llmstudiod.http.sessions import COOKIE

_SCHEMES = ("http", "https")
SIGNED_IN = Key("signed in at the page", hash="", admin=True, metrics=True)
"""Whom a session's cookie stands for."""
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
    """Judges requests by the rules in force. ``is_session``: whether a cookie's secret is that of a session."""

    def __init__(
        self,
        rules: Rules,
        *,
        own_names: frozenset[str],
        is_session: Callable[[str], bool],
        now: Callable[[], float] = time.time,
    ) -> None:
        self.rules = rules
        self._is_session = is_session
        self._own_names = LOOPBACK_NAMES | own_names
        self._now = now

    def check(self, headers: Mapping[str, str], *, local_address: str, is_safe: bool) -> Key | None:
        """Let a request in, and return its key, or None where none is needed.

        ``local_address`` is where the connection arrived; ``is_safe`` tells a request that changes and starts nothing.

        Raises:
            AuthenticationError: It shows no key, or a wrong one.
            AccessDeniedError: It comes from another site's page, or from elsewhere where only this machine may ask.
        """
        if self.is_signed_in(headers):
            self._check_host(headers.get("Host", ""), local_address)
            self._check_own_page(headers)
            return SIGNED_IN
        key = self._key(headers)
        if key is None:
            self._check_host(headers.get("Host", ""), local_address)
            self._check_origin(headers, is_safe=is_safe)
            if not self.rules.allows_open_listener and not is_loopback(local_address):
                hint = "`llmstudioctl key add NAME` makes a key; allow_open_listener lets everybody in"
                raise AccessDeniedError("this listener is reached from outside, and no keys are set", hint=hint)
        return key

    def is_signed_in(self, headers: Mapping[str, str]) -> bool:
        """Whether a request carries a session's cookie, and no key beside it."""
        has_key = "Authorization" in headers or "x-api-key" in headers
        return not has_key and any(self._is_session(token) for token in session_tokens(headers))

    def check_page(self, headers: Mapping[str, str], *, local_address: str) -> None:
        """Let a browser have the page itself, which holds no secret, under a name of this machine.

        Raises:
            AccessDeniedError: It asks for another machine's.
        """
        self._check_host(headers.get("Host", ""), local_address)

    def check_sign_in(self, headers: Mapping[str, str], *, local_address: str) -> None:
        """Let our own page sign somebody in.

        Raises:
            AccessDeniedError: It is another page that asks.
        """
        self._check_host(headers.get("Host", ""), local_address)
        self._check_own_page(headers)

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

    @staticmethod
    def _check_own_page(headers: Mapping[str, str]) -> None:
        """A browser adds the cookie whoever made the request; SameSite ignores ports, so it is not enough alone."""
        origin = headers.get("Origin")
        own = {f"{scheme}://{headers.get('Host')}" for scheme in _SCHEMES}
        if headers.get("Sec-Fetch-Site", "none") in {"none", "same-origin"} and (origin is None or origin in own):
            return
        found = origin[:100] if origin else "another site"
        hint = "only this daemon's own page may use what was signed in there; programs use a key"
        raise AccessDeniedError(f"a web page of '{found}' may not use somebody's session", hint=hint)

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


def session_tokens(headers: Mapping[str, str]) -> list[str]:
    """Return what a request's cookies of our name hold.

    >>> session_tokens({"Cookie": "a=1; llmstudio_session=x-Y_z"})
    ['x-Y_z']
    """
    pairs = (pair.strip().partition("=") for pair in headers.get("Cookie", "").split(";"))
    return [value for name, _, value in pairs if name == COOKIE and value][:4]


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
