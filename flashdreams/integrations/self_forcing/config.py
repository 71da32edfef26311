"""Configs of Self-Forcing: streaming text-to-video on Wan 2.1 1.3B."""

from flashdreams.infra.config import derive_config
from flashdreams.infra.runner_configs import by_name, with_pipeline
from flashdreams.infra.video_runner import TextToVideoRunnerConfig
from flashdreams.models.wan.config import (
    FOUR_STEP_PIPELINE_1_3B,
    TAEHV_DECODER,
    TINY_TEXT_ENCODER,
    TINY_TRANSFORMER,
    TINY_VAE_DECODER,
    training_checkpoint,
)

CHECKPOINT = training_checkpoint(
    "gdhe17/Self-Forcing",
    "checkpoints/self_forcing_dmd.pt",
    "2f8b779212da279d212c22a509b66ad6552f350e",
    select=("generator_ema", "generator"),
    license="CC BY-NC-SA 4.0",
)

PIPELINE = derive_config(
    FOUR_STEP_PIPELINE_1_3B,
    name="self-forcing-wan2.1-t2v-1.3b",
    diffusion_model=dict(transformer=dict(checkpoint=CHECKPOINT)),
)

TAEHV_PIPELINE = derive_config(PIPELINE, name=f"{PIPELINE.name}-taehv", decoder=TAEHV_DECODER)

REROPE_PIPELINE = derive_config(
    PIPELINE,
    name=f"{PIPELINE.name}-sink5-window7-rerope",
    diffusion_model=dict(transformer=dict(sink_size_t=5, window_size_t=7, relative_rope=True)),
)

TINY_PIPELINE = derive_config(
    PIPELINE,
    name="self-forcing-tiny-random",
    text_encoder=TINY_TEXT_ENCODER,
    diffusion_model=dict(
        transformer=derive_config(TINY_TRANSFORMER, len_t=3, window_size_t=7, sink_size_t=2)
    ),
    decoder=TINY_VAE_DECODER,
)

RUNNER = TextToVideoRunnerConfig(
    runner_name=PIPELINE.name,
    description="Self-Forcing on Wan 2.1 1.3B: streaming text-to-video at 480x832.",
    pipeline=PIPELINE,
)

TAEHV_RUNNER = with_pipeline(
    RUNNER, TAEHV_PIPELINE, "Self-Forcing with the tiny decoder, for speed."
)

REROPE_RUNNER = with_pipeline(
    RUNNER, REROPE_PIPELINE, "Self-Forcing with 5 sink and 7 window frames, for long rollouts."
)

TINY_RUNNER = with_pipeline(
    RUNNER,
    TINY_PIPELINE,
    "Self-Forcing at toy size with random weights: noise, in seconds.",
    total_blocks=7,
)

RUNNER_CONFIGS = by_name(RUNNER, TAEHV_RUNNER, REROPE_RUNNER, TINY_RUNNER)
