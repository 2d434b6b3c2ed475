"""What the server answers: this host's own pages, and nothing that another page in the same browser asks for."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

_HOST = re.compile(rb"(127\.0\.0\.1|localhost)(:\d{1,5})?")
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

    - a ``Host`` other than 127.0.0.1 and localhost, which a name is that a page's author points at 127.0.0.1 (DNS
      rebinding); with any port, because ports can be forwarded;
    - an ``Origin`` other than that host and port, and what the browser marks as sent by another site, except where a
      link to the page is followed: a page of another server that posts to this one (CSRF), which the browser sends
      even where it hides the answer;
    - the addresses of Gradio that the page does not use: upload, files, proxy.

    Args:
        app: The application.
    """

    def __init__(self, app: App) -> None:
        self._app = app

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
        host = headers.get(b"host", b"")
        if _HOST.fullmatch(host) is None:
            return "this server answers to 127.0.0.1 only"
        if headers.get(b"origin", b"http://" + host) != b"http://" + host:
            return "this server answers its own pages only"
        site, mode = headers.get(b"sec-fetch-site", b"none"), headers.get(b"sec-fetch-mode")
        followed = mode == b"navigate" and scope.get("method") == "GET" and scope["path"] == "/"
        if site not in (b"none", b"same-origin") and not followed:
            return "this server answers its own pages only"
        if scope["path"].startswith(_UNUSED):
            return "the page does not use this address"
        return None
