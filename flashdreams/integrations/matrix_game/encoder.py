"""Encoders: the first image to its context, actions and grey frames to the control of a chunk.

Shape letters: B batch, T latent frames of a chunk, F pixel frames, K keyboard columns, H W latent
rows and columns.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdreams.infra.component import build_component
from flashdreams.infra.encoder.base import (
    Encoder,
    EncoderConfig,
    StreamingEncoder,
    StreamingEncoderConfig,
)
from flashdreams.infra.ranges import check_range
from flashdreams.models.carried_frames import CarriedFrames
from flashdreams.models.clip import CLIPImageEncoder, CLIPImageEncoderConfig
from flashdreams.models.wan.image import MASK_CHANNELS, mark_first_frame
from flashdreams.models.wan.vae import WanVAEImageEncoder, WanVAEImageEncoderConfig, as_video
from flashdreams.parallel.plan import state

TIME_FACTOR = 4
"""Pixel frames of a latent frame."""


@dataclass(frozen=True)
class Actions:
    """Held keys and view rotation in each of F pixel frames."""

    keyboard: Tensor = state("whole")
    """``[F, K]`` or ``[B, F, K]``, 1 where a key is held."""
    mouse: Tensor | None = state("whole", default=None)
    """``[F, 2]`` or ``[B, F, 2]``: pitch and yaw, up and right positive; None without a mouse."""

    def part(self, frames: slice) -> "Actions":
        """The actions of some of the frames."""
        mouse = None if self.mouse is None else self.mouse[..., frames, :]
        return Actions(self.keyboard[..., frames, :], mouse)


@dataclass(kw_only=True)
class MatrixGameImageEncoderConfig(EncoderConfig):
    """Config of the encoder of the first image, for the whole rollout."""

    _target: type["MatrixGameImageEncoder"] = field(default_factory=lambda: MatrixGameImageEncoder)

    clip: CLIPImageEncoderConfig = field(default_factory=CLIPImageEncoderConfig)
    """Encodes the image to tokens for cross-attention."""


class MatrixGameImageEncoder(Encoder):
    """Encodes an image to the context ``image_tokens``; ``first_frame`` is the image itself."""

    config: MatrixGameImageEncoderConfig

    def __init__(self, config: MatrixGameImageEncoderConfig) -> None:
        super().__init__(config)
        self.clip: CLIPImageEncoder = build_component(config.clip)

    def example_input(self) -> Tensor:
        """A small grey image."""
        return torch.zeros(1, 3, 32, 32, dtype=torch.float32, device="cpu")

    @torch.no_grad()
    def forward(self, input: Tensor) -> dict[str, Tensor]:
        """Encode ``[B, 3, height, width]``, RGB in [-1, 1]."""
        return {"image_tokens": self.clip(input), "first_frame": input}


@dataclass(kw_only=True)
class ActionEncoderConfig(StreamingEncoderConfig):
    """Config of the action encoder."""

    _target: type["ActionEncoder"] = field(default_factory=lambda: ActionEncoder)

    vae: WanVAEImageEncoderConfig = field(default_factory=WanVAEImageEncoderConfig)
    """Encodes the first image and the grey frames that come after it."""
    keyboard_dim: int = 4
    """Keyboard columns, as in the transformer."""
    mouse_dim: int | None = 2
    """Mouse columns, as in the transformer; None without a mouse."""
    len_t: int = 3
    """Latent frames of one chunk, as in the transformer."""
    actions_per_latent: int = 12
    """Actions that one latent frame sees, as in the transformer."""
    settled_after: int = 30
    """Latent frames after which the grey frames' latents no longer change and the last one is
    repeated: the image is then outside the autoencoder's receptive field, so this is exact."""

    def __post_init__(self) -> None:
        check_range(self, "keyboard_dim", "mouse_dim", "len_t", "actions_per_latent")
        check_range(self, "settled_after")


@dataclass
class WholeFrames(CarriedFrames):
    """Frames that the image encoder carries: every rank encodes the full width."""

    slots: dict[str, Tensor] = state("whole", default_factory=dict)


@dataclass
class ActionCache:
    """The action encoder's state in one rollout."""

    image: Tensor | None = state("rebuilt")
    """``[B, 3, height, width]``; None if the rollout was given its whole condition."""
    video: WholeFrames = field(default_factory=WholeFrames)
    latent: Tensor | None = state("whole", default=None)
    """``[B, C, 1, H, W]``, the last latent frame of the condition."""
    keyboard: Tensor | None = state("whole", default=None)
    """``[B or 1, actions_per_latent, K]``, the last actions; None before the first."""
    mouse: Tensor | None = state("whole", default=None)
    """Like ``keyboard``."""


