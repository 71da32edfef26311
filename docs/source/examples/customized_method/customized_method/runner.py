"""What the command line starts: the loop over the chunks, and the video."""

from contextlib import nullcontext
from dataclasses import dataclass, field

from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.infra.runner import Runner, RunnerConfig


@dataclass(kw_only=True)
class CustomizedMethodRunnerConfig(RunnerConfig):
    """Runner config for my method."""

    _target: type["CustomizedMethodRunner"] = field(default_factory=lambda: CustomizedMethodRunner)

    prompt: str = "A cat surfing."
    """What to dream of. The words choose colours and shapes; they mean nothing to it."""

    total_blocks: int = 60
    """AR steps; each makes four frames."""


class CustomizedMethodRunner(Runner[CustomizedMethodRunnerConfig, StreamInferencePipeline]):
    """Dreams ``total_blocks`` chunks and streams them into one video."""

    def run(self) -> None:
        """Drive one rollout."""
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
