"""Configs of Matrix-Game 2.0: worlds played with keys and mouse."""

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.infra.runner_configs import by_name, with_pipeline
from flashdreams.models.clip import CLIPImageEncoderConfig
from flashdreams.models.wan.config import (
    TAEHV_DECODER,
    TINY_VAE_DECODER,
    TINY_VAE_IMAGE_ENCODER,
    WAN_IMAGE_CONDITION_ENCODER,
    WAN_VAE_DECODER,
    WAN_VAE_IMAGE_ENCODER,
)
from flashdreams.runtime.checkpoint import CheckpointConfig

from .encoder import ActionEncoderConfig, MatrixGameImageEncoderConfig
from .runner import MatrixGameRunnerConfig
from .transformer import MatrixGameTransformerConfig

REPO = "Skywork/Matrix-Game-2.0"
REVISION = "main"
"""A branch, since no commit is known."""


def matrix_game_checkpoint(file: str, parameters: int) -> CheckpointConfig:
    """A transformer of the official repository; its names begin with ``model.``."""
    return CheckpointConfig(
        source=REPO,
        file=file,
        revision=REVISION,
        strip_prefixes=("model.",),
        size_bytes=4 * parameters,
        license="MIT for the code; the model card was not checked",
    )


TRANSFORMER = MatrixGameTransformerConfig(
    dtype="bfloat16",
    checkpoint=matrix_game_checkpoint(
        "base_distilled_model/base_distill.safetensors", 1_619_242_304
    ),
)
"""Keys and mouse, 1.6B parameters, 352x640 pixels. Source: Skywork/Matrix-Game-2.0."""

# Schedule and chunks: SkyworkAI/Matrix-Game, Matrix-Game-2/configs/inference_yaml.
PIPELINE = StreamInferencePipelineConfig(
    name="matrix-game-2-universal",
    image_encoder=MatrixGameImageEncoderConfig(clip=WAN_IMAGE_CONDITION_ENCODER.clip),
    encoder=ActionEncoderConfig(vae=WAN_VAE_IMAGE_ENCODER),
    diffusion_model=DiffusionModelConfig(
        transformer=TRANSFORMER,
        scheduler=FlowMatchSchedulerConfig(denoising_timesteps=(1000.0, 666.0, 333.0), shift=5.0),
    ),
    decoder=derive_config(WAN_VAE_DECODER, dtype="float16"),
)

GTA_DRIVE_PIPELINE = derive_config(
    PIPELINE,
    name="matrix-game-2-gta-drive",
    encoder=dict(keyboard_dim=2),
    diffusion_model=dict(
        transformer=dict(
            keyboard_dim=2,
            window_size_t=4,
            checkpoint=matrix_game_checkpoint(
                "gta_distilled_model/gta_keyboard2dim.safetensors", 1_619_238_464
            ),
        )
    ),
)

TEMPLE_RUN_PIPELINE = derive_config(
    PIPELINE,
    name="matrix-game-2-temple-run",
    encoder=dict(keyboard_dim=7, mouse_dim=None),
    diffusion_model=dict(
        transformer=dict(
            keyboard_dim=7,
            mouse_dim=None,
            checkpoint=matrix_game_checkpoint(
                "templerun_distilled_model/templerun_7dim_onlykey.safetensors", 1_508_715_584
            ),
        ),
        scheduler=dict(denoising_timesteps=(1000.0, 750.0, 500.0, 250.0)),
    ),
)

TINY_PIPELINE = derive_config(
    PIPELINE,
    name="matrix-game-2-tiny-random",
    image_encoder=MatrixGameImageEncoderConfig(
        clip=CLIPImageEncoderConfig(image_size=28, dim=32, out_dim=16, num_heads=2, num_layers=2)
    ),
    encoder=dict(vae=TINY_VAE_IMAGE_ENCODER),
    diffusion_model=dict(
        transformer=MatrixGameTransformerConfig(
            dim=48,
            ffn_dim=96,
            num_heads=6,
            num_layers=3,
            freq_dim=32,
            image_dim=32,
            image_len=5,
            latent_height=6,
            latent_width=10,
            action_blocks=2,
            action_heads=4,
            action_dim=48,
            keyboard_embed_dim=6,
        )
    ),
    decoder=TINY_VAE_DECODER,
)

RUNNER = MatrixGameRunnerConfig(
    runner_name=PIPELINE.name,
    description="Matrix-Game 2.0: walk and look around in a world that starts from your image.",
    pipeline=PIPELINE,
)

GTA_DRIVE_RUNNER = with_pipeline(
    RUNNER,
    GTA_DRIVE_PIPELINE,
    "Matrix-Game 2.0, fine-tuned for driving a car.",
    variant="gta_drive",
)

TEMPLE_RUN_RUNNER = with_pipeline(
    RUNNER,
    TEMPLE_RUN_PIPELINE,
    "Matrix-Game 2.0, fine-tuned for a running game: one key at a time, no mouse.",
    variant="temple_run",
)

TINY_RUNNER = with_pipeline(
    RUNNER,
    TINY_PIPELINE,
    "Matrix-Game 2.0 at toy size with random weights: noise, in seconds.",
    total_blocks=4,
    actions="w12 wl12 j8",
    test_image=True,
)


def with_tiny_decoder(runner: MatrixGameRunnerConfig) -> MatrixGameRunnerConfig:
    """The same world with the tiny decoder, for speed."""
    name = f"{runner.runner_name}-taehv"
    pipeline = derive_config(runner.pipeline, name=name, decoder=TAEHV_DECODER)
    return with_pipeline(runner, pipeline, f"{runner.description} Tiny decoder, for speed.")


FULL_SIZE = (RUNNER, GTA_DRIVE_RUNNER, TEMPLE_RUN_RUNNER)

RUNNER_CONFIGS = by_name(*FULL_SIZE, *map(with_tiny_decoder, FULL_SIZE), TINY_RUNNER)
