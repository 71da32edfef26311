"""Pipelines of registered methods with inputs to stream, for the benchmarks."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import command
import report
import torch
from cheap_weights import cheap_weights
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flashdreams.infra.config import derive_config
from flashdreams.infra.controller import Event
from flashdreams.infra.pipeline import StreamInferencePipeline, StreamInferencePipelineConfig
from flashdreams.infra.runner import RunnerConfig
from flashdreams.infra.video_runner import SPATIAL_FACTOR, ImageToVideoRunnerConfig
from flashdreams.infra.weights import named_checkpoints
from flashdreams.integrations.lingbot_world.encoder import CameraPath
from flashdreams.integrations.lingbot_world.runner import CameraToVideoRunnerConfig, read_path
from flashdreams.integrations.matrix_game.controls import ActionController
from flashdreams.integrations.matrix_game.encoder import Actions
from flashdreams.integrations.matrix_game.runner import MatrixGameRunnerConfig
from flashdreams.integrations.toy_world.runner import ToyWorldRunnerConfig, walk
from flashdreams.parallel import environment
from flashdreams.parallel.environment import Environment
from flashdreams.parallel.mesh import Mesh, ParallelConfig
from flashdreams.registry import discover
from flashdreams.runtime.checkpoint import find_local
from flashdreams.runtime.image_file import gradient_image

WALKED_FRAMES = 4000
"""Pixel frames of a walk; after that the camera does not move."""


@dataclass(frozen=True)
class Subject:
    """A pipeline and the inputs of its rollouts."""

    slug: str
    pipeline: StreamInferencePipeline
    mesh: Mesh
    context: dict[str, Any]
    """Arguments of ``initialize_cache``."""
    input: Callable[[int], Any]
    """The control input of an AR step."""
    random_weights: tuple[str, ...]
    """Fields of the config whose checkpoints are not on this machine."""

    @property
    def streaming(self) -> bool:
        """Whether a rollout has more than one AR step."""
        return bool(getattr(self.pipeline.diffusion_model.transformer.config, "streaming", False))

    @property
    def steps_to_fill(self) -> int:
        """AR steps until the window is full and has evicted once; all later steps are alike."""
        c: Any = self.pipeline.diffusion_model.transformer.config
        return -(-(c.sink_size_t + c.window_size_t) // c.len_t) + 1 if self.streaming else 1

    @property
    def weights(self) -> str:
        """Description of the weights for the report; their values do not change the speed."""
        names = ", ".join(self.random_weights)
        return f"random for {names}; speed does not depend on them" if names else "as configured"

    def new_rollout(self, seed: int = 0) -> Any:
        """Start a rollout."""
        return self.pipeline.initialize_cache(**self.context, seed=seed)

    def new_steady_rollout(self, seed: int = 0) -> Any:
        """Start a rollout and fill its window."""
        cache = self.new_rollout(seed)
        for _ in range(self.steps_to_fill):
            self.step(cache)
        return cache

    def step(self, cache: Any) -> Any:
        """One AR step, generate and finalize; returns the chunk."""
        index = cache.next_index
        chunk = self.pipeline.generate(
            autoregressive_index=index, cache=cache, input=self.input(index)
        )
        self.pipeline.finalize(autoregressive_index=index, cache=cache)
        return chunk


def run_streaming(
    benchmark: str,
    description: str | None,
    arguments: list[str] | None,
    *,
    repeats: int,
    measure: Callable[[Subject, torch.device, int], list[dict[str, Any]]],
    columns: Sequence[str],
    fields: Sequence[str],
    draw: Callable[[Mapping[str, Any], Path], None] | None = None,
) -> None:
    """The complete script of a benchmark that streams one method, also under torchrun.

    Args:
        benchmark: name of the benchmark.
        description: docstring of the script; its first paragraph is the help text.
        arguments: command line; None: that of the process.
        repeats: default number of timed AR steps.
        measure: rows for the method, the device and the number of steps.
        columns: row fields to print in the table.
        fields: required fields of every row in addition to those of every report.
        draw: draws the picture; None: there is none.
    """
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("slug", nargs="?", default="toy-world", help="a streaming method")
    parser.add_argument("--window", type=command.count, help="latent frames of the sliding window")
    parser.add_argument("--threads", type=command.count, default=1, help="CPU threads")
    options = command.parse(parser, arguments, ranks=True, draws=draw is not None)
    torch.set_num_threads(options.threads)
    place = environment.init(options.device)
    window = None if options.window is None else {"window_size_t": options.window}
    subject = load_subject(options.slug, place, transformer=window)
    steps = options.repeats or repeats
    with torch.no_grad():
        rows = measure(subject, place.device, steps)
    config = {
        "slug": options.slug,
        "repeats": steps,
        "parallel": str(subject.mesh.degrees),
        "weights": subject.weights,
        "pipeline": repr(subject.pipeline.config),
    }
    if place.is_rank_zero:
        commit = options.git_commit
        found = report.new_report(benchmark, place.device, config, rows, commit, fields)
        report.finish(found, options, columns, draw)
    environment.shutdown()


def load_subject(
    slug: str,
    place: Environment,
    *,
    backend: str | None = None,
    use_cuda_graph: bool | None = None,
    dtype: str | None = None,
    transformer: Mapping[str, Any] | None = None,
    strict: bool = False,
) -> Subject:
    """Build the pipeline of a slug; weights that are not on this machine are random.

    Args:
        slug: slug as on the command line.
        place: the ranks.
        backend: attention backend of every core; None: that of the config.
        use_cuda_graph: replay the network call; None: as in the config.
        dtype: dtype of the transformer; None: that of the config.
        transformer: further changed fields of the transformer.
        strict: same bits on any number of ranks.

    Raises:
        ValueError: an unknown slug or backend, or a method with an unknown control input.
    """
    runner: Any = discover().resolve(slug)
    changes: dict[str, Any] = dict(transformer or {})
    if use_cuda_graph is not None:
        changes["use_cuda_graph"] = use_cuda_graph
    if dtype is not None:
        changes["dtype"] = dtype
    if backend is not None:
        changes["attention_backend"] = backend
    config = derive_config(runner.pipeline, diffusion_model={"transformer": changes})
    config, missing = without_missing_weights(config)
    config, context, steer = _conditions(runner, config)
    with cheap_weights(place.device) if missing else nullcontext():
        pipeline = config.setup(device=place.device, load=False)
    mesh = pipeline.build_mesh(place.world_size, ParallelConfig(strict=strict))
    pipeline.parallelize(mesh)
    pipeline.load()
    return Subject(slug, pipeline, mesh, context, steer, missing)


def without_missing_weights(
    config: StreamInferencePipelineConfig,
) -> tuple[StreamInferencePipelineConfig, tuple[str, ...]]:
    """The config with random weights for missing checkpoints, and the fields of these.

    A text encoder without its weights is removed; the prompt is then given as embeddings.
    """
    missing = []
    for path, checkpoint in named_checkpoints(config):
        if find_local(checkpoint) is not None:
            continue
        owner = path.removesuffix(".checkpoint")
        missing.append(owner)
        change: Any = {"checkpoint": None}
        names = owner.split(".")
        if names[0] == "text_encoder":
            names, change = names[:1], None
        for name in reversed(names):
            change = {name: change}
        if config.text_encoder is not None or names[0] != "text_encoder":
            config = derive_config(config, **change)
    return config, tuple(missing)


def _conditions(
    runner: RunnerConfig, config: StreamInferencePipelineConfig
) -> tuple[StreamInferencePipelineConfig, dict[str, Any], Callable[[int], Any]]:
    """The config, the context of a rollout and the control input of each AR step."""
    transformer: Any = config.diffusion_model.transformer
    if isinstance(runner, MatrixGameRunnerConfig):
        image = gradient_image(
            SPATIAL_FACTOR * transformer.latent_height, SPATIAL_FACTOR * transformer.latent_width
        )
        return config, {"image": image}, partial(_actions_of, runner, transformer.len_t)
    context: dict[str, Any] = {"text": [getattr(runner, "prompt", "a walk through a town")]}
    if config.text_encoder is None:
        generator = torch.Generator().manual_seed(0)
        size = (1, transformer.text_len, transformer.text_dim)
        context["text"] = torch.randn(size, generator=generator)
        if config.diffusion_model.guidance_scale is not None:
            context["negative_text"] = torch.randn(size, generator=generator)
    if isinstance(runner, ImageToVideoRunnerConfig):
        context["image"] = gradient_image(*runner.frame_size)
    if isinstance(runner, ToyWorldRunnerConfig):
        return config, context, partial(_pose_of, walk(runner.actions, WALKED_FRAMES))
    if isinstance(runner, CameraToVideoRunnerConfig):
        encoder = dict(
            pose_mode="streaming", len_t=transformer.len_t, patch_size=transformer.patch_size[1]
        )
        path = read_path(derive_config(runner, actions=f"w{WALKED_FRAMES}", pose_path=None))
        return (
            derive_config(config, encoder=encoder),
            context,
            partial(_path_of, path, transformer.len_t),
        )
    if config.encoder is not None:
        raise ValueError(
            f"{runner.runner_name} has an encoder of its own, {type(config.encoder).__name__}: "
            "add its control input to benchmarks/rollout.py."
        )
    return config, context, lambda index: None


def _pose_of(poses: Tensor, index: int) -> Tensor:
    return poses[min(index, len(poses) - 1)][None]


def _path_of(path: CameraPath, len_t: int, index: int) -> CameraPath:
    frames = _pixel_frames(len_t, index)
    return path.part(slice(frames.start, frames.stop))


def _actions_of(runner: MatrixGameRunnerConfig, len_t: int, index: int) -> Actions:
    """The keys in turn, each held for a chunk."""
    controller = ActionController(runner.keys)
    keys = list(runner.keys.names)
    pressed = Event(0, {"keys": keys[index % len(keys)]})
    return controller.advance(controller.new_state(), [pressed], _pixel_frames(len_t, index))


def _pixel_frames(len_t: int, index: int) -> range:
    """The pixel frames of a chunk: one for latent frame 0, four for every other."""
    return range(0 if index == 0 else 4 * index * len_t - 3, 4 * (index + 1) * len_t - 3)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_s(device: torch.device) -> float:
    """A clock in seconds; CPU time on a CPU, so that other processes do not count."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def time_in_turn(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of every call; the variants take turns, so that load affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats):
        for name in list(calls) if number % 2 else list(calls)[::-1]:
            start = clock_s(device)
            calls[name]()
            times[name].append(1e3 * (clock_s(device) - start))
    return times


def _heads_first_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    batch, heads, queries, dim = q
    return int(2 * batch * heads * queries * k[2] * (dim + v[3]))


def _tokens_first_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    batch, queries, heads, dim = q
    return int(2 * batch * heads * queries * k[1] * (dim + v[3]))


def count_flops(function: Callable[[], Any]) -> int:
    """Floating point operations of one call on this rank: matmuls, convolutions and attention."""
    mapping: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _heads_first_flops
    }
    own = getattr(torch.ops, "flashdreams", None)
    if own is not None and hasattr(own, "chunk_attention"):
        mapping[own.chunk_attention] = _tokens_first_flops
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return int(counter.get_total_flops())
