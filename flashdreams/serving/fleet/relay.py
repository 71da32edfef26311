"""A proxy in front of a fleet: routes HTTP and WebSocket to the server with the session."""

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.websockets import WebSocketDisconnect

from flashdreams.serving.fleet.members import Fleet, Member
from flashdreams.serving.protocol import Error, SessionResume
from flashdreams.serving.web.app import add_errors
from flashdreams.serving.web.guard import GuardedApp, keep_token, knows_token
from flashdreams.serving.web.settings import WebSettings

logger = logging.getLogger(__name__)

REFRESH_S = 1.0
MAX_SERVERS = 64
"""Maximum number of servers that a socket tries or waits at, before it is refused."""
WAITING_PICTURES = 2
"""Messages buffered here per client; the rest waits in the server, which can drop frames."""
_SESSION_PATH = re.compile(r"v1/sessions/([^/]+)")
_KEPT_HEADERS = ("content-type", "x-flashdreams-step", "etag", "last-modified")
_LOST = Error(message="The server was lost; resume the session.", code="draining")
_NONE = Error(message="No server is ready yet.", code="not_ready")


def create_relay(fleet: Fleet, settings: WebSettings) -> FastAPI:
    """The proxy application in front of the servers.

    Args:
        fleet: the servers.
        settings: the token that clients need, and the allowed origins and host names.
    """
    import httpx

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with httpx.AsyncClient(timeout=httpx.Timeout(10.0, read=settings.step_s)) as client:
            app.state.client = client
            await fleet.refresh(client)
            watch = asyncio.create_task(_watch(fleet, client))
            yield
            watch.cancel()

    app = FastAPI(title="flashdreams", docs_url=None, redoc_url=None, openapi_url=None,
                  lifespan=lifespan)  # fmt: skip
    app.add_middleware(GuardedApp, settings=settings)
    _add_probes(app, fleet)
    add_errors(app)

    @app.websocket("/v1/realtime/video")
    async def realtime_video(socket: WebSocket) -> None:
        await _relay_socket(socket, fleet, settings)

    @app.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "DELETE"])
    async def http(path: str, request: Request) -> Response:
        welcome = keep_token(request, settings.token) if path == "" else None
        return welcome or await _relay_request(path, request, fleet)

    return app


async def _watch(fleet: Fleet, client: Any) -> None:
    while True:
        await asyncio.sleep(REFRESH_S)
        try:
            await fleet.refresh(client)
        except Exception:  # keep the earlier results
            logger.exception("the servers cannot be asked how they are")


