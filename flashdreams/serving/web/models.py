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
        model = Model(
            id=offer.model,
            width=offer.width,
            height=offer.height,
            fps=offer.fps,
            seed=offer.seed,
            prompt=offer.prompt,
            num_inference_steps=offer.num_inference_steps,
            guidance_scale=offer.guidance_scale,
            formats=["m4s", "jpeg"] if even else ["jpeg"],
            controls=None if offer.controls is None else dict(offer.controls),
            prompts_change=offer.prompts_change,
            takes_image=offer.takes_image,
            commands=list(offer.commands),
            chunk_frames=offer.chunk_frames,
        )
        return Models(data=[model])
