"""A small transformer that attends over a sink and a window of past frames.

Shape letters: B batch, C channels, T latent frames, L tokens of a chunk, N heads, D head dim.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flashdreams.attention.cache import KVCache, KVCacheSpec
from flashdreams.attention.core import AttentionCore
from flashdreams.attention.rope import apply_rope
from flashdreams.infra.diffusion.causal import CausalTransformer
from flashdreams.infra.diffusion.causal_config import CausalTransformerConfig
from flashdreams.infra.diffusion.causal_state import CausalState, StepInputs
from flashdreams.parallel.plan import ParallelPlan, state

from .encoder import FEATURES

CORES = "blocks.*.attention.core"
"""Glob of the attention cores; each gets a KV cache."""


@dataclass(kw_only=True)
class StreamingNetworkConfig(CausalTransformerConfig):
    """Config of the network; window, sink and positions are fields of the engine."""

    _target: type["StreamingNetwork"] = field(default_factory=lambda: StreamingNetwork)

    num_layers: int = 2
    """Blocks."""
    text_dim: int = 32
    """Width of the text embeddings."""


class Attention(nn.Module):
    """Self-attention over the cached frames and the current chunk."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.core = AttentionCore(head_dim)

    def forward(self, x: Tensor, rope: Tensor, cache: KVCache | None) -> Tensor:
        """Map tokens ``[B, L, dim]``; the core writes their keys and values into the cache."""
        q, k, v = (y(x).unflatten(-1, (-1, self.head_dim)) for y in (self.q, self.k, self.v))
        return self.o(self.core(apply_rope(q, rope), apply_rope(k, rope), v, cache).flatten(2))


class Block(nn.Module):
    """Attention and feed-forward, shifted by the timestep and the prompt."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, head_dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, shift: Tensor, rope: Tensor, cache: KVCache | None) -> Tensor:
        """Map ``[B, L, dim]``; ``shift`` is ``[B, 1, dim]``."""
        x = x + self.attention(self.norm_1(x) + shift, rope, cache)
        return x + self.mlp(self.norm_2(x))


@dataclass
class Prompt:
    """Values that depend only on the prompt; the same on all ranks."""

    shift: Tensor = state("whole")
    """``[B, 1, dim]``."""


class StreamingNetwork(CausalTransformer):
    """The network; cursors, caches, graphs and rewriting are provided by the engine."""

    config: StreamingNetworkConfig

    def __init__(self, config: StreamingNetworkConfig) -> None:
        super().__init__(config)
        c, (_, rows, columns) = config, config.patch_size
        self.embed = nn.Linear(c.in_channels * rows * columns, c.dim)
        self.control = nn.Linear(FEATURES, c.dim)
        self.text = nn.Linear(c.text_dim, c.dim)
        self.time = nn.Sequential(nn.Linear(1, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.blocks = nn.ModuleList(Block(c.dim, c.head_dim) for _ in range(c.num_layers))
        self.head = nn.Linear(c.dim, c.in_channels * rows * columns)
        nn.init.normal_(self.control.weight)  # untrained: make the world visible

    def cache_specs(self, batch_size: int) -> dict[str, KVCacheSpec]:
        """One cache per block, sized by the config."""
        return {CORES: self.cache_spec(batch_size)}

    def project_context(self, text: Tensor | None, image_tokens: Tensor | None) -> Prompt:
        """The mean of the embedded words of ``text`` ``[B, S, text_dim]``."""
        if text is None:
            raise ValueError("This network needs a prompt: text=[...].")
        return Prompt(self.text(text.to(self.device, self.dtype)).mean(1, keepdim=True))

    def modulations(self, timestep: Tensor) -> Tensor:
        """``[B, 1, dim]`` for timesteps ``[B]``."""
        return self.time(timestep[:, None, None].to(self.dtype) / 1000)

    def embed_control(self, control: Any) -> Tensor:
        """Embed the places of the tokens, ``[1, L, FEATURES]``, once per chunk."""
        return self.control(control.to(self.device, self.dtype))

    def forward(
        self,
        latent: Tensor,
        modulation: Tensor,
        inputs: StepInputs,
        state: CausalState,
        write_only: bool = False,
    ) -> Tensor:
        """Predict the clean latent ``[B, C, T, H, W]``."""
        (_, rows, columns), grid = self.config.patch_size, self.config.token_grid
        cells = latent.unflatten(3, (-1, rows)).unflatten(5, (-1, columns))  # B C T h r w c
        patches = cells.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
        x = self.embed(patches.to(self.dtype)) + inputs.control
        shift = modulation + state.context.shift
        for block, cache in zip(self.blocks, state.caches[CORES], strict=True):
            x = block(x, shift, inputs.rotations, cache)
        cells = self.head(x).unflatten(2, (-1, rows, columns)).unflatten(1, (-1, *grid))
        return cells.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).float()

    def parallel_plan(self) -> ParallelPlan:
        """Tokens are split after the embeddings and gathered after the head; heads over TP."""
        return ParallelPlan(
            tensor={f"blocks.*.attention.{name}": "colwise" for name in "qkv"}
            | {"blocks.*.attention.o": "rowwise"}
            | {"blocks.*.mlp.0": "colwise", "blocks.*.mlp.2": "rowwise"},
            split={"embed": 1, "control": 1, "rope": 0},
            gather={"head": 1},
            attention=(CORES,),
        )

    def example_context(self, batch_size: int) -> dict[str, Any]:
        """Zeros, for warm-up."""
        return {"text": torch.zeros(batch_size, 1, self.config.text_dim)}

    def example_control(self, batch_size: int) -> Tensor:
        """Zeros, for warm-up."""
        return torch.zeros(1, self.config.len_t * self.config.tokens_per_frame, FEATURES)
