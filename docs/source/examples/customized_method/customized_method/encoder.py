"""The text encoder: maps words to vectors, without weights."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashdreams.infra.encoder.base import Encoder, EncoderConfig

TEXT_DIM = 32
"""Width of a word's vector: the bytes of a SHA-256."""


@dataclass(kw_only=True)
class MyTextEncoderConfig(EncoderConfig):
    """Config of the text encoder."""

    # Point to the class that will be instantiated by this config
    _target: type["MyTextEncoder"] = field(default_factory=lambda: MyTextEncoder)

    # Expose your configurable parameters
    text_len: int = 16
    """Maximum number of words; further ones are ignored."""


class MyTextEncoder(Encoder):
    """Maps every word to its own vector, the same on every machine.

    Args:
        config: Configuration to instantiate the encoder.
    """

    # Enable type checking
    config: MyTextEncoderConfig

    def forward(self, input: Sequence[str]) -> Tensor:
        """Encode one prompt per batch entry.

        Args:
            input: ``B`` prompts.

        Returns:
            ``[B, text_len, TEXT_DIM]`` float32 in [-1, 1]; rows beyond a prompt's words are zero.
        """
        size = (len(input), self.config.text_len, TEXT_DIM)
        embeddings = torch.zeros(size, dtype=torch.float32)
        for prompt, rows in zip(input, embeddings, strict=True):
            for word, row in zip(prompt.lower().split(), rows, strict=False):
                digest = hashlib.sha256(word.encode()).digest()
                row.copy_(torch.tensor(list(digest), dtype=torch.float32) / 127.5 - 1)
        return embeddings
