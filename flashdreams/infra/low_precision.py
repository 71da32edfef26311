"""Linear layers in 8 bits, put in place of those that a plan names."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from flashdreams.parallel.plan import ParallelPlan, glob_pattern
from flashdreams.parallel.tensor import ColwiseLinear, RowwiseLinear

LinearPrecision = Literal["native", "fp8", "fp8_rowwise"]
"""How the wide products of a transformer are computed: as its dtype says, or from e4m3 numbers with
one scale per tensor or one per row."""

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
TINY = 1e-12
"""Least scale, for rows of zeros."""
FEATURES_STEP = 16
"""On a GPU the features that go in and out must be multiples of it (16 bytes of a row)."""
LEAST_CAPABILITY = (8, 9)
"""The first GPUs with eight-bit tensor cores."""


class Fp8Linear(nn.Module):
    """A linear layer with an e4m3 weight; activations are rounded as they come.

    Every scale belongs to what this rank holds and is applied before anything is exchanged, so
    partial sums of tensor parallelism add up as they are. Its state has keys of its own: weights
    of a native checkpoint can never be taken for rounded ones.
    """

    weight_fp8: Tensor
    weight_scale: Tensor

    def __init__(self, linear: nn.Linear, *, rowwise: bool) -> None:
        """Round the weight of a layer.

        Args:
            linear: plain, or a rank's part; its weights are loaded.
            rowwise: one scale per output feature and per token; else one per tensor.
        """
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rowwise = rowwise
        self.bias = linear.bias
        self.channel = linear.channel if isinstance(linear, RowwiseLinear) else None
        weight, scale = quantize(linear.weight.detach(), rowwise)
        self.register_buffer("weight_fp8", weight)
        self.register_buffer("weight_scale", scale)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]`` in the same dtype."""
        x, scale = quantize(input.reshape(-1, self.in_features), self.rowwise)
        multiply = scaled_product if x.is_cuda else emulated_product
        factors = (x, scale, self.weight_fp8, self.weight_scale)
        if self.channel is None:
            out = multiply(*factors, self.bias, input.dtype)
        else:
            out = self.channel.all_reduce(multiply(*factors, None, input.dtype))
            out = out if self.bias is None else out + self.bias
        return out.view(*input.shape[:-1], self.out_features)


def quantize(x: Tensor, rowwise: bool) -> tuple[Tensor, Tensor]:
    """Round to e4m3 so that the largest entry becomes the largest number there is.

    Args:
        x: ``[rows, features]``.
        rowwise: whether every row has a scale of its own.

    Returns:
        ``[rows, features]`` e4m3, and the scales: float32, ``[rows, 1]`` or 0-dim.
    """
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True) if rowwise else wide.abs().amax()
    scale = (largest / LARGEST).clamp(min=TINY)
    return (wide / scale).to(FP8), scale


