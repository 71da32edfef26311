"""The record of a run: stage times, checksums and latents, collected by observing the pipeline."""

import atexit
import importlib
import logging
import os
import platform
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flashdreams
from flashdreams.infra.config_file import config_hash, dump_config
from flashdreams.infra.identity import describe_config, describe_inputs
from flashdreams.infra.pipeline import StreamInferencePipeline, StreamInferencePipelineCache
from flashdreams.infra.run_log import Replay, RunLog, sample_of, turn_row
from flashdreams.infra.session import Turn
from flashdreams.parallel.environment import Environment
from flashdreams.parallel.mesh import Mesh
from flashdreams.runtime.files import (
    InUseError,
    check_target,
    open_owned,
    readable_write_errors,
)
from flashdreams.runtime.latents import LatentWriter
from flashdreams.runtime.profiler import StageTimer
from flashdreams.runtime.stats import StatsWriter, memory_stats, sha256_of
from flashdreams.runtime.text import printable, reason_of, say
from flashdreams.runtime.transfer import copy_to_host

MAX_COPIES = 4
"""Most tensors copied to the host and not yet hashed; beyond that the loop waits for the oldest."""

LOCK_S = 1.0
"""Seconds that the end of a run waits for a thread that writes a record."""

log = logging.getLogger(__name__)


def own_files(folder: Path, slug: str) -> list[Path]:
    """The files that a run of a slug may write into its output folder."""
    names = ("{}.mp4", "stats_{}.json", "latents_{}.safetensors", "log_{}.jsonl", "report_{}.html",
             "{}.partial.mp4", "stats_{}.partial.jsonl", "latents_{}.partial.npy")  # fmt: skip
    return [folder / name.format(slug) for name in names]


@contextmanager
def claimed_output(config: Any) -> Iterator[None]:
    """Make the output folder, and keep other runs from writing files of this slug into it.

    It has the file ``.<slug>.lock`` meanwhile; the end of the process also releases the names.

    Args:
        config: of the runner.

    Raises:
        ValueError: one line with the reason.
    """
    folder, slug = config.output_dir, config.runner_name
    if config.trace is not None:
        check_target(config.trace, "--trace", own_files(folder, slug))
    for path in own_files(folder, slug):
        is_folder = os.path.isdir(path)  # unlike path.is_dir(), never an error
        if is_folder or (os.path.exists(path) and not os.access(path, os.W_OK)):
            raise ValueError(
                f"--output-dir {folder}: {path.name}, which the run may write, is "
                f"{'a folder' if is_folder else 'not writable'}. Remove it, or name another folder."
            )
    try:
        importlib.import_module("matplotlib")  # which mediapy imports at the first frame
    except OSError as error:
        raise ValueError(
            "Videos need a folder for Matplotlib's cache, and neither the home nor a temporary "
            f"folder is writable. Set MPLCONFIGDIR to one that is, such as {folder}."
        ) from error
    lock, own = folder / f".{slug}.lock", f"{platform.node()} {os.getpid()}".encode()
    try:
        file = open_owned(lock)
        file.write(own)
        file.flush()
    except InUseError as error:
        holder, remedy = f"another run of {slug}", "wait until it ends"
        if lock.is_file() and lock.read_bytes() == own:
            holder = f"a runner of {slug} in this process"
            remedy = 'close() it; "with config.setup() as runner" does so'
        raise ValueError(
            f"--output-dir {folder}: {holder} writes its files there. "
            f"Use another folder, such as --output-dir {folder}-2, or {remedy}."
        ) from error
    except OSError as error:
        raise ValueError(
            f"--output-dir {folder} cannot be written: {reason_of(error)}. Name another folder."
        ) from error
    with file:
        try:
            yield
        finally:
            with suppress(OSError):  # the folder may have been deleted
                lock.unlink(missing_ok=True)


@dataclass(eq=False)
class _Rollout:
    number: int
    timer: StageTimer
    cache: "weakref.ref[StreamInferencePipelineCache]"
    """A weak reference, so that its memory can be freed."""


