"""The Wan diffusion transformer, streaming and bidirectional.

Shape letters: B batch, T latent frames, H W latent rows and columns, C channels, L query tokens,
S key tokens, N heads, D head dim. Tokens run frame by frame, row by row. Parameter names are those
of the official checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.attention.cache import KVCacheSpec
from flashdreams.attention.choose import AUTO
from flashdreams.attention.fp8 import FP8
from flashdreams.infra.diffusion.causal_config import CausalTransformerConfig, Precision
from flashdreams.infra.diffusion.causal_state import CausalState, StepInputs
from flashdreams.infra.ranges import check_range
from flashdreams.models.wan.blocks import (
    FlattenTokens,
    Head,
    ImageEmbedding,
    TokenPlaces,
    WanBlock,
    modulation_rows,
    timestep_embedding,
)
from flashdreams.models.wan.fused_choice import FusesKernels
from flashdreams.models.wan.keys import WAN_KEY_MAPS
from flashdreams.models.wan.plan import wan_plan
from flashdreams.parallel.plan import ParallelPlan, glob_pattern, state
from flashdreams.runtime.transfer import to_device

SELF_ATTENTION = "blocks.*.self_attn.core"
"""Glob of the cores that have a KV cache."""

RESIDUAL_PARAMETERS = tuple(
    glob_pattern(glob)
    for glob in (
        *("time_embedding.*.*", "time_projection.*.*", "head.modulation", "head.head.*"),
        *("blocks.*.modulation", "blocks.*.norm3.*"),
    )
)
"""Names of the parameters that follow ``residual_dtype``."""


@dataclass(kw_only=True)
class WanTransformerConfig(CausalTransformerConfig):
    """Config of a Wan transformer; the defaults are the 1.3B text-to-video model."""

    _target: type["WanTransformer"] = field(default_factory=lambda: WanTransformer)

    ffn_dim: int = 8960
    """Inner width of the feed-forward layers."""
    num_layers: int = 30
    """Transformer blocks."""
    out_channels: int = 16
    """Channels of the predicted flow."""
    freq_dim: int = 256
    """Width of the sinusoidal timestep embedding."""
    text_dim: int = 4096
    """Width of the input text embeddings; 0 for models without a prompt, whose
    cross-attention sees only the image tokens."""
    text_len: int = 512
    """Text tokens; shorter prompts are padded with zero rows, which are attended."""
    image_dim: int | None = None
    """Width of the image tokens for cross-attention; None for models without them."""
    image_len: int = 257
    """Image tokens that warm-up prepares for: CLIP's 16 x 16 patches and its class token."""
    control_dim: int | None = None
    """Width of a per-token control signal that is embedded and added to the tokens; None for
    models without control."""
    eps: float = 1e-6
    """Added to variances."""
    residual_dtype: Literal["float32"] | None = None
    """Dtype of the residual stream, of the norms and modulations applied to it, of
    the time embedding and of the head, parameters included. None is ``dtype``; "float32" with a
    16-bit ``dtype`` is the arithmetic of a float32 network under autocast."""
    fused_kernels: bool | None = None
    """Run modulated norms, gated sums, and norm, rotation and cache write of queries and keys as
    Triton kernels. None: on, on a GPU if Triton is installed, and off elsewhere; True is
    refused where they cannot run (for tests, TRITON_INTERPRET=1 interprets them on a CPU)."""
    fp8_gemm_min_width: int = 4096
    """Input features from which on ``precision="fp8_gemm"`` quantizes a linear layer of a block. At
    a width of 1536, FP8 matmuls with quantization apart were no faster than bf16 on an H200."""

    precisions: ClassVar[tuple[str, ...]] = get_args(Precision)
    """All of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "ffn_dim", "num_layers", "out_channels", "freq_dim")
        check_range(self, "text_len", "image_dim", "image_len", "control_dim", "fp8_gemm_min_width")
        check_range(self, "eps", "text_dim", least=0)
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim={self.freq_dim} must be even: half are sines.")
        if not self.text_dim and self.image_dim is None:
            raise ValueError("text_dim=0 leaves cross-attention to the image; set image_dim.")
        if self.residual_dtype not in (None, "float32"):
            raise ValueError(
                f"residual_dtype={self.residual_dtype!r} is unknown; allowed are 'float32', and "
                f"None, which means dtype={self.dtype!r}."
            )

    @property
    def image_branch(self) -> bool:
        """Whether cross-attention sees image tokens beside the text."""
        return self.image_dim is not None and self.text_dim > 0


@dataclass
class WanContext:
    """State that depends only on the prompt and the image."""

    pairs: list[list[tuple[Tensor, Tensor]]] = state("heads")
    """Cross-attention keys and values ``[B, S, N, D]`` per block: text, then image."""


class WanTransformer(FusesKernels):
    """One plain network for text-to-video, image-to-video, bidirectional and streaming use."""

    config: WanTransformerConfig
    block_class: type[WanBlock] = WanBlock
    checkpoint_key_maps = WAN_KEY_MAPS

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__(config)
        c = config
        channels = c.in_channels + c.condition_channels
        self.patch_embedding = nn.Conv3d(channels, c.dim, c.patch_size, stride=c.patch_size)
        self.flatten_tokens = FlattenTokens()
        self.token_places = TokenPlaces()
        if c.text_dim:
            self.text_embedding = nn.Sequential(
                nn.Linear(c.text_dim, c.dim), nn.GELU(approximate="tanh"), nn.Linear(c.dim, c.dim)
            )
        self.time_embedding = nn.Sequential(
            nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        if c.image_dim is not None:
            self.img_emb = ImageEmbedding(c.image_dim, c.dim)
        if c.control_dim is not None:
            self.control_embedding = nn.Sequential(
                nn.Linear(c.control_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim)
            )
        blocks = nn.ModuleList(self.new_block(index) for index in range(c.num_layers))
        self.blocks: Sequence[WanBlock] = cast(Any, blocks)
        patch_volume = c.patch_size[0] * c.patch_size[1] * c.patch_size[2]
        self.head = Head(c.dim, c.out_channels * patch_volume, c.eps)
        if c.attention_backend != AUTO:
            self.set_attention_backend(c.attention_backend)

    def new_block(self, index: int) -> WanBlock:
        """The block at an index; all are of ``block_class``."""
        return self.block_class(self.config)

    @property
    def residual_dtype(self) -> torch.dtype:
        """Dtype of the residual stream; see the config."""
        return getattr(torch, self.config.residual_dtype or self.config.dtype)

    def dtype_of(self, name: str) -> torch.dtype:
        """``residual_dtype`` for what computes on the sum through the blocks; see the contract.

        Weights of FP8 layers are e4m3, their scales float32.
        """
        layer, _, leaf = name.rpartition(".")
        if layer in self.fp8_layers and leaf != "bias":
            return FP8 if leaf == "weight" else torch.float32
        follows = any(pattern.fullmatch(name) for pattern in RESIDUAL_PARAMETERS)
        return self.residual_dtype if follows else self.dtype

    def parallel_plan(self) -> ParallelPlan:
        """How the network may be split."""
        c = self.config
        return wan_plan(image=c.image_branch, control=c.control_dim is not None)

    def cache_specs(self, batch_size: int) -> dict[str, KVCacheSpec]:
        """One KV cache per block."""
        return {SELF_ATTENTION: self.cache_spec(batch_size)}

    def example_context(self, batch_size: int) -> dict[str, Any]:
        """Zeros for ``initialize_cache``."""
        c = self.config
        context = {}
        if c.text_dim:
            context["text"] = torch.zeros(
                (batch_size, c.text_len, c.text_dim), dtype=torch.float32, device="cpu"
            )
        if c.image_dim is not None:
            context["image_tokens"] = torch.zeros(
                batch_size, c.image_len, c.image_dim, dtype=torch.float32, device="cpu"
            )
        if c.condition_channels:
            size = (batch_size, c.condition_channels, 1, c.latent_height, c.latent_width)
            context["condition"] = torch.zeros(size, dtype=torch.float32, device="cpu")
        return context

    def example_control(self, batch_size: int) -> Any:
        """Zeros ``[B, L, control_dim]``."""
        c = self.config
        if c.control_dim is None:
            return None
        return torch.zeros(
            batch_size,
            c.len_t * c.tokens_per_frame,
            c.control_dim,
            dtype=torch.float32,
            device="cpu",
        )

    def project_context(self, text: Tensor | None, image_tokens: Tensor | None) -> WanContext:
        """Cross-attention keys and values of every block.

        Args:
            text: ``[B, S, text_dim]`` with ``S <= text_len``; padded with zero rows.
            image_tokens: ``[B, S, image_dim]``, for models with image cross-attention.

        Raises:
            ValueError: a shape that does not fit the config.
        """
        c = self.config
        if (image_tokens is None) != (c.image_dim is None):
            wanted = "needs" if c.image_dim is not None else "takes no"
            raise ValueError(f"This transformer {wanted} image tokens (image_dim={c.image_dim}).")
        image = None
        if image_tokens is not None:
            if image_tokens.shape[-1] != c.image_dim:
                raise ValueError(
                    f"Image tokens must be [B, S, {c.image_dim}] (image_dim={c.image_dim}); "
                    f"got {list(image_tokens.shape)}."
                )
            image = self.img_emb(image_tokens.to(self.device, self.dtype))
        if text is not None and not c.text_dim:
            raise ValueError("This transformer takes no text (text_dim=0).")
        words, image = (self.embed_text(text), image) if c.text_dim else (image, None)
        return WanContext([block.cross_attn.project(words, image) for block in self.blocks])

    def embed_text(self, text: Tensor | None) -> Tensor:
        """Pad text embeddings ``[B, S, text_dim]`` with zero rows and embed all rows."""
        c = self.config
        shape = [] if text is None else list(text.shape)
        if text is None or len(shape) != 3 or shape[2] != c.text_dim or shape[1] > c.text_len:
            raise ValueError(
                f"Text embeddings must be [B, at most {c.text_len}, {c.text_dim}]; "
                f"got {shape or None}."
            )
        padded = F.pad(text.to(self.device, self.dtype), (0, 0, 0, c.text_len - text.shape[1]))
        return self.text_embedding(padded)

    def embed_control(self, control: Any) -> Any:
        """Embed a control signal ``[B, L, control_dim]``; it is added to the tokens."""
        if (control is None) != (self.config.control_dim is None):
            wanted = "needs" if self.config.control_dim is not None else "takes no"
            raise ValueError(
                f"This transformer {wanted} control input (control_dim={self.config.control_dim})."
            )
        if control is None:
            return None
        if control.shape[-1] != self.config.control_dim:
            raise ValueError(
                f"The control input must be [B, L, {self.config.control_dim}] "
                f"(control_dim={self.config.control_dim}); got {list(control.shape)}."
            )
        return self.control_embedding(to_device(control, self.device).to(self.dtype))

    def block_controls(self, inputs: StepInputs, state: CausalState) -> Sequence[Any]:
        """Inputs of each block's hooks: its part of the control, and its own caches.

        Here nothing.

        Args:
            inputs: whose ``control`` is what ``embed_control`` returned.
            state: whose ``caches`` are found by the globs of ``cache_specs``.
        """
        return [None] * len(self.blocks)

    def add_control(self, x: Tensor, control: Any) -> Tensor:
        """Add an embedded control to the tokens ``[B, L, dim]`` before the first block."""
        if control is None:
            return x
        if control.shape[1] not in (1, x.shape[1]):
            raise ValueError(
                f"The control input has {control.shape[1]} tokens, the chunk has {x.shape[1]}: "
                "give the control of all frames of this AR step, and of no others."
            )
        return x + control

    def forward(
        self,
        latent: Tensor,
        modulation: Tensor,
        inputs: StepInputs,
        state: CausalState,
        write_only: bool = False,
    ) -> Tensor:
        """The network call; see the contract.

        Args:
            latent: ``[B, C, T, H, W]``.
            modulation: from ``modulations``.
            inputs: rotations ``[L, D/2, 2]``, condition and control.
            state: keys and values; the chunk's slots are overwritten.
            write_only: stop when the last block's keys and values are in the cache.

        Returns:
            ``[B, out_channels, T, H, W]`` float32; an empty tensor if ``write_only``.
        """
        if inputs.rotations is None:
            raise ValueError("The state is not prepared for a chunk; call begin_step first.")
        if inputs.condition is not None:
            latent = torch.cat([latent, inputs.condition.to(latent)], dim=1)
        patches = self.patch_embedding(latent.to(self.dtype))
        x = self.flatten_tokens(patches).to(self.residual_dtype)
        x = self.add_control(x, inputs.control)
        size, rope = patches.shape[2:], inputs.rotations
        rows_of = modulation_rows(self, modulation, size)
        *layers, last = zip(
            self.blocks,
            range(len(self.blocks)),
            state.context.pairs,
            state.caches[SELF_ATTENTION],
            self.block_controls(inputs, state),
            strict=True,
        )
        for block, place, context, kv_cache, control in layers:
            x = block(x, rows_of(place), rope, context, kv_cache, control)
        block, place, context, kv_cache, control = last
        rows = rows_of(place)
        if write_only and kv_cache is not None:
            block.write(x, rows, rope, context, kv_cache, control)
            return x.new_empty(0)
        x = block(x, rows, rope, context, kv_cache, control)
        x = self.head(x, rows_of(len(self.blocks)))
        return self.unpatchify(x, *size).float()

    def modulations(self, timestep: Tensor) -> Tensor:
        """Modulation of every block and of the head by timesteps.

        Args:
            timestep: ``[B]``, ``[B, T]`` or ``[B, L]``.

        Returns:
            One timestep for all tokens: ``[B, 1, 6 * num_layers + 2, dim]`` float32, six rows a
            block, two of the head. Several: ``[B, T or L, 7, dim]`` float32, to which each block
            and the head add their own: six rows of the projection, one of the embedding.
        """
        several = timestep if timestep.ndim == 2 else timestep[:, None]
        embedded = self.time_embedding(
            timestep_embedding(several, self.config.freq_dim).to(self.residual_dtype)
        )
        projected = self.time_projection(embedded).unflatten(-1, (6, -1)).float()
        if several.shape[1] > 1:
            return torch.cat([projected, embedded.float().unsqueeze(2)], dim=2)
        of_blocks = [block.modulation.float() + projected for block in self.blocks]
        return torch.cat(
            [*of_blocks, self.head.modulation.float() + embedded.float().unsqueeze(2)], dim=2
        )

    def unpatchify(self, patches: Tensor, frames: int, rows: int, columns: int) -> Tensor:
        """Undo patching: ``[B, L, kt*kh*kw*C]`` (channels last) to ``[B, C, T, H, W]``."""
        kt, kh, kw = self.config.patch_size
        x = patches.unflatten(1, (frames, rows, columns)).unflatten(-1, (kt, kh, kw, -1))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
