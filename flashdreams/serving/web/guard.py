"""Access control and request limits."""

import hmac
import time
import urllib.parse
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from flashdreams.serving.web.settings import WebSettings, is_loopback

OPEN_PATHS = ("/healthz", "/readyz")
"""Probes, which need no token because their answers are not secret."""
UPLOAD_PATHS = ("/v1/sessions",)
"""Paths whose request bodies may contain an image."""
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-cache"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        b"worker-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        b"frame-ancestors 'none'",
    ),
)


class TokenBucket:
    """Allows ``rate`` per second on average, and twice that within one second."""

    def __init__(self, rate: float, now: Callable[[], float] = time.monotonic) -> None:
        """Start with a full bucket."""
        self.rate, self._now = rate, now
        self._tokens, self._at = 2 * rate, now()

    def take(self) -> float:
        """Take one token.

        Returns:
            Seconds to wait before it may be used; 0 if one was available.
        """
        now = self._now()
        self._tokens = min(2 * self.rate, self._tokens + (now - self._at) * self.rate)
        self._at = now
        self._tokens -= 1
        return max(0.0, -self._tokens / self.rate)


def knows_token(scope: Scope, settings: WebSettings) -> bool:
    """Whether a request has the token: in its query, as a bearer token, or in a cookie."""
    wanted = settings.token
    if not wanted:
        return True
    request = HTTPConnection(scope)
    found = request.query_params.getlist("token")
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        found.append(bearer.strip())
    found.append(urllib.parse.unquote(request.cookies.get(cookie_name(scope), "")))
    same = [hmac.compare_digest(text.encode(), wanted.encode()) for text in found]
    return any(same)


def allows_host(scope: Scope, settings: WebSettings) -> bool:
    """Whether a request is for a host name of this server.

    A loopback server without a token refuses all other names; otherwise DNS rebinding would
    give a foreign page access.
    """
    if settings.token or not is_loopback(settings.host):
        return True
    name = _split(f"//{Headers(scope=scope).get('host', '')}").hostname or ""
    return is_loopback(name) or name in settings.allowed_hosts


def allows_origin(scope: Scope, settings: WebSettings) -> bool:
    """Whether the requesting page is from this server or allowed; programs send no origin."""
    headers = Headers(scope=scope)
    origin = headers.get("origin")
    if origin is None or origin in settings.allowed_origins:
        return True
    own = headers.get("host", "").lower()
    return bool(own) and _split(origin).netloc.lower() == own


class GuardedApp:
    """An ASGI application that answers allowed requests only, with bodies of limited size."""

    def __init__(self, app: ASGIApp, settings: WebSettings) -> None:
        """Wrap an application."""
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request or pass it on."""
        if scope["type"] == "websocket":
            settings = self._settings
            if not (allows_host(scope, settings) and allows_origin(scope, settings)):
                await receive()
                await WebSocketClose(1008)(scope, receive, send)
                return
        elif scope["type"] == "http":
            refusal = self._refusal(scope)
            if refusal is not None:
                status, text = refusal
                headers = {"connection": "close"}
                if status == 401:
                    headers["www-authenticate"] = "Bearer"
                await PlainTextResponse(text, status, headers)(scope, receive, send)
                return
            receive, send = _limited(receive, send, self._limit(scope))
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        settings = self._settings
        if not allows_host(scope, settings):
            return 421, "Unknown host name."
        if scope["method"] not in ("GET", "HEAD") and not allows_origin(scope, settings):
            return 403, "Pages of other origins are not allowed."
        if scope["path"] not in OPEN_PATHS and not knows_token(scope, settings):
            return 401, "A token is required: ?token=..., or Authorization: Bearer ..."
        try:
            length = int(Headers(scope=scope).get("content-length", "0"))
        except ValueError:
            return 400, "Content-Length is not a number."
        if length > self._limit(scope):
            return 413, f"At most {self._limit(scope):,} bytes are accepted."
        return None

    def _limit(self, scope: Scope) -> int:
        settings = self._settings
        with_image = scope["path"] in UPLOAD_PATHS
        return settings.max_socket_bytes if with_image else settings.max_message_bytes


class TooLarge(Exception):
    """The body of a request is larger than allowed."""


def cookie_name(scope: Scope) -> str:
    """Name of the cookie with the token; contains the port, because cookies ignore ports."""
    return f"flashdreams_token_{(scope.get('server') or ('', 0))[1]}"


def keep_token(request: Request, wanted: str | None) -> RedirectResponse | None:
    """Move the token of a URL into a cookie, so that it is not in the URL and the history.

    Args:
        request: request of the page; the guard has checked its token.
        wanted: the server's token.

    Returns:
        None: the URL has no token, or the server requires none.
    """
    token = request.query_params.get("token")
    if token is None or not wanted:
        return None
    rest = [item for item in request.query_params.multi_items() if item[0] != "token"]
    answer = RedirectResponse(f"/?{urllib.parse.urlencode(rest)}" if rest else "/", 303)
    answer.set_cookie(
        cookie_name(request.scope),
        urllib.parse.quote(token, safe=""),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return answer


def _split(address: str) -> urllib.parse.SplitResult:
    """The parts of an address; empty parts if it is invalid, such as ``//[``."""
    try:
        return urllib.parse.urlsplit(address)
    except ValueError:
        return urllib.parse.urlsplit("")


def _limited(receive: Receive, send: Send, limit: int) -> tuple[Receive, Send]:
    """Limit the body of a request, and add headers to its response."""
    size = 0

    async def receive_within_limit() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise TooLarge(f"At most {limit:,} bytes are accepted.")
        return message

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *_HEADERS]
            if size > limit:  # the rest of the body is not read
                message["status"] = 413
                message["headers"].append((b"connection", b"close"))
        await send(message)

    return receive_within_limit, send_with_headers