def _add_probes(app: FastAPI, fleet: Fleet) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        ready = bool(fleet.health)
        phase = "ready" if ready else "loading"
        return JSONResponse({"ready": ready, "phase": phase}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        values = {"servers": len(fleet.health)}
        values |= {n: fleet.total(n) for n in ("sessions", "queued", "parked", "places")}
        lines = [
            f"# TYPE flashdreams_fleet_{name} gauge\nflashdreams_fleet_{name} {value}\n"
            for name, value in values.items()
        ]
        return Response("".join(lines), media_type="text/plain; version=0.0.4")


async def _relay_request(path: str, request: Request, fleet: Fleet) -> Response:
    """Forward a request; if a server is unreachable, try the next one."""
    import httpx

    body = await request.body()
    session = _SESSION_PATH.match(path)
    query = [item for item in request.query_params.multi_items() if item[0] != "token"]
    headers = {"content-type": request.headers.get("content-type", "application/json")}
    for _ in range(len(fleet.members)):
        member = await fleet.of_session(session[1]) if session else fleet.least_loaded()
        if member is None:
            break
        headers["authorization"] = f"Bearer {member.token}"
        try:
            answer = await request.app.state.client.request(
                request.method, f"{member.url}/{path}", content=body, params=query, headers=headers
            )
        except httpx.ConnectError:
            fleet.lost(member)
            continue
        except httpx.HTTPError:  # it may have been executed, so the client decides
            fleet.lost(member)
            return JSONResponse(_LOST.model_dump(include={"code", "message"}), 503)
        kept = {n: answer.headers[n] for n in _KEPT_HEADERS if n in answer.headers}
        return Response(answer.content, answer.status_code, kept)
    return JSONResponse(_NONE.model_dump(include={"code", "message"}), 503)


async def _relay_socket(socket: WebSocket, fleet: Fleet, settings: WebSettings) -> None:
    await socket.accept()
    if not knows_token(socket.scope, settings):
        await _end(socket, Error(message="A token is required.", code="unauthorized"), 1008)
        return
    try:
        first = await asyncio.wait_for(socket.receive_text(), settings.start_s)
    except (asyncio.TimeoutError, KeyError):
        await _end(socket, Error(message="session.start must come first.", code="timeout"), 1008)
        return
    except WebSocketDisconnect:
        return
    token = _token_of(first)
    for _ in range(MAX_SERVERS):
        member = await fleet.of_session(token) if token else fleet.least_loaded()
        if member is None:
            break
        if await _converse(socket, fleet, member, first):
            return
    await _end(socket, _NONE, 1013)


async def _converse(socket: WebSocket, fleet: Fleet, member: Member, first: str) -> bool:
    """Forward messages in both directions until one side disconnects.

    Returns:
        False: try another server, because this one cannot be reached, or has the client wait while
        others have places.
    """
    from websockets.asyncio.client import connect
    from websockets.exceptions import ConnectionClosed, WebSocketException

    try:
        upstream = await connect(
            f"ws{member.url.removeprefix('http')}/v1/realtime/video",
            additional_headers={"Authorization": f"Bearer {member.token}"},
            max_size=None,
            max_queue=WAITING_PICTURES,
            compression=None,
            proxy=None,
        )
    except (OSError, WebSocketException, asyncio.TimeoutError):
        fleet.lost(member)
        return False
    async with upstream:
        with contextlib.suppress(ConnectionClosed):  # `_downwards` says why
            await upstream.send(first)
        waits = asyncio.Event()
        moves = asyncio.create_task(_await_place(fleet, member, waits))
        tasks = [
            asyncio.create_task(_upwards(socket, upstream)),
            asyncio.create_task(_downwards(socket, upstream, waits)),
        ]
        await asyncio.wait([*tasks, moves], return_when=asyncio.FIRST_COMPLETED)
        moved = moves.done() and waits.is_set() and not any(task.done() for task in tasks)
        for task in (*tasks, moves):
            task.cancel()
        await asyncio.gather(*tasks, moves, return_exceptions=True)
        if moved:
            with contextlib.suppress(ConnectionClosed):
                await upstream.send('{"type": "session.stop"}')
    return not moved


async def _await_place(fleet: Fleet, member: Member, waits: asyncio.Event) -> None:
    """Wait until a client that waits at this server would have a place at another one."""
    while not (waits.is_set() and fleet.has_place(member.name)):
        await asyncio.sleep(REFRESH_S / 2)


async def _upwards(socket: WebSocket, upstream: Any) -> None:
    """Forward the client's messages; when it disconnects, close the server's socket too."""
    from websockets.exceptions import ConnectionClosed

    with contextlib.suppress(WebSocketDisconnect, ConnectionClosed):
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            data = message.get("text")
            await upstream.send(message["bytes"] if data is None else data)


async def _downwards(socket: WebSocket, upstream: Any, waits: asyncio.Event) -> None:
    """Forward the server's messages and close reason; ``waits`` is set while it has no place."""
    from websockets.exceptions import ConnectionClosed

    begun = False
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        try:
            while True:
                data = await upstream.recv()
                if not begun and isinstance(data, str):
                    type = json.loads(data)["type"]
                    begun = type == "video.start"
                    if type == "video.queued":
                        waits.set()
                    elif begun:
                        waits.clear()
                await (socket.send_text(data) if isinstance(data, str) else socket.send_bytes(data))
        except ConnectionClosed as closed:
            if closed.rcvd is None:
                await _end(socket, _LOST, 1012)
            else:
                await socket.close(closed.rcvd.code, closed.rcvd.reason)


async def _end(socket: WebSocket, error: Error, code: int) -> None:
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        await socket.send_text(error.model_dump_json())
        await socket.close(code)


def _token_of(first: str) -> str | None:
    """The token of a first message that resumes a session."""
    try:
        return SessionResume.model_validate_json(first).token
    except ValidationError:
        return None
