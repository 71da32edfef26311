"""The state of a rollout, made whole from the parts that ranks hold, and cut again."""

from typing import Any

from torch import Tensor

from flashdreams.parallel.mesh import Mesh
from flashdreams.parallel.plan import ParallelPlan
from flashdreams.parallel.spatial import WidthLayout

HEADS_DIM = 2
"""Dim of the heads in ``[B, S, N, D]``."""


class RolloutExchange:
    """What a mesh did to the state of a rollout.

    KV caches know how to become whole themselves; here stands what a plan says of the rest.
    """

    def __init__(
        self,
        mesh: Mesh,
        plan: ParallelPlan | None = None,
        width_layout: WidthLayout | None = None,
        latent_width: int = 0,
    ) -> None:
        """Prepare.

        Args:
            mesh: the ranks.
            plan: of the transformer.
            width_layout: how the decoder's columns are shared; None where they are not.
            latent_width: columns of the whole latent.
        """
        self.mesh = mesh
        self.width_layout = width_layout
        self.latent_width = latent_width
        styles = {} if plan is None else plan.rollout
        self.rebuilt = frozenset(name for name, style in styles.items() if style == "rebuilt")
        cut = plan is not None and bool(plan.tensor) and mesh.tp.group is not None
        self._heads = {name for name, style in styles.items() if style == "heads" and cut}

    @property
    def halves_apart(self) -> bool:
        """Whether the two halves of guidance are on different ranks."""
        return self.mesh.cfg.group is not None

    def gather(self, path: str, x: Tensor) -> Tensor:
        """The whole of a tensor of the transformer's state; a collective call.

        Args:
            path: its path within that state.
            x: this rank's part, ``[B, S, N, D]`` where heads are split.
        """
        if path.partition("/")[0] not in self._heads:
            return x
        return self.mesh.channel(self.mesh.tp).all_gather(x, dim=HEADS_DIM)

    def shard(self, path: str, x: Tensor) -> Tensor:
        """This rank's part: the inverse of ``gather``."""
        if path.partition("/")[0] not in self._heads:
            return x
        return x.chunk(self.mesh.tp.size, dim=HEADS_DIM)[self.mesh.tp.rank]

    def gather_halves(self, x: Tensor, own: str) -> dict[str, Tensor]:
        """A tensor of both halves of guidance, which has the same shape in both.

        Args:
            x: of the half that this rank evaluates.
            own: the name of that half.
        """
        if not self.halves_apart:
            return {own: x}
        halves = self.mesh.channel(self.mesh.cfg).all_gather(x[None]).unbind(0)
        return dict(zip(("conditional", "unconditional"), halves, strict=True))

    def whole_decoder(self, cache: Any) -> Any:
        """The decoder's state as something whose ``state_dict`` is that of the whole width."""
        if self.width_layout is None or cache is None:
            return cache
        return _WholeWidth(cache, self.width_layout, self.latent_width)


class _WholeWidth:
    """Carried frames of this rank's columns, seen as those of all columns."""

    def __init__(self, cache: Any, layout: WidthLayout, latent_width: int) -> None:
        self.cache = cache
        self.layout = layout
        self.latent_width = latent_width

    def state_dict(self) -> dict[str, Tensor]:
        return self.layout.gather_state(self.cache.state_dict(), self.latent_width)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.cache.load_state_dict(self.layout.shard_state(state, self.latent_width))
