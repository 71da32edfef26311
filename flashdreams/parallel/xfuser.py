"""xDiT's long-context attention as a wrapper of the core, for bidirectional models."""

import importlib
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from flashdreams.attention.cache import KVCache, KVCacheSpec
from flashdreams.attention.core import AttentionCore
from flashdreams.attention.cursor import Cursor
from flashdreams.attention.merge import attend_with_lse
from flashdreams.parallel.context import AttentionWrapper
from flashdreams.parallel.mesh import NO_STREAMING, Mesh
from flashdreams.parallel.sequence import SequenceLayout

INSTALL = "pip install 'flashdreams[gpu]'"


class XfuserAttention(AttentionWrapper):
    """Long-context attention of xfuser, or of its library yunchang where xfuser does not import.

    Both use process groups that yunchang keeps for the whole process, so all cores of a process
    share one mesh. There is no causal cache that the ranks share: streaming models use the
    native strategies.

    Source: USP, arXiv:2405.07719, section 3.
    """

    def __init__(self, core: AttentionCore, attention: nn.Module, layout: SequenceLayout) -> None:
        super().__init__(core)
        self.scale = core.scale
        self.attention = attention
        self.takes_module = type(attention).__name__.startswith("xFuser")
        self.layout = layout

    def new_cache(self, spec: KVCacheSpec, cursor: Cursor) -> KVCache:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError(NO_STREAMING)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None = None) -> Tensor:
        """Attend; the arguments are ``[B, L/P, N, D]``, and so is the result.

        Raises:
            ValueError: the ranks do not divide the tokens.
        """
        refuse_padding(self.layout.length, self.layout.size)
        module = (None,) if self.takes_module else ()
        return self.attention(*module, q, k, v, softmax_scale=self.scale, causal=False)


def refuse_padding(tokens: int, ranks: int) -> None:
    """Refuse tokens that would have to be padded.

    Args:
        tokens: of a whole sequence.
        ranks: that share it.

    Raises:
        ValueError: the ranks do not divide the tokens.
    """
    if tokens % ranks:
        raise ValueError(
            f"{tokens} tokens are not divisible by {ranks} ranks, and context_backend='xfuser' "
            "cannot mask padding. Use --parallel.context-backend native."
        )


def build_long_context(mesh: Mesh) -> nn.Module:
    """The attention module of xfuser or yunchang on this mesh; a collective call.

    Raises:
        ImportError: neither package can be imported; the message says what to install.
    """
    yunchang = _import_yunchang()
    yunchang.set_seq_parallel_pg(
        mesh.ulysses.size, mesh.ring.size, dist.get_rank(), dist.get_world_size()
    )
    kind = _xfuser_class() or yunchang.LongContextAttention
    return kind(ring_impl_type="basic", attn_type=None, attn_processor=_Processor())


class _Processor(nn.Module):
    """One block of attention with its log-sum-exp, in the form that yunchang calls."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, **unused: Any
    ) -> tuple[Tensor, Tensor]:
        out, lse = attend_with_lse(q, k, v, scale=softmax_scale)
        return out.to(q.dtype), lse.transpose(1, 2)


def _import_yunchang() -> Any:
    try:
        return importlib.import_module("yunchang")
    except ImportError as error:
        raise ImportError(
            f"context_backend='xfuser' needs xfuser or yunchang ({error}). Install: {INSTALL}"
        ) from error


def _xfuser_class() -> Any | None:
    """xfuser's own class; None where xfuser is absent or, as on machines without CUDA, broken."""
    try:
        module = importlib.import_module("xfuser.core.long_ctx_attention")
    except Exception:
        return None
    return getattr(module, "xFuserLongContextAttention", None)