def scaled_product(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``(x * x_scale) @ (weight * weight_scale).T + bias`` by PyTorch's scaled matrix product.

    Args:
        x: ``[rows, in_features]`` e4m3.
        x_scale: float32, ``[rows, 1]`` or 0-dim.
        weight: ``[out_features, in_features]`` e4m3.
        weight_scale: float32, ``[out_features, 1]`` or 0-dim.
        bias: ``[out_features]`` in ``dtype``, or None.
        dtype: of the result.

    Returns:
        ``[rows, out_features]``.
    """
    recipe = ScalingType.RowWise if x_scale.ndim == 2 else ScalingType.TensorWise
    factors = (x, weight.t(), x_scale, recipe, weight_scale.t(), recipe)
    return F.scaled_mm(*factors, bias=bias, output_dtype=dtype)


def emulated_product(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The same from the same rounded numbers, summed in float32: for accuracy, not for speed."""
    out = (x.float() @ weight.float().t()) * x_scale * weight_scale.t()
    return (out if bias is None else out + bias.float()).to(dtype)


def lower_precision(
    module: nn.Module, plan: ParallelPlan | None, precision: LinearPrecision, device: torch.device
) -> int:
    """Round the weights that the plan's ``low_precision`` names, in place.

    Call once, when the weights are loaded; each rank rounds what it holds.

    Args:
        module: with its weights, cut or whole.
        plan: which layers may be rounded.
        precision: ``"native"`` changes nothing.
        device: where it runs.

    Returns:
        Number of layers that were replaced.

    Raises:
        ValueError: see `check_low_precision`.
    """
    check_low_precision(module, plan, precision, device)
    if precision == "native" or plan is None:
        return 0
    layers = list(named_layers(module, plan))
    for name, layer in layers:
        parent, _, leaf = name.rpartition(".")
        replacement = Fp8Linear(layer, rowwise=precision == "fp8_rowwise")
        setattr(module.get_submodule(parent), leaf, replacement)
    return len(layers)


def named_layers(module: nn.Module, plan: ParallelPlan) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that a plan's ``low_precision`` names.

    Raises:
        ValueError: a layer that cannot be rounded.
    """
    patterns = [glob_pattern(glob) for glob in plan.low_precision]
    for name, layer in module.named_modules():
        if any(pattern.fullmatch(name) for pattern in patterns):
            if type(layer) not in (nn.Linear, ColwiseLinear, RowwiseLinear):
                raise ValueError(
                    f"{name} is a {type(layer).__name__}, which cannot be rounded to eight bits. "
                    "Weights are rounded once, and not together with --parallel.strict True; else "
                    "use linear_precision='native'."
                )
            yield name, layer


def check_low_precision(
    module: nn.Module, plan: ParallelPlan | None, precision: LinearPrecision, device: torch.device
) -> None:
    """Refuse what `lower_precision` could not do or would do at a loss; weights may be missing yet.

    A CPU computes the same from rounded numbers, slower than without, so that accuracy can be
    looked at anywhere. A GPU has to have the products.

    Raises:
        ValueError: no plan that names layers, a GPU without eight-bit products, or sizes and types
            that its products do not take.
    """
    if precision == "native":
        return
    if plan is None or not plan.low_precision:
        raise ValueError(
            f"linear_precision={precision!r}, but the plan of {type(module).__name__} names no "
            "layers in low_precision. Use 'native', or name them there."
        )
    layers = list(named_layers(module, plan))
    if device.type == "cpu":
        return
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < LEAST_CAPABILITY:
        raise ValueError(
            f"linear_precision={precision!r} needs a GPU with eight-bit products, compute "
            f"capability {'.'.join(map(str, LEAST_CAPABILITY))} or later; {device} has "
            f"{'.'.join(map(str, capability))}. Use 'native'."
        )
    dtype = getattr(module, "dtype", torch.bfloat16)
    if dtype != torch.bfloat16:
        raise ValueError(
            f"linear_precision={precision!r} gives bfloat16 on a GPU; dtype is {dtype}. "
            "Set dtype='bfloat16', or linear_precision='native'."
        )
    for name, layer in layers:
        if layer.in_features % FEATURES_STEP or layer.out_features % FEATURES_STEP:
            raise ValueError(
                f"{name} maps {layer.in_features} to {layer.out_features} features on this rank; "
                f"eight-bit products take multiples of {FEATURES_STEP}. Use "
                "linear_precision='native', or a smaller tensor_parallel_degree."
            )


def weight_nbytes(
    module: nn.Module,
    plan: ParallelPlan | None,
    precision: LinearPrecision,
    dtype_of: Callable[[str], torch.dtype],
) -> int:
    """Bytes of a native module's weights once `lower_precision` is done; scales left out.

    Args:
        module: may be on ``meta``.
        plan: which layers may be rounded.
        precision: whether they are.
        dtype_of: storage type of a parameter, by its name.
    """
    rounded: set[str] = set()
    if precision != "native" and plan is not None:
        rounded = {f"{name}.weight" for name, _ in named_layers(module, plan)}
    return sum(
        parameter.numel() * (FP8 if name in rounded else dtype_of(name)).itemsize
        for name, parameter in module.named_parameters()
    )
