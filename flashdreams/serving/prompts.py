"""Prompts of a server: encoded on arrival, in the calling thread, and cached."""

import threading
from functools import lru_cache

import torch
from torch import Tensor

from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.runtime.streams import SideStream
from flashdreams.serving.interface import Refused

REMEMBERED = 64
"""Maximum number of prompts whose embeddings are cached."""
MAX_CHARACTERS = 20_000


class Prompts:
    """Encodes prompts on rank zero, one at a time, outside of AR steps."""

    def __init__(self, pipeline: StreamInferencePipeline) -> None:
        """Store the pipeline; on rank zero.

        Args:
            pipeline: loaded.
        """
        self.pipeline = pipeline
        self._lock = threading.Lock()
        self._side = SideStream(pipeline.target_device)
        self._remembered = lru_cache(REMEMBERED)(self._encode)

    @property
    def change(self) -> bool:
        """Whether prompts may differ from the server's own."""
        released = self.pipeline.config.release_text_encoder
        return self.pipeline.text_encoder is not None and not released

    def encode(self, text: str) -> dict[str, Tensor]:
        """Embeddings ``[1, S, text_dim]`` on the CPU, as the tensors of a prompt's command.

        Raises:
            Refused: there is no text encoder, or it does not accept this prompt.
        """
        if not self.change:
            raise Refused(
                "Prompts cannot change here: the server runs without its text encoder, or released "
                "it. Start without a prompt."
            )
        if not text.strip() or len(text) > MAX_CHARACTERS:
            raise Refused(
                f"A prompt has from 1 to {MAX_CHARACTERS} characters; got {len(text.strip())}."
            )
        with self._lock:
            return dict(self._remembered(text))

    def _encode(self, text: str) -> dict[str, Tensor]:
        try:
            # Frames are made meanwhile: they must not wait for the encoder, offloaded or not.
            with torch.no_grad(), self._side.work(self.pipeline.text_encoder):
                encoded = self.pipeline.prompt_tensors([text])
            self._side.join()
        except ValueError as error:
            raise Refused(str(error)) from error
        if not all(bool(torch.isfinite(x).all()) for x in encoded.values()):
            raise Refused("The embeddings of this prompt are not finite; use another prompt.")
        return encoded
