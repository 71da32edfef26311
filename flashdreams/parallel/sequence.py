"""Splitting a token sequence over the ranks, and gathering it."""

import torch.nn.functional as F
from torch import Tensor

from flashdreams.parallel.collectives import Channel
from flashdreams.parallel.mesh import Axis


class SequenceLayout:
    """Which tokens each rank of the (ring, ulysses) axes holds.

    Contiguous: rank ``s`` of the sequence holds the ``s``-th run of tokens. Interleaved: ring rank
    ``r`` of ``R`` holds tokens ``r, r + R, ...``, so that every ring rank has the same share of
    every latent frame; Ulysses ranks hold runs of that. The last ranks are padded with zeros to
    equal lengths, in whole multiples of ``unit`` tokens. On a single rank, which has no channel,
    nothing is left to do but that padding.

    ``length`` is the true number of tokens in the current forward pass: the first split
    of a pass sets it and the last gather reads it. It is not rollout state.
    """

    def __init__(
        self,
        ring: Axis,
        ulysses: Axis,
        channel: Channel | None,
        *,
        interleaved: bool = False,
        unit: int = 1,
    ) -> None:
        self.ring = ring
        self.ulysses = ulysses
        self.channel = channel
        self.interleaved = interleaved
        self.unit = unit
        self.length = 0

    @property
    def size(self) -> int:
        """Number of ranks that share the sequence."""
        return self.ring.size * self.ulysses.size

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of every rank, padding counted in."""
        share = self.size * self.unit
        return (self.length + share - 1) // share * self.unit

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This rank's tokens.

        Args:
            x: all tokens along ``dim``; the same on every rank.
            dim: the token dim.

        Returns:
            ``x`` with ``tokens_per_rank`` tokens along ``dim``, contiguous, zeros for padding.
        """
        self.length = x.shape[dim]
        count = self.tokens_per_rank
        step, start = 1, (self.ring.rank * self.ulysses.size + self.ulysses.rank) * count
        if self.interleaved:
            step = self.ring.size
            start = self.ring.rank + self.ulysses.rank * count * step
        index = [slice(None)] * x.ndim
        index[dim] = slice(start, start + step * count, step)
        return pad_dim(x[tuple(index)].contiguous(), dim, count)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """All tokens in their order, without the padding, contiguous.

        Args:
            x: this rank's tokens along ``dim``.
            dim: the token dim.

        Raises:
            ValueError: ``x`` has another number of tokens than the last split returned.
        """
        if x.shape[dim] != self.tokens_per_rank:
            raise ValueError(
                f"A gather got {x.shape[dim]} tokens along dim {dim}, but the last split of "
                f"{self.length} tokens gave every rank {self.tokens_per_rank}; name in the plan's "
                "split every module whose output has a token dim."
            )
        if self.channel is not None:
            x = self.channel.all_gather(x, dim)
        if self.interleaved:
            x = x.unflatten(dim, (self.ring.size, -1)).transpose(dim, dim + 1)
            x = x.flatten(dim, dim + 1)
        return x.narrow(dim, 0, self.length).contiguous()

    def trim(self, x: Tensor, dim: int) -> Tensor:
        """Drop the padding of one ring rank's tokens, or of all tokens.

        Args:
            x: ``tokens_per_rank`` times the Ulysses degree tokens along ``dim``, or all of them.
            dim: the token dim.

        Returns:
            A view. Contiguous tokens of one ring rank among several keep their padding: it is
            dropped when they are gathered.
        """
        if self.interleaved:
            return x.narrow(dim, 0, min(x.shape[dim], self.share_of(self.ring.rank)))
        if x.shape[dim] == self.tokens_per_rank * self.size:
            return x.narrow(dim, 0, self.length)
        return x

    def without_padding(self, x: Tensor, dim: int) -> Tensor:
        """One ring rank's contiguous tokens with zeros in the place of what padding has become.

        Args:
            x: ``tokens_per_rank`` times the Ulysses degree tokens along ``dim``.
            dim: the token dim.
        """
        count = x.shape[dim]
        own = min(max(self.length - self.ring.rank * count, 0), count)
        return pad_dim(x.narrow(dim, 0, own), dim, count)

    def share_of(self, ring_rank: int) -> int:
        """True tokens of a ring rank in the interleaved layout."""
        return len(range(ring_rank, self.length, self.ring.size))


def pad_dim(x: Tensor, dim: int, length: int) -> Tensor:
    """A tensor of any shape with zeros appended along ``dim`` up to ``length``.

    One that is as long is returned itself.
    """
    missing = length - x.shape[dim]
    if missing == 0:
        return x
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing))
