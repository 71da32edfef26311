"""Tensor parallelism: layers with sliced weights under their old names."""

import torch
from torch import Tensor, nn

from flashdreams.parallel.collectives import Channel
from flashdreams.runtime.checkpoint import TensorSlice


def slice_of(size: int, channel: Channel, dim: int, name: str, parts: int = 1) -> TensorSlice:
    """This rank's part of a dim.

    Args:
        size: entries of the dim in the whole tensor.
        channel: the ranks that share it.
        dim: which one is cut.
        name: how the message calls what is cut.
        parts: runs of the dim that are cut one by one.

    Raises:
        ValueError: the ranks do not divide it.
    """
    if size % (parts * channel.size):
        raise ValueError(
            f"{name} has {size} entries along dim {dim}, not divisible by "
            f"tensor_parallel_degree={channel.size}. Use a divisor of {size}."
        )
    length = size // (parts * channel.size)
    return TensorSlice(dim, channel.rank * length, length, size, parts)


def take_slice(parameter: Tensor, part: TensorSlice) -> nn.Parameter:
    """A parameter of its own that holds the part; on meta it holds nothing, as before."""
    kept = part.of(parameter.detach()).clone()
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


class ShardedLayer(nn.Module):
    """A layer that holds a part of its weights.

    ``slices`` says which, by parameter name; parameters that it does not name are whole.
    """

    slices: dict[str, TensorSlice]


class ColwiseLinear(nn.Linear, ShardedLayer):
    """A linear layer that computes this rank's output features; no communication.

    Of an output that is several parts side by side, such as queries, keys and values, it computes
    this rank's share of each.
    """

    def __init__(self, linear: nn.Linear, channel: Channel, name: str, parts: int = 1) -> None:
        nn.Module.__init__(self)
        part = slice_of(linear.out_features, channel, 0, name, parts)
        self.in_features, self.out_features = linear.in_features, part.length * parts
        self.weight = take_slice(linear.weight, part)
        self.slices = {"weight": part}
        self.register_parameter("bias", None)
        if linear.bias is not None:
            self.bias = take_slice(linear.bias, part)
            self.slices["bias"] = part


class GatheredColwiseLinear(ColwiseLinear):
    """A linear layer that computes this rank's output features and gathers those of all ranks.

    It costs an all-gather of the whole output where `ColwiseLinear` costs none: for what must be
    whole on every rank and is computed seldom, such as a control embedding once per AR step.
    """

    def __init__(self, linear: nn.Linear, channel: Channel, name: str) -> None:
        super().__init__(linear, channel, name)
        self.channel = channel

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in_features]``, whole, to ``[..., P * out_features]``, whole."""
        own = super().forward(input)
        return self.channel.all_gather(own, dim=own.ndim - 1)


class RowwiseLinear(nn.Linear, ShardedLayer):
    """A linear layer over this rank's input features; the partial results are summed.

    The bias is whole on every rank and added once, after the sum.
    """

    def __init__(self, linear: nn.Linear, channel: Channel, name: str) -> None:
        nn.Module.__init__(self)
        part = slice_of(linear.in_features, channel, 1, name)
        self.in_features, self.out_features = part.length, linear.out_features
        self.weight = take_slice(linear.weight, part)
        self.bias = linear.bias
        self.slices = {"weight": part}
        self.channel = channel

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in_features]``, split, to ``[..., out_features]``, whole."""
        partial = nn.functional.linear(input, self.weight)
        total = self.channel.all_reduce(partial)
        return total if self.bias is None else total + self.bias


class ShardedRMSNorm(ShardedLayer):
    """RMS norm over a width that is split over the ranks; one float per token is all-reduced."""

    def __init__(self, norm: nn.Module, channel: Channel, name: str) -> None:
        super().__init__()
        weight, eps = getattr(norm, "weight", None), getattr(norm, "eps", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(eps, float):
            raise ValueError(
                f"{name} ({type(norm).__name__}) cannot be split as a norm: it needs a 1-D weight "
                "and a float eps, as an RMS norm has."
            )
        if getattr(norm, "bias", None) is not None or isinstance(norm, nn.LayerNorm):
            raise ValueError(f"{name} ({type(norm).__name__}) is not an RMS norm.")
        part = slice_of(len(weight), channel, 0, name)
        self.weight = take_slice(weight, part)
        self.eps = eps
        self.dim = len(weight)
        self.slices = {"weight": part}
        self.channel = channel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim of ``x``, ``[..., dim/P]``, over all ranks; keep its dtype."""
        wide = x.float()
        squares = self.channel.all_reduce(wide.square().sum(-1, keepdim=True))
        scale = torch.rsqrt(squares / self.dim + self.eps)
        return (wide * scale).to(x.dtype) * self.weight
