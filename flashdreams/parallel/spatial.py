"""Decoding split over the ranks by width: halo convolutions around unchanged layers.

Every rank decodes its columns. A convolution over columns first receives its neighbours'
border columns; attention over a frame gathers its keys and values. Carried frames stay with the
columns that they belong to.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.parallel.collectives import Channel
from flashdreams.parallel.mesh import Mesh
from flashdreams.parallel.plan import ParallelPlan
from flashdreams.parallel.sequence import pad_dim
from flashdreams.runtime.region import Region, whole_region


class WidthLayout:
    """Which latent columns each rank holds: runs whose lengths differ by one at most.

    Where there are fewer columns than ranks, every rank decodes all of them without communication.
    ``widths`` belongs to the current forward pass; it is not rollout state.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.widths: list[int] = []
        """Latent columns of every rank; empty where nothing is split."""

    def split(self, latent: Tensor) -> Tensor:
        """This rank's columns of ``[..., W]``."""
        self._share_out(latent.shape[-1])
        return self._own_part(latent)

    def gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Join all ranks' columns along a dim whose length is a multiple of the width.

        Args:
            x: this rank's part, at any resolution.
            dim: the dim that holds columns (or rows times columns).
        """
        if not self.widths:
            return x
        dim = dim % x.ndim
        scale = x.shape[dim] // self.widths[self.channel.rank]
        widest = max(self.widths) * scale
        padded = self.channel.all_gather(pad_dim(x, dim, widest), dim)
        if min(self.widths) == max(self.widths):
            return padded
        parts = padded.split(widest, dim)
        kept = [p.narrow(dim, 0, w * scale) for p, w in zip(parts, self.widths, strict=True)]
        return torch.cat(kept, dim)

    def state_region(self, shape: Sequence[int], latent_width: int, *, is_whole: bool) -> Region:
        """Which entries of carried frames ``[..., W]`` of the whole width this rank holds.

        Args:
            shape: of this rank's part, or of the whole; a 0-dim tensor is the same on every rank.
            latent_width: columns of the whole latent.
            is_whole: which of the two.
        """
        self._share_out(latent_width)
        if not shape or not self.widths:
            return whole_region(shape)
        own, rank = self.widths[self.channel.rank], self.channel.rank
        scale = shape[-1] // (latent_width if is_whole else own)
        start = sum(self.widths[:rank]) * scale
        return (*whole_region(shape[:-1]), range(start, start + own * scale))

    def _share_out(self, columns: int) -> None:
        size = self.channel.size
        shares = [columns // size + (rank < columns % size) for rank in range(size)]
        self.widths = shares if columns >= size else []

    def _own_part(self, x: Tensor) -> Tensor:
        if not self.widths:
            return x
        scale = x.shape[-1] // sum(self.widths)
        start = sum(self.widths[: self.channel.rank])
        return x.narrow(-1, start * scale, self.widths[self.channel.rank] * scale)

    def with_halo(self, x: Tensor, columns: int) -> Tensor:
        """``x`` with the neighbours' nearest columns on both sides, zeros at the frame's border.

        Args:
            x: ``[..., w]``; the memory format is kept.
            columns: how many on each side.
        """
        left, right = self.channel.exchange_edges(
            x[..., :columns].contiguous(), x[..., -columns:].contiguous()
        )
        wide = F.pad(x, (columns, columns))
        if left is not None:
            wide[..., :columns] = left
        if right is not None:
            wide[..., -columns:] = right
        return wide


def resolve_decode(
    mesh: Mesh, plan: ParallelPlan | None, latent_width: int
) -> Literal["replicated", "split", "rank0"]:
    """Resolve ``decode="auto"``: split where the decoder can be split, else replicated.

    Args:
        mesh: the ranks and the request.
        plan: the decoder's plan, if it ships one.
        latent_width: columns of the latents.

    Raises:
        ValueError: ``decode="split"`` is impossible here.
    """
    request, ranks = mesh.config.decode, mesh.decode.size
    if request in ("replicated", "rank0"):
        return request
    reason = None
    if plan is None or not plan.spatial:
        reason = "the decoder has no spatial plan"
    elif latent_width < ranks:
        reason = f"{latent_width} latent columns cannot be split over {ranks} ranks"
    elif mesh.config.strict:
        reason = "strict=True: a convolution over fewer columns changes bits"
    shared = mesh.decode.is_shared
    if request == "split" and shared and reason is not None:
        raise ValueError(f"decode='split': {reason}. Use --parallel.decode replicated.")
    return "split" if reason is None and shared else "replicated"


def split_by_width(module: nn.Module, spatial: dict[str, str], channel: Channel) -> WidthLayout:
    """Split a decoder by width, in place; its parameters are unchanged.

    Args:
        module: ``module(latent, ...)`` maps ``[..., W]`` to frames ``[..., width]``.
        spatial: submodule name -> ``"halo"`` or ``"gather_width"``.
        channel: the ranks that share the width.

    Raises:
        ValueError: a convolution that is not centred with stride 1.
    """
    layout = WidthLayout(channel)
    for name, style in spatial.items():
        child = module.get_submodule(name)
        if style == "halo":
            _add_halo(child, name, layout)
        else:
            child.register_forward_pre_hook(partial(_gather_keys, layout))
    module.register_forward_pre_hook(
        lambda module, args, kwargs: _split_latent(layout, args, kwargs), with_kwargs=True
    )
    module.register_forward_hook(lambda module, args, output: layout.gather(output))
    return layout


def _add_halo(conv: Any, name: str, layout: WidthLayout) -> None:
    """Give a convolution its neighbours' columns and keep its own columns of the result.

    A causal convolution pads in space in its ``convolve``, after its carried frames were put in
    front, and so does one that upsamples, which says by ``upscale`` how many columns a column
    becomes; any other one pads in ``forward``.
    """
    kernel, stride, padding = conv.weight.shape[-1], conv.stride[-1], conv.padding[-1]
    if stride != 1 or kernel != 2 * padding + 1:
        raise ValueError(
            f"{name} cannot be a halo convolution: kernel {kernel}, stride {stride} and padding "
            f"{padding} over columns; needed are stride 1 and padding (kernel - 1) / 2."
        )
    method = "convolve" if hasattr(conv, "convolve") else "forward"
    whole: Callable[..., Tensor] = getattr(conv, method)
    upscale = getattr(conv, "upscale", 1)

    def convolve(x: Tensor, *forms: Any, **options: Any) -> Tensor:
        if not layout.widths:
            return whole(x, *forms, **options)
        wide = whole(layout.with_halo(x, padding), *forms, **options)
        return wide.narrow(-1, padding * upscale, x.shape[-1] * upscale)

    setattr(conv, method, convolve)


def _gather_keys(
    layout: WidthLayout, module: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Queries stay local; keys and values ``[..., H w, C]`` become those of the whole frame."""
    q, k, v = args
    return q, layout.gather(k, -2), layout.gather(v, -2)


def _split_latent(
    layout: WidthLayout, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (layout.split(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "latent": layout.split(kwargs["latent"])}
