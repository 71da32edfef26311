"""A method as release 0.1 documented it: it does everything itself, by the names of then."""

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from flashdreams.attention.cache import CacheCursor, KVCache, KVCacheSpec
from flashdreams.attention.choose import AttentionShape
from flashdreams.attention.core import AttentionCore
from flashdreams.attention.rope import RotaryEmbedding3D, apply_rope
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.diffusion.transformer import ContextChunk, Transformer, TransformerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.parallel.plan import ParallelPlan
from flashdreams.runtime.cuda_graph import GraphedCallable, copy_in_place

DIM, HEADS, TEXT_DIM = 24, 4, 6


@dataclass
class LegacyCache:
    cursor: CacheCursor
    layers: list[KVCache]
    context: list[tuple[Tensor, Tensor]]
    rope: Tensor | None = None
    steps: int = 0


def graph_key(cache: LegacyCache) -> Hashable:
    return cache.cursor.visible_tokens


@dataclass(kw_only=True)
class LegacyTransformerConfig(TransformerConfig):
    _target: type["LegacyTransformer"] = field(default_factory=lambda: LegacyTransformer)
    num_heads: int = HEADS
    in_channels: int = 4
    len_t: int = 2
    latent_height: int = 3
    latent_width: int = 4
    window_size_t: int = 5
    sink_size_t: int = 1
    streaming: bool = True
    tokens_per_frame: int = 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.ctx_k, self.ctx_v = nn.Linear(TEXT_DIM, DIM), nn.Linear(TEXT_DIM, DIM)
        self.core, self.cross = AttentionCore(DIM // HEADS), AttentionCore(DIM // HEADS)

    def forward(self, x, rope, context, cache):
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (-1, DIM // HEADS)) for f in (self.q, self.k, self.v))
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        attended = self.core(q, k, v, cache) + self.cross(q, *context)
        return x + self.o(attended.flatten(2))


class LegacyTransformer(Transformer):
    config: LegacyTransformerConfig

    def __init__(self, config: LegacyTransformerConfig) -> None:
        super().__init__(config)
        self.embed = nn.Linear(config.in_channels, DIM)
        self.rope = RotaryEmbedding3D(DIM // HEADS)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(DIM, config.in_channels)
        self.finished = 0
        self.network = self.__call__
        if config.use_cuda_graph:
            self.network = GraphedCallable(self.__call__, torch.device("cpu"), key=graph_key)

    def finish_loading(self) -> None:
        super().finish_loading()
        self.finished += 1

    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(
            tensor={f"blocks.*.{n}": "colwise" for n in ("q", "k", "v", "ctx_k", "ctx_v")}
            | {"blocks.*.o": "rowwise"},
            split={"embed": 1, "rope": 0},
            gather={"head": 1},
            attention=("blocks.*.core",),
            rollout={"context": "heads", "rope": "rebuilt"},
        )

    def _project(self, text: Tensor) -> list[tuple[Tensor, Tensor]]:
        heads = (-1, DIM // HEADS)
        return [
            (b.ctx_k(text).unflatten(-1, heads), b.ctx_v(text).unflatten(-1, heads))
            for b in self.blocks
        ]

    def initialize_cache(self, text: Tensor) -> LegacyCache:
        c = self.config
        cursor = CacheCursor(c.sink_size_t, c.window_size_t, c.tokens_per_frame)
        spec = KVCacheSpec(
            batch_size=len(text),
            sink_size_t=c.sink_size_t,
            window_size_t=c.window_size_t,
            tokens_per_frame=c.tokens_per_frame,
            num_heads=HEADS,
            head_dim=DIM // HEADS,
            dtype=self.dtype,
            device=self.device,
        )
        layers = [block.core.new_cache(spec, cursor) for block in self.blocks]
        return LegacyCache(cursor, layers, self._project(text))

    def reuse_cache(self, cache: LegacyCache, text: Tensor) -> bool:
        for stored, new in zip(cache.context, self._project(text), strict=True):
            for mine, x in zip(stored, new, strict=True):
                mine.copy_(x)
        cache.cursor.load_state_dict({"start": 0})
        cache.steps = 0
        return True

    def graphed_calls(self) -> Sequence[GraphedCallable]:
        return [self.network] if isinstance(self.network, GraphedCallable) else []

    @property
    def warm_up_steps(self) -> int:
        return 4

    def example_context(self, batch_size: int) -> dict[str, Any]:
        return {"text": torch.zeros(batch_size, 2, TEXT_DIM)}

    def attention_shape(self, batch_size: int) -> AttentionShape:
        return AttentionShape(
            batch_size=batch_size, queries=24, keys=72, num_heads=HEADS, head_dim=DIM // HEADS
        )

    def update_context(self, cache: LegacyCache, text: Tensor) -> None:
        for stored, new in zip(cache.context, self._project(text), strict=True):
            for mine, x in zip(stored, new, strict=True):
                mine.copy_(x)

    def context_frames(self, cache: LegacyCache) -> list[int]:
        return cache.cursor.past_frames()

    def rewrite_context(
        self, cache: LegacyCache, chunks: Sequence[ContextChunk], timestep: Tensor
    ) -> None:
        rope, cache.rope = cache.rope, None
        with cache.cursor.rewriting():
            for chunk in chunks:
                cache.cursor.place_next(len(chunk.frames), self.device)
                self._rotate(cache, torch.tensor(chunk.frames))
                self(chunk.latent, timestep, cache)
        frames = [f for chunk in chunks for f in chunk.frames]
        slots = [s for f in frames for s in cache.cursor.frame_slots(f, f + 1)]
        for layer in cache.layers:
            layer.scatter(slots)
        cache.rope = rope

    def _rotate(self, cache: LegacyCache, frames: Tensor) -> None:
        c = self.config
        table = self.rope(frames, c.latent_height, c.latent_width, self.device)
        cache.rope = copy_in_place(cache.rope, table)

    def begin_step(self, autoregressive_index, cache: LegacyCache, control=None) -> None:
        cache.cursor.place(self.config.len_t, self.device)
        self._rotate(cache, torch.arange(cache.cursor.start, cache.cursor.end))

    def forward(self, latent: Tensor, timestep: Tensor, cache: LegacyCache) -> Tensor:
        x = self.embed(latent.flatten(2).transpose(1, 2)) + timestep / 1000
        for block, context, layer in zip(self.blocks, cache.context, cache.layers, strict=True):
            x = block(x, cache.rope, context, layer)
        return self.head(x).transpose(1, 2).unflatten(2, latent.shape[2:]).float()

    def predict_flow(self, latent: Tensor, timestep: Tensor, state: LegacyCache) -> Tensor:
        return self.network(latent, timestep.float(), state)

    def update_cache(self, latent: Tensor, timestep: Tensor, cache: LegacyCache) -> None:
        self.network(latent, timestep.float(), cache)
        for layer in cache.layers:
            layer.keep_sink()
        cache.cursor.advance()
        cache.steps += 1


def legacy_pipeline(**transformer) -> StreamInferencePipelineConfig:
    return StreamInferencePipelineConfig(
        name="legacy",
        diffusion_model=DiffusionModelConfig(
            transformer=LegacyTransformerConfig(**transformer),
            scheduler=FlowMatchSchedulerConfig(denoising_timesteps=(1000.0, 500.0)),
        ),
    )
