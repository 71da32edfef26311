"""The config that every network of the causal engine has."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from flashdreams.attention.quantized import KVStorage
from flashdreams.infra.diffusion.transformer import TransformerConfig
from flashdreams.infra.ranges import check_range

Precision = Literal["native", "fp8", "fp8_gemm"]
"""What attention over the KV cache is computed from, numbers of ``dtype`` or e4m3; ``"fp8_gemm"``:
wide linear layers from e4m3, too."""


@dataclass(kw_only=True)
class CausalTransformerConfig(TransformerConfig):
    """Config fields of a network that the causal engine reads."""

    dim: int = 1536
    """Width of the token stream."""
    num_heads: int = 12
    """Attention heads; must divide ``dim``."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames (always 1), rows and columns that make up one token."""
    condition_channels: int = 0
    """Channels of a condition per latent frame (image-to-video: 4 mask + 16 image latent)."""
    prediction: Literal["flow", "x0"] = "flow"
    """Output of the network; an ``"x0"`` output is converted to the flow."""
    streaming: bool = True
    """Keep a KV cache from chunk to chunk; False for a bidirectional model, which has one chunk."""
    window_size_t: int = 21
    """Latent frames of the sliding window, the current chunk included, the sink not."""
    sink_size_t: int = 0
    """First latent frames of the rollout that are never evicted."""
    relative_rope: bool = False
    """Cache-relative positions: the sink is always placed directly before the window."""
    rewritten_sink: Literal["rewritten", "kept", "moved"] = "rewritten"
    """The sink when the window is recomputed mid-rollout: also recomputed; kept under the old
    prompt; or filled with the frames that are now the oldest of the last
    ``sink_size_t + window_size_t``. As long as these include frame 0, all is recomputed."""
    shot_sink_size_t: int = 0
    """First latent frames of a shot's first chunk that are pinned in the window until the next shot
    has some; see `CausalTransformer.begin_shot`."""
    shot_rope_offset: float = 0.0
    """Latent frames by which positions jump at the start of a shot."""
    shot_clean_recache: bool = False
    """In the clean pass of a shot's first chunk, only the sink is visible before it."""
    precision: Precision = "native"
    """``"fp8"``: KV cache and queries are e4m3 with a fixed scale per head, and FlashAttention-3
    reads them as they are, which is faster and less exact. Needs a Hopper GPU; a CPU dequantizes
    them, to look at the error. ``"fp8_gemm"``: also the matmuls of wide linear layers are FP8, for
    families whose ``precisions`` name it."""
    kv_cache_dtype: Literal["native", "int8"] = "native"
    """How cached keys and values are stored: ``"native"`` as ``precision`` says; ``"int8"`` takes a
    byte each, at the cost of accuracy and time to dequantize them."""

    precisions: ClassVar[tuple[str, ...]] = ("native", "fp8")
    """What ``precision`` may be in this family."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "dim", "num_heads")
        check_range(self, "condition_channels", "window_size_t", "sink_size_t", least=0)
        check_range(self, "shot_sink_size_t", least=0)
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"dim={self.dim} over num_heads={self.num_heads} must give an even head size; "
                f"got {self.dim / self.num_heads:g}."
            )
        _check_patching(self)
        pinned = min(self.shot_sink_size_t, self.len_t)
        if (self.streaming or pinned) and self.window_size_t < self.len_t + pinned:
            also = f" and the {pinned} pinned frames of a shot" * (pinned > 0)
            raise ValueError(
                f"window_size_t={self.window_size_t} must hold the current chunk of "
                f"len_t={self.len_t} latent frames{also}; use at least {self.len_t + pinned}."
            )
        _check_shots(self)
        _check_precision(self)

    @property
    def kv_storage(self) -> KVStorage:
        """How self-attention's keys and values are stored."""
        return self.kv_cache_dtype if self.precision == "native" else "fp8"

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of one latent frame."""
        _, rows, columns = self.patch_size
        return self.latent_height // rows, self.latent_width // columns

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame."""
        rows, columns = self.token_grid
        return rows * columns


def _check_precision(config: CausalTransformerConfig) -> None:
    if config.kv_cache_dtype == "fp8":
        raise ValueError(
            "kv_cache_dtype='fp8' was removed in 0.2: use precision='fp8', whose attention reads "
            "the cache as it is, or kv_cache_dtype='int8' where that cannot run."
        )
    allowed = ("native", "int8") if config.streaming else ("native",)
    if config.kv_cache_dtype not in allowed:
        raise ValueError(
            f"kv_cache_dtype={config.kv_cache_dtype!r} with streaming={config.streaming}: "
            f"allowed is {', '.join(map(repr, allowed))}."
        )
    precision = config.precision
    if precision not in config.precisions:
        known = ", ".join(map(repr, config.precisions))
        raise ValueError(f"precision={precision!r} is not for this network; allowed: {known}.")
    if precision != "native" and not config.streaming:
        raise ValueError(
            f"precision={precision!r} is for a KV cache, and a model with streaming=False has "
            "none. Use precision='native'."
        )
    if precision != "native" and config.kv_cache_dtype != "native":
        raise ValueError(
            f"precision={precision!r} says how keys and values are stored, too; got kv_cache_dtype="
            f"{config.kv_cache_dtype!r}. Omit that, or use precision='native'."
        )


def _check_shots(config: CausalTransformerConfig) -> None:
    if config.rewritten_sink not in ("rewritten", "kept", "moved"):
        raise ValueError(
            f"rewritten_sink={config.rewritten_sink!r} is unknown; allowed are 'rewritten', "
            "'kept' and 'moved'."
        )
    if config.relative_rope and (config.shot_sink_size_t or config.shot_rope_offset):
        raise ValueError(
            "relative_rope renumbers the frames of the window, so it goes with neither "
            "shot_sink_size_t nor shot_rope_offset; set them to 0."
        )


def _check_patching(config: CausalTransformerConfig) -> None:
    if config.patch_size[0] != 1:
        raise ValueError(
            f"patch_size={config.patch_size}: a token covers one latent frame; begin with 1."
        )
    sizes = (config.latent_height, config.latent_width)
    names = ("latent_height", "latent_width")
    for name, size, patch in zip(names, sizes, config.patch_size[1:], strict=True):
        if size % patch:
            below = max(patch, size // patch * patch)
            raise ValueError(
                f"{name}={size} is not a multiple of the patch size {patch}; "
                f"the nearest that are: {below}, {below + patch}."
            )
