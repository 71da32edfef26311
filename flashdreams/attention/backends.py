"""Attention backends of one device, as a table of functions."""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


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


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """PyTorch's scaled dot-product attention, which picks its own kernel."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


BACKENDS: dict[str, AttentionBackend] = {"sdpa": sdpa}


def resolve_backend(name: str) -> AttentionBackend:
    """The backend of a name.

    Raises:
        ValueError: no backend of that name; the message lists all.
    """
    if name not in BACKENDS:
        raise ValueError(f"Unknown attention backend {name!r}. Allowed: {', '.join(BACKENDS)}.")
    return BACKENDS[name]
