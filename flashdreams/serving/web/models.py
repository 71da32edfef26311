"""``/v1/models``: what is served."""

from typing import Any, Literal

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from flashdreams.serving.web.gate import Gate


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


def add_models(app: FastAPI, gate: Gate) -> None:
    """Add ``GET /v1/models``."""

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
