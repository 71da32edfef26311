"""The prompt encoder: a described scene as ten one-hot tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, stack

from flashdreams.infra.encoder.base import Encoder, EncoderConfig

from .scene import NUM_OPTIONS, NUM_SLOTS, scene_from_text

PROMPT_DIM = NUM_SLOTS * (NUM_OPTIONS + 1)
"""Width of a prompt token: one place for every option of every slot, hidden ones included."""


def embed_scene(scene: Tensor) -> Tensor:
    """One-hot tokens of scenes.

    Args:
        scene: ``[B, 10]`` int64, hidden slots allowed.

    Returns:
        ``[B, 10, PROMPT_DIM]`` float32; token i is one-hot among the options of slot i.
    """
    options = F.one_hot(scene, NUM_OPTIONS + 1).float()
    slots = F.one_hot(scene.new_tensor(range(NUM_SLOTS)), NUM_SLOTS).float()
    return (slots[None, :, :, None] * options[:, :, None, :]).flatten(2)


@dataclass(kw_only=True)
class ScenePromptEncoderConfig(EncoderConfig):
    """Config of the scene prompt encoder; there is nothing to set."""

    _target: type["ScenePromptEncoder"] = field(default_factory=lambda: ScenePromptEncoder)


class ScenePromptEncoder(Encoder):
    """Reads texts such as "red floor, gold pillars, dusk sky"."""

    config: ScenePromptEncoderConfig

    def forward(self, input: Sequence[str]) -> Tensor:
        """Encode one text per batch entry to ``[B, 10, PROMPT_DIM]``.

        Raises:
            ValueError: a word that names no place or colour.
        """
        return embed_scene(stack([scene_from_text(text) for text in input]))
