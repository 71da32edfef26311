"""Short forms for the runner configs of a family of methods."""

from typing import Any, TypeVar

from flashdreams.infra.config import derive_config
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.infra.runner import RunnerConfig

R = TypeVar("R", bound=RunnerConfig)


def with_pipeline(
    runner: R, pipeline: StreamInferencePipelineConfig, description: str, **changes: Any
) -> R:
    """A runner with another pipeline, under the pipeline's name.

    Args:
        runner: to start from.
        pipeline: of the new runner.
        description: one line for the list of methods.
        changes: further changed fields.
    """
    found: R = derive_config(
        runner, runner_name=pipeline.name, description=description, pipeline=pipeline, **changes
    )
    return found


def by_name(*runners: RunnerConfig) -> dict[str, RunnerConfig]:
    """Runners by their names, as the registry takes them."""
    return {runner.runner_name: runner for runner in runners}
