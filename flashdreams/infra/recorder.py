"""The record of a run: stage times, checksums and latents, gathered by watching the pipeline."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import flashdreams
from flashdreams.infra.config_file import config_hash
from flashdreams.infra.pipeline import StreamInferencePipeline, StreamInferencePipelineCache
from flashdreams.parallel.environment import Environment
from flashdreams.parallel.mesh import Mesh
from flashdreams.runtime.profiler import StageTimer
from flashdreams.runtime.stats import memory_stats, sha256_of, write_stats
from flashdreams.runtime.transfer import start_host_copy

if TYPE_CHECKING:
    from flashdreams.infra.runner import RunnerConfig


class RunRecorder:
    """Watches rollouts and writes ``stats_<slug>.json`` when the run is over.

    Checksums are taken beside the loop, by one thread, from copies that the loop does not wait
    for. Only rank zero records anything.
    """

    def __init__(
        self,
        config: "RunnerConfig",
        environment: Environment,
        mesh: Mesh,
        pipeline: StreamInferencePipeline,
    ) -> None:
        self.config = config
        self.pipeline = pipeline
        self.environment = environment
        self.mesh = mesh
        self._ready = time.perf_counter()
        self._first_chunk_ms: float | None = None
        self._first_seen = 0.0
        self._frames_since = 0
        self._timers: list[StageTimer] = []  # not the caches, whose memory is for other rollouts
        self._latents: list[Tensor] = []
        self._checksums: list[tuple[dict[str, Any], str, Future[str]]] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checksum")

    def observe(self, cache: StreamInferencePipelineCache, chunk: Tensor) -> None:
        """Note one chunk; called by the pipeline right after it was generated.

        Args:
            cache: the rollout that it belongs to.
            chunk: ``[B, F, 3, height, width]`` in [-1, 1], or the latent without a decoder.
        """
        if not self.environment.is_rank_zero:
            return
        if not any(known is cache.timer for known in self._timers):
            self._timers.append(cache.timer)
        decoded = chunk is not cache.latent
        frames = chunk.shape[1] if decoded else chunk.shape[2]
        if self._first_chunk_ms is None:
            self._first_seen = time.perf_counter()
            self._first_chunk_ms = (self._first_seen - self._ready) * 1e3
        else:
            self._frames_since += frames
        cache.timer.note(frames=frames, **memory_stats(self.environment.device))
        self._checksum(cache.records[-1], "frames_sha256", chunk)
        if cache.latent is not None:
            self._checksum(cache.records[-1], "latent_sha256", cache.latent)
            if self.config.save_latents:
                self._latents.append(cache.latent.float().cpu())

    @property
    def steps(self) -> int:
        """AR steps of all rollouts so far; 0 on ranks that record nothing."""
        return sum(len(timer.records) for timer in self._timers)

    @property
    def frames_per_second(self) -> float:
        """Rate since the first chunk, which start-up slows; 0 until the second."""
        elapsed = time.perf_counter() - self._first_seen
        return self._frames_since / elapsed if self._frames_since > 0 else 0.0

    def _checksum(self, record: dict[str, Any], key: str, tensor: Tensor) -> None:
        copy, arrived = _host_copy(tensor)

        def compute() -> str:
            if arrived is not None:
                arrived.synchronize()
            return sha256_of(copy)

        self._checksums.append((record, key, self._thread.submit(compute)))

    def records(self) -> list[dict[str, Any]]:
        """One record per AR step of every rollout watched, complete with rates and checksums.

        A step that was broken off made no frames and has none.
        """
        for record, key, checksum in self._checksums:
            record[key] = checksum.result()
        self._checksums.clear()
        found = []
        for rollout, timer in enumerate(self._timers):
            for record in timer.flush():
                if "frames" not in record:
                    continue
                seconds = record["total_ms"] / 1e3
                rate = record["frames"] / seconds if seconds > 0 else None
                found.append({"rollout": rollout, **record, "fps": rate})
        return found

    def header(self) -> dict[str, Any]:
        """What holds for the run as a whole."""
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
            "first_frame_latency_ms": self._first_chunk_ms,
            **self.pipeline.stats(),
        }

    def close(self) -> list[Path]:
        """Write the stats and, if asked for, the latents; only rank zero does.

        Returns:
            The files that were written.
        """
        if not self.environment.is_rank_zero:
            return []
        folder, slug = self.config.output_dir, self.config.runner_name
        records = self.records()
        self._thread.shutdown()
        stats = folder / f"stats_{slug}.json"
        with _said_for_people(stats):
            write_stats(stats, self.header(), records)
        if not self._latents:
            return [stats]
        latents = folder / f"latents_{slug}.safetensors"
        self._write_latents(latents)
        return [stats, latents]

    def _write_latents(self, path: Path) -> None:
        partial = path.with_name(f".{path.name}.partial")
        try:
            with _said_for_people(path):
                save_file({"latents": torch.cat(self._latents, dim=2)}, partial)
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _said_for_people(path: Path) -> Iterator[None]:
    """Turn a failed write into one line that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(
            f"{path} could not be written: {reason}. Free some space or choose another "
            "directory (--output-dir)."
        ) from error


def _host_copy(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host that nobody changes, and the event after which it is complete."""
    return start_host_copy(tensor) if tensor.is_cuda else (tensor.detach().clone(), None)
