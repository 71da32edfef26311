"""Config literals of Causal-Forcing: streaming text- and image-to-video on Wan 2.1 1.3B."""

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.infra.runner import RunnerConfig
from flashdreams.models.wan.config import (
    TINY_TEXT_ENCODER,
    TINY_TRANSFORMER,
    TINY_VAE_DECODER,
    TINY_VAE_IMAGE_ENCODER,
    UMT5_TEXT_ENCODER,
    WAN_TRANSFORMER_1_3B,
    WAN_VAE_DECODER,
    WAN_VAE_IMAGE_ENCODER,
)
from flashdreams.models.wan.runner import ImageToVideoRunnerConfig, TextToVideoRunnerConfig
from flashdreams.runtime.checkpoint import CheckpointConfig


def checkpoint(file: str, select: tuple[str, ...]) -> CheckpointConfig:
    """A file of the official repository."""
    return CheckpointConfig(
        source="zhuhz22/Causal-Forcing",
        file=file,
        revision="2f8eb8bb6eeb1238da9d13e5420d342a74d634a6",
        select=select,
        strip_prefixes=("model.", "net."),
        # One set of tensors; the file may hold more than the one that is read.
        size_bytes=5_675_987_200,
    )


CHUNKWISE_CHECKPOINT = checkpoint(
    "chunkwise/causal_forcing.pt", select=("generator", "generator_ema")
)
FRAMEWISE_CHECKPOINT = checkpoint(
    "framewise/causal_forcing.pt", select=("generator_ema", "generator")
)

# Schedule and chunks: thu-ml/Causal-Forcing, which takes over Self-Forcing's.

CHUNKWISE_PIPELINE = StreamInferencePipelineConfig(
    name="causal-forcing-wan2.1-t2v-1.3b-chunkwise",
    text_encoder=UMT5_TEXT_ENCODER,
    diffusion_model=DiffusionModelConfig(
        transformer=derive_config(
            WAN_TRANSFORMER_1_3B,
            len_t=3,
            window_size_t=21,
            sink_size_t=0,
            checkpoint=CHUNKWISE_CHECKPOINT,
        ),
        scheduler=FlowMatchSchedulerConfig(
            denoising_timesteps=(1000.0, 750.0, 500.0, 250.0), shift=5.0
        ),
    ),
    decoder=WAN_VAE_DECODER,
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

FRAMEWISE_RUNNER = derive_config(
    CHUNKWISE_RUNNER,
    runner_name=FRAMEWISE_PIPELINE.name,
    description="Causal-Forcing on Wan 2.1 1.3B: streaming text-to-video, 4 frames a step.",
    pipeline=FRAMEWISE_PIPELINE,
    total_blocks=180,
)

I2V_FRAMEWISE_RUNNER = ImageToVideoRunnerConfig(
    runner_name=I2V_FRAMEWISE_PIPELINE.name,
    description="Causal-Forcing on Wan 2.1 1.3B: a stream that begins with an image.",
    pipeline=I2V_FRAMEWISE_PIPELINE,
    total_blocks=180,
)

TINY_RUNNER = derive_config(
    I2V_FRAMEWISE_RUNNER,
    runner_name=TINY_PIPELINE.name,
    description="Causal-Forcing at toy size with random weights: noise, in seconds.",
    pipeline=TINY_PIPELINE,
    total_blocks=7,
    test_image=True,
)

RUNNER_CONFIGS: dict[str, RunnerConfig] = {
    runner.runner_name: runner
    for runner in (CHUNKWISE_RUNNER, FRAMEWISE_RUNNER, I2V_FRAMEWISE_RUNNER, TINY_RUNNER)
}
