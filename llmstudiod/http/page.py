"""The page's files: plain modules and styles from the package, with the headers that keep everything else out of it."""

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from aiohttp import web

KINDS = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
    "Server": "llmstudiod",
}
FOLDER = "/page/"
FILES = Path(__file__).parents[1] / "page"


@dataclass(frozen=True, slots=True)
class Asset:
    """A file of the page."""

    body: bytes
    zipped: bytes
    kind: str
    tag: str


def asset_name(path: str) -> str | None:
    """Return the name of the page's file that a path means, or None.

    >>> asset_name("/page/app.js"), asset_name("/page/../x"), asset_name("/v1/models")
    ('app.js', None, None)
    """
    if path in {"/", "/page", "/page/"}:
        return "index.html"
    if path == "/favicon.ico":
        return "icon.svg"
    name = path.removeprefix(FOLDER)
    return name if path.startswith(FOLDER) and "/" not in name and name[:1].isalpha() else None


@cache
def _asset(name: str) -> Asset | None:
    kind = KINDS.get(name[name.rfind(".") :])
    file = FILES / name
    if kind is None or not file.is_file():
        return None
    body = file.read_bytes()
    tag = '"' + hashlib.sha256(body).hexdigest()[:20] + '"'
    return Asset(body, gzip.compress(body, 9, mtime=0), kind, tag)


def page_response(name: str, headers: Mapping[str, str]) -> web.Response | None:
    """Return a file of the page, or None where there is no such file."""
    asset = _asset(name)
    if asset is None:
        return None
    own = {**HEADERS, "ETag": asset.tag, "Vary": "Accept-Encoding"}
    if asset.tag in headers.get("If-None-Match", ""):
        return web.Response(status=304, headers=own)
    body = asset.body
    if "gzip" in headers.get("Accept-Encoding", ""):
        own["Content-Encoding"] = "gzip"
        body = asset.zipped
    return web.Response(body=body, content_type=asset.kind, charset="utf-8", headers=own)
