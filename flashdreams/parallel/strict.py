"""Bit-equal results on any number of ranks: matrix products in tiles of one fixed size.

The bits of a matrix product change with its number of rows, because libraries pick kernels by
size. Here every product of tokens has the same number of rows, and the sequence is split at the
borders of these tiles, so that a token sees the same arithmetic wherever it is computed. One rank
pads its tokens to whole tiles as well: element-wise loops round the end of a vector that their
registers do not fill in another way than the rest.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.attention.backends import AttentionBackend
from flashdreams.attention.core import AttentionCore
from flashdreams.parallel.sequence import pad_dim

TILE_ROWS = {"cpu": 16, "cuda": 128}
"""Tokens per tile by device type: small where models are small, a full GPU tile otherwise."""


class TiledLinear(nn.Linear):
    """A linear layer that runs over tokens in tiles of a fixed number of rows."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.rows = rows

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., L, in_features]`` to ``[..., L, out_features]``."""
        if input.ndim == 1:
            return self(input[None])[0]
        flat = input.reshape(-1, *input.shape[-2:])
        out = [torch.cat([self._tile(t) for t in x.split(self.rows)]) for x in flat]
        return torch.stack(out).reshape(*input.shape[:-1], -1)

    def _tile(self, x: Tensor) -> Tensor:
        return F.linear(pad_dim(x, 0, self.rows).contiguous(), self.weight, self.bias)[: len(x)]


class TiledAttention:
    """An attention backend that calls another with fixed query rows, one head at a time."""

    def __init__(self, backend: AttentionBackend, rows: int) -> None:
        self.backend = backend
        self.rows = rows

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        """See `AttentionBackend`."""
        heads = [
            self._one_head([x[b : b + 1, :, n : n + 1].contiguous() for x in (q, k, v)], scale)
            for b in range(q.shape[0])
            for n in range(q.shape[2])
        ]
        return torch.cat(heads, dim=2).unflatten(2, (q.shape[0], -1)).squeeze(0).transpose(0, 1)

    def _one_head(self, qkv: list[Tensor], scale: float) -> Tensor:
        q, k, v = qkv
        tiles = [
            self.backend(pad_dim(t, 1, self.rows).contiguous(), k, v, scale=scale)[:, : t.shape[1]]
            for t in q.split(self.rows, dim=1)
        ]
        return torch.cat(tiles, dim=1)


def make_strict(module: nn.Module, device_type: str) -> int:
    """Tile every linear layer and every attention core of a module, whatever the world size.

    On a CPU this also sets one intra-op thread for the process: the split of a product over
    threads changes its bits.

    Args:
        module: changed in place; parameters keep their names.
        device_type: where it will run, for the size of a tile.

    Returns:
        The rows of a tile: a sequence must be split in multiples of them.
    """
    rows = TILE_ROWS.get(device_type, TILE_ROWS["cuda"])
    if device_type == "cpu":
        torch.set_num_threads(1)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, TiledLinear(child, rows))
    for core in module.modules():
        if isinstance(core, AttentionCore):
            core.backend = TiledAttention(core.backend, rows)
            core.strict = True
    return rows