class ActionEncoder(StreamingEncoder):
    """Encodes the actions of a chunk and before it for each latent frame.

    Latent frame f sees the actions of the pixel frames ``4 f - 12`` to ``4 f - 1``, oldest first;
    before frame 0 the first action is repeated. A latent frame's own last pixel frame, ``4 f``, is
    not among them.

    It also returns the chunk's condition: the mask, and latents of the image and of grey frames,
    which are encoded as the rollout proceeds.

    Source: SkyworkAI/Matrix-Game, Matrix-Game-2/wan/modules/action_module.py, and inference.py.
    """

    config: ActionEncoderConfig

    def __init__(self, config: ActionEncoderConfig) -> None:
        super().__init__(config)
        self.vae: WanVAEImageEncoder = build_component(config.vae)

    def initialize_cache(
        self, first_frame: Tensor | None = None, condition: Tensor | None = None
    ) -> ActionCache:
        """Start a rollout.

        Args:
            first_frame: ``[B, 3, height, width]``, RGB in [-1, 1].
            condition: the encoded condition of the whole rollout: then nothing is encoded here.

        Raises:
            ValueError: neither.
        """
        if first_frame is None and condition is None:
            raise ValueError("This method starts from an image: give image=[B, 3, height, width].")
        return ActionCache(image=first_frame if condition is None else None)

    @torch.no_grad()
    def forward(
        self, input: Actions | None, autoregressive_index: int = 0, cache: ActionCache | None = None
    ) -> dict[str, Tensor]:
        """Encode the actions of one AR step.

        Args:
            input: over the pixel frames of the chunk.
            autoregressive_index: number of the AR step, from 0.
            cache: this rollout's state.

        Returns:
            ``keyboard`` ``[B or 1, T, actions_per_latent, K]`` and ``mouse`` likewise, float32 on
            the CPU; ``condition`` ``[B, 4 + C, T, H, W]``, unless the rollout was given it.

        Raises:
            ValueError: actions of another number, width or type, or not finite.
        """
        if cache is None:
            raise ValueError("The action encoder needs its rollout's cache: initialize_cache().")
        keyboard, mouse = self._checked(input, autoregressive_index)
        control = {}
        control["keyboard"], cache.keyboard = self._windows(cache.keyboard, keyboard)
        if mouse is not None:
            control["mouse"], cache.mouse = self._windows(cache.mouse, mouse)
        if cache.image is not None:
            control["condition"] = self._next_condition(cache, cache.image, autoregressive_index)
        return control

    def example_step(self, frames: int) -> Actions:
        """No key is held, and the mouse rests."""
        c = self.config
        on_host: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        mouse = None if c.mouse_dim is None else torch.zeros(frames, c.mouse_dim, **on_host)
        return Actions(torch.zeros(frames, c.keyboard_dim, **on_host), mouse)

    def _windows(self, past: Tensor | None, actions: Tensor) -> tuple[Tensor, Tensor]:
        """What each latent frame of the chunk sees, ``[B, T, window, K]``, and carried actions."""
        c, first = self.config, past is None
        past = actions[:, :1].expand(-1, c.actions_per_latent, -1) if past is None else past
        seen = torch.cat([past, actions], dim=1)
        # The first chunk begins with pixel frame 0, the others three frames before a latent frame.
        start = 0 if first else TIME_FACTOR - 1
        windows = [
            seen[:, begin : begin + c.actions_per_latent]
            for begin in range(start, start + TIME_FACTOR * c.len_t, TIME_FACTOR)
        ]
        return torch.stack(windows, dim=1), seen[:, -c.actions_per_latent :].clone()

    def _next_condition(self, cache: ActionCache, image: Tensor, index: int) -> Tensor:
        """Mask and latents of the chunk."""
        c = self.config
        if index * c.len_t >= c.settled_after and cache.latent is not None:
            cache.video.slots.clear()
            latents = cache.latent.expand(-1, -1, c.len_t, -1, -1)
        else:
            frame = as_video(image)
            grey = torch.zeros_like(frame).expand(-1, -1, TIME_FACTOR * c.len_t, -1, -1)
            if index == 0:
                grey = torch.cat([frame, grey[:, :, TIME_FACTOR:]], dim=2)
            latents = self.vae.encode_chunk(grey, cache.video)
            cache.latent = latents[:, :, -1:].clone()
        if index == 0:
            return mark_first_frame(latents)
        return F.pad(latents, (0, 0, 0, 0, 0, 0, MASK_CHANNELS, 0))

    def _checked(self, actions: Actions | None, index: int) -> tuple[Tensor, Tensor | None]:
        """Validated actions ``[B, F, columns]`` as float32 on the CPU."""
        c = self.config
        frames = TIME_FACTOR * c.len_t - (TIME_FACTOR - 1 if index == 0 else 0)
        if not isinstance(actions, Actions):
            raise ValueError(
                f"AR step {index} takes Actions(keyboard, mouse) over {frames} pixel frames; got "
                f"{type(actions).__name__}."
            )
        if (actions.mouse is None) != (c.mouse_dim is None):
            wanted = "takes no" if c.mouse_dim is None else "needs"
            raise ValueError(f"This variant {wanted} mouse (mouse_dim={c.mouse_dim}).")
        keyboard = check_columns("keyboard", actions.keyboard, c.keyboard_dim, frames)
        if actions.mouse is None or c.mouse_dim is None:
            return keyboard, None
        return keyboard, check_columns("mouse", actions.mouse, c.mouse_dim, frames)


def check_columns(name: str, x: Tensor, columns: int, frames: int | None) -> Tensor:
    """Actions as ``[B or 1, F, columns]`` float32 on the CPU.

    Args:
        name: for messages.
        x: ``[F, columns]`` or ``[B, F, columns]``.
        columns: that the variant has.
        frames: F; None: any number.

    Raises:
        ValueError: not a tensor of numbers, another shape, or values that are not finite.
    """
    many = "frames" if frames is None else frames
    if not isinstance(x, Tensor) or x.is_complex():
        raise ValueError(f"{name}: must be a tensor of numbers; got {type(x).__name__}.")
    fits = x.ndim in (2, 3) and x.shape[-1] == columns and x.shape[-2] == (frames or x.shape[-2])
    if not fits or x.shape[-2] == 0:
        raise ValueError(
            f"{name}: must be [{many}, {columns}], one row per pixel frame; got {list(x.shape)}."
        )
    x = x.cpu().float()
    if not x.isfinite().all():
        row = int((~x.isfinite()).nonzero()[0][-2])
        raise ValueError(f"{name}: row {row} has a value that is not finite.")
    return x if x.ndim == 3 else x[None]
