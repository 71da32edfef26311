"""``/v1/sessions``: sessions that are driven step by step over HTTP."""

import asyncio
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Path
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from flashdreams.runtime.text import quoted
from flashdreams.serving.interface import Chunk, Refused
from flashdreams.serving.protocol import (
    Control,
    EventId,
    Keep,
    Message,
    Reset,
    SessionOptions,
    StartConfig,
    Text,
)
from flashdreams.serving.web.accounts import Accounts, Denied, Session, answered
from flashdreams.serving.web.chunk_files import STEP_HEADER, ChunkFormat, chunk_answer
from flashdreams.serving.web.events import Part
from flashdreams.serving.web.messages import check_values
from flashdreams.serving.web.stepper import Ended, Stepper

MAX_DETAILS = 8
"""Maximum number of fields of a body named in a refusal."""
_STATUS = {
    "unknown_session": 404,
    "queue_full": 503,
    "not_ready": 503,
    "draining": 503,
    "timeout": 504,
    "session_failed": 500,
}
_REFUSALS = {
    404: "No such session.",
    409: "A step is being made.",
    410: "The session is over.",
    422: "Refused; says what is allowed.",
    503: "Not now.",
    504: "No chunk came.",
}
SessionId = Annotated[str, Path(min_length=8, max_length=256, description="From the creation.")]


class SessionCreate(SessionOptions):
    """A new session. Absent fields and None mean the server's default."""


class SessionInfo(BaseModel):
    """A session and its accepted inputs."""

    id: str
    """Identifier; it grants full control of the session."""
    state: str
    position: int
    """Position in the queue; 0: it has a place."""
    config: StartConfig
    controls: dict[str, Any] | None
    prompts_change: bool
    commands: list[str]
    saved: list[str]


class Prompt(Message):
    """New prompt from the next step on."""

    prompt: Text
    event_id: EventId | None = None


class StepRequest(Message):
    """One AR step."""

    control: dict[str, Any] | None = None
    """Values for the controller, from this step on."""
    prompt: Text | None = None
    """New prompt from this step on."""
    format: ChunkFormat = "mp4"


class Accepted(BaseModel):
    """The request will be executed before the next step, whose figures report it."""

    accepted: bool = True


class Steppers:
    """The routes of step-driven sessions; used only on the event loop's thread."""

    def __init__(self, accounts: Accounts) -> None:
        """Store the sessions of the server."""
        self.accounts = accounts

    async def create(self, body: SessionCreate) -> SessionInfo:
        """Open a session that generates chunks on request."""
        return self._describe(await self.accounts.open(body, self._new_stepper()))

    async def info(self, id: SessionId) -> SessionInfo:
        """Describe a session and its accepted inputs."""
        return self._describe(await self.find(id))

    async def close(self, id: SessionId) -> None:
        """End a session."""
        self.accounts.forget(await self.find(id))
        self.accounts.host().close(id)

    async def step(self, id: SessionId, body: StepRequest) -> Response:
        """Generate one chunk and return its pictures."""
        session = await self.find(id)
        stepper = session.listener
        if stepper.lock.locked():
            raise HTTPException(409, "A step of this session is being made already.")
        async with stepper.lock:
            if body.control is not None:
                await self.control(id, Control(values=body.control))
            if body.prompt is not None:
                await self.prompt(id, Prompt(prompt=body.prompt))
            settings, host = self.accounts.settings, self.accounts.host()
            try:
                chunk = await stepper.next_chunk(lambda: host.pause(id, False), settings.step_s)
            except (Ended, Refused) as ended:
                raise HTTPException(410, str(ended)) from None
            except TimeoutError:
                text = f"No chunk came within {settings.step_s:g} s; ask again."
                raise Denied(text, "timeout") from None
            stepper.used_at = time.monotonic()
            figures = _figures(chunk, stepper)
        return await asyncio.to_thread(
            chunk_answer, chunk, figures, body.format, session.config.fps, settings.encoder
        )

    async def control(self, id: SessionId, body: Control) -> Accepted:
        """Pass values to the controller; they take effect from the next step on."""
        check_values(body.values)
        call = partial(self.accounts.host().control, id, body.values)
        return await self._hand_over(id, body.event_id, "control", call)

    async def prompt(self, id: SessionId, body: Prompt) -> Accepted:
        """Change the prompt from the next step on."""
        call = partial(self.accounts.host().prompt, id, body.prompt)
        return await self._hand_over(id, body.event_id, "prompt", call)

    async def snapshot(self, id: SessionId, body: Keep) -> Accepted:
        """Save the state before the next step to disk."""
        return await self._command(id, "save", body.event_id, name=body.name)

    async def fork(self, id: SessionId, body: Keep) -> Accepted:
        """Fork the state before the next step, on the device."""
        return await self._command(id, "fork", body.event_id, name=body.name)

    async def rewind(self, id: SessionId, body: Keep) -> Accepted:
        """Return to a saved state with the next step."""
        return await self._command(id, "rewind", body.event_id, name=body.name)

    async def reset(self, id: SessionId, body: Reset) -> Accepted:
        """Begin the rollout again with the next step."""
        values = {} if body.seed is None else {"seed": body.seed}
        return await self._command(id, "reset", body.event_id, **values)

    async def find(self, id: str) -> Session[Stepper]:
        """A session; one that is not driven by this process is resumed first.

        Raises:
            Denied: there is none.
        """
        host, session = self.accounts.host(), self.accounts.sessions.get(id)
        if session is None or not _is_driven(session):
            async with self.accounts.taking_up(id, Stepper, self._new_stepper) as session:
                if not _is_driven(session):
                    stepper = self._new_stepper()
                    try:
                        await answered(host.attach, id, stepper)
                        session.listener, session.attached = stepper, True
                    except Denied as denied:
                        if not session.attached:
                            self.accounts.forget(session)
                            raise Denied(denied.error.message, "unknown_session") from None
                        # else it has ended for good
        session.listener.used_at = time.monotonic()
        return session

    def _new_stepper(self) -> Stepper:
        return Stepper(self.accounts.settings, self.accounts.metrics)

    def _describe(self, session: Session[Stepper]) -> SessionInfo:
        host, stepper = self.accounts.host(), session.listener
        return SessionInfo(
            **vars(host.offer),
            id=session.id,
            state="ended" if stepper.end is not None else stepper.state,
            position=stepper.position,
            config=session.config,
            saved=host.saved(session.id),
        )

    async def _command(self, id: str, kind: str, event_id: str | None, **values: Any) -> Accepted:
        call = partial(self.accounts.host().command, id, kind, values=values)
        return await self._hand_over(id, event_id, "command", call)

    async def _hand_over(
        self, id: str, event_id: str | None, part: Part, call: Callable[..., None]
    ) -> Accepted:
        """Pass an event to the host, once.

        Args:
            id: identifier of the session.
            event_id: the client's identifier; a second event with it is not executed.
            part: what it changes.
            call: passes it on, with the host's identifier ``event_id`` of the event.

        Raises:
            Denied: it was refused.
        """
        stepper = (await self.find(id)).listener
        if stepper.end is not None:
            raise Denied(stepper.end, "unknown_session")
        ids = stepper.events.accept(event_id, {part: None})
        if ids is not None:
            try:
                await answered(partial(call, event_id=ids[part]))
            except Denied:
                stepper.events.finish(ids[part], again=True)
                raise
        return Accepted()


