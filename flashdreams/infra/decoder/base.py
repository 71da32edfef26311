"""Decoders: latents to frames."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flashdreams.infra.component import Component, ComponentConfig
from flashdreams.runtime.cuda_graph import GraphedCallable


@dataclass(kw_only=True)
class DecoderConfig(ComponentConfig):
    """Config of a stateless decoder."""

    _target: type["Decoder"] = field(default_factory=lambda: Decoder)


class Decoder(Component):
    """A stateless decoder: every chunk is decoded independently."""

    config: DecoderConfig

    def forward(self, latent: Tensor) -> Tensor:
        """Decode ``[B, C, T, H, W]`` latents to ``[B, F, 3, height, width]`` in [-1, 1].

        The default returns the latents, time before channels: ``[B, T, C, H, W]``.
        """
        return latent.transpose(1, 2)

    def frame_count(self, latent_frames: int) -> int:
        """Pixel frames that the first ``latent_frames`` of a rollout decode to; as many here."""
        return latent_frames


@dataclass(kw_only=True)
class StreamingDecoderConfig(DecoderConfig):
    """Config of a decoder that carries state from one AR step to the next."""

    _target: type["StreamingDecoder"] = field(default_factory=lambda: StreamingDecoder)


class StreamingDecoder(Decoder):
    """A decoder whose state (trailing frames of causal convolutions) lives in the rollout's cache.

    ``initialize_cache`` may declare parameters; the pipeline passes the context of those names.
    """

    config: StreamingDecoderConfig

    def initialize_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Fresh state for one rollout; subclasses declare the context that they need."""
        return None

    def forward(self, latent: Tensor, autoregressive_index: int = 0, cache: Any = None) -> Tensor:
        """Decode one chunk.

        Args:
            latent: ``[B, C, T, H, W]``, clean latents of the chunk.
            autoregressive_index: number of the AR step, from 0.
            cache: this rollout's state, updated in place.

        Returns:
            ``[B, F, 3, height, width]`` in [-1, 1].
        """
        return super().forward(latent)

    def capture(self, latent: Tensor) -> None:
        """Capture a CUDA graph for chunks of this shape; by default nothing is captured.

        Called once, at warm-up, if graphs are enabled.

        Args:
            latent: ``[B, C, T, H, W]``, as ``forward`` will get it.
        """

    def graphed_calls(self) -> Sequence[GraphedCallable]:
        """The calls that are replayed as CUDA graphs."""
        return ()

    def drop_graphs(self) -> None:
        """Free the graphs; rollouts continue eagerly."""
