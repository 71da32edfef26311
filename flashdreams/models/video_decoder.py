"""What the streaming decoders of video autoencoders have in common."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from flashdreams.infra.decoder.base import StreamingDecoder
from flashdreams.models.carried_frames import CarriedFrames
from flashdreams.models.decode_graph import DecodeGraph
from flashdreams.models.decoder_forms import DecoderForms, forms_for, select_forms
from flashdreams.runtime.cuda_graph import GraphedCallable


class VideoDecoder(StreamingDecoder, ABC):
    """Latents to frames, chunk by chunk, by causal layers that carry their trailing frames.

    A subclass writes ``decode``; its config has ``time_factor``.
    """

    config: Any
    graph: DecodeGraph | None = None
    """Decodes chunks from the second one on, where a subclass has captured it."""

    def after_load(self) -> None:
        """Choose the forms of the layers for the device."""
        super().after_load()
        self.take_forms(forms_for(self.device, self.dtype))

    def take_forms(self, forms: DecoderForms) -> None:
        """Set the requested form of every layer; the weights are in place."""
        self.graph = None
        select_forms(self, forms)

    def graphed_calls(self) -> list[GraphedCallable]:
        """The call that decodes a chunk, once it was captured."""
        return [] if self.graph is None else [self.graph.call]

    def drop_graphs(self) -> None:
        """Free the graph; rollouts continue eagerly."""
        if self.graph is not None:
            self.graph.drop()

    def initialize_cache(self) -> CarriedFrames:
        """State of a new rollout."""
        return CarriedFrames()

    def frame_count(self, latent_frames: int) -> int:
        """One for the first latent frame, ``time_factor`` for every later one."""
        return 1 + self.config.time_factor * (latent_frames - 1)

    @torch.no_grad()
    def forward(
        self, latent: Tensor, autoregressive_index: int = 0, cache: CarriedFrames | None = None
    ) -> Tensor:
        """Decode one chunk.

        Args:
            latent: ``[B, C, T, H, W]``, normalised (for all weights), any floating dtype.
            autoregressive_index: number of the chunk, from 0; must follow what ``cache`` has seen.
            cache: this rollout's state, updated in place; ``None`` decodes a whole clip at once.

        Returns:
            ``[B, F, 3, height, width]``, float32 in [-1, 1], ``spatial_factor`` pixels per latent
            row and column. The first chunk has ``F = 1 + time_factor (T - 1)`` frames, later ones
            ``time_factor T``.

        Raises:
            ValueError: wrong shape, or a chunk out of order.
        """
        carried = self.initialize_cache() if cache is None else cache
        carried.begin_chunk(autoregressive_index)
        call = self.decode if self.graph is None else self.graph
        video = call(latent, carried)
        carried.chunks += 1
        return video

    @abstractmethod
    def decode(self, latent: Tensor, carried: CarriedFrames) -> Tensor:
        """The computation of ``forward``, for a chunk that follows ``carried``.

        Args:
            latent: ``[B, C, T, H, W]``, normalised, any floating dtype.
            carried: trailing frames of every layer, updated in place.

        Returns:
            ``[B, F, 3, height, width]``, float32 in [-1, 1].
        """
