"""Configs of Causal-Forcing: streaming text- and image-to-video on Wan 2.1 1.3B."""

from flashdreams.infra.config import derive_config
from flashdreams.infra.runner_configs import by_name, with_pipeline
from flashdreams.infra.video_runner import ImageToVideoRunnerConfig, TextToVideoRunnerConfig
from flashdreams.models.wan.config import (
    FOUR_STEP_PIPELINE_1_3B,
    TINY_TEXT_ENCODER,
    TINY_TRANSFORMER,
    TINY_VAE_DECODER,
    TINY_VAE_IMAGE_ENCODER,
    WAN_VAE_IMAGE_ENCODER,
    training_checkpoint,
)

REPO = "zhuhz22/Causal-Forcing"
REVISION = "2f8eb8bb6eeb1238da9d13e5420d342a74d634a6"

CHUNKWISE_CHECKPOINT = training_checkpoint(
    REPO, "chunkwise/causal_forcing.pt", REVISION, select=("generator", "generator_ema")
)
FRAMEWISE_CHECKPOINT = training_checkpoint(
    REPO, "framewise/causal_forcing.pt", REVISION, select=("generator_ema", "generator")
)
TWO_STEP_CHECKPOINT, ONE_STEP_CHECKPOINT = (
    training_checkpoint(
        REPO,
        f"causal-forcing++/framewise-{steps}step.pt",
        REVISION,
        select=("generator_ema", "generator"),
    )
    for steps in (2, 1)
)

CHUNKWISE_PIPELINE = derive_config(
    FOUR_STEP_PIPELINE_1_3B,
    name="causal-forcing-wan2.1-t2v-1.3b-chunkwise",
    diffusion_model=dict(transformer=dict(checkpoint=CHUNKWISE_CHECKPOINT)),
)

FRAMEWISE_PIPELINE = derive_config(
    CHUNKWISE_PIPELINE,
    name="causal-forcing-wan2.1-t2v-1.3b-framewise",
    diffusion_model=dict(transformer=dict(len_t=1, checkpoint=FRAMEWISE_CHECKPOINT)),
)

I2V_FRAMEWISE_PIPELINE = derive_config(
    FRAMEWISE_PIPELINE,
    name="causal-forcing-wan2.1-i2v-1.3b-framewise",
    image_encoder=WAN_VAE_IMAGE_ENCODER,
    diffusion_model=dict(first_latent_from_image=True),
)
TWO_STEP_MODEL = derive_config(
    FRAMEWISE_PIPELINE.diffusion_model,
    transformer=dict(checkpoint=TWO_STEP_CHECKPOINT),
    scheduler=dict(denoising_timesteps=(1000.0, 500.0)),
    first_chunk_scheduler=FRAMEWISE_PIPELINE.diffusion_model.scheduler,
)
"""Causal-Forcing++: two denoising steps, but four for the first generated chunk.

Source: thu-ml/Causal-Forcing, ``denoising_step_list`` and ``denoising_step_list_first_chunk``.
"""

ONE_STEP_MODEL = derive_config(
    TWO_STEP_MODEL,
    transformer=dict(checkpoint=ONE_STEP_CHECKPOINT),
    scheduler=dict(denoising_timesteps=(1000.0,)),
)

TWO_STEP_PIPELINE, ONE_STEP_PIPELINE = (
    derive_config(
        FRAMEWISE_PIPELINE, name=f"{FRAMEWISE_PIPELINE.name}-{steps}step", diffusion_model=model
    )
    for steps, model in ((2, TWO_STEP_MODEL), (1, ONE_STEP_MODEL))
)

I2V_TWO_STEP_PIPELINE, I2V_ONE_STEP_PIPELINE = (
    derive_config(
        I2V_FRAMEWISE_PIPELINE,
        name=f"{I2V_FRAMEWISE_PIPELINE.name}-{steps}step",
        diffusion_model=derive_config(model, first_latent_from_image=True),
    )
    for steps, model in ((2, TWO_STEP_MODEL), (1, ONE_STEP_MODEL))
)

TINY_PIPELINE = derive_config(
    I2V_FRAMEWISE_PIPELINE,
    name="causal-forcing-tiny-random",
    text_encoder=TINY_TEXT_ENCODER,
    image_encoder=TINY_VAE_IMAGE_ENCODER,
    diffusion_model=dict(
        transformer=derive_config(TINY_TRANSFORMER, len_t=1, window_size_t=5, sink_size_t=0)
    ),
    decoder=TINY_VAE_DECODER,
)

CHUNKWISE_RUNNER = TextToVideoRunnerConfig(
    runner_name=CHUNKWISE_PIPELINE.name,
    description="Causal-Forcing on Wan 2.1 1.3B: streaming text-to-video, 12 frames a step.",
    pipeline=CHUNKWISE_PIPELINE,
)

FRAMEWISE_RUNNER = with_pipeline(
    CHUNKWISE_RUNNER,
    FRAMEWISE_PIPELINE,
    "Causal-Forcing on Wan 2.1 1.3B: streaming text-to-video, 4 frames a step.",
    total_blocks=180,
)

I2V_FRAMEWISE_RUNNER = ImageToVideoRunnerConfig(
    runner_name=I2V_FRAMEWISE_PIPELINE.name,
    description="Causal-Forcing on Wan 2.1 1.3B: a stream that begins with an image.",
    pipeline=I2V_FRAMEWISE_PIPELINE,
    total_blocks=180,
)

FEW_STEP_RUNNERS = [
    with_pipeline(runner, pipeline, f"Causal-Forcing++ on Wan 2.1 1.3B: {what}, {steps} a chunk.")
    for runner, pipeline, what, steps in (
        (FRAMEWISE_RUNNER, TWO_STEP_PIPELINE, "streaming text-to-video", "2 steps"),
        (FRAMEWISE_RUNNER, ONE_STEP_PIPELINE, "streaming text-to-video", "1 step"),
        (I2V_FRAMEWISE_RUNNER, I2V_TWO_STEP_PIPELINE, "a stream from an image", "2 steps"),
        (I2V_FRAMEWISE_RUNNER, I2V_ONE_STEP_PIPELINE, "a stream from an image", "1 step"),
    )
]

TINY_RUNNER = with_pipeline(
    I2V_FRAMEWISE_RUNNER,
    TINY_PIPELINE,
    "Causal-Forcing at toy size with random weights: noise, in seconds.",
    total_blocks=7,
    test_image=True,
)

RUNNER_CONFIGS = by_name(
    *(CHUNKWISE_RUNNER, FRAMEWISE_RUNNER, I2V_FRAMEWISE_RUNNER),
    *(*FEW_STEP_RUNNERS, TINY_RUNNER),
)
