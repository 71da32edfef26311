"""The runner: one method on the command line, with its files and stats."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from tqdm import tqdm

from flashdreams.infra.config import InstantiateConfig, check_slug, format_config
from flashdreams.infra.controller import Controller
from flashdreams.infra.pipeline import (
    StreamInferencePipeline,
    StreamInferencePipelineConfig,
)
from flashdreams.infra.ranges import check_range
from flashdreams.infra.recorder import RunRecorder, claimed_output
from flashdreams.infra.resumable import ResumableRun
from flashdreams.infra.same_options import refuse_other_options
from flashdreams.infra.session import Command, Session, Step
from flashdreams.infra.stored_choices import read_choices
from flashdreams.infra.weights import require_packages
from flashdreams.parallel.environment import (
    LOAD_TIMEOUT_S,
    MEETING_DEADLINE_S,
    Environment,
    from_rank_zero,
    gather_to_rank_zero,
    init,
    read_launch,
    shutdown,
)
from flashdreams.parallel.logs import announced, set_up_logging
from flashdreams.parallel.mesh import DEGREES, Mesh, ParallelConfig
from flashdreams.parallel.messages import MessageChannel
from flashdreams.parallel.peers import PeerWatch
from flashdreams.parallel.watchdog import Watchdog
from flashdreams.runtime.noise import SEED_LIMIT
from flashdreams.runtime.run_report import write_report
from flashdreams.runtime.segments import SegmentedVideo
from flashdreams.runtime.text import tell
from flashdreams.runtime.trace import Tracer, slowest_rank, traced, write_trace
from flashdreams.runtime.video import VideoWriter

MAX_THREADS = 1024
SMALL_PARAMETERS = 10_000_000
"""Parameters below which one CPU thread is faster than two; the toy world has 4 million."""

ConfigT = TypeVar("ConfigT", bound="RunnerConfig")
RunnerT = TypeVar("RunnerT", bound="Runner[Any, Any]")


@dataclass(kw_only=True)
class RunnerConfig(InstantiateConfig):
    """The fields of every method on the command line."""

    _target: type["Runner"] = field(default_factory=lambda: Runner)

    runner_name: str
    """The slug: the name on the command line."""
    description: str = ""
    """One line for the list of methods."""
    pipeline: StreamInferencePipelineConfig
    """The method."""
    output_dir: Path = Path("outputs")
    """Folder that receives the video and the stats."""
    seed: int = 0
    """Seed of the noise, for rollouts without a seed of their own."""
    fps: int = 16
    """Frames per second of the video."""
    device: str = "auto"
    """Device: "auto" is CUDA if available, else "cpu"."""
    save_latents: bool = False
    """Also write all latents, in float32, to latents_<slug>.safetensors."""
    hash_frames: bool = False
    """Also record the SHA-256 of each chunk's frames in the stats, beside that of its latent."""
    snapshot_every: int = 0
    """AR steps between snapshots; 0: none. A failed run continues from its newest snapshot with
    --resume True, or with torchrun --max-restarts. Several nodes need a shared output folder."""
    snapshots_kept: int = 2
    """Snapshots to keep; older ones are deleted."""
    resume: bool = False
    """Continue the unfinished run in the output folder from its newest complete snapshot."""
    numerics_from: Path | None = None
    """Log of a run (log_<slug>.jsonl) or folder of a snapshot: use its attention backend, KV splits
    and fused kernels instead of measuring, unless the config sets them. --replay and --resume True
    imply it."""
    threads: int | None = None
    """CPU threads of PyTorch. None: OMP_NUM_THREADS if set; otherwise, on a CPU, 1 for networks
    below ten million parameters (more threads are slower) and PyTorch's default for all others."""
    step_deadline_s: float = 60.0
    """With several ranks: timeout of one stage of an AR step, in seconds."""
    start_deadline_s: float = LOAD_TIMEOUT_S
    """With several ranks: timeout in seconds of each stage before the first AR step: rendezvous (at
    most 300), downloading and loading weights, warm-up."""
    trace: Path | None = None
    """Write a timeline of all ranks, stages and collectives to this .json, for ui.perfetto.dev."""
    report: bool = False
    """Also write report_<slug>.html: config, measurements, plots, first and last frame."""
    log_json: bool = False
    """Write log lines as JSON objects, for log collectors."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Parallelism over several ranks."""

    def __post_init__(self) -> None:
        check_slug(self.runner_name)
        if hasattr(self, "total_blocks"):  # every shipped method has it
            check_range(self, "total_blocks", as_flags=True)
        check_range(self, "fps", most=1000, as_flags=True)
        check_range(self, "snapshot_every", least=0, as_flags=True)
        check_range(self, "snapshots_kept", as_flags=True)
        check_range(self, "step_deadline_s", "start_deadline_s", least=0.1, as_flags=True)
        check_range(self, "threads", most=MAX_THREADS, as_flags=True)
        if not 0 <= self.seed < SEED_LIMIT:
            raise ValueError(f"--seed {self.seed}: must be from 0 to 2**64 - 1.")

    def for_serving(self: ConfigT) -> ConfigT:
        """The config for live sessions, without options of a run to a file.

        Raises:
            ValueError: an option does not apply to live sessions.
        """
        return replace(self, snapshot_every=0, resume=False)


