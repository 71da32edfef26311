"""Configs of Wan 2.2 TI2V 5B: text or an image and text to video, 24 frames per second."""

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm_unipc import FlowUniPCSchedulerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.infra.runner_configs import by_name, with_pipeline
from flashdreams.models.wan.config import (
    NEGATIVE_PROMPT,
    TAEHV22_DECODER,
    TINY_NEGATIVE_PROMPT,
    TINY_TEXT_ENCODER,
    TINY_TRANSFORMER,
    TINY_VAE22_DECODER,
    TINY_VAE22_IMAGE_ENCODER,
    UMT5_TEXT_ENCODER,
    WAN22_VAE_DECODER,
    WAN22_VAE_IMAGE_ENCODER,
    WAN_TRANSFORMER_TI2V_5B,
    wan22_checkpoint,
)

from .runner import TextImageToVideoRunnerConfig

PIPELINE = StreamInferencePipelineConfig(
    name="wan22-ti2v-5b-704p",
    text_encoder=UMT5_TEXT_ENCODER,
    image_encoder=WAN22_VAE_IMAGE_ENCODER,
    diffusion_model=DiffusionModelConfig(
        transformer=derive_config(
            WAN_TRANSFORMER_TI2V_5B,
            streaming=False,
            len_t=31,
            window_size_t=31,
            residual_dtype="float32",  # as the official code under autocast
            checkpoint=wan22_checkpoint(
                "diffusion_pytorch_model.safetensors.index.json", 19_999_150_848
            ),
        ),
        scheduler=FlowUniPCSchedulerConfig(num_inference_steps=50, shift=5.0),
        guidance_scale=5.0,
        first_frames_from_image=True,
    ),
    decoder=WAN22_VAE_DECODER,
)
"""Source: Wan-Video/Wan2.2, wan/configs/wan_ti2v_5B.py and wan/textimage2video.py."""

TAEHV_PIPELINE = derive_config(PIPELINE, name="wan22-ti2v-5b-704p-taehv", decoder=TAEHV22_DECODER)

TINY_PIPELINE = derive_config(
    PIPELINE,
    name="wan22-ti2v-tiny-random",
    text_encoder=TINY_TEXT_ENCODER,
    image_encoder=TINY_VAE22_IMAGE_ENCODER,
    diffusion_model=dict(
        transformer=derive_config(
            TINY_TRANSFORMER,
            in_channels=48,
            out_channels=48,
            streaming=False,
            len_t=3,
            window_size_t=3,
            residual_dtype="float32",
        ),
        scheduler=dict(num_inference_steps=6),
    ),
    decoder=TINY_VAE22_DECODER,
)

RUNNER = TextImageToVideoRunnerConfig(
    runner_name=PIPELINE.name,
    description="Wan 2.2 text- and image-to-video 5B, 121 frames at 704x1280, all frames at once.",
    pipeline=PIPELINE,
    negative_prompt=NEGATIVE_PROMPT,
    total_blocks=1,
    fps=24,
)

TAEHV_RUNNER = with_pipeline(
    RUNNER, TAEHV_PIPELINE, "Wan 2.2 text- and image-to-video 5B with the tiny decoder."
)

TINY_RUNNER = with_pipeline(
    RUNNER,
    TINY_PIPELINE,
    "Wan 2.2 text- and image-to-video at toy size with random weights: noise.",
    negative_prompt=TINY_NEGATIVE_PROMPT,
    max_pixels=64 * 96,
)

RUNNER_CONFIGS = by_name(RUNNER, TAEHV_RUNNER, TINY_RUNNER)
