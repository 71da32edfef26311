"""Bit-equal results on any number of ranks: each token gets the same arithmetic on any rank.

The bits of a matmul change with its number of rows, because libraries pick kernels by
size. On a GPU linear layers run through one kernel that picks nothing by the number of rows, and
attention through a backend that was tested at set-up to give the same bits for any number of
heads and rows. On a CPU every matmul over tokens has the same number of rows, and the sequence is
split at the borders of these tiles. There one rank pads its tokens to whole tiles as well:
element-wise loops round the end of a vector that their registers do not fill in another way than
the rest. A GPU computes element by element and norms row by row, which asks for no padding.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.attention.backends import AttentionBackend
from flashdreams.attention.core import AttentionCore
from flashdreams.parallel.sequence import pad_dim

TILE_ROWS = {"cpu": 16, "cuda": 128}
"""Tokens per tile by device type: small where models are small, a full GPU tile otherwise."""


class StrictLinear(nn.Linear):
    """A linear layer in the place of another, with its parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias


class TiledLinear(StrictLinear):
    """A linear layer that runs over tokens in tiles of a fixed number of rows."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__(linear)
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


class InvariantLinear(StrictLinear):
    """A linear layer on a GPU whose bits per row do not depend on the number of rows.

    One Triton kernel for all rows, where `TiledLinear` calls the library once per tile.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        if input.is_meta:  # nothing is computed, and operations are counted by their names
            return F.linear(input, self.weight, self.bias)
        from flashdreams_kernels.linear import invariant_linear

        return invariant_linear(input, self.weight, self.bias)


def make_strict(module: nn.Module, device_type: str) -> tuple[str, int]:
    """Make every linear layer and every attention core of a module strict, at any world size.

    On a GPU linear layers run through one batch-invariant kernel; without Triton, and on a CPU, in
    tiles of fixed size. Attention runs in tiles until warm-up has compared bits without them.
    On a CPU this also sets one intra-op thread for the process: the split of a matmul over
    threads changes its bits.

    Code that fuses linear layers must not change these: it may only take a layer for which
    ``type(layer) is nn.Linear`` holds.

    Args:
        module: changed in place; parameters keep their names.
        device_type: where it will run.

    Returns:
        What its linear layers are now; a sequence must be split in multiples of so many tokens.
    """
    rows = TILE_ROWS.get(device_type, TILE_ROWS["cuda"])
    invariant = device_type == "cuda" and importlib.util.find_spec("triton") is not None
    if device_type == "cpu":
        torch.set_num_threads(1)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                strict = InvariantLinear(child) if invariant else TiledLinear(child, rows)
                setattr(parent, name, strict)
    tile_attention(module, device_type)
    if invariant:
        return "linear layers with the same bits for any number of rows", 1
    return "tiles of fixed size", rows


def tile_attention(module: nn.Module, device_type: str) -> None:
    """Call the backend of every attention core with fixed query rows and one head at a time."""
    rows = TILE_ROWS.get(device_type, TILE_ROWS["cuda"])
    for core in module.modules():
        if isinstance(core, AttentionCore):
            core.backend = TiledAttention(core.backend, rows)
            core.strict = True
