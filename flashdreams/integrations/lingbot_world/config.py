"""Config literals of LingBot-World: a camera that is steered through a generated world."""

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.infra.runner import RunnerConfig
from flashdreams.models.wan.config import (
    TAEHV_DECODER,
    TINY_TEXT_ENCODER,
    TINY_VAE_DECODER,
    TINY_VAE_IMAGE_ENCODER,
    UMT5_TEXT_ENCODER,
    WAN_VAE_DECODER,
    WAN_VAE_IMAGE_ENCODER,
)
from flashdreams.runtime.checkpoint import CheckpointConfig

from .encoder import CameraEncoderConfig, ImageConditionEncoderConfig
from .runner import CameraToVideoRunnerConfig
from .transformer import LingBotTransformerConfig

SHARD_INDEX = "diffusion_pytorch_model.safetensors.index.json"

FAST_REPO = "robbyant/lingbot-world-fast"
ACT_REPO = "robbyant/lingbot-world-base-act"

REVISIONS = {FAST_REPO: "main", ACT_REPO: "main"}
"""Of each official repository; a branch, which may move: no commit is known."""


def lingbot_checkpoint(repo: str, size_bytes: int) -> CheckpointConfig:
    """The sharded transformer of an official repository."""
    return CheckpointConfig(
        source=repo, file=SHARD_INDEX, revision=REVISIONS[repo], size_bytes=size_bytes
    )


TRANSFORMER = LingBotTransformerConfig(
    dtype="bfloat16",
    residual_dtype="float32",
    dim=5120,
    ffn_dim=13824,
    num_heads=40,
    num_layers=40,
    condition_channels=20,
    camera_channels=6,
    len_t=3,
    window_size_t=63,
    sink_size_t=0,
    latent_height=58,
    latent_width=104,
    checkpoint=lingbot_checkpoint(FAST_REPO, 74_177_331_456),
)
"""Steered by the camera's path, 18.5B parameters, 464x832 pixels.
Source: robbyant/lingbot-world-fast."""

ACT_TRANSFORMER = derive_config(
    TRANSFORMER,
    camera_channels=7,
    checkpoint=lingbot_checkpoint(ACT_REPO, 74_182_574_336),
)
"""Steered by turns and keys; goes with ``CameraEncoderConfig(control_type="act")``.
Source: robbyant/lingbot-world-base-act."""

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

TAEHV_PIPELINE = derive_config(
    PIPELINE,
    name="lingbot-world-fast-taehv-window15-sink3",
    diffusion_model=dict(transformer=dict(window_size_t=15, sink_size_t=3)),
    decoder=TAEHV_DECODER,
)

TINY_PIPELINE = derive_config(
    PIPELINE,
    name="lingbot-world-tiny-random",
    text_encoder=TINY_TEXT_ENCODER,
    image_encoder=ImageConditionEncoderConfig(vae=TINY_VAE_IMAGE_ENCODER, latent_frames=6),
    diffusion_model=dict(
        transformer=LingBotTransformerConfig(
            residual_dtype="float32",
            dim=48,
            ffn_dim=96,
            num_heads=4,
            num_layers=2,
            condition_channels=20,
            freq_dim=32,
            text_dim=32,
            text_len=32,
            len_t=3,
            latent_height=8,
            latent_width=14,
            window_size_t=6,
            sink_size_t=3,
        )
    ),
    decoder=TINY_VAE_DECODER,
)

RUNNER = CameraToVideoRunnerConfig(
    runner_name=PIPELINE.name,
    description="LingBot-World: steer a camera through a world that begins with your image.",
    pipeline=PIPELINE,
)

TAEHV_RUNNER = derive_config(
    RUNNER,
    runner_name=TAEHV_PIPELINE.name,
    description="LingBot-World with a short window and the tiny decoder, for speed and memory.",
    pipeline=TAEHV_PIPELINE,
)

TINY_RUNNER = derive_config(
    RUNNER,
    runner_name=TINY_PIPELINE.name,
    description="LingBot-World at toy size with random weights: noise, in seconds.",
    pipeline=TINY_PIPELINE,
    total_blocks=4,
    actions="w20 l8 wl17",
    test_image=True,
)

RUNNER_CONFIGS: dict[str, RunnerConfig] = {
    runner.runner_name: runner for runner in (RUNNER, TAEHV_RUNNER, TINY_RUNNER)
}
