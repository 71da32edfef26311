"""Attention over parts of the keys, merged into attention over all of them.

Shape letters: B batch, L query tokens, S key tokens, N heads, D head dim.
"""

from typing import cast

from torch import Tensor

from flashdreams.attention.backends import AttentionBackend, LseBackend, sdpa


def attend_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, backend: AttentionBackend = sdpa
) -> tuple[Tensor, Tensor]:
    """Attention and the logarithm of its normaliser, in the form that `merge` takes.

    Args:
        q: ``[B, L, N, D]``.
        k: ``[B, S, N, D]``.
        v: ``[B, S, N, D]``.
        scale: factor on the scores.
        backend: what attends, an `LseBackend`, as all named ones are.

    Returns:
        ``[B, L, N, D]`` float32 and ``[B, L, N]`` float32.
    """
    out, lse = cast(LseBackend, backend)(q, k, v, scale=scale, return_lse=True)
    return out.float(), lse.transpose(1, 2)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    With ``w = exp(lse)`` the sum of exponentials of a set, the result is the mean of the two
    outputs weighted by ``w``.

    Args:
        out: ``[B, L, N, D]`` float32, attention over the one set.
        lse: ``[B, L, N]`` float32, the logarithm of its sum of exponentials; minus infinity for no
            keys, of which one of the two sets has some.
        more: like ``out``, over the other set.
        more_lse: like ``lse``.

    Returns:
        Both over the union, shaped like ``out`` and ``lse``.

    Source: FlashAttention, arXiv:2205.14135, section 3.1.
    """
    total = lse.logaddexp(more_lse)
    kept, added = (lse - total).exp()[..., None], (more_lse - total).exp()[..., None]
    return out * kept + more * added, total
