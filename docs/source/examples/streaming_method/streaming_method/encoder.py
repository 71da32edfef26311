"""Camera poses to the place in the world that each token sees."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashdreams.infra.encoder.base import Encoder, EncoderConfig

HARMONICS = (0.25, 0.5)
"""Frequencies of the encoding of a place, in cycles per world unit."""
FEATURES = 4 * len(HARMONICS)
"""Values per token."""
EXTENT = 2.0
"""Width of a frame in world units."""


@dataclass(kw_only=True)
class PlaceEncoderConfig(EncoderConfig):
    """Config of the control encoder."""

    _target: type["PlaceEncoder"] = field(default_factory=lambda: PlaceEncoder)

    token_rows: int = 12
    """Token rows of a latent frame."""
    token_columns: int = 18
    """Token columns of a latent frame."""


class PlaceEncoder(Encoder):
    """A camera above a plane: where each token looks, as sines and cosines."""

    config: PlaceEncoderConfig

    def forward(self, input: Tensor) -> Tensor:
        """Map poses ``[T, 4, 4]`` to ``[1, L, FEATURES]`` float32.

        Raises:
            ValueError: another shape.
        """
        if not isinstance(input, Tensor) or input.shape[1:] != (4, 4) or len(input) == 0:
            got = list(input.shape) if isinstance(input, Tensor) else type(input).__name__
            raise ValueError(f"Camera poses must be [T, 4, 4]; got {got}.")
        rows, columns = self.config.token_rows, self.config.token_columns
        right = EXTENT * (torch.arange(columns, dtype=torch.float32) / columns - 0.5)
        ahead = EXTENT * (0.5 - torch.arange(rows, dtype=torch.float32) / rows) * rows / columns
        offsets = torch.stack(torch.meshgrid(ahead, right, indexing="ij"), dim=-1).double()
        turn = input[:, (2, 0)][:, :, (2, 0)]  # world axes (Z, X) of the camera's axes (z, x)
        places = torch.einsum("tij,hwj->thwi", turn, offsets) + input[:, None, None, (2, 0), 3]
        phases = torch.cat([2 * torch.pi * h * places for h in HARMONICS], dim=-1)
        return torch.cat([phases.sin(), phases.cos()], dim=-1).flatten(0, 2)[None].float()
