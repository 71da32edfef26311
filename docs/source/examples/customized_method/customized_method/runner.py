"""The runner of the command line: the loop over the chunks, and the video."""

from contextlib import nullcontext
from dataclasses import dataclass, field

from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.infra.runner import Runner, RunnerConfig


@dataclass(kw_only=True)
class CustomizedMethodRunnerConfig(RunnerConfig):
    """Runner config for my method."""

    _target: type["CustomizedMethodRunner"] = field(default_factory=lambda: CustomizedMethodRunner)

    prompt: str = "A cat surfing."
    """Prompt. Its words select colours and shapes; their meaning has no effect."""

    total_blocks: int = 60
    """AR steps; each generates four frames."""


class CustomizedMethodRunner(Runner[CustomizedMethodRunnerConfig, StreamInferencePipeline]):
    """Generates ``total_blocks`` chunks and streams them into one video."""

    def run(self) -> None:
        """Run one rollout."""
        cfg = self.config

        # 1. Initialize the autoregressive cache
        cache = self.pipeline.initialize_cache(text=[cfg.prompt], seed=cfg.seed)

        # 2. Drive the autoregressive rollout; every rank does
        with self.open_video() if self.is_rank_zero else nullcontext() as video:
            for i in self.progress(cfg.total_blocks):
                video_chunk = self.pipeline.generate(autoregressive_index=i, cache=cache)
                self.pipeline.finalize(autoregressive_index=i, cache=cache)

                # 3. Write outputs only on the main process
                if video is not None:
                    video.write(video_chunk)
