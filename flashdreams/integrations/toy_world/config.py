"""Configs of the toy world."""

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.infra.runner_configs import by_name
from flashdreams.models.wan.transformer import WanTransformerConfig
from flashdreams.runtime.checkpoint import CheckpointConfig

from .camera import CameraEncoderConfig, control_features
from .codec import LATENT_CHANNELS, PatchDecoderConfig, PatchEncoderConfig
from .prompt import PROMPT_DIM, ScenePromptEncoderConfig
from .runner import ToyWorldRunnerConfig
from .scene import NUM_SLOTS


def packaged(name: str, folder: str = "weights") -> CheckpointConfig:
    """Weights in the folder of this file."""
    return CheckpointConfig(source=f"package:{__package__}/{folder}/{name}.safetensors")


COURTYARD_CHANNELS = 32
"""Of the latent of the world with materials."""

TRANSFORMER = WanTransformerConfig(
    dim=192,
    ffn_dim=768,
    num_heads=6,
    num_layers=6,
    in_channels=LATENT_CHANNELS,
    out_channels=LATENT_CHANNELS,
    freq_dim=64,
    text_dim=PROMPT_DIM,
    text_len=NUM_SLOTS,
    control_dim=control_features(rows=4, columns=4),
    prediction="x0",
    len_t=1,
    latent_height=8,
    latent_width=8,
    sink_size_t=1,
    window_size_t=8,
    relative_rope=True,
    checkpoint=packaged("transformer"),
)

TOY_WORLD_PIPELINE = StreamInferencePipelineConfig(
    name="toy-world",
    text_encoder=ScenePromptEncoderConfig(),
    image_encoder=PatchEncoderConfig(checkpoint=packaged("encoder")),
    encoder=CameraEncoderConfig(),
    diffusion_model=DiffusionModelConfig(
        transformer=TRANSFORMER,
        scheduler=FlowMatchSchedulerConfig(denoising_timesteps=(1000.0,)),
        first_latent_from_image=True,
    ),
    decoder=PatchDecoderConfig(checkpoint=packaged("decoder")),
)

TOY_WORLD_RUNNER = ToyWorldRunnerConfig(
    runner_name="toy-world",
    description="A small courtyard to walk through, in real time on one CPU thread.",
    pipeline=TOY_WORLD_PIPELINE,
)

COURTYARD_CAMERA = CameraEncoderConfig(
    token_rows=8, token_columns=10, height=128, width=160, materials=True
)

COURTYARD_PIPELINE = derive_config(
    TOY_WORLD_PIPELINE,
    name="courtyard",
    image_encoder={
        "channels": COURTYARD_CHANNELS,
        "checkpoint": packaged("encoder", "courtyard_weights"),
    },
    encoder=COURTYARD_CAMERA,
    diffusion_model={
        "transformer": {
            "num_layers": 5,
            "in_channels": COURTYARD_CHANNELS,
            "out_channels": COURTYARD_CHANNELS,
            "control_dim": COURTYARD_CAMERA.control_dim,
            "latent_height": 16,
            "latent_width": 20,
            "checkpoint": packaged("transformer", "courtyard_weights"),
        }
    },
    decoder={
        "channels": COURTYARD_CHANNELS,
        "checkpoint": packaged("decoder", "courtyard_weights"),
    },
)

COURTYARD_RUNNER = derive_config(
    TOY_WORLD_RUNNER,
    runner_name="courtyard",
    description="The courtyard with arches, tiles and a sky, 160x128 pixels, for two CPU cores.",
    pipeline=COURTYARD_PIPELINE,
    scale=4,
)

RUNNER_CONFIGS = by_name(TOY_WORLD_RUNNER, COURTYARD_RUNNER)
