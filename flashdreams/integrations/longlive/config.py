"""Configs of LongLive: long videos of several prompts, on Wan 2.1 1.3B and Wan 2.2 5B."""

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm_unipc import FlowUniPCSchedulerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.infra.runner_configs import by_name, with_pipeline
from flashdreams.infra.video_runner import ImageToVideoRunnerConfig, TextToVideoRunnerConfig
from flashdreams.models.wan.config import (
    FOUR_STEP_PIPELINE_1_3B,
    TINY_TEXT_ENCODER,
    TINY_TRANSFORMER,
    TINY_VAE22_DECODER,
    UMT5_TEXT_ENCODER,
    WAN22_VAE_DECODER,
    WAN22_VAE_IMAGE_ENCODER,
    WAN_TRANSFORMER_TI2V_5B,
)
from flashdreams.runtime.checkpoint import CheckpointConfig

REPO = "Efficient-Large-Model/LongLive-1.3B"

CHECKPOINT = CheckpointConfig(
    source=REPO,
    file="models/longlive_base.pt",
    select=("generator", "generator_ema"),
    strip_prefixes=("model.",),
    size_bytes=5_675_987_200,
)
"""Base of LongLive 1.0; no commit of the repository is pinned."""

PIPELINE = derive_config(
    FOUR_STEP_PIPELINE_1_3B,
    name="longlive-wan2.1-t2v-1.3b",
    reencode_window="once",
    diffusion_model=dict(
        transformer=dict(
            checkpoint=CHECKPOINT,
            loras=(f"hf://{REPO}/models/lora.pt",),
            window_size_t=9,
            sink_size_t=3,
            rewritten_sink="kept",
        )
    ),
)
"""LongLive 1.0: on a prompt change the window is recomputed in one pass, the sink is kept.

Source: NVlabs/LongLive, branch v1.0: local 12, sink 3, ``global_sink``.
"""

INFINITY_PIPELINE = derive_config(
    PIPELINE,
    name=f"{PIPELINE.name}-infinity",
    diffusion_model=dict(transformer=dict(relative_rope=True)),
)
"""The same weights with cache-relative RoPE, for rollouts of unlimited length."""

SHOTS_PIPELINE = StreamInferencePipelineConfig(
    name="longlive-wan2.2-t2v-5b",
    text_encoder=UMT5_TEXT_ENCODER,
    diffusion_model=DiffusionModelConfig(
        transformer=derive_config(
            WAN_TRANSFORMER_TI2V_5B,
            len_t=8,
            window_size_t=24,
            sink_size_t=8,
            shot_sink_size_t=8,
            shot_rope_offset=8.0,
            checkpoint=CheckpointConfig(
                source="Efficient-Large-Model/LongLive-2.0-5B",
                file="model_bf16.pt",
                select=("generator", "generator_ema", "model"),
                strip_prefixes=("model.",),
                size_bytes=9_999_575_424,
            ),
        ),
        scheduler=FlowUniPCSchedulerConfig(num_inference_steps=4, shift=5.0),
    ),
    decoder=WAN22_VAE_DECODER,
    scene_cut_prefix="The scene transitions. ",
)
"""LongLive 2.0: one prompt per chunk, the first frames of the current shot pinned in the window.

Source: NVlabs/LongLive, pipeline/causal_diffusion_inference.py: local 32, sink 8, chunks of 8.
"""

SHOTS_IMAGE_PIPELINE = derive_config(
    SHOTS_PIPELINE,
    name="longlive-wan2.2-i2v-5b",
    image_encoder=WAN22_VAE_IMAGE_ENCODER,
    diffusion_model=dict(first_frames_from_image=True),
)
"""The same from an image, which is the first latent frame (``independent_first_frame``)."""

TINY_PIPELINE = derive_config(
    SHOTS_PIPELINE,
    name="longlive-tiny-random",
    text_encoder=TINY_TEXT_ENCODER,
    diffusion_model=dict(
        transformer=derive_config(
            TINY_TRANSFORMER,
            in_channels=48,
            out_channels=48,
            len_t=2,
            window_size_t=6,
            sink_size_t=2,
            shot_sink_size_t=2,
            shot_rope_offset=8.0,
        )
    ),
    decoder=TINY_VAE22_DECODER,
)
"""LongLive 2.0 at toy size with random weights."""

RUNNER = TextToVideoRunnerConfig(
    runner_name=PIPELINE.name,
    description="LongLive 1.0 on Wan 2.1 1.3B: long videos with changing prompts.",
    pipeline=PIPELINE,
)

INFINITY_RUNNER = with_pipeline(
    RUNNER,
    INFINITY_PIPELINE,
    "LongLive 1.0 with cache-relative RoPE, for videos of unlimited length.",
)

SHOTS_RUNNER = TextToVideoRunnerConfig(
    runner_name=SHOTS_PIPELINE.name,
    description="LongLive 2.0 on Wan 2.2 5B: videos of several shots at 704x1280.",
    pipeline=SHOTS_PIPELINE,
    total_blocks=16,
    fps=24,
)

SHOTS_IMAGE_RUNNER = ImageToVideoRunnerConfig(
    runner_name=SHOTS_IMAGE_PIPELINE.name,
    description="LongLive 2.0 on Wan 2.2 5B: several shots, starting from an image.",
    pipeline=SHOTS_IMAGE_PIPELINE,
    total_blocks=16,
    fps=24,
)

TINY_RUNNER = with_pipeline(
    SHOTS_RUNNER,
    TINY_PIPELINE,
    "LongLive at toy size with random weights: noise, in seconds.",
    total_blocks=8,
)

RUNNER_CONFIGS = by_name(RUNNER, INFINITY_RUNNER, SHOTS_RUNNER, SHOTS_IMAGE_RUNNER, TINY_RUNNER)
