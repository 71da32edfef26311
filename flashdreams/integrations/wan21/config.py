"""Configs of Wan 2.1: bidirectional text- and image-to-video."""

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm_unipc import FlowUniPCSchedulerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.infra.runner_configs import by_name, with_pipeline
from flashdreams.infra.video_runner import ImageToVideoRunnerConfig, TextToVideoRunnerConfig
from flashdreams.models.wan.config import (
    I2V_14B_480P_REPO,
    NEGATIVE_PROMPT,
    T2V_1_3B_REPO,
    T2V_14B_REPO,
    TINY_IMAGE_CONDITION_ENCODER,
    TINY_NEGATIVE_PROMPT,
    TINY_TEXT_ENCODER,
    TINY_TRANSFORMER,
    TINY_VAE_DECODER,
    UMT5_TEXT_ENCODER,
    WAN_IMAGE_CONDITION_ENCODER,
    WAN_TRANSFORMER_1_3B,
    WAN_TRANSFORMER_14B,
    WAN_TRANSFORMER_I2V_14B,
    WAN_VAE_DECODER,
    wan21_checkpoint,
)

ONE_CHUNK = dict(streaming=False, len_t=21, window_size_t=21)
"""Transformer fields: the whole clip, 81 frames, is one chunk."""

AUTOCAST = dict(residual_dtype="float32")
"""Transformer fields: float32 parts as in the official code, which runs under autocast."""

SHARD_INDEX = "diffusion_pytorch_model.safetensors.index.json"

# Shift, steps and guidance: the release notes of Wan-Video/Wan2.1 for each model.

T2V_1_3B_480P_PIPELINE = StreamInferencePipelineConfig(
    name="wan21-t2v-1.3b-480p",
    text_encoder=UMT5_TEXT_ENCODER,
    diffusion_model=DiffusionModelConfig(
        transformer=derive_config(
            WAN_TRANSFORMER_1_3B,
            **ONE_CHUNK,
            **AUTOCAST,
            checkpoint=wan21_checkpoint(
                T2V_1_3B_REPO, "diffusion_pytorch_model.safetensors", 5_675_987_200
            ),
        ),
        scheduler=FlowUniPCSchedulerConfig(num_inference_steps=50, shift=8.0),
        guidance_scale=6.0,
    ),
    decoder=WAN_VAE_DECODER,
)

T2V_14B_720P_PIPELINE = derive_config(
    T2V_1_3B_480P_PIPELINE,
    name="wan21-t2v-14b-720p",
    diffusion_model=dict(
        transformer=derive_config(
            WAN_TRANSFORMER_14B,
            **ONE_CHUNK,
            **AUTOCAST,
            latent_height=90,
            latent_width=160,
            checkpoint=wan21_checkpoint(T2V_14B_REPO, SHARD_INDEX, 57_153_966_336),
        ),
        scheduler=dict(shift=5.0),
        guidance_scale=5.0,
    ),
)

I2V_14B_480P_PIPELINE = derive_config(
    T2V_1_3B_480P_PIPELINE,
    name="wan21-i2v-14b-480p",
    image_encoder=WAN_IMAGE_CONDITION_ENCODER,
    diffusion_model=dict(
        transformer=derive_config(
            WAN_TRANSFORMER_I2V_14B,
            **ONE_CHUNK,
            **AUTOCAST,
            checkpoint=wan21_checkpoint(I2V_14B_480P_REPO, SHARD_INDEX, 65_579_515_136),
        ),
        scheduler=dict(num_inference_steps=40, shift=3.0),
        guidance_scale=5.0,
    ),
)

T2V_TINY_PIPELINE = StreamInferencePipelineConfig(
    name="wan21-tiny-random",
    text_encoder=TINY_TEXT_ENCODER,
    diffusion_model=DiffusionModelConfig(
        transformer=derive_config(
            TINY_TRANSFORMER, streaming=False, len_t=3, window_size_t=3, **AUTOCAST
        ),
        scheduler=FlowUniPCSchedulerConfig(num_inference_steps=6, shift=8.0),
        guidance_scale=6.0,
    ),
    decoder=TINY_VAE_DECODER,
)

I2V_TINY_PIPELINE = derive_config(
    T2V_TINY_PIPELINE,
    name="wan21-i2v-tiny-random",
    image_encoder=TINY_IMAGE_CONDITION_ENCODER,
    diffusion_model=dict(
        transformer=dict(condition_channels=20, image_dim=32, image_len=5),
        scheduler=dict(shift=3.0),
        guidance_scale=5.0,
    ),
)

T2V_1_3B_480P_RUNNER = TextToVideoRunnerConfig(
    runner_name=T2V_1_3B_480P_PIPELINE.name,
    description="Wan 2.1 text-to-video 1.3B, 81 frames at 480x832, all frames at once.",
    pipeline=T2V_1_3B_480P_PIPELINE,
    negative_prompt=NEGATIVE_PROMPT,
    total_blocks=1,
)

T2V_14B_720P_RUNNER = with_pipeline(
    T2V_1_3B_480P_RUNNER,
    T2V_14B_720P_PIPELINE,
    "Wan 2.1 text-to-video 14B, 81 frames at 720x1280, all frames at once.",
)

I2V_14B_480P_RUNNER = ImageToVideoRunnerConfig(
    runner_name=I2V_14B_480P_PIPELINE.name,
    description="Wan 2.1 image-to-video 14B, 81 frames of up to 480x832 pixels at once.",
    pipeline=I2V_14B_480P_PIPELINE,
    max_pixels=480 * 832,  # Wan-Video/Wan2.1, wan/configs/__init__.py, MAX_AREA_CONFIGS
    negative_prompt=f"镜头晃动，{NEGATIVE_PROMPT}",  # Wan-Video/Wan2.1, wan/configs/wan_i2v_14B.py
    total_blocks=1,
)

T2V_TINY_RUNNER = with_pipeline(
    T2V_1_3B_480P_RUNNER,
    T2V_TINY_PIPELINE,
    "Wan 2.1 text-to-video at toy size with random weights: noise, in seconds.",
    negative_prompt=TINY_NEGATIVE_PROMPT,
)

I2V_TINY_RUNNER = with_pipeline(
    I2V_14B_480P_RUNNER,
    I2V_TINY_PIPELINE,
    "Wan 2.1 image-to-video at toy size with random weights: noise, in seconds.",
    negative_prompt=TINY_NEGATIVE_PROMPT,
    test_image=True,
    max_pixels=40 * 40,
)

RUNNER_CONFIGS = by_name(
    T2V_1_3B_480P_RUNNER,
    T2V_14B_720P_RUNNER,
    I2V_14B_480P_RUNNER,
    T2V_TINY_RUNNER,
    I2V_TINY_RUNNER,
)
