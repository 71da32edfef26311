"""Classifier-free guidance, on one rank or with one branch per rank."""

from collections.abc import Callable

from torch import Tensor

from flashdreams.parallel.collectives import Channel
from flashdreams.parallel.mesh import Mesh


class Guidance:
    """Combines the conditional and the unconditional prediction.

    A rank keeps rollout state (a KV cache, its clean pass) only for the branches that it evaluates:
    both one after the other or, over two ranks, the conditional one on the first and the
    unconditional one on the second.
    """

    def __init__(self, channel: Channel | None = None) -> None:
        """Prepare.

        Args:
            channel: the two ranks; None evaluates both branches here.

        Raises:
            ValueError: another number of ranks.
        """
        if channel is not None and channel.size != 2:
            raise ValueError(f"Guidance has two branches; got a group of {channel.size} ranks.")
        self.channel = channel
        self.evaluates_conditional = channel is None or channel.rank == 0
        self.evaluates_unconditional = channel is None or channel.rank == 1

    def __call__(
        self,
        predict_conditional: Callable[[], Tensor],
        predict_unconditional: Callable[[], Tensor],
        scale: float,
    ) -> Tensor:
        """``uncond + scale * (cond - uncond)``, the same on every rank.

        Over two ranks it calls one of the two functions; one all-gather.

        Source: Classifier-Free Diffusion Guidance, arXiv:2207.12598, equation 6, in the form of
        the official Wan 2.1 sampler.
        """
        if self.channel is None:
            conditional, unconditional = predict_conditional(), predict_unconditional()
        else:
            own = predict_conditional() if self.evaluates_conditional else predict_unconditional()
            conditional, unconditional = self.channel.all_gather(own[None], dim=0).unbind(0)
        return unconditional + scale * (conditional - unconditional)


def build_guidance(mesh: Mesh) -> Guidance:
    """The guidance of a mesh: over its ``cfg`` axis if that has two ranks."""
    return Guidance(None if mesh.cfg.group is None else mesh.channel(mesh.cfg))
