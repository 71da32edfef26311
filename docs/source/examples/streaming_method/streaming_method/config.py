"""Config literals of the method."""

from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.infra.runner import RunnerConfig
from flashdreams.models.prompts import HashTextEncoderConfig

from .decoder import PreviewDecoderConfig
from .encoder import PlaceEncoderConfig
from .network import StreamingNetworkConfig
from .runner import StreamingMethodRunnerConfig

STREAMING_PIPELINE = StreamInferencePipelineConfig(
    name="streaming-method",
    text_encoder=HashTextEncoderConfig(text_len=8, text_dim=32),
    encoder=PlaceEncoderConfig(token_rows=12, token_columns=18),
    diffusion_model=DiffusionModelConfig(
        transformer=StreamingNetworkConfig(
            dim=64,
            num_heads=4,
            in_channels=4,
            len_t=2,
            patch_size=(1, 1, 1),
            latent_height=12,
            latent_width=18,
            window_size_t=6,
            sink_size_t=1,
            prediction="x0",
        ),
        scheduler=FlowMatchSchedulerConfig(denoising_timesteps=(1000.0, 500.0)),
    ),
    decoder=PreviewDecoderConfig(),
)

STREAMING_METHOD_RUNNER = StreamingMethodRunnerConfig(
    runner_name="streaming-method",
    description="Fly over a plane of colours: a KV cache, a plan and a control input.",
    pipeline=STREAMING_PIPELINE,
)

RUNNER_CONFIGS: dict[str, RunnerConfig] = {
    STREAMING_METHOD_RUNNER.runner_name: STREAMING_METHOD_RUNNER
}
