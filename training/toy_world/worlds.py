"""The worlds that can be trained, with their renderers and configs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.integrations.toy_world.camera import CameraEncoderConfig
from flashdreams.integrations.toy_world.codec import PatchDecoderConfig, PatchEncoderConfig
from flashdreams.integrations.toy_world.config import COURTYARD_PIPELINE, TOY_WORLD_PIPELINE
from flashdreams.integrations.toy_world.render import render
from flashdreams.integrations.toy_world.shading import shade

PACKAGE = Path(__file__).parents[2] / "flashdreams/integrations/toy_world"


@dataclass(frozen=True)
class World:
    """One slug's world."""

    pipeline: StreamInferencePipelineConfig
    """The shipped config."""
    draw: Callable[[Tensor, Tensor, tuple[int, int]], Tensor]
    """The renderer: scenes ``[B, 10]``, poses ``[B, 3]`` and a size to ``[B, 3, h, w]``."""
    weights: Path
    """Folder of the shipped weights."""

    @property
    def transformer(self) -> Any:
        """Config of the network."""
        return self.pipeline.diffusion_model.transformer

    @property
    def camera(self) -> CameraEncoderConfig:
        """Config of the camera encoder, which has the size of a picture."""
        assert isinstance(self.pipeline.encoder, CameraEncoderConfig)
        return self.pipeline.encoder

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        return self.camera.height, self.camera.width

    def new_encoder_config(self) -> PatchEncoderConfig:
        """Config of the linear encoder, without its weights."""
        return PatchEncoderConfig(channels=self.transformer.in_channels)

    def new_decoder_config(self) -> PatchDecoderConfig:
        """Config of the decoder, without its weights."""
        shipped = self.pipeline.decoder
        assert isinstance(shipped, PatchDecoderConfig)
        return PatchDecoderConfig(channels=shipped.channels, width=shipped.width)


WORLDS = {
    "toy-world": World(TOY_WORLD_PIPELINE, render, PACKAGE / "weights"),
    "courtyard": World(COURTYARD_PIPELINE, shade, PACKAGE / "courtyard_weights"),
}
"""By slug."""
