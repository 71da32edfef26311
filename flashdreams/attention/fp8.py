"""Attention over e4m3 queries, keys and values with fixed scales per head.

Shape letters: B batch, L query tokens, S key tokens, N heads, D head dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdreams.attention.backends import AttentionBackend
from flashdreams.attention.flash_attention_3 import HINT, load_flash_attn_3, parameters_of
from flashdreams.attention.quantized import least_exponents, power_of_two, scaled

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
HEADROOM = 8.0
"""How much larger than in the first chunk values may become before they saturate at the largest
e4m3 number. It costs no accuracy: e4m3 keeps its three bits over 14 powers of two."""
DESCALES = ("q_descale", "k_descale", "v_descale")
"""Arguments of FlashAttention-3 for the scales, ``[B, N]`` float32."""
LEAST_HEAD_DIM = 64
"""Of FlashAttention-3; smaller heads are padded."""


class ScaledTokens:
    """``[B, tokens, N, D]`` in e4m3, with one fixed scale per batch entry and head.

    Read and written along its tokens like the tensor that it represents: ``x[:, a:b]`` gives new
    numbers in ``dtype``, assignments and ``index_copy_`` quantize, or take e4m3 numbers as they
    are. Scales are powers of two, so that writing what was read changes nothing.
    """

    def __init__(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        """Name the storage.

        Args:
            values: ``[B, tokens, N, D]`` e4m3.
            scale: ``[B, N]`` float32, powers of two; zero while they are not fixed yet.
            dtype: of what is read.
        """
        self.values = values
        self.scale = scale
        self.dtype = dtype

    @property
    def shape(self) -> torch.Size:
        """``[B, tokens, N, D]``."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """Its device."""
        return self.values.device

    @property
    def parts(self) -> list[Tensor]:
        """The stored values, ``[B, ...]``; the scales have their own owner."""
        return [self.values]

    def __getitem__(self, index: Any) -> Tensor:
        return dequantize(_bytes(self.values)[index].view(FP8), self.scale, self.dtype)

    def __setitem__(self, index: Any, x: Tensor) -> None:
        _bytes(self.values)[index] = _bytes(self._stored(x))

    def index_copy_(self, dim: int, index: Tensor, x: Tensor) -> None:
        """Write ``x`` to the places of ``index`` along ``dim``, as `torch.Tensor.index_copy_`."""
        _bytes(self.values).index_copy_(dim, index, _bytes(self._stored(x)))

    def _stored(self, x: Tensor) -> Tensor:
        return x if x.dtype == FP8 else quantize(x, self.scale)


def _bytes(x: Tensor) -> Tensor:
    """The same storage as integers: indexing of 8-bit floats is not in every build of PyTorch."""
    return x.view(torch.uint8)


def scales_of(maxima: Tensor) -> Tensor:
    """The power of two with which values of a size are stored, with `HEADROOM`.

    Args:
        maxima: largest absolute values, float32, any shape.

    Returns:
        Like ``maxima``; 1 where they are zero.
    """
    exponents = least_exponents(maxima * (HEADROOM / LARGEST))
    return power_of_two(torch.where(maxima > 0, exponents, 0))


def head_maxima(x: Tensor) -> Tensor:
    """Largest absolute value of every head: ``[B, L, N, D]`` to ``[B, N]`` float32."""
    return x.abs().amax((1, 3)).float()


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Quantize to e4m3, to nearest, ties to even; large values saturate, NaN stays NaN.

    Args:
        x: ``[B, L, N, D]``.
        scale: ``[B, N]`` float32, powers of two.

    Returns:
        ``[B, L, N, D]`` e4m3: ``x / scale``.
    """
    scaled = x.float() * scale.reciprocal()[:, None, :, None]
    return scaled.clamp_(-LARGEST, LARGEST).to(FP8)


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``values * scale`` in ``dtype``; exact except for float16, see `scaled`.

    Args:
        values: ``[B, L, N, D]`` e4m3.
        scale: ``[B, N]`` float32, powers of two.
        dtype: of the result.
    """
    return scaled(values, scale[:, None, :, None], dtype)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor, Tensor, Tensor],
    *,
    scale: float,
    dtype: torch.dtype,
    backend: AttentionBackend,
    num_splits: int = 1,
) -> Tensor:
    """Attention of e4m3 queries to e4m3 keys and values.

    A GPU runs FlashAttention-3's e4m3 kernel, which also rounds the softmax weights to e4m3. A CPU
    dequantizes and runs ``backend``.

    Args:
        q: ``[B, L, N, D]`` e4m3.
        k: ``[B, S, N, D]`` e4m3.
        v: like ``k``.
        scales: of these, ``[B, N]`` float32 each.
        scale: factor on the scores, usually ``D ** -0.5``.
        dtype: of the result.
        backend: for dequantized numbers.
        num_splits: shares of the keys that a GPU computes side by side.

    Returns:
        ``[B, L, N, D]`` in ``dtype``.

    Raises:
        ImportError: a GPU without FlashAttention-3.
    """
    if q.is_cuda:
        return call_flash_attn_3(q, k, v, scales, scale, num_splits).to(dtype)
    wide = [dequantize(x, s, dtype) for x, s in zip((q, k, v), scales, strict=True)]
    return backend(*wide, scale=scale)


def call_flash_attn_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: tuple[Tensor, Tensor, Tensor],
    scale: float,
    num_splits: int,
) -> Tensor:
    """FlashAttention-3's e4m3 kernel; arguments as for `attend`, the result in its own type.

    Raises:
        ImportError: it is not installed.
    """
    head_dim = q.shape[-1]
    if head_dim < LEAST_HEAD_DIM:  # of models that are too small for their speed to matter
        q, k, v = (_padded(x) for x in (q, k, v))
    descales = dict(zip(DESCALES, scales, strict=True))
    function = load_flash_attn_3().flash_attn_func
    found = function(q, k, v, softmax_scale=scale, num_splits=num_splits, **descales)
    out = found[0] if isinstance(found, tuple) else found
    return out[..., :head_dim]


def _padded(x: Tensor) -> Tensor:
    """Numbers ``[..., D]`` in e4m3 with zeros up to the least head size of the kernel."""
    return F.pad(_bytes(x), (0, LEAST_HEAD_DIM - x.shape[-1])).view(FP8)


def why_no_fp8(device: torch.device, head_dim: int) -> str | None:
    """Why e4m3 attention cannot run on a device; None if it can.

    Args:
        device: where it will run.
        head_dim: channels of a head.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"it needs a Hopper GPU, or a CPU to evaluate its error, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        found = ".".join(map(str, capability))
        return f"FlashAttention-3 needs compute capability 9.x, found {found}"
    if head_dim > 256 or (head_dim > LEAST_HEAD_DIM and head_dim % 16):
        return f"FlashAttention-3 takes multiples of 16 up to 256 as head size, not {head_dim}"
    try:
        parameters = parameters_of(load_flash_attn_3().flash_attn_func)
    except ImportError as error:
        return str(error)
    if not {*DESCALES, "num_splits"} <= parameters:
        return f"this release of FlashAttention-3 has no e4m3 kernel; {HINT}"
    return None


def check_fp8(device: torch.device, head_dim: int, precision: str = "fp8") -> None:
    """Refuse e4m3 attention where it cannot run: another way would give other results.

    Args:
        device: where it shall run.
        head_dim: channels of a head.
        precision: what was asked for.

    Raises:
        ValueError: says what is missing, and what runs.
    """
    reason = why_no_fp8(device, head_dim)
    if reason is not None:
        raise ValueError(
            f"precision={precision!r} cannot be used here: {reason}. Use precision='native'."
        )
