"""Linear layers of a Wan block in fewer kernels: one matmul per input, GELU in the epilogue.

The layers stay what they are: they load, shard, save and move under their own names. Layers with a
``forward`` of their own, such as those of a strict run, are left alone.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.models.wan.fp8_linear import FP8, FP8Linear, fp8_linear

PROBE = -2.75
"""Where the two forms of GELU differ by 5 %, far more than 16-bit rounding."""


class PackedLinears:
    """Linear layers of one input whose weights are rows of one tensor, in one matmul.

    Life: built from layers, whose parameters become views of it; rebuilt when they have moved.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        sizes: Sequence[int],
        scale: Tensor | None = None,
    ) -> None:
        """Refer to packed parameters; see `pack_linears`.

        Args:
            weight: ``[sum of sizes, in_features]``.
            bias: ``[sum of sizes]``.
            sizes: output features of each layer.
            scale: ``[sum of sizes]`` of an e4m3 weight.
        """
        self.weight = weight
        self.bias = bias
        self.sizes = list(sizes)
        self.scale = scale

    def __call__(self, x: Any) -> tuple[Tensor, ...]:
        """Each layer's ``[..., size]`` of ``[..., in_features]``; views of one tensor."""
        if self.scale is None or self.bias is None:
            return F.linear(x, self.weight, self.bias).split(self.sizes, -1)
        return fp8_linear(x, self.weight, self.scale, self.bias).split(self.sizes, -1)

    def last(self, count: int) -> "PackedLinears":
        """Only the last layers."""
        rows = sum(self.sizes[-count:])
        bias = None if self.bias is None else self.bias[-rows:]
        scale = None if self.scale is None else self.scale[-rows:]
        return PackedLinears(self.weight[-rows:], bias, self.sizes[-count:], scale)


@torch.no_grad()
def pack_linears(layers: Sequence[nn.Module]) -> PackedLinears | None:
    """Move the parameters of layers into one tensor each, of which they become views.

    Takes no more memory afterwards than before.

    Args:
        layers: with the same input.

    Returns:
        What computes all of them at once; None if some layer is not a plain linear one, unless all
        are FP8.
    """
    quantized = all(isinstance(layer, FP8Linear) for layer in layers)
    if not quantized and not all(is_plain_linear(layer) for layer in layers):
        return None
    linears = cast(Sequence[nn.Linear], layers)
    kinds = {(x.weight.dtype, x.weight.device, x.in_features, x.bias is None) for x in linears}
    if len(kinds) > 1:
        return None
    weight = _pack([linear.weight for linear in linears])
    bias = None
    if linears[0].bias is not None:
        bias = _pack([linear.bias for linear in linears])
    scale = _pack([cast(Any, linear).weight_scale for linear in linears]) if quantized else None
    return PackedLinears(weight, bias, [len(linear.weight) for linear in linears], scale)


def _pack(parameters: Sequence[Tensor]) -> Tensor:
    kept = [parameter.detach() for parameter in parameters]
    if kept[0].dtype == FP8:  # which not every build of PyTorch can put together
        packed = torch.cat([x.view(torch.uint8) for x in kept]).view(FP8)
    else:
        packed = torch.cat(kept)
    parts = packed.split([len(parameter) for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return packed


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer computes ``F.linear`` of its own parameters and has no hooks.

    Slices of tensor parallelism over output features are plain.
    """
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    own_forward = getattr(type(layer), "forward", None) is nn.Linear.forward
    return own_forward and "weight" in layer._parameters and not hooked


def linear_gelu(layer: nn.Linear, x: Tensor) -> Tensor:
    """``gelu(layer(x))`` with the tanh form of GELU in the epilogue of the matmul.

    GELU is applied before the result is rounded.

    Args:
        layer: plain, with a bias; see `fuses_gelu`.
        x: ``[..., in_features]`` on a GPU.

    Returns:
        ``[..., out_features]``.
    """
    flat = x.flatten(0, -2)
    out = torch._addmm_activation(layer.bias, flat, layer.weight.t(), use_gelu=True)
    return out.unflatten(0, x.shape[:-1])


@torch.no_grad()
def fuses_gelu(layer: nn.Module, activation: nn.Module) -> bool:
    """Whether `linear_gelu` computes ``activation(layer(x))``; tested on one number.

    Args:
        layer: with its weights, where it runs.
        activation: the activation after it.
    """
    plain = is_plain_linear(layer) and layer.bias is not None
    if not plain or getattr(activation, "approximate", None) != "tanh":
        return False
    weight = cast(nn.Linear, layer).weight
    narrow = weight.dtype in (torch.bfloat16, torch.float16)
    if weight.device.type != "cuda" or not narrow or not hasattr(torch, "_addmm_activation"):
        return False
    return _gives_tanh_gelu(weight.device, weight.dtype)


@lru_cache(maxsize=8)
def _gives_tanh_gelu(device: torch.device, dtype: torch.dtype) -> bool:
    """Called by every block, with the same result."""
    probe = nn.Linear(16, 16, device=device, dtype=dtype).requires_grad_(False)
    probe.weight.zero_()
    probe.bias.fill_(PROBE)
    x = torch.zeros(16, 16, device=device, dtype=dtype)
    wanted = F.gelu(
        torch.tensor(PROBE, dtype=torch.float32, device="cpu"), approximate="tanh"
    ).item()
    return abs(linear_gelu(probe, x)[0, 0].item() / wanted - 1) < 0.02


NORMED = ("self_attn.q", "self_attn.k", "self_attn.v", "cross_attn.q", "ffn.0")
"""Layers of a block whose input is a norm; they are quantized together or not at all."""
SIXTEENS = 16
"""FP8 matmuls want input and output widths that are multiples of it."""


@torch.no_grad()
def quantize_linears(block: nn.Module, least_width: int) -> list[str]:
    """Replace linear layers of a block by FP8 ones, as far as they are wide enough and plain.

    Both follow from sizes and from how ranks cut the layers, never from a measurement.

    Args:
        block: a `WanBlock` with its weights.
        least_width: input features from which on a layer is quantized.

    Returns:
        Names of the layers.
    """

    def fits(name: str) -> bool:
        layer = block.get_submodule(name)
        if not is_plain_linear(layer) or layer.bias is None:
            return False
        sizes = cast(nn.Linear, layer).in_features, cast(nn.Linear, layer).out_features
        return sizes[0] >= least_width and not any(size % SIXTEENS for size in sizes)

    names = list(NORMED) if all(map(fits, NORMED)) else []
    names += ["ffn.2"] if fits("ffn.2") else []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer = cast(nn.Linear, block.get_submodule(name))
        setattr(block.get_submodule(parent), leaf, FP8Linear(layer))
    return names


def repack(module: Any, _: Any = None) -> None:
    """Pack the projections of a module again, after its parameters were replaced; a hook."""
    if module.packed is not None:
        module.pack()
