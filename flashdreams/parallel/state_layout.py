"""How the ranks of a mesh hold the state of a rollout: parts to the whole, and back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashdreams.parallel.context import share_region
from flashdreams.parallel.mesh import Mesh
from flashdreams.parallel.plan import ParallelPlan, StateStyle, trunk_is_cut
from flashdreams.parallel.spatial import WidthLayout
from flashdreams.runtime.region import Region, TensorPart, whole_region

HEADS_DIM = 2
"""Dim of the heads in ``[B, S, N, D]``."""

BRANCHES = ("conditional", "unconditional")
"""The branches of guidance, in the order of the ranks of the ``cfg`` axis."""


class StateLayout:
    """Which part of state tensors a rank holds, by the style that their field declares.

    KV caches are not handled here: each asks the attention core that it belongs to.
    """

    def __init__(
        self,
        mesh: Mesh,
        device: torch.device,
        plan: ParallelPlan | None = None,
        width_layout: WidthLayout | None = None,
        latent_width: int = 0,
    ) -> None:
        """Prepare.

        Args:
            mesh: the ranks.
            device: of this rank's part.
            plan: of the transformer.
            width_layout: how the decoder's columns are shared; None where they are not.
            latent_width: columns of the whole latent.
        """
        self.mesh = mesh
        self.device = device
        self.plan = plan
        self._width_layout = width_layout
        self._latent_width = latent_width
        self._heads_are_cut = mesh.tp.group is not None and (
            plan is not None and trunk_is_cut(plan, mesh.tp.size)
        )

    @property
    def splits_width(self) -> bool:
        """Whether the decoder's state is cut by width."""
        return self._width_layout is not None

    @property
    def branches_apart(self) -> bool:
        """Whether the two branches of guidance are on different ranks."""
        return self.mesh.cfg.group is not None

    def region(self, style: StateStyle, shape: Sequence[int]) -> Region:
        """Which entries of a whole tensor of a shape this rank holds."""
        whole = whole_region(shape)
        if style == "heads" and self._heads_are_cut:
            return share_region(whole, HEADS_DIM, self.mesh.channel(self.mesh.tp))
        if style == "columns" and self._width_layout is not None:
            return self._width_layout.state_region(shape, self._latent_width, is_whole=True)
        return whole

    def part(self, style: StateStyle, x: Tensor, *, in_branch: bool) -> TensorPart:
        """This rank's part of a tensor, and what it writes of it; gathers nothing.

        Args:
            style: of the tensor's field.
            x: this rank's part.
            in_branch: the tensor is of a branch of guidance, which other ranks may not have.
        """
        mesh, shape = self.mesh, list(x.shape)
        writes = mesh.sequence.rank == 0 and (in_branch or mesh.cfg.rank == 0)
        region = whole_region(shape)
        if style == "heads" and self._heads_are_cut:
            shape[HEADS_DIM] *= mesh.tp.size
            region = self.region(style, shape)
        elif style == "columns" and self._width_layout is not None:
            columns = self._width_layout
            region = columns.state_region(shape, self._latent_width, is_whole=False)
            if shape and columns.widths:
                scale = shape[-1] // columns.widths[columns.channel.rank]
                shape[-1], writes = scale * self._latent_width, True
            else:
                writes = columns.channel.rank == 0
        else:
            writes = writes and mesh.tp.rank == 0
        return TensorPart(tuple(shape), x.dtype, region, region if writes else None, lambda: x)
