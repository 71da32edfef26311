"""``/v1/sessions``: sessions that are driven step by step over HTTP."""

import asyncio
import json
import time
from collections import ChainMap
from collections.abc import Callable
from typing import Annotated, Any
from weakref import WeakValueDictionary

from fastapi import FastAPI, HTTPException, Path
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from flashdreams.runtime.text import quoted
from flashdreams.serving.interface import Chunk, Host, Refused
from flashdreams.serving.protocol import (
    Error,
    EventId,
    ImageReference,
    Name,
    SessionStart,
    StartConfig,
    Text,
)
from flashdreams.serving.web.accounts import (
    Accounts,
    Denied,
    answered,
    config_of,
)
from flashdreams.serving.web.chunk_files import STEP_HEADER, ChunkFormat, chunk_answer
from flashdreams.serving.web.events import Part
from flashdreams.serving.web.messages import check_values
from flashdreams.serving.web.stepper import Ended, Stepper

MAX_DETAILS = 8
"""Maximum number of fields of a body named in a refusal."""
_STATUS = {
    "bad_message": 422,
    "not_allowed": 422,
    "interaction_failed": 422,
    "unknown_session": 404,
    "queue_full": 503,
    "not_ready": 503,
    "draining": 503,
    "timeout": 504,
    "session_failed": 500,
}
SessionId = Annotated[str, Path(min_length=8, max_length=256, description="From the creation.")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class SessionCreate(_Body):
    """A new session. Absent fields and None mean the server's default."""

    model: str | None = None
    prompt: Text | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    num_frames: Annotated[int, Field(ge=1)] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    image_reference: ImageReference | None = None


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


class Control(_Body):
    """Values for the controller, from the next step on."""

    values: dict[str, Any]
    event_id: EventId | None = None


class Prompt(_Body):
    """New prompt from the next step on."""

    prompt: Text
    event_id: EventId | None = None


class Keep(_Body):
    """Name for the state before the next step."""

    name: Name
    event_id: EventId | None = None


class Reset(_Body):
    """Begin the rollout again with the next step."""

    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    event_id: EventId | None = None


class StepRequest(_Body):
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
    """All step-driven sessions; used only on the event loop's thread."""

    def __init__(self, accounts: Accounts) -> None:
        """Start without sessions."""
        self.accounts = accounts
        self.sessions: dict[str, tuple[Stepper, StartConfig]] = {}
        self._taking_up: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        accounts.step_driven = ChainMap[str, Any](self.sessions, self._taking_up)

    async def create(self, body: SessionCreate) -> str:
        """Open a session.

        Returns:
            Its identifier.
        """
        start = SessionStart(type="session.start", **body.model_dump(exclude_unset=True))
        stepper = Stepper(self.accounts.metrics)
        id, config = await self.accounts.open(start, stepper)
        self.sessions[id] = stepper, config
        return id

    async def find(self, id: str) -> tuple[Stepper, StartConfig]:
        """A session; one that is not driven by this process is resumed first.

        Raises:
            Denied: there is none.
        """
        host = self.accounts.host()
        if not self._is_driven(id):
            if id in self.accounts.sessions:
                raise Denied(_error("unknown_session", "This session is driven over a WebSocket."))
            async with self._taking_up.setdefault(id, asyncio.Lock()):
                if not self._is_driven(id):
                    await self._take_up(id, host)
        stepper, config = self.sessions[id]
        stepper.used_at = time.monotonic()
        return stepper, config

    def _is_driven(self, id: str) -> bool:
        return id in self.sessions and self.sessions[id][0].ended is None

    async def _take_up(self, id: str, host: Host) -> None:
        stepper = Stepper(self.accounts.metrics)
        try:
            await answered(host.attach, id, stepper)
        except Denied as denied:
            if id in self.sessions:
                return  # it has ended for good
            raise Denied(_error("unknown_session", denied.error.message)) from None
        ended = self.sessions.get(id)
        config = ended[1] if ended else config_of(SessionStart(type="session.start"), host.offer)
        self.sessions[id] = stepper, config

    async def info(self, id: str) -> SessionInfo:
        """Description of a session for clients."""
        stepper, config = await self.find(id)
        host = self.accounts.host()
        offer = host.offer
        saved = await asyncio.to_thread(host.saved, id)
        return SessionInfo(
            id=id,
            state="ended" if stepper.ended is not None else stepper.state,
            position=stepper.position,
            config=config,
            controls=None if offer.controls is None else dict(offer.controls),
            prompts_change=offer.prompts_change,
            commands=list(offer.commands),
            saved=saved,
        )

    async def hand_over(
        self, id: str, event_id: str | None, part: Part, call: Callable[[Host, str], None]
    ) -> Accepted:
        """Pass an event to the host, once.

        Args:
            id: identifier of the session.
            event_id: the client's identifier; a second event with it is not executed.
            part: what it changes.
            call: passes it on, with the host's identifier of the event.

        Raises:
            Denied: it was refused.
        """
        stepper, _ = await self.find(id)
        if stepper.ended is not None:
            raise Denied(_error("unknown_session", stepper.ended))
        ids = stepper.events.accept(event_id, {part: None})
        if ids is not None:
            try:
                await answered(call, self.accounts.host(), ids[part])
            except Denied:
                stepper.events.finish(ids[part], again=True)
                raise
        return Accepted()

    async def step(self, id: str, body: StepRequest) -> Response:
        """Run one AR step.

        Raises:
            Denied: a request was refused, or no chunk arrived in time.
        """
        stepper, config = await self.find(id)
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
                raise Denied(_error("timeout", text)) from None
            stepper.used_at = time.monotonic()
            figures = _figures(chunk, stepper)
        return await asyncio.to_thread(
            chunk_answer, chunk, figures, body.format, config.fps, settings.encoder
        )

    async def control(self, id: str, body: Control) -> Accepted:
        """Pass values to the controller."""
        check_values(body.values)
        call = self.hand_over
        return await call(
            id, body.event_id, "control", lambda host, event: host.control(id, body.values, event)
        )

    async def prompt(self, id: str, body: Prompt) -> Accepted:
        """Change the prompt."""
        return await self.hand_over(
            id, body.event_id, "prompt", lambda host, event: host.prompt(id, body.prompt, event)
        )

    async def command(
        self, id: str, kind: str, event_id: str | None, values: dict[str, Any]
    ) -> Accepted:
        """Save, fork, rewind or reset."""
        takes = self.accounts.host().offer.commands
        if kind not in takes:
            text = f"There is no {kind} here; commands are: {', '.join(takes) or 'none'}."
            raise Denied(_error("not_allowed", text))

        def call(host: Host, event: str) -> None:
            host.command(id, kind, event, values)

        return await self.hand_over(id, event_id, "command", call)

    async def close(self, id: str) -> None:
        """End a session."""
        await self.find(id)
        self.sessions.pop(id, None)
        self.accounts.host().close(id)

    async def reap(self) -> None:
        """Periodically close sessions without requests."""
        while True:
            await asyncio.sleep(self.accounts.settings.reap_s)
            host, idle_s = self.accounts.gate.host, self.accounts.settings.idle_s
            now = time.monotonic()
            for id, (stepper, _) in list(self.sessions.items()):
                if (
                    host is not None
                    and now - stepper.used_at > idle_s
                    and not stepper.lock.locked()
                ):
                    del self.sessions[id]
                    if stepper.ended is None:  # else its client may reconnect for its data
                        host.close(id)


async def _answer_invalid(request: Any, error: RequestValidationError) -> Response:
    """FastAPI's answer, but also for input that JSON or UTF-8 cannot encode: NaN, a surrogate."""
    detail = [
        {**{name: found[name] for name in ("type", "loc", "msg")}, "input": quoted(found["input"])}
        for found in error.errors()[:MAX_DETAILS]
    ]
    return Response(json.dumps({"detail": detail}), 422, media_type="application/json")


def add_sessions(app: FastAPI, accounts: Accounts) -> Steppers:
    """Add ``/v1/sessions`` and its subpaths."""
    steppers = Steppers(accounts)
    add = {"tags": ["step-driven sessions"], "responses": _refusals(404, 422, 503)}

    @app.exception_handler(Denied)
    async def denied(request: Any, error: Denied) -> JSONResponse:
        accounts.metrics.refused(error.error.code)
        content = error.error.model_dump(include={"code", "message", "event_id", "allowed"})
        return JSONResponse(content, _STATUS.get(error.error.code, 400))

    @app.exception_handler(Refused)
    async def refused(request: Any, error: Refused) -> JSONResponse:
        return await denied(request, Denied(_error("not_allowed", str(error))))

    app.add_exception_handler(RequestValidationError, _answer_invalid)  # type: ignore[arg-type]

    @app.post("/v1/sessions", status_code=201, **add)  # type: ignore[arg-type]
    async def create(body: SessionCreate) -> SessionInfo:
        """Open a session that generates chunks on request."""
        return await steppers.info(await steppers.create(body))

    @app.get("/v1/sessions/{id}", **add)  # type: ignore[arg-type]
    async def info(id: SessionId) -> SessionInfo:
        """Describe a session and its accepted inputs."""
        return await steppers.info(id)

    @app.delete("/v1/sessions/{id}", status_code=204, **add)  # type: ignore[arg-type]
    async def close(id: SessionId) -> None:
        """End a session."""
        await steppers.close(id)

    @app.post("/v1/sessions/{id}/step", response_class=Response, **_step_options())
    async def step(id: SessionId, body: StepRequest) -> Response:
        """Generate one chunk and return its pictures."""
        return await steppers.step(id, body)

    @app.post("/v1/sessions/{id}/control", status_code=202, **add)  # type: ignore[arg-type]
    async def control(id: SessionId, body: Control) -> Accepted:
        """Pass values to the controller; they take effect from the next step on."""
        return await steppers.control(id, body)

    @app.post("/v1/sessions/{id}/prompt", status_code=202, **add)  # type: ignore[arg-type]
    async def prompt(id: SessionId, body: Prompt) -> Accepted:
        """Change the prompt from the next step on."""
        return await steppers.prompt(id, body)

    @app.post("/v1/sessions/{id}/snapshot", status_code=202, **add)  # type: ignore[arg-type]
    async def snapshot(id: SessionId, body: Keep) -> Accepted:
        """Save the state before the next step to disk."""
        return await steppers.command(id, "save", body.event_id, {"name": body.name})

    @app.post("/v1/sessions/{id}/fork", status_code=202, **add)  # type: ignore[arg-type]
    async def fork(id: SessionId, body: Keep) -> Accepted:
        """Fork the state before the next step, on the device."""
        return await steppers.command(id, "fork", body.event_id, {"name": body.name})

    @app.post("/v1/sessions/{id}/rewind", status_code=202, **add)  # type: ignore[arg-type]
    async def rewind(id: SessionId, body: Keep) -> Accepted:
        """Return to a saved state with the next step."""
        return await steppers.command(id, "rewind", body.event_id, {"name": body.name})

    @app.post("/v1/sessions/{id}/reset", status_code=202, **add)  # type: ignore[arg-type]
    async def reset(id: SessionId, body: Reset) -> Accepted:
        """Begin the rollout again with the next step."""
        values = {} if body.seed is None else {"seed": body.seed}
        return await steppers.command(id, "reset", body.event_id, values)

    return steppers


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


def _error(code: Any, message: str) -> Error:
    return Error(message=message, code=code)


def _refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    texts = {404: "No such session.", 422: "Refused; says what is allowed.", 503: "Not now."}
    texts |= {409: "A step is being made.", 410: "The session is over.", 504: "No chunk came."}
    return {code: {"description": texts[code]} for code in codes}


def _step_options() -> dict[str, Any]:
    text = f"The pictures; the header {STEP_HEADER} holds the step's figures as JSON."
    kinds = ("video/mp4", "application/x-npy", "application/json")
    content: dict[str, Any] = {kind: {} for kind in kinds}
    good = {200: {"description": text, "content": content}}
    return {
        "tags": ["step-driven sessions"],
        "responses": {**good, **_refusals(404, 409, 410, 422, 503, 504)},
    }
