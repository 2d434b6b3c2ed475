"""What the server answers: this host's own pages, and nothing that another page in the same browser asks for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

_HOSTS = ("127.0.0.1", "localhost")
_UNUSED = (
    *(
        f"/gradio_api/{name}"
        for name in ("upload", "proxy", "file", "stream", "vibe", "process_recording", "run-history")
    ),
    "/monitoring",
    "/custom_component",
    "/proxy",
    "/file",
)
_HEADERS = (
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Guard:
    """An ASGI application before another one.

    It refuses

    - a ``Host`` that is not this server's: a name that a page's author points at 127.0.0.1 (DNS rebinding);
    - an ``Origin`` other than the server's own, and what the browser marks as sent by another site, except following a
      link to the page: a page of another server that posts to this one (CSRF), which the browser sends even where it
      hides the answer;
    - the addresses of Gradio that the page does not use: upload, files, proxy.

    Args:
        app: The application.
        port: Of this server.
    """

    def __init__(self, app: App, port: int) -> None:
        self._app = app
        self._hosts = {f"{host}:{port}".encode() for host in _HOSTS}
        if port == 80:
            self._hosts |= {host.encode() for host in _HOSTS}

    async def __call__(
        self,
        scope: Scope,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        reason = self._refusal(scope)
        if reason is not None:
            if scope["type"] == "http":
                await send(
                    {"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]}
                )
                await send({"type": "http.response.body", "body": reason.encode()})
            else:
                await send({"type": "websocket.close", "code": 1008})
            return

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        await self._app(scope, receive, send_on)

    def _refusal(self, scope: Scope) -> str | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if headers.get(b"host") not in self._hosts:
            return "this server answers to 127.0.0.1 only"
        origin = headers.get(b"origin")
        if origin is not None and origin not in {b"http://" + host for host in self._hosts}:
            return "this server answers its own pages only"
        site, mode = headers.get(b"sec-fetch-site", b"none"), headers.get(b"sec-fetch-mode")
        followed = mode == b"navigate" and scope.get("method") == "GET" and scope["path"] == "/"
        if site not in (b"none", b"same-origin") and not followed:
            return "this server answers its own pages only"
        if scope["path"].startswith(_UNUSED):
            return "the page does not use this address"
        return None
