"""Configs of LingBot-World: a camera steered through a generated world."""

from typing import Any

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.diffusion.scheduler.fm_unipc import FlowUniPCSchedulerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.infra.runner_configs import by_name, with_pipeline
from flashdreams.models.wan.config import (
    NEGATIVE_PROMPT,
    TAEHV_DECODER,
    TINY_NEGATIVE_PROMPT,
    TINY_TEXT_ENCODER,
    TINY_VAE_DECODER,
    TINY_VAE_IMAGE_ENCODER,
    UMT5_TEXT_ENCODER,
    WAN_VAE_DECODER,
    WAN_VAE_IMAGE_ENCODER,
)
from flashdreams.runtime.checkpoint import CheckpointConfig

from .clip_runner import CameraToClipRunnerConfig
from .encoder import CameraEncoderConfig, ImageConditionEncoderConfig
from .runner import CameraToVideoRunnerConfig
from .transformer import LingBotExpertsConfig, LingBotTransformerConfig

SHARD_INDEX = "diffusion_pytorch_model.safetensors.index.json"

FAST_REPO = "robbyant/lingbot-world-fast"
BASE_REPO = "robbyant/lingbot-world-base-cam"

REVISIONS = {FAST_REPO: "main", BASE_REPO: "main"}
"""Revision of the official repositories: a branch, since no commit is known."""


MAX_PIXELS = 480 * 832
"""Most pixels of a frame: 464x832 after an image of 16:9.
Source: Robbyant/lingbot-world, README.md (``--size 480*832``) and wan/image2video_fast.py."""


def lingbot_checkpoint(repo: str, folder: str = "") -> CheckpointConfig:
    """A sharded transformer in a folder of an official repository; all are of the same size."""
    return CheckpointConfig(
        source=repo,
        file=f"{folder}{SHARD_INDEX}",
        revision=REVISIONS[repo],
        size_bytes=74_177_331_456,
    )


NETWORK: dict[str, Any] = dict(
    dtype="bfloat16",
    residual_dtype="float32",
    dim=5120,
    ffn_dim=13824,
    num_heads=40,
    num_layers=40,
    condition_channels=20,
    camera_channels=6,
    latent_height=58,
    latent_width=104,
)
"""Fields of every network: camera control, 18.5B parameters, 464x832 pixels."""

TRANSFORMER = LingBotTransformerConfig(
    **NETWORK,
    len_t=3,
    window_size_t=63,
    sink_size_t=0,
    checkpoint=lingbot_checkpoint(FAST_REPO),
)
"""Source: robbyant/lingbot-world-fast."""

BASE_TRANSFORMER = LingBotExpertsConfig(
    **NETWORK,
    streaming=False,
    len_t=41,
    window_size_t=41,
    boundary=0.947,
    checkpoint=lingbot_checkpoint(BASE_REPO, "high_noise_model/"),
    low_noise_checkpoint=lingbot_checkpoint(BASE_REPO, "low_noise_model/"),
)
"""Two networks, 161 frames at once.
Source: Robbyant/lingbot-world, wan/image2video.py and README.md (161 frames at 16 per second)."""

# Schedule and chunks: Robbyant/lingbot-world, wan/image2video_fast.py.
PIPELINE = StreamInferencePipelineConfig(
    name="lingbot-world-fast",
    text_encoder=UMT5_TEXT_ENCODER,
    image_encoder=ImageConditionEncoderConfig(vae=WAN_VAE_IMAGE_ENCODER),
    encoder=CameraEncoderConfig(),
    diffusion_model=DiffusionModelConfig(
        transformer=TRANSFORMER,
        scheduler=FlowMatchSchedulerConfig(
            denoising_timesteps=(1000.0, 821.0, 642.0, 321.0),
            shift=10.0,
            sigma_max=0.999,
            timestep_dtype="int64",
        ),
    ),
    decoder=WAN_VAE_DECODER,
)

BASE_PIPELINE = derive_config(
    PIPELINE,
    name="lingbot-world-base",
    encoder=dict(pose_mode="offline", len_t=BASE_TRANSFORMER.len_t),
    diffusion_model=dict(
        transformer=BASE_TRANSFORMER,
        scheduler=FlowUniPCSchedulerConfig(num_inference_steps=70, shift=10.0),
        guidance_scale=5.0,
    ),
)
"""Both branches of guidance see the camera. Source: Robbyant/lingbot-world, wan/image2video.py."""