def _is_driven(session: Session[Any]) -> bool:
    driven = isinstance(session.listener, Stepper) and session.attached
    return driven and session.listener.end is None


async def _answer_invalid(request: Any, error: RequestValidationError) -> Response:
    """FastAPI's answer, but also for input that JSON or UTF-8 cannot encode: NaN, a surrogate."""
    detail = [
        {**{name: found[name] for name in ("type", "loc", "msg")}, "input": quoted(found["input"])}
        for found in error.errors()[:MAX_DETAILS]
    ]
    return Response(json.dumps({"detail": detail}), 422, media_type="application/json")


def add_sessions(app: FastAPI, accounts: Accounts) -> None:
    """Add ``/v1/sessions`` and its subpaths."""

    @app.exception_handler(Denied)
    async def denied(request: Any, error: Denied) -> JSONResponse:
        accounts.metrics.errors(error.error.code).inc()
        content = error.error.model_dump(include={"code", "message", "event_id", "allowed"})
        return JSONResponse(content, _STATUS.get(error.error.code, 422))

    @app.exception_handler(Refused)
    async def refused(request: Any, error: Refused) -> JSONResponse:
        return await denied(request, Denied(str(error), "not_allowed"))

    app.add_exception_handler(RequestValidationError, _answer_invalid)  # type: ignore[arg-type]

    def add(method: str, path: str, endpoint: Callable[..., Any], status: int) -> None:
        app.add_api_route(
            f"/v1/sessions{path}",
            endpoint,
            methods=[method],
            status_code=status,
            tags=["step-driven sessions"],
            responses=_responses(404, 422, 503),
        )

    steppers = Steppers(accounts)
    add("POST", "", steppers.create, 201)
    add("GET", "/{id}", steppers.info, 200)
    add("DELETE", "/{id}", steppers.close, 204)
    for endpoint in (steppers.control, steppers.prompt, steppers.snapshot, steppers.fork,
                     steppers.rewind, steppers.reset):  # fmt: skip
        add("POST", f"/{{id}}/{endpoint.__name__}", endpoint, 202)
    text = f"The pictures; the header {STEP_HEADER} holds the step's figures as JSON."
    kinds = ("video/mp4", "application/x-npy", "application/json")
    good: dict[int | str, Any] = {
        200: {"description": text, "content": {kind: {} for kind in kinds}}
    }
    app.add_api_route(
        "/v1/sessions/{id}/step",
        steppers.step,
        methods=["POST"],
        response_class=Response,
        tags=["step-driven sessions"],
        responses={**good, **_responses(*_REFUSALS)},
    )


def _responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"description": _REFUSALS[code]} for code in codes}


def _figures(chunk: Chunk, stepper: Stepper) -> dict[str, Any]:
    events = stepper.events.apply(chunk.applied)
    figures = {
        "autoregressive_index": chunk.index,
        "epoch": chunk.epoch,
        "first_frame": chunk.first_frame,
        "num_frames": len(chunk.frames),
        "applied_event_ids": list(events.applied),
        "kept": list(stepper.kept),
        "refused": list(stepper.refused),
        "stage_ms": dict(chunk.stage_ms),
    }
    stepper.kept.clear()
    stepper.refused.clear()
    return figures
