"""The CLIP image encoder that Wan's image-to-video models condition on."""

# Shapes: B images, S = 1 + (image_size / patch_size)^2 tokens, the class token first, C = dim,
# N heads, D channels of a head.

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.infra.encoder.base import Encoder, EncoderConfig
from flashdreams.infra.ranges import check_range

CLIP_IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of red, green and blue in [0, 1]. Source: OpenAI CLIP, preprocessing of ViT."""
CLIP_IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of the same. Source: as above."""

UNUSED_TENSORS = (r"textual\.", r"log_scale$")
"""Tensors of the official file beside the image tower, for ``CheckpointConfig.ignore``."""


@dataclass(kw_only=True)
class CLIPImageEncoderConfig(EncoderConfig):
    """Image tower of CLIP; the defaults are those of open-clip's XLM-Roberta ViT-H/14."""

    _target: type["CLIPImageEncoder"] = field(default_factory=lambda: CLIPImageEncoder)

    image_size: int = 224
    """Height and width in pixels to which all images are resized."""

    patch_size: int = 14
    """Height and width of a patch in pixels."""

    dim: int = 1280
    """Channels of a token."""

    mlp_ratio: int = 4
    """Channels inside the feed-forward layers, in multiples of ``dim``."""

    out_dim: int = 1024
    """Channels of the shared space of text and images, which Wan does not use."""

    num_heads: int = 16
    """Attention heads."""

    num_layers: int = 32
    """Blocks in the file; the last is not run."""

    eps: float = 1e-5
    """Added to the variance in layer norms."""

    def __post_init__(self) -> None:
        check_range(self, "image_size", "patch_size", "dim", "mlp_ratio", "out_dim", "num_heads")
        check_range(self, "num_layers")
        check_range(self, "eps", least=0)


class CLIPImageEncoder(Encoder):
    """Images to the tokens before the tower's last block, the input of Wan's image-to-video models.

    The names are those of ``models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth``; its text
    tower is dropped by ``CheckpointConfig(ignore=UNUSED_TENSORS)``. The last block, the closing
    norm and the projection are in the file, so they are loaded, but not run.

    Source: Wan-Video/Wan2.1, wan/modules/clip.py (``use_31_block``); CLIP, arXiv:2103.00020.
    """

    config: CLIPImageEncoderConfig

    def __init__(self, config: CLIPImageEncoderConfig) -> None:
        super().__init__(config)
        if config.image_size % config.patch_size or config.dim % config.num_heads:
            raise ValueError(
                f"image_size={config.image_size} must be divisible by patch_size="
                f"{config.patch_size}, and dim={config.dim} by num_heads={config.num_heads}"
            )
        self.visual = _VisionTransformer(config)
        self.to(self.dtype)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        """Encode images.

        Args:
            input: ``[B, 3, height, width]`` or ``[3, height, width]``, RGB in [-1, 1], any floating
                dtype and any size.

        Returns:
            ``[B, S, C]`` in the encoder's dtype; 257 x 1280 for ViT-H/14.

        Raises:
            ValueError: another shape, or pixels that are not floating point.
        """
        return self.visual(self.preprocess(input).to(self.dtype))

    def example_input(self) -> Tensor:
        """A grey image ``[1, 3, image_size, image_size]``."""
        return torch.zeros(
            1, 3, self.config.image_size, self.config.image_size, dtype=torch.float32, device="cpu"
        )

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize images to a square without cropping, and normalise their colours.

        Args:
            images: as in `forward`.

        Returns:
            ``[B, 3, image_size, image_size]`` float32, on the encoder's device.

        Raises:
            As `forward`.
        """
        if images.ndim not in (3, 4) or images.shape[-3] != 3 or not images.is_floating_point():
            raise ValueError(
                "CLIP takes RGB images [B, 3, height, width] of floating point in [-1, 1], "
                f"got {images.dtype} {list(images.shape)}"
            )
        pixels = images if images.ndim == 4 else images[None]
        pixels = pixels.to(self.device, torch.float32)
        size = (self.config.image_size, self.config.image_size)
        pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False)
        mean, std = (
            torch.tensor(values, device=self.device, dtype=torch.float32).view(3, 1, 1)
            for values in (CLIP_IMAGE_MEAN, CLIP_IMAGE_STD)
        )
        return (pixels * 0.5 + 0.5 - mean) / std


class _VisionTransformer(nn.Module):
    def __init__(self, config: CLIPImageEncoderConfig) -> None:
        super().__init__()
        dim, patch = config.dim, config.patch_size
        tokens = 1 + (config.image_size // patch) ** 2
        scale = dim**-0.5
        self.patch_embedding = nn.Conv2d(3, dim, patch, stride=patch, bias=False)
        self.cls_embedding = nn.Parameter(scale * torch.randn(1, 1, dim))
        self.pos_embedding = nn.Parameter(scale * torch.randn(1, tokens, dim))
        self.pre_norm = _LayerNorm(dim, config.eps)
        self.transformer = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.post_norm = _LayerNorm(dim, config.eps)
        self.head = nn.Parameter(scale * torch.randn(dim, config.out_dim))

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, 3, height, width]`` normalised pixels to ``[B, S, C]``."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_embedding.expand(len(patches), -1, -1), patches], dim=1)
        x = self.pre_norm(x + self.pos_embedding)
        for block in self.transformer[:-1]:
            x = block(x)
        return x


class _Block(nn.Module):
    def __init__(self, config: CLIPImageEncoderConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm1 = _LayerNorm(dim, config.eps)
        self.attn = _Attention(dim, config.num_heads)
        self.norm2 = _LayerNorm(dim, config.eps)
        self.mlp = nn.Sequential(
            nn.Linear(dim, dim * config.mlp_ratio),
            nn.GELU(),
            nn.Linear(dim * config.mlp_ratio, dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, N, S, D]
            for part in self.to_qkv(x).chunk(3, dim=-1)
        )
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class _LayerNorm(nn.LayerNorm):
    """Layer norm that computes in float32 and keeps the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).type_as(
            input
        )
