"""Config literals: the parts of the pipeline, and the runner by name."""

from customized_method.decoder import MyStreamingDecoderConfig
from customized_method.encoder import MyTextEncoderConfig
from customized_method.runner import CustomizedMethodRunnerConfig
from customized_method.transformer import MyTransformerConfig
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.infra.runner import RunnerConfig

# Define your pipeline config literal
CUSTOMIZED_PIPELINE_CONFIG = StreamInferencePipelineConfig(
    name="customized-method",
    text_encoder=MyTextEncoderConfig(),
    diffusion_model=DiffusionModelConfig(
        transformer=MyTransformerConfig(),
        scheduler=FlowMatchSchedulerConfig(),
    ),
    decoder=MyStreamingDecoderConfig(),
)

# Define your runner config
CUSTOMIZED_METHOD_RUNNER = CustomizedMethodRunnerConfig(
    runner_name=CUSTOMIZED_PIPELINE_CONFIG.name,
    description="Moving patterns from a network of a few lines; copy it to begin your own.",
    pipeline=CUSTOMIZED_PIPELINE_CONFIG,
)

# Several runners of one package go into a mapping, by name
RUNNER_CONFIGS: dict[str, RunnerConfig] = {
    CUSTOMIZED_METHOD_RUNNER.runner_name: CUSTOMIZED_METHOD_RUNNER,
}
