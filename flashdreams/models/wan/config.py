"""Published sizes and weights of the Wan family, and toy-size variants."""

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.models.clip import UNUSED_TENSORS, CLIPImageEncoderConfig
from flashdreams.models.prompts import HashTextEncoderConfig
from flashdreams.models.taehv import DECODER_IGNORES as TAEHV_DECODER_IGNORES
from flashdreams.models.taehv import TAEHVDecoderConfig
from flashdreams.models.umt5 import UMT5TextEncoderConfig
from flashdreams.models.wan.image import WanImageConditionEncoderConfig
from flashdreams.models.wan.transformer import WanTransformerConfig
from flashdreams.models.wan.vae import (
    DECODER_IGNORES,
    ENCODER_IGNORES,
    WanVAEDecoderConfig,
    WanVAEImageEncoderConfig,
)
from flashdreams.models.wan.vae22 import WanVAE22DecoderConfig, WanVAE22ImageEncoderConfig
from flashdreams.runtime.checkpoint import CheckpointConfig

# Sizes on disk are those of the tensors, the files are a little larger.

T2V_1_3B_REPO = "Wan-AI/Wan2.1-T2V-1.3B"
T2V_14B_REPO = "Wan-AI/Wan2.1-T2V-14B"
I2V_14B_480P_REPO = "Wan-AI/Wan2.1-I2V-14B-480P"

TI2V_5B_REPO = "Wan-AI/Wan2.2-TI2V-5B"

REVISIONS = {
    T2V_1_3B_REPO: "37ec512624d61f7aa208f7ea8140a131f93afc9a",
    T2V_14B_REPO: "a064a6c71f5be440641209c07bf2a5ce7a2ff5e4",
    I2V_14B_480P_REPO: "6b73f84e66371cdfe870c72acd6826e1d61cf279",
}
"""Commit of each official repository."""


def wan21_checkpoint(
    repo: str, file: str, size_bytes: int, ignore: tuple[str, ...] = ()
) -> CheckpointConfig:
    """A file of an official Wan 2.1 repository, at the commit in ``REVISIONS``."""
    return CheckpointConfig(
        source=repo,
        file=file,
        revision=REVISIONS[repo],
        ignore=ignore,
        size_bytes=size_bytes,
        license="Apache-2.0",
    )


def wan21_vae_checkpoint(ignore: tuple[str, ...]) -> CheckpointConfig:
    """The autoencoder, the same file in every Wan 2.1 repository, without one of its halves."""
    return wan21_checkpoint(T2V_1_3B_REPO, "Wan2.1_VAE.pth", 507_570_124, ignore)


def training_checkpoint(
    repo: str, file: str, revision: str, select: tuple[str, str], license: str | None = None
) -> CheckpointConfig:
    """A 1.3B transformer in a file as Self-Forcing's training code writes it.

    Args:
        repo: Hugging Face repository.
        file: in the repository.
        revision: its commit.
        select: ``"generator"`` and ``"generator_ema"``, the one to take first.
        license: of the weights.
    """
    return CheckpointConfig(
        source=repo,
        file=file,
        revision=revision,
        select=select,
        strip_prefixes=("model.", "net."),
        size_bytes=5_675_987_200,
        license=license,
    )


WAN_TRANSFORMER_1_3B = WanTransformerConfig(dtype="bfloat16")
"""Text-to-video, 1.3B parameters. Source: Wan-AI/Wan2.1-T2V-1.3B, config.json."""

WAN_TRANSFORMER_14B = derive_config(
    WAN_TRANSFORMER_1_3B, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40
)
"""Text-to-video, 14B parameters. Source: Wan-AI/Wan2.1-T2V-14B, config.json."""

WAN_TRANSFORMER_I2V_14B = derive_config(WAN_TRANSFORMER_14B, condition_channels=20, image_dim=1280)
"""Image-to-video, 16B parameters with the image branch. Source: Wan-AI/Wan2.1-I2V-14B-480P."""

WAN_TRANSFORMER_TI2V_5B = derive_config(
    WAN_TRANSFORMER_1_3B,
    dim=3072,
    ffn_dim=14336,
    num_heads=24,
    in_channels=48,
    out_channels=48,
    latent_height=44,
    latent_width=80,
)
"""Wan 2.2 text- and image-to-video, 5B parameters. Source: Wan-AI/Wan2.2-TI2V-5B."""

UMT5_TEXT_ENCODER = UMT5TextEncoderConfig(
    dtype="bfloat16",
    checkpoint=wan21_checkpoint(T2V_1_3B_REPO, "models_t5_umt5-xxl-enc-bf16.pth", 11_361_820_672),
    tokenizer=wan21_checkpoint(T2V_1_3B_REPO, "google/umt5-xxl/tokenizer.json", 16_837_417),
)
"""UMT5-XXL and its tokenizer; the same files in every Wan 2.1 repository."""

WAN_VAE_DECODER = WanVAEDecoderConfig(
    dtype="bfloat16", checkpoint=wan21_vae_checkpoint(DECODER_IGNORES)
)
"""Decoder of the Wan 2.1 autoencoder."""

WAN_VAE_IMAGE_ENCODER = WanVAEImageEncoderConfig(
    dtype="bfloat16", checkpoint=wan21_vae_checkpoint(ENCODER_IGNORES)
)
"""Encoder of the Wan 2.1 autoencoder."""

WAN_IMAGE_CONDITION_ENCODER = WanImageConditionEncoderConfig(
    dtype="bfloat16",
    vae=WAN_VAE_IMAGE_ENCODER,
    clip=CLIPImageEncoderConfig(
        dtype="float16",
        checkpoint=wan21_checkpoint(
            I2V_14B_480P_REPO,
            "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
            4_772_059_140,  # the file holds float32
            UNUSED_TENSORS,
        ),
    ),
)
"""Image latent, mask and CLIP tokens, for the Wan 2.1 image-to-video models."""

