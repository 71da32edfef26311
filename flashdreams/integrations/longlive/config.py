"""Config literals of LongLive: long videos of several prompts, on Wan 2.1 1.3B and Wan 2.2 5B."""

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm_unipc import FlowUniPCSchedulerConfig
from flashdreams.infra.runner import RunnerConfig
from flashdreams.infra.video_runner import TextToVideoRunnerConfig
from flashdreams.models.wan.config import (
    FOUR_STEP_PIPELINE_1_3B,
    TINY_TEXT_ENCODER,
    TINY_TRANSFORMER,
    TINY_VAE_DECODER,
)
from flashdreams.runtime.checkpoint import CheckpointConfig

REPO = "Efficient-Large-Model/LongLive-1.3B"

CHECKPOINT = CheckpointConfig(
    source=REPO,
    file="models/longlive_base.pt",
    select=("generator", "generator_ema"),
    strip_prefixes=("model.",),
    size_bytes=5_675_987_200,
)
"""Base of LongLive 1.0; no commit of the repository is known here."""

PIPELINE = derive_config(
    FOUR_STEP_PIPELINE_1_3B,
    name="longlive-wan2.1-t2v-1.3b",
    reencode_window="once",
    diffusion_model=dict(
        transformer=dict(
            checkpoint=CHECKPOINT,
            loras=(f"hf://{REPO}/models/lora.pt",),
            window_size_t=9,
            sink_size_t=3,
            rewritten_sink="kept",
        )
    ),
)
"""LongLive 1.0: at another prompt the window is computed anew in one pass, the sink stays.

Source: NVlabs/LongLive, branch v1.0: local 12, sink 3, ``global_sink``.
"""

INFINITY_PIPELINE = derive_config(
    PIPELINE,
    name=f"{PIPELINE.name}-infinity",
    diffusion_model=dict(transformer=dict(relative_rope=True)),
)
"""The same weights with cache-relative RoPE, for rollouts without an end."""

TINY_PIPELINE = derive_config(
    PIPELINE,
    name="longlive-tiny-random",
    text_encoder=TINY_TEXT_ENCODER,
    scene_cut_prefix="The scene transitions. ",
    reencode_window=None,
    diffusion_model=DiffusionModelConfig(
        transformer=derive_config(
            TINY_TRANSFORMER,
            len_t=2,
            window_size_t=6,
            sink_size_t=2,
            shot_sink_size_t=2,
            shot_rope_offset=8.0,
        ),
        scheduler=FlowUniPCSchedulerConfig(num_inference_steps=4, shift=5.0),
    ),
    decoder=TINY_VAE_DECODER,
)
"""The form of LongLive 2.0 at toy size with random weights."""

RUNNER = TextToVideoRunnerConfig(
    runner_name=PIPELINE.name,
    description="LongLive 1.0 on Wan 2.1 1.3B: long videos of changing prompts.",
    pipeline=PIPELINE,
)

INFINITY_RUNNER = derive_config(
    RUNNER,
    runner_name=INFINITY_PIPELINE.name,
    description="LongLive 1.0 with cache-relative RoPE, for videos without an end.",
    pipeline=INFINITY_PIPELINE,
)

TINY_RUNNER = derive_config(
    RUNNER,
    runner_name=TINY_PIPELINE.name,
    description="LongLive at toy size with random weights: noise, in seconds.",
    pipeline=TINY_PIPELINE,
    total_blocks=8,
)

RUNNER_CONFIGS: dict[str, RunnerConfig] = {
    runner.runner_name: runner for runner in (RUNNER, INFINITY_RUNNER, TINY_RUNNER)
}