TAEHV_PIPELINE = derive_config(
    PIPELINE,
    name="lingbot-world-fast-taehv-window15-sink3",
    diffusion_model=dict(transformer=dict(window_size_t=15, sink_size_t=3)),
    decoder=TAEHV_DECODER,
)

TINY_NETWORK: dict[str, Any] = dict(
    residual_dtype="float32",
    dim=48,
    ffn_dim=96,
    num_heads=4,
    num_layers=2,
    condition_channels=20,
    freq_dim=32,
    text_dim=32,
    text_len=32,
    latent_height=8,
    latent_width=14,
)
"""Fields of a network at toy size."""

TINY_PIPELINE = derive_config(
    PIPELINE,
    name="lingbot-world-tiny-random",
    text_encoder=TINY_TEXT_ENCODER,
    image_encoder=ImageConditionEncoderConfig(vae=TINY_VAE_IMAGE_ENCODER, latent_frames=6),
    diffusion_model=dict(
        transformer=LingBotTransformerConfig(
            **TINY_NETWORK, len_t=3, window_size_t=6, sink_size_t=3
        )
    ),
    decoder=TINY_VAE_DECODER,
)

BASE_TINY_PIPELINE = derive_config(
    BASE_PIPELINE,
    name="lingbot-world-base-tiny-random",
    text_encoder=TINY_TEXT_ENCODER,
    image_encoder=TINY_PIPELINE.image_encoder,
    encoder=dict(len_t=6),
    diffusion_model=dict(
        transformer=LingBotExpertsConfig(
            **TINY_NETWORK,
            streaming=False,
            len_t=6,
            window_size_t=6,
            boundary=BASE_TRANSFORMER.boundary,
        ),
        scheduler=dict(num_inference_steps=6),
    ),
    decoder=TINY_VAE_DECODER,
)

RUNNER = CameraToVideoRunnerConfig(
    runner_name=PIPELINE.name,
    description="LingBot-World: steer a camera through a world that starts from your image.",
    pipeline=PIPELINE,
    max_pixels=MAX_PIXELS,
)

TAEHV_RUNNER = with_pipeline(
    RUNNER,
    TAEHV_PIPELINE,
    "LingBot-World with a short window and the tiny decoder, for speed and memory.",
)

TINY_RUNNER = with_pipeline(
    RUNNER,
    TINY_PIPELINE,
    "LingBot-World at toy size with random weights: noise, in seconds.",
    total_blocks=4,
    actions="w20 l8 wl17",
    test_image=True,
    max_pixels=64 * 116,  # as in the full-size models, 64x112 after an image of 16:9
)

BASE_RUNNER = CameraToClipRunnerConfig(
    runner_name=BASE_PIPELINE.name,
    description="LingBot-World base: 161 frames at once, with or without a camera; two 18.5B nets.",
    pipeline=BASE_PIPELINE,
    max_pixels=MAX_PIXELS,
    negative_prompt=(
        f"画面突变，{NEGATIVE_PROMPT}，镜头晃动，画面闪烁，模糊，噪点，水印，签名，文字，变形，扭曲，液化，"
        "不合逻辑的结构，卡顿，PPT幻灯片感，过暗，欠曝，低对比度，霓虹灯光感，过度锐化，3D渲染感，人物，行人，"
        "游客，身体，皮肤，肢体，面部特征，汽车，电线"
    ),  # Robbyant/lingbot-world, wan/configs/wan_i2v_A14B.py
    total_blocks=1,
)

BASE_TINY_RUNNER = with_pipeline(
    BASE_RUNNER,
    BASE_TINY_PIPELINE,
    "LingBot-World base at toy size with random weights: noise, in seconds.",
    negative_prompt=TINY_NEGATIVE_PROMPT,
    test_image=True,
    max_pixels=64 * 116,  # as in the full-size models, 64x112 after an image of 16:9
)

RUNNER_CONFIGS = by_name(RUNNER, TAEHV_RUNNER, BASE_RUNNER, TINY_RUNNER, BASE_TINY_RUNNER)
