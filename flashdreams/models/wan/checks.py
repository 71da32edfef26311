"""What the config of a Wan transformer has to fulfil."""

from typing import TYPE_CHECKING, get_args

from flashdreams.attention.quantized import KVStorage
from flashdreams.infra.ranges import check_range

if TYPE_CHECKING:
    from flashdreams.models.wan.transformer import WanTransformerConfig


def check_config(config: "WanTransformerConfig") -> None:
    """Refuse what is out of range, does not fit together or excludes each other.

    Raises:
        ValueError: says which, what is allowed, and what to set instead.
    """
    c = config
    check_range(c, "dim", "ffn_dim", "num_heads", "num_layers", "out_channels", "freq_dim")
    check_range(c, "text_dim", "text_len", "image_dim", "image_len", "control_dim")
    check_range(c, "condition_channels", "window_size_t", "sink_size_t", "eps", least=0)
    if c.dim % c.num_heads or (c.dim // c.num_heads) % 2:
        raise ValueError(
            f"dim={c.dim} over num_heads={c.num_heads} must give an even head size; "
            f"got {c.dim / c.num_heads:g}."
        )
    _check_patching(c)
    if c.residual_dtype not in (None, "float32"):
        raise ValueError(
            f"residual_dtype={c.residual_dtype!r} is unknown; allowed are 'float32', and None, "
            f"which means dtype={c.dtype!r}."
        )
    if c.streaming and c.window_size_t < c.len_t:
        raise ValueError(
            f"window_size_t={c.window_size_t} must hold the current chunk of "
            f"len_t={c.len_t} latent frames; use at least {c.len_t}."
        )
    allowed = get_args(KVStorage) if c.streaming else ("native",)
    if c.kv_cache_dtype not in allowed:
        raise ValueError(
            f"kv_cache_dtype={c.kv_cache_dtype!r} with streaming={c.streaming}: "
            f"allowed is {', '.join(map(repr, allowed))}."
        )


def _check_patching(config: "WanTransformerConfig") -> None:
    if config.patch_size[0] != 1:
        raise ValueError(
            f"patch_size={config.patch_size}: a token stands for one latent frame; begin with 1."
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
