"""Attention backends of one device, as a table of functions."""

import difflib
import importlib.util
import os
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashdreams.attention.flash_attention_3 import flash_attn_3, why_flash_attn_3_is_unusable

HALF_TYPES = (torch.bfloat16, torch.float16)
FLASH_ATTN_HINT = "pip install flash-attn --no-build-isolation"


class AttentionBackend(Protocol):
    """``softmax(q k^T * scale) v`` without a mask."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        """Attend.

        Args:
            q: ``[B, L, N, D]``.
            k: ``[B, S, N, D]``.
            v: ``[B, S, N, D]``.
            scale: factor on the scores, usually ``D ** -0.5``.

        Returns:
            ``[B, L, N, D]``.
        """


class LseBackend(Protocol):
    """An attention backend that can also return its log-sum-exp, for merging."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, return_lse: bool = False
    ) -> Any:
        """Attend; arguments as in :class:`AttentionBackend`.

        Returns:
            ``[B, L, N, D]``; with ``return_lse`` a pair, the second being ``[B, N, L]`` float32,
            the natural logarithm of each query's sum of exponentials.
        """


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, return_lse: bool = False) -> Any:
    """PyTorch's scaled dot-product attention, which picks its own kernel."""
    if return_lse:
        kernels = ("sdpa_flash", "sdpa_efficient", "sdpa_math")
        usable = (n for n in kernels if why_unusable(n, q.device, q.dtype, q.shape[-1]) is None)
        return BACKENDS[next(usable)](q, k, v, scale=scale, return_lse=True)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def sdpa_flash(q: Tensor, k: Tensor, v: Tensor, *, scale: float, return_lse: bool = False) -> Any:
    """PyTorch's flash kernel."""
    if not return_lse:
        return _sdpa_with(SDPBackend.FLASH_ATTENTION, q, k, v, scale)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    if q.device.type == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *heads_first, scale=scale
        )
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention(*heads_first, scale=scale)
    return found[0].transpose(1, 2), found[1]


def sdpa_cudnn(q: Tensor, k: Tensor, v: Tensor, *, scale: float, return_lse: bool = False) -> Any:
    """PyTorch's call of cuDNN."""
    if not return_lse:
        return _sdpa_with(SDPBackend.CUDNN_ATTENTION, q, k, v, scale)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, None, True, scale=scale
    )
    return found[0].transpose(1, 2), found[1].reshape(q.shape[0], q.shape[2], q.shape[1])


def sdpa_efficient(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, return_lse: bool = False
) -> Any:
    """PyTorch's memory-efficient kernel, the fused one that takes float32 on a GPU."""
    if not return_lse:
        return _sdpa_with(SDPBackend.EFFICIENT_ATTENTION, q, k, v, scale)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    found = torch.ops.aten._scaled_dot_product_efficient_attention(
        *heads_first, None, True, scale=scale
    )
    # The kernel pads its log-sum-exp to whole tiles of queries.
    return found[0].transpose(1, 2), found[1][..., : q.shape[1]]


def sdpa_math(q: Tensor, k: Tensor, v: Tensor, *, scale: float, return_lse: bool = False) -> Any:
    """Plain matmuls; writes all scores to memory."""
    if not return_lse:
        return _sdpa_with(SDPBackend.MATH, q, k, v, scale)
    query, key, value = (x.transpose(1, 2).float() for x in (q, k, v))
    scores = query @ key.transpose(-1, -2) * scale
    out = scores.softmax(-1) @ value
    return out.transpose(1, 2).to(q.dtype), scores.logsumexp(-1)


def triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    return_lse: bool = False,
    num_splits: int | None = None,
) -> Any:
    """The package's own kernel; without ``num_splits`` it chooses the KV splits per call."""
    from flashdreams_kernels.attention import chunk_attention

    return chunk_attention(q, k, v, scale=scale, return_lse=return_lse, num_splits=num_splits)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, *, scale: float, return_lse: bool = False) -> Any:
    """FlashAttention-2 of the ``flash-attn`` package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise ImportError(f"flash-attn cannot be imported; {FLASH_ATTN_HINT}") from error
    found = flash_attn_func(q, k, v, softmax_scale=scale, return_attn_probs=return_lse)
    return (found[0], found[1]) if return_lse else found


BACKENDS: Mapping[str, LseBackend] = MappingProxyType(
    {
        "sdpa": sdpa,
        "sdpa_flash": sdpa_flash,
        "sdpa_cudnn": sdpa_cudnn,
        "sdpa_efficient": sdpa_efficient,
        "sdpa_math": sdpa_math,
        "triton": triton,
        "flash_attn": flash_attn,
        "flash_attn_3": flash_attn_3,
    }
)
"""Every backend by name."""

PREFERENCE = ("flash_attn_3", "sdpa_cudnn", "flash_attn", "triton", "sdpa")
"""Order of preference among equally fast backends."""

SPLIT_BACKENDS = frozenset({"flash_attn_3", "triton"})
"""Backends with a parameter ``num_splits``, which is bound at set-up."""

CHOOSES_SPLITS = frozenset({"triton"})
"""Of these, the ones that choose it per call if none is bound; strict does not allow that."""


def bind_kv_splits(name: str, splits: int) -> LseBackend:
    """A backend with its number of KV splits bound; one without splits is returned unchanged."""
    if name in SPLIT_BACKENDS and (splits > 1 or name in CHOOSES_SPLITS):
        return partial(BACKENDS[name], num_splits=splits)  # type: ignore[call-arg]
    return BACKENDS[name]


def why_unusable(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int = 64
) -> str | None:
    """Why a backend cannot run on a device, dtype and head size; None if it can.

    Args:
        name: one of :data:`BACKENDS`.
        device: where the tensors are.
        dtype: of queries, keys and values.
        head_dim: channels of a head.
    """
    if name in ("sdpa", "sdpa_math"):
        return None
    if name == "triton":
        return _why_no_triton(device, dtype, head_dim)
    if name == "sdpa_flash" and device.type == "cpu":
        return None
    if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        return f"flash-attn is not installed; {FLASH_ATTN_HINT}"
    if name == "flash_attn_3":
        return why_flash_attn_3_is_unusable(device, dtype, head_dim)
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if name == "sdpa_efficient":
        return None
    if dtype not in HALF_TYPES:
        return f"takes bfloat16 and float16, not {_short(dtype)}"
    if head_dim > 256 or head_dim % 8:
        return f"takes head sizes that are multiples of 8 up to 256, not {head_dim}"
    return _why_too_old(name, device)


def _why_too_old(name: str, device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    found = ".".join(map(str, capability))
    if capability < (8, 0):
        return f"needs compute capability 8.0, found {found}"
    if name == "sdpa_cudnn" and not torch.backends.cudnn.is_available():
        return "this build of PyTorch has no cuDNN"
    return None


def _why_no_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if dtype not in (*HALF_TYPES, torch.float32):
        return f"takes bfloat16, float16 and float32, not {_short(dtype)}"
    if head_dim > 256:
        return f"takes head sizes up to 256, not {head_dim}"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"needs a CUDA device, not {device.type} (TRITON_INTERPRET=1 interprets it, for tests)"


def usable_backends(device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> list[str]:
    """Names of the backends that can run, in the order of the table."""
    return [name for name in BACKENDS if why_unusable(name, device, dtype, head_dim) is None]


def resolve_backend(
    name: str,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
) -> LseBackend:
    """The backend of a name.

    Args:
        name: one of :data:`BACKENDS`; ``"auto"`` is for ``choose_backend``, which measures.
        device: where it will run; None checks the name alone.
        dtype: of queries, keys and values.
        head_dim: channels of a head.

    Raises:
        ValueError: no backend of that name, or one that cannot run here; the message lists all,
            or those that can.
    """
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"Unknown attention backend {name!r}. Allowed: {', '.join(BACKENDS)}; in a config "
            f"also auto.{hint}"
        )
    reason = None if device is None else why_unusable(name, device, dtype, head_dim)
    if device is not None and reason is not None:
        usable = ", ".join(usable_backends(device, dtype, head_dim))
        raise ValueError(
            f"The attention backend {name!r} cannot be used here: {reason}. "
            f"Usable on {device.type} with {_short(dtype)}: {usable}."
        )
    return BACKENDS[name]


def _sdpa_with(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