TAEHV_DECODER = TAEHVDecoderConfig(
    dtype="bfloat16",
    checkpoint=CheckpointConfig(
        # The file of this name in lightx2v/Autoencoders has the same shapes and other values.
        source=(
            "https://raw.githubusercontent.com/madebyollin/taehv/"
            "011dfc2112197741c540e0bdd5b7b67bcc930771/taew2_1.pth"
        ),
        sha256="d26151e76cdc2c9424bef988de874b33d9a53f30ef3060cd556c429c469c797e",
        ignore=TAEHV_DECODER_IGNORES,
        size_bytes=22_678_901,
        license="MIT (madebyollin/taehv)",
    ),
)
"""Tiny decoder for the latents of Wan 2.1."""


def wan22_checkpoint(file: str, size_bytes: int, ignore: tuple[str, ...] = ()) -> CheckpointConfig:
    """A file of the repository of Wan 2.2 TI2V 5B, read from its branch: no commit is pinned."""
    return CheckpointConfig(
        source=TI2V_5B_REPO, file=file, ignore=ignore, size_bytes=size_bytes, license="Apache-2.0"
    )


WAN22_VAE_DECODER = WanVAE22DecoderConfig(
    dtype="bfloat16", checkpoint=wan22_checkpoint("Wan2.2_VAE.pth", 2_818_754_672, DECODER_IGNORES)
)
"""Decoder of the Wan 2.2 autoencoder."""

WAN22_VAE_IMAGE_ENCODER = WanVAE22ImageEncoderConfig(
    checkpoint=wan22_checkpoint("Wan2.2_VAE.pth", 2_818_754_672, ENCODER_IGNORES)
)
"""Encoder of the Wan 2.2 autoencoder; in float32, for an image is one short pass."""

TAEHV22_DECODER = TAEHVDecoderConfig(
    dtype="bfloat16",
    latent_channels=48,
    patch_size=2,
    checkpoint=CheckpointConfig(
        source=(
            "https://raw.githubusercontent.com/madebyollin/taehv/"
            "1f14a568f24bf8811e0a0ac601613e04fc1581e8/taew2_2.pth"
        ),
        ignore=TAEHV_DECODER_IGNORES,
        size_bytes=22_836_216,
        license="MIT (madebyollin/taehv)",
    ),
)
"""Tiny decoder for the latents of Wan 2.2 TI2V 5B. No checksum of the file is known; the
commit in its URL identifies it."""

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""Negative prompt of the Wan models: what guidance leads away from, a constant of the release.
Source: Wan-Video/Wan2.1 and Wan2.2, wan/configs/shared_config.py."""

TINY_NEGATIVE_PROMPT = (
    "oversaturated, overexposed, still picture, frozen motion, grey cast, blurry, noise, "
    "compression artefacts, low quality, text, captions, watermark, logo, distorted faces, "
    "malformed hands, extra fingers, extra limbs, crowded background, people walking backwards"
)
"""Negative prompt of the toy-size methods, whose text encoder reads word by word."""

FOUR_STEP_PIPELINE_1_3B = StreamInferencePipelineConfig(
    name="wan2.1-t2v-1.3b-four-steps",
    text_encoder=UMT5_TEXT_ENCODER,
    diffusion_model=DiffusionModelConfig(
        transformer=derive_config(WAN_TRANSFORMER_1_3B, len_t=3, window_size_t=21, sink_size_t=0),
        scheduler=FlowMatchSchedulerConfig(
            denoising_timesteps=(1000.0, 750.0, 500.0, 250.0), shift=5.0
        ),
    ),
    decoder=WAN_VAE_DECODER,
)
"""Streaming text-to-video as Self-Forcing trains it: a base for configs that add the weights.

Source: guandeh17/Self-Forcing, configs/self_forcing_dmd.yaml and default_config.yaml; thu-ml/
Causal-Forcing uses the same.
"""

TINY_TRANSFORMER = WanTransformerConfig(
    dim=48,
    ffn_dim=96,
    num_heads=2,
    num_layers=2,
    freq_dim=32,
    text_dim=32,
    text_len=32,
    latent_height=4,
    latent_width=6,
)
"""A transformer for tests and laptops, with random weights."""

TINY_TEXT_ENCODER = HashTextEncoderConfig(text_len=32, text_dim=32)
"""Words to random rows, to go with ``TINY_TRANSFORMER``."""

TINY_VAE_DECODER = WanVAEDecoderConfig(dim=4)
"""The Wan autoencoder's decoder at toy width, with random weights."""

TINY_VAE22_DECODER = WanVAE22DecoderConfig(dim=4)
"""The Wan 2.2 autoencoder's decoder at toy width, with random weights."""

TINY_VAE22_IMAGE_ENCODER = WanVAE22ImageEncoderConfig(dim=4)
"""The Wan 2.2 autoencoder's encoder at toy width, with random weights."""

TINY_VAE_IMAGE_ENCODER = WanVAEImageEncoderConfig(dim=4)
"""The Wan autoencoder's encoder at toy width, with random weights."""

TINY_IMAGE_CONDITION_ENCODER = WanImageConditionEncoderConfig(
    vae=TINY_VAE_IMAGE_ENCODER,
    clip=CLIPImageEncoderConfig(image_size=28, dim=32, out_dim=16, num_heads=2, num_layers=2),
    latent_frames=3,
)
"""Image condition at toy size, with random weights."""
