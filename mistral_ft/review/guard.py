"""Who may talk to the review server, and for how long.

A page on the internet that the reviewer visits must neither read records nor change them: requests need our own host
name (against DNS rebinding) and, if they say where they come from, our own origin (against forged ones). Where others
can reach the port, they need the token. Connections that dawdle are closed.
"""

import asyncio
import hmac
import ipaddress
import socket
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
REQUEST_SECONDS = 15  # for a request to arrive, headers and body
STALL_SECONDS = 60  # for a reader to take any of an answer

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens at `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware that lets in only the reviewer's own page.

    Args:
        app: what it guards.
        host: where the server listens.
        port: its port, part of the cookie's name: browsers share cookies among ports.
        token: what others than this machine must know; None for none.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, token: str | None):
        self.app, self.token, self.cookie = app, token, f"review-{port}"
        self.names = LOOPBACK_NAMES | {host.lower()}
        self.any_address = not is_loopback(host)
        if self.any_address:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no web sockets here

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        answer = self._refuse(scope) or self.app
        await answer(scope, receive, send_with_headers)

    def _refuse(self, scope: Scope) -> Response | None:
        """The answer to a request that is not let in, or None."""
        headers = Headers(scope=scope)
        if len(headers.getlist("host")) != 1 or not self._is_ours(headers["host"]):
            return PlainTextResponse("This host name is not served here.", 421)
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != headers["host"].lower():
            return PlainTextResponse("Requests from other pages are refused.", 403)
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not self._is_opening(
            scope, headers
        ):
            return PlainTextResponse("Requests from other pages are refused.", 403)
        if scope["method"] not in ("GET", "HEAD") and origin is None:
            return PlainTextResponse("Changes need an Origin header.", 403)
        if self.token is None or self._knows_token(headers):
            return None
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["path"] == "/" and self._is_token(given):
            # The token leaves the address bar for a cookie that no script can read.
            response = RedirectResponse("/", 303)
            response.set_cookie(self.cookie, given, httponly=True, samesite="lax", max_age=30 * 86400)
            return response
        return PlainTextResponse("Open the address with the token that the server printed when it started.", 401)

    def _is_opening(self, scope: Scope, headers: Headers) -> bool:
        """Whether somebody follows a link to the page itself, which tells the linking page nothing."""
        return scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self.names:
            return True
        try:
            ipaddress.ip_address(name)  # an address is no name that could be bound to another one
        except ValueError:
            return False
        return self.any_address

    def _knows_token(self, headers: Headers) -> bool:
        if self._is_token(headers.get("authorization", "").removeprefix("Bearer ")):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return False
        return cookie is not None and self._is_token(cookie.value)

    def _is_token(self, given: str) -> bool:
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP protocol with an end to requests that arrive drop by drop and to readers that stand still."""

    _deadline: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's own
        super().connection_made(transport)
        self._deadline = self.loop.call_later(REQUEST_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):  # the request is complete
            self._cancel("_deadline")

    def on_response_complete(self) -> None:
        self._cancel("_deadline")  # the next request has its own
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel("_stall")

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel("_deadline")
        self._cancel("_stall")
        super().connection_lost(exc)

    def _cancel(self, name: str) -> None:
        if (timer := getattr(self, name)) is not None:
            timer.cancel()
            setattr(self, name, None)
