"""The ASGI application: page, WebSocket, HTTP."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel

import flashdreams
from flashdreams.serving.protocol import schema
from flashdreams.serving.web.accounts import INTERNAL, Accounts
from flashdreams.serving.web.conversation import Conversation
from flashdreams.serving.web.gate import Gate
from flashdreams.serving.web.guard import GuardedApp, TooLarge, keep_token
from flashdreams.serving.web.metrics import CONTENT_TYPE, Metrics
from flashdreams.serving.web.rtc import add_peers
from flashdreams.serving.web.sessions import add_sessions
from flashdreams.serving.web.settings import WebSettings
from flashdreams.serving.web.transport import SocketTransport

PAGE = Path(__file__).resolve().parents[1] / "page"

logger = logging.getLogger(__name__)


class Model(BaseModel):
    """The model of a server, and the only values that it serves."""

    id: str
    object: Literal["model"] = "model"
    width: int
    height: int
    fps: float
    seed: int
    """Default for sessions."""
    prompt: str | None
    """Default for sessions."""
    num_inference_steps: int
    guidance_scale: float | None
    """None: without guidance."""
    formats: list[str]
    controls: dict[str, Any] | None
    """JSON Schema of a session's controls; None: no controls."""
    prompts_change: bool
    takes_image: bool
    commands: list[str]
    chunk_frames: int
    """Number of pictures of one AR step."""


class Models(BaseModel):
    """All served models: exactly one."""

    object: Literal["list"] = "list"
    data: list[Model]


def create_app(gate: Gate, settings: WebSettings) -> FastAPI:
    """The application of one server.

    Args:
        gate: holds the host, now or later.
        settings: addresses and limits.
    """
    metrics = Metrics(gate)
    accounts = Accounts(gate, settings, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.loop = asyncio.get_running_loop()
        reaper = asyncio.create_task(accounts.reap())
        yield
        reaper.cancel()

    app = FastAPI(
        title="flashdreams",
        version=flashdreams.__version__,
        description="Live sessions of an autoregressive video model. The messages of "
        "`WS /v1/realtime/video` and of data channels are described by `/v1/schema`.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.accounts = accounts
    app.add_middleware(GuardedApp, settings=settings)
    _add_probes(app, gate, metrics)
    _add_models(app, gate)
    add_sessions(app, accounts)
    _add_socket(app, accounts)
    add_peers(app, accounts)
    _add_page(app, settings)
    add_errors(app)
    return app


def _add_probes(app: FastAPI, gate: Gate, metrics: Metrics) -> None:
    @app.get("/healthz", tags=["server"])
    async def healthz() -> dict[str, str]:
        """The web side answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["server"], responses={503: {"description": "Not ready."}})
    async def readyz() -> JSONResponse:
        """Whether sessions can be opened, and if not, what the server does."""
        ready = gate.host is not None
        content = {
            "ready": ready,
            "phase": gate.phase,
            "message": gate.words(),
            "seconds": round(time.monotonic() - gate.since, 1),
        }
        return JSONResponse(content, 200 if ready else 503)

    @app.get("/metrics", tags=["server"], response_class=Response)
    async def figures() -> Response:
        """Figures in Prometheus' text format."""
        return Response(await asyncio.to_thread(metrics.text), media_type=CONTENT_TYPE)

    @app.get("/v1/schema", tags=["server"])
    async def messages() -> dict[str, Any]:
        """JSON Schema of the messages of ``WS /v1/realtime/video``, of both directions."""
        return schema()


def _add_models(app: FastAPI, gate: Gate) -> None:
    @app.get("/v1/models", tags=["server"], responses={503: {"description": "Not ready."}})
    async def models() -> Models:
        """The model that this server serves."""
        host = gate.host
        if host is None:
            raise HTTPException(503, gate.words())
        offer = host.offer
        even = offer.width % 2 == offer.height % 2 == 0
        formats = ["m4s", "jpeg"] if even else ["jpeg"]
        model = Model(**vars(offer), id=offer.model, formats=formats)
        return Models(data=[model])


def _add_socket(app: FastAPI, accounts: Accounts) -> None:
    @app.websocket("/v1/realtime/video")
    async def realtime_video(socket: WebSocket) -> None:
        if accounts.full:
            await socket.close(1013)
            return
        await socket.accept()
        conversation = Conversation(SocketTransport(socket), accounts)
        with accounts.counted(conversation):
            await conversation.run()


def _add_page(app: FastAPI, settings: WebSettings) -> None:
    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return keep_token(request, settings.token) or FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE, check_dir=False))


def add_errors(app: FastAPI) -> None:
    """Answer what has failed without saying where."""

    @app.exception_handler(TooLarge)
    async def too_large(request: Request, error: TooLarge) -> JSONResponse:
        return JSONResponse({"code": "too_large", "message": str(error)}, 413)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        logger.error("a request has failed", exc_info=error)
        return JSONResponse({"code": "session_failed", "message": INTERNAL}, 500)
