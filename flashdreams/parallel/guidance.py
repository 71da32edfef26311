"""Classifier-free guidance, on one rank or with one branch per rank."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from flashdreams.parallel.collectives import Channel
from flashdreams.parallel.mesh import Mesh


class Guidance(Protocol):
    """Combines the conditional and the unconditional prediction.

    A rank keeps rollout state (a KV cache, its clean pass) only for the branches that it evaluates.
    """

    evaluates_conditional: bool
    evaluates_unconditional: bool

    def __call__(
        self,
        predict_conditional: Callable[[], Tensor],
        predict_unconditional: Callable[[], Tensor],
        scale: float,
    ) -> Tensor:
        """``uncond + scale * (cond - uncond)``, the same on every rank.

        Source: Classifier-Free Diffusion Guidance, arXiv:2207.12598, equation 6, in the form of
        the official Wan 2.1 sampler.
        """


class SerialGuidance:
    """Both branches one after the other."""

    evaluates_conditional = True
    evaluates_unconditional = True

    def __call__(
        self,
        predict_conditional: Callable[[], Tensor],
        predict_unconditional: Callable[[], Tensor],
        scale: float,
    ) -> Tensor:
        """See `Guidance`."""
        return combine(predict_conditional(), predict_unconditional(), scale)


class CfgParallelGuidance:
    """The conditional branch on the first rank, the unconditional on the second; one all-gather."""

    def __init__(self, channel: Channel) -> None:
        if channel.size != 2:
            raise ValueError(f"Guidance has two branches; got a group of {channel.size} ranks.")
        self.channel = channel
        self.evaluates_conditional = channel.rank == 0
        self.evaluates_unconditional = channel.rank == 1

    def __call__(
        self,
        predict_conditional: Callable[[], Tensor],
        predict_unconditional: Callable[[], Tensor],
        scale: float,
    ) -> Tensor:
        """See `Guidance`; calls one of the two functions."""
        own = predict_conditional() if self.evaluates_conditional else predict_unconditional()
        conditional, unconditional = self.channel.all_gather(own[None], dim=0).unbind(0)
        return combine(conditional, unconditional, scale)


def combine(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """``unconditional + scale * (conditional - unconditional)``, tensors of one shape."""
    return unconditional + scale * (conditional - unconditional)


def build_guidance(mesh: Mesh) -> Guidance:
    """The guidance of a mesh: over its ``cfg`` axis if that has two ranks."""
    if mesh.cfg.group is None:
        return SerialGuidance()
    return CfgParallelGuidance(mesh.channel(mesh.cfg))