@dataclass(eq=False)
class _Step:
    """An AR step whose record is not yet written."""

    rollout: _Rollout
    record: dict[str, Any]
    checksums: dict[str, Future[str]]
    sample: dict[str, Any]
    """Shape and values of the latent, for the log; set together with the checksum."""
    turn: int

    def is_complete(self) -> bool:
        """Whether the record is complete."""
        timer = self.rollout.timer
        is_last = timer.records[-1] is self.record and self.rollout.cache() is not None
        hashed = all(checksum.done() for checksum in self.checksums.values())
        return not is_last and hashed and timer.has_all_times(self.record)


class RunRecorder:
    """Observes rollouts and writes ``stats_<slug>.json`` when the run is over.

    ``log_<slug>.jsonl`` is the input of a replay; see `flashdreams.infra.run_log`.

    Until then the record of a step goes to ``stats_<slug>.partial.jsonl`` once the next step has
    begun, and its latent, if asked for, to ``latents_<slug>.partial.npy``. Both remain if the
    process is killed. Memory does not grow with the number of steps.

    One thread hashes and writes latents, from copies that the loop does not wait for unless
    :data:`MAX_COPIES` are outstanding. After a failed write nothing more is added to that file;
    `close` raises the error. Only rank zero records anything.
    """

    def __init__(
        self,
        config: Any,
        environment: Environment,
        mesh: Mesh,
        pipeline: StreamInferencePipeline,
    ) -> None:
        self.config = config
        self.pipeline = pipeline
        self.environment = environment
        self.mesh = mesh
        self.ranks: dict[str, Any] = {}
        """Median step time of each rank and the slowest rank; set at the end."""
        self.steps = 0
        """AR steps of all rollouts so far; 0 on ranks that record nothing."""
        self._ready = time.perf_counter()
        self._first_chunk_ms: float | None = None
        self._first_seen = 0.0
        self._frame_size: list[int] | None = None
        self._frames_since = 0
        self._rollout_count = 0
        self._rollouts: list[_Rollout] = []  # with steps to write, or still running
        self._steps: list[_Step] = []
        self._copies: deque[Future[str]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checksum")
        folder, slug = config.output_dir, config.runner_name
        self._stats = StatsWriter(folder / f"stats_{slug}.json", self.header)
        self._latents = LatentWriter(folder / f"latents_{slug}.safetensors")
        self.log = RunLog(folder / f"log_{slug}.jsonl", self.log_header)
        """Commands and hashes of the run."""
        self.replay: Replay | None = None
        """The log that this run replays."""
        self.resumable = False
        """Whether a failed run keeps its partial files for a process that resumes it."""
        self._errors: dict[Path, Exception] = {}
        self._lock = threading.RLock()
        self._closed = False

    def observe(self, cache: StreamInferencePipelineCache, chunk: Tensor) -> None:
        """Record one chunk; called by the pipeline right after it was generated.

        Args:
            cache: the rollout that it belongs to.
            chunk: ``[B, F, 3, height, width]`` in [-1, 1], or the latent without a decoder.
        """
        if not self.environment.is_rank_zero:
            return
        decoded = chunk is not cache.latent
        frames = chunk.shape[1] if decoded else chunk.shape[2]
        if self._first_chunk_ms is None:
            self._first_seen = time.perf_counter()
            self._first_chunk_ms = (self._first_seen - self._ready) * 1e3
            self._frame_size = list(chunk.shape[-2:]) if decoded else None
        else:
            self._frames_since += frames
        cache.timer.note(frames=frames, **memory_stats(self.environment.device))
        step = _Step(self._rollout_of(cache), cache.records[-1], {}, {}, self.steps)
        if self.config.hash_frames:
            step.checksums["frames_sha256"] = self._start_checksum(chunk)
        if cache.latent is not None:

            def keep(latent: Tensor) -> None:
                step.sample.update(latent_shape=list(latent.shape), sample=sample_of(latent))
                if self.config.save_latents:
                    self._append(self._latents, latent)

            step.checksums["latent_sha256"] = self._start_checksum(cache.latent, keep)
        with self._lock:
            self._steps.append(step)
            self._write_records()
        if self.steps == 0:
            # However the process ends: also where its main thread hangs, see `end_now`. Registered
            # after the video, so that it comes before it.
            atexit.register(self.abort)
        self.steps += 1

    def _rollout_of(self, cache: StreamInferencePipelineCache) -> _Rollout:
        for rollout in self._rollouts:
            if rollout.timer is cache.timer:
                return rollout
        rollout = _Rollout(self._rollout_count, cache.timer, weakref.ref(cache))
        self._rollout_count += 1
        self._rollouts.append(rollout)
        return rollout

    @property
    def frames_per_second(self) -> float:
        """Frames per second since the first chunk, without start-up; 0 until the second."""
        elapsed = time.perf_counter() - self._first_seen
        return self._frames_since / elapsed if self._frames_since > 0 else 0.0

    def _start_checksum(
        self, tensor: Tensor, save: Callable[[Tensor], None] | None = None
    ) -> Future[str]:
        """Queue a tensor to be hashed, and its copy passed to ``save``, in the thread."""
        while self._copies and self._copies[0].done():
            self._copies.popleft()
        if len(self._copies) >= MAX_COPIES:
            with self.pipeline.guard("checksum", self.steps):  # a hung device never returns it
                wait_for([self._copies.popleft()])
        copy, arrived = copy_to_host(tensor)

        def compute() -> str:
            if arrived is not None:
                arrived.synchronize()
            if save is not None:
                save(copy)
            return sha256_of(copy)

        self._copies.append(self._thread.submit(compute))
        return self._copies[-1]

    def _write_records(self, wait: bool = False) -> None:
        """Write the records that are complete; with ``wait`` those of all steps.

        An interrupted step has no frames and no record.
        """
        if wait:
            for rollout in self._rollouts:
                rollout.timer.flush()
        for step in [step for step in self._steps if wait or step.is_complete()]:
            record = {"rollout": step.rollout.number, **step.record}
            record.update((key, checksum.result()) for key, checksum in step.checksums.items())
            seconds = record["total_ms"] / 1e3
            record["fps"] = record["frames"] / seconds if seconds > 0 else None
            self._steps.remove(step)
            self._append(self._stats, record)
            if step.sample:
                sha256 = record["latent_sha256"]
                row = {"step": step.turn, "latent_sha256": sha256, **step.sample}
                self._append(self.log, row)
                if self.replay is not None:
                    self.replay.compare(row)
        busy = {id(step.rollout) for step in self._steps}
        self._rollouts = [r for r in self._rollouts if id(r) in busy or r.cache() is not None]

    def note_turn(self, number: int, turn: Turn) -> None:
        """Log the commands of a session; called before the turn is applied."""
        if self.environment.is_rank_zero and turn.commands:
            row = turn_row(number, turn.autoregressive_index, turn.commands)
            self._append(self.log, row)

    @property
    def stats_path(self) -> Path:
        """Of the stats, once `close` has written them."""
        return self._stats.path

    def log_header(self, config: Any = None) -> dict[str, Any]:
        """The first line of the log.

        Args:
            config: of the runner whose log it is; None: the run's own.
        """
        config = config or self.config
        return {
            "flashdreams": flashdreams.__version__,
            "runner_name": config.runner_name,
            "config": _dumped(config),
            "config_hash": config_hash(config),
            "inputs": describe_inputs(config),
            "method": {
                name: value
                for name, value in describe_config(self.pipeline.config).items()
                if not name.startswith("decoder")
            },
            "seed": config.seed,
            "world_size": self.environment.world_size,
            "fingerprint": self.pipeline.fingerprint(),
        }

    def flush(self) -> None:
        """Write the records of all steps so far; they are final."""
        if self.environment.is_rank_zero:
            self._write_records(wait=True)

    def resume(self, steps: int, latent_frames: int) -> None:
        """Continue after the first steps of an earlier process; its later output is deleted.

        Raises:
            ValueError: it wrote fewer.
            OSError: the files cannot be read or written.
        """
        self.steps = steps
        self._stats.resume(steps)
        self.log.resume(steps)
        if self.config.save_latents:
            self._latents.resume(latent_frames)

    def _append(self, writer: StatsWriter | LatentWriter | RunLog, item: Any) -> None:
        """Add to a file, and keep the error of a failed write for `close`."""
        if writer.path in self._errors:
            return
        try:
            with readable_write_errors(writer.path, writer.partial_path):
                writer.append(item)
        except (OSError, ValueError, TypeError) as error:
            self._errors[writer.path] = error
            writer.close()
            log.warning("%s The run continues without it.", error)

    def header(self) -> dict[str, Any]:
        """Data of the run as a whole."""
        device = self.environment.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        return {
            "flashdreams": flashdreams.__version__,
            "runner_name": self.config.runner_name,
            "config_hash": config_hash(self.config),
            "seed": self.config.seed,
            "device": name,
            "torch": torch.__version__,
            "world_size": self.environment.world_size,
            "parallel": asdict(self.mesh.degrees),
            "collectives": {name: asdict(sent) for name, sent in self.mesh.meter.counts.items()},
            **({"frame_size": self._frame_size} if self._frame_size else {}),
            "first_frame_latency_ms": self._first_chunk_ms,
            **self.ranks,
            **self.pipeline.stats(),
        }

    def close(self) -> list[Path]:
        """Write the stats and, if requested, the latents; on rank zero only.

        Returns:
            The files that were written.

        Raises:
            OSError: a file could not be written, now or during the run.
            ValueError: a record has a value that JSON cannot represent, or latents differ in size.
            TypeError: likewise.
        """
        if not self.environment.is_rank_zero:
            return []
        self._closed = True
        atexit.unregister(self.abort)
        with self._lock:
            self._write_records(wait=True)
            self._thread.shutdown()
            files = [self._finish(self._stats)]
            if self._latents.latent_frames or self._latents.path in self._errors:
                files.append(self._finish(self._latents))
            if self.log.has_lines or self.log.path in self._errors:
                files.append(self._finish(self.log))
        return files

    def abort(self) -> None:
        """Write what is available of a run that has failed or hangs; any thread may call it.

        Stats of complete steps come first: requests to the device may hang. What
        cannot be written is reported on stderr, once; nothing is raised.
        """
        if not self.environment.is_rank_zero or self._closed or not self.steps:
            return
        free = self._lock.acquire(timeout=LOCK_S)  # the thread that holds it may hang
        try:
            if self._stats.path not in self._errors and not self.resumable:
                with readable_write_errors(self._stats.path, self._stats.partial_path):
                    self._stats.write()
            if free and self.resumable:
                self._leave_parts()
            elif free:
                self.close()
        except Exception as error:
            self._closed = True  # it is not said again at exit
            if error not in self._errors.values():  # those were logged when they occurred
                say(f"flashdreams: {printable(str(error))}")
        finally:
            if free:
                self._lock.release()

    def _leave_parts(self) -> None:
        self._closed = True
        atexit.unregister(self.abort)
        self._write_records(wait=True)
        for writer in (self._stats, self._latents, self.log):
            writer.close()

    def _finish(self, writer: StatsWriter | LatentWriter | RunLog) -> Path:
        if error := self._errors.get(writer.path):
            raise error
        with readable_write_errors(writer.path, writer.partial_path):
            writer.finish()
        return writer.path


def _dumped(config: Any) -> str | None:
    """The config as YAML; None if it cannot be written as a file; such a log cannot be replayed."""
    try:
        return dump_config(config)
    except TypeError:
        return None
