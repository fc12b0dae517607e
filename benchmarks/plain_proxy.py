"""The usual aiohttp proxy, to measure against: server and client of aiohttp, each piece awaited on its way through.

python plain_proxy.py PORT UNIX_SOCKET
"""

import sys

from aiohttp import ClientSession, ClientTimeout, TCPConnector, UnixConnector, web

DROPPED = {"host", "content-length", "transfer-encoding", "connection", "keep-alive", "date", "server"}


async def main(socket_path: str) -> web.Application:
    """Return the proxy as an application."""
    app = web.Application(client_max_size=64 << 20)

    async def session(app: web.Application) -> None:
        connector: TCPConnector | UnixConnector = UnixConnector(path=socket_path, limit=0)
        app["session"] = ClientSession(connector=connector, timeout=ClientTimeout(total=None))

    async def forward(request: web.Request) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in DROPPED}
        body = await request.read()
        async with request.app["session"].request(
            request.method, f"http://localhost{request.rel_url}", data=body, headers=headers
        ) as upstream:
            kept = {name: value for name, value in upstream.headers.items() if name.lower() not in DROPPED}
            response = web.StreamResponse(status=upstream.status, headers=kept)
            await response.prepare(request)
            async for chunk in upstream.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    app.on_startup.append(session)
    app.router.add_route("*", "/{path:.*}", forward)
    return app


if __name__ == "__main__":
    web.run_app(main(sys.argv[2]), host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)