PipelineT = TypeVar("PipelineT", bound=StreamInferencePipeline)


class Runner(Generic[ConfigT, PipelineT]):
    """Sets up a pipeline, runs rollouts in ``run`` and writes the stats in ``close``.

    ``run`` streams one session into a video. Subclasses define its inputs in ``conditions``
    and its control in ``controller`` and ``commands``, or override ``run``. The stats come
    from observing the pipeline, so they are written whatever ``run`` does.

    A program closes it, or opens it as a context: ``with config.setup() as runner``.
    """

    config: ConfigT
    pipeline: PipelineT
    fetch_all: ClassVar[str | None] = None
    """The option that downloads all missing weights; None names a flag for each."""

    def __init__(self, config: ConfigT) -> None:
        """Join the process group, build the pipeline and open the output folder.

        Raises:
            ValueError: the config cannot be run, the text encoder refuses a prompt, or the output
                folder is not writable or in use by another run. No weights have been read yet.
            CheckpointError: weights are missing or damaged.
        """
        self.config = config
        self.environment: Environment = init(
            config.device, meeting_s=min(config.start_deadline_s, MEETING_DEADLINE_S)
        )
        set_up_logging(self.environment, as_json=config.log_json)
        self._is_closed = False
        self._resources = contextlib.ExitStack()
        self._peers = self._resources.enter_context(PeerWatch(self.environment))
        self._output = contextlib.ExitStack()
        if self.is_rank_zero:
            self._output.enter_context(claimed_output(config))
        try:
            self._assemble(config)
        except BaseException as error:
            self._output.close()
            found = self.explain(error)
            self._resources.close()
            if found is error:
                raise
            raise found from error

    def _assemble(self, config: ConfigT) -> None:
        limit_s, where = config.start_deadline_s, self.environment
        refuse_other_options(config)
        require_packages(config.pipeline, fetch_all=self.fetch_all)
        self.pipeline = config.pipeline.setup(device=self.environment.device, load=False)
        self.pipeline.default_seed = config.seed
        set_threads(config.threads, self.pipeline)
        self.resumable = ResumableRun(
            config.output_dir / f"resume_{config.runner_name}",
            read_launch(self.environment),
            every=config.snapshot_every,
            kept=config.snapshots_kept,
            resume=config.resume,
        )
        if self.is_rank_zero:
            self._output.callback(self.resumable.leave)
        self.mesh = self._build_mesh()
        reports = self.pipeline.parallelize(self.mesh)
        if self.environment.world_size > 1:
            self._tell(f"ranks: {self.mesh.degrees}; transformer: {reports['transformer']}")
        self._apply_choices()
        self._videos: list[Path] = []
        self._video: SegmentedVideo | None = None
        if self.environment.world_size > 1:
            watchdog = self._resources.enter_context(Watchdog(where, config.step_deadline_s))
            self.pipeline.guard = watchdog.stage
        self.tracer = Tracer(self.environment.rank, keep=config.trace is not None)
        self.pipeline.guard = traced(self.pipeline.guard, self.tracer, self.mesh.meter)
        with announced("loading weights", where), self.pipeline.guard("load", None, limit_s):
            self.pipeline.load(self.fetch_all, self.prompt_options())
        with announced("warming up", where), self.pipeline.guard("warm-up", None, limit_s):
            warmed_up = self.pipeline.warm_up()
        if warmed_up.steps:
            self._tell(f"{warmed_up.measured}ready: {warmed_up}")
        self.recorder = RunRecorder(config, self.environment, self.mesh, self.pipeline)
        self.recorder.resumable = bool(self.resumable.every or self.resumable.goes_on)
        self.pipeline.observers.append(self.recorder.observe)

    def _apply_choices(self) -> None:
        """Use the numerics choices of the run that this one continues or repeats."""
        source = self.config.numerics_from
        if source is None:
            stored = self.resumable.choices()
        else:
            stored = from_rank_zero(lambda: read_choices(source))
        for line in () if stored is None else self.pipeline.apply_choices(stored):
            self._tell(f"numerics: {line}.")

    def _build_mesh(self) -> Mesh:
        """The requested mesh; a resumed run uses one that fits its ranks."""
        ranks, asked = self.environment.world_size, self.config.parallel
        try:
            return self.pipeline.build_mesh(ranks, asked)
        except ValueError as error:
            if not self.resumable.goes_on:
                raise
            self._tell(f"ranks: {error} This run continues with degrees that fit.")
            degrees = dict.fromkeys(DEGREES, "auto")
            return self.pipeline.build_mesh(ranks, replace(asked, **degrees))  # type: ignore[arg-type]

    def _tell(self, text: str) -> None:
        if self.is_rank_zero:
            tell(text)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes files and prints."""
        return self.environment.is_rank_zero

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.environment.device

    def prompt_options(self) -> dict[str, str]:
        """The texts that ``run`` will encode, by the option that gives them.

        A prompt that the encoder refuses ends the program before weights are downloaded or read.
        """
        return {}

    def conditions(self) -> dict[str, Any]:
        """Conditions of the rollout: keyword arguments of ``pipeline.initialize_cache``.

        The default is the prompt of the config.

        Raises:
            TypeError: the config has no ``prompt``.
        """
        prompt = getattr(self.config, "prompt", None)
        if not isinstance(prompt, str):
            raise TypeError(
                f"{type(self).__name__} has no prompt in its config; define conditions(), which "
                "returns the keyword arguments of pipeline.initialize_cache."
            )
        return {"text": [prompt]}

    def controller(self) -> Controller | None:
        """The controller that makes each control input; None for methods without control."""
        return None

    def commands(self) -> Sequence[Command]:
        """Commands for the session of ``run``, such as the key presses of a flag."""
        return ()

    def open_session(self, name: str = "session") -> Session:
        """Start or resume a rollout that can be steered; a collective call."""
        controller = self.controller()
        progress = self.resumable.resume(self.pipeline, controller)
        seed, cache = (self.config.seed, None) if progress is None else progress[:2]
        replay = self.recorder.replay
        opening = {} if replay is None else replay.opening
        session = Session(
            self.pipeline,
            {**self.conditions(), **to_device(opening, self.device)},
            seed=seed,
            controller=controller,
            channel=MessageChannel(self.environment.store),
            name=name,
            cache=cache,
        )
        session.on_turn = self.recorder.note_turn
        self.resumable.begin()
        if progress is not None:  # truncate the files of the run to its snapshot
            session.turns = progress.turns
            frames = progress.turns * self.pipeline.diffusion_model.transformer.config.len_t
            from_rank_zero(lambda: self.recorder.resume(progress.turns, frames))
            self._tell(f"resumed before AR step {session.cache.next_index}")
        return session

    def stream(self, total_blocks: int) -> Iterator[Step]:
        """AR steps of a session with ``commands``, with a progress bar on rank zero.

        Args:
            total_blocks: AR steps.
        """
        session, replay = self.open_session(), self.recorder.replay
        first = session.cache.next_index
        if self._video is not None:
            self._video.begin(first)
        seen = self.pipeline.pixel_frames(first).start if first else -1
        told = [c for c in self.commands() if first == 0 or (c.at_frame or -1) >= seen]
        for command in told if self.is_rank_zero and replay is None else ():
            session.submit(command)
        # Runners written for 0.1 have a ``progress`` with one argument.
        for _ in self.progress(total_blocks, *([first] if first else [])):
            if replay is not None and self.is_rank_zero:
                for command in replay.turns.get(session.turns, []):
                    session.submit(command)
            yield session.step()
            done = session.cache.next_index
            if self.resumable.is_due(done) and done < total_blocks:
                self._save_snapshot(session)
        self.pipeline.check_values(session.cache)

    def _save_snapshot(self, session: Session) -> None:
        """Save a snapshot, after all earlier output is in its files; a collective call."""
        done = session.cache.next_index
        self.recorder.flush()
        if self._video is not None:
            self._video.cut(done)
        self.resumable.save(
            self.pipeline, session.cache, {"turns": session.turns, "seed": session.seed}
        )

    def run(self) -> None:
        """Stream ``config.total_blocks`` AR steps into the video."""
        total_blocks = getattr(self.config, "total_blocks", None)
        if total_blocks is None:
            raise TypeError(
                f"{type(self.config).__name__} has no field total_blocks; add it, or define "
                f"{type(self).__name__}.run."
            )
        video = self.open_video() if self.is_rank_zero else contextlib.nullcontext()
        with video as writer:
            for step in self.stream(total_blocks):
                if writer is not None and step.chunk is not None:
                    writer.write(step.chunk)

    def open_video(self, scale: int = 1) -> VideoWriter | SegmentedVideo:
        """A writer for ``<output_dir>/<slug>.mp4``, to be used as a context on rank zero.

        Args:
            scale: enlargement by whole pixels, for small worlds.
        """
        path = self.config.output_dir / f"{self.config.runner_name}.mp4"
        if self.config.snapshot_every or self.resumable.goes_on:
            self._videos.append(path)
            segments = self.resumable.home / "segments"
            self._video = SegmentedVideo(path, segments, fps=self.config.fps, scale=scale)
            return self._video
        writer = VideoWriter(path, fps=self.config.fps, scale=scale)
        self._videos.append(writer.path)
        return writer

    def progress(self, total_blocks: int, first: int = 0) -> Iterator[int]:
        """The AR indices ``first`` to ``total_blocks - 1``, with a progress bar on rank zero."""
        bar = tqdm(
            total=total_blocks,
            initial=first,
            desc=self.config.runner_name,
            unit="chunk",
            disable=not self.is_rank_zero,
            dynamic_ncols=True,
        )
        with bar:
            for index in range(first, total_blocks):
                yield index
                if rate := self.recorder.frames_per_second:
                    bar.set_postfix_str(f"{rate:.1f} fps", refresh=False)
                bar.update()

    def close(self) -> None:
        """Write the stats and, if requested, the latents, then leave the process group; once.

        Raises:
            NotFiniteError: the last AR step has made NaN or infinite values.
            OSError: on rank zero, if a file could not be written.
            RankZeroError: on the other ranks, if rank zero has failed.
        """
        if self._is_closed:
            return
        self._is_closed = True
        limit_s = LOAD_TIMEOUT_S if self.config.save_latents else None  # there may be many
        with contextlib.ExitStack() as at_the_end:
            at_the_end.callback(self._output.close)
            at_the_end.enter_context(self.pipeline.guard("close", self.recorder.steps, limit_s))
            ranks = gather_to_rank_zero((list(self.tracer.steps_ms), self.tracer.events))
            self.recorder.ranks = slowest_rank([steps for steps, _ in ranks]) if ranks else {}
            files = from_rank_zero(self.recorder.close)
            if (path := self.config.trace) is not None:
                from_rank_zero(lambda: write_trace(path, [events for _, events in ranks]))
                files.append(path)
            if self.config.report:
                files += from_rank_zero(self._write_report)
            self.pipeline.check_values()
        if self.is_rank_zero:
            if self.recorder.resumable:
                self.resumable.finish()
            tell(" ".join(["written:", *map(str, [*self._videos, *files])]))
            if self.recorder.replay is not None:
                tell(self.recorder.replay.verdict(self.recorder.log_header()))
        self._leave()

    def __enter__(self: RunnerT) -> RunnerT:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Close; after an error only write what is available."""
        if error is None:
            self.close()
            return
        self.abort()
        if self.environment.world_size == 1:  # else other ranks may hang in a collective
            self._leave()

    def serve(self) -> None:
        """Record nothing from now on, for a runner that serves sessions."""
        observers, own = self.pipeline.observers, self.recorder.observe
        observers[:] = [observe for observe in observers if observe != own]

    def end_serving(self) -> None:
        """Unlock the output folder and leave the process group; writes no files."""
        self._output.close()
        self._leave()

    def _leave(self) -> None:
        self.pipeline.drop_graphs()
        self._resources.close()
        shutdown()

    def _write_report(self) -> list[Path]:
        path = self.config.output_dir / f"report_{self.config.runner_name}.html"
        video = self._videos[0] if self._videos and self._videos[0].is_file() else None
        write_report(path, self.recorder.stats_path, format_config(self.config), video)
        return [path]

    def explain(self, error: BaseException) -> BaseException:
        """The error to report: the death of another rank, if this error only follows from it."""
        return self._peers.explain(error)

    def abort(self) -> None:
        """Write the stats of the steps before the failure.

        The process group is left to torchrun: other ranks may hang in a collective.
        """
        guard = self.pipeline.guard("abort", self.recorder.steps)  # a hung device blocks checksums
        with contextlib.suppress(Exception), guard:
            self.recorder.abort()
        self._output.close()


def to_device(conditions: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Conditions with their tensors on a device."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in conditions.items()
    }


def set_threads(threads: int | None, pipeline: StreamInferencePipeline) -> None:
    """Set the CPU threads of PyTorch by `RunnerConfig.threads`."""
    if threads is None:
        small = sum(p.numel() for p in pipeline.parameters()) < SMALL_PARAMETERS
        if pipeline.target_device.type != "cpu" or "OMP_NUM_THREADS" in os.environ or not small:
            return
        threads = 1
    torch.set_num_threads(threads)
