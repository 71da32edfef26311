"""One variant of a method in a separate process, which streams on request of `variants.py`.

Its one argument is a JSON object (see `Spec`). Orders arrive as JSON lines on standard input, and
each is answered by one JSON line. It can run the code of any checkout since 7918d52, so that two
commits can be timed in turns on one device: modules of `flashdreams`, kernels and benchmarks come
from that checkout, this file and `cheap_weights` from here.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO, TypedDict

KERNELS_SHOWN = 25


class Spec(TypedDict):
    """What a process has to stream."""

    tree: str
    """Folder of the checkout."""
    slug: str
    device: str
    options: dict[str, Any]
    """Keyword arguments of the checkout's ``rollout.load_subject``."""


class Streamer:
    """A pipeline with a rollout whose window is full."""

    def __init__(self, spec: Spec) -> None:
        """Import the checkout's code, without touching the device.

        Args:
            spec: what to stream.

        Raises:
            ImportError: the package comes from another folder.
        """
        self.spec = spec
        self.weights = import_module("cheap_weights")  # this one, not the checkout's
        tree = Path(spec["tree"]).resolve()
        sys.path[:0] = [str(tree / part) for part in ("benchmarks", ".", "kernels")]
        import torch

        package = import_module("flashdreams")
        if not Path(str(package.__file__)).resolve().is_relative_to(tree):
            raise ImportError(f"flashdreams comes from {package.__file__}, not from {tree}.")
        self.rollout = import_module("rollout")
        self.torch = torch
        self.subject: Any = None
        self.cache: Any = None
        self.chunk: Any = None

    def build(self) -> dict[str, Any]:
        """Build the pipeline; from here on the process has memory of the device."""
        torch, spec = self.torch, self.spec
        torch.set_grad_enabled(False)
        place = import_module("flashdreams.parallel.environment").init(spec["device"])
        self.device = place.device
        weights = self.weights.cheap_weights(place.device)
        start = time.perf_counter()
        with weights:
            self.subject = self.rollout.load_subject(spec["slug"], place, **spec["options"])
        self._synchronize()
        if self.device.type == "cuda":  # weights may have been larger during construction
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        self.setup_s = time.perf_counter() - start
        return {"setup_s": self.setup_s}

    def warm_up(self, latents: str) -> dict[str, Any]:
        """Warm up and fill the window of a rollout.

        Args:
            latents: file for the clean latents of these AR steps.
        """
        pipeline = self.subject.pipeline
        start = time.perf_counter()
        done = pipeline.warm_up()
        self._synchronize()
        warm_up_s = time.perf_counter() - start
        if not self.subject.streaming:
            raise ValueError(f"{self.subject.slug} makes one chunk; variants are of streams.")
        self.cache, found = self.subject.new_rollout(), []
        for _ in range(self.subject.steps_to_fill):
            self._step()
            found.append(self.cache.latent.float().cpu())
        self.torch.save(found, latents)
        backend = getattr(getattr(done, "attention", None), "name", None)
        frames = self.chunk.shape[1] if pipeline.decoder is not None else self.chunk.shape[2]
        return {
            "setup_s": self.setup_s,
            "warm_up_s": warm_up_s,
            "attention": backend or "unknown",
            "frames_per_step": frames,
            "weights": self.subject.weights,
            "stats": pipeline.stats(),
        }

    def steps(self, count: int) -> dict[str, Any]:
        """Stream ``count`` AR steps without waiting between them; returns milliseconds per step.

        ``host_ms`` is the time until the last call returns, ``ms`` until the device is done.
        """
        self._synchronize()
        start = time.perf_counter()
        for _ in range(count):
            self._step()
        returned = time.perf_counter()
        self._synchronize()
        scale = 1e3 / count
        return {
            "ms": scale * (time.perf_counter() - start),
            "host_ms": scale * (returned - start),
            "peak_gib": self._peak_gib(),
        }

    def latency(self, count: int) -> dict[str, Any]:
        """Milliseconds of ``generate`` alone, each started on an idle device."""
        found = []
        for _ in range(count):
            self._synchronize()
            start = time.perf_counter()
            self._step(lambda: found.append(1e3 * (time.perf_counter() - start)))  # noqa: B023
        return {"ms": found}

    def profile(self) -> dict[str, Any]:
        """Kernels of one AR step by device time, and the step's wall time under the profiler."""
        from torch.profiler import ProfilerActivity, profile

        on_gpu = self.device.type == "cuda"
        activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        for _ in range(2):  # the first one starts the tracer
            self._synchronize()
            with profile(activities=[activity]) as traced:
                start = time.perf_counter()
                self._step()
                self._synchronize()
                wall_ms = 1e3 * (time.perf_counter() - start)
        field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        events = [(e.key, e.count, getattr(e, field) / 1e3) for e in traced.key_averages()]
        events = sorted((e for e in events if e[2] > 0), key=lambda e: -e[2])
        return {
            "wall_ms": wall_ms,
            "busy_ms": sum(e[2] for e in events),
            "launches": sum(e[1] for e in events),
            "kernels": [list(e) for e in events[:KERNELS_SHOWN]],
        }

    def sha256(self) -> dict[str, Any]:
        """Hash of the last chunk."""
        stats = import_module("flashdreams.runtime.stats")
        return {"sha256": stats.sha256_of(self.chunk)}

    def _step(self, shown: Callable[[], None] | None = None) -> None:
        index, pipeline = self.cache.next_index, self.subject.pipeline
        control = self.subject.input(index)
        self.chunk = pipeline.generate(autoregressive_index=index, cache=self.cache, input=control)
        if shown is not None:
            self._synchronize()
            shown()
        pipeline.finalize(autoregressive_index=index, cache=self.cache)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize(self.device)

    def _peak_gib(self) -> float:
        if self.device.type == "cuda":
            return float(self.torch.cuda.max_memory_allocated(self.device)) / 2**30
        memory_stats = import_module("flashdreams.runtime.stats").memory_stats
        return float(memory_stats(self.device)["mem_peak_gib"])


def serve(spec: Spec, orders: TextIO, answers: TextIO) -> None:
    """Import the code, then execute orders until the input ends; the first one is to build.

    An order is ``{"do": METHOD, ...arguments}``; a failure is answered by ``{"error": TEXT}``.
    """

    def answer(value: Mapping[str, Any]) -> None:
        answers.write(json.dumps(value, default=str) + "\n")
        answers.flush()

    try:
        streamer = Streamer(spec)
    except Exception as error:
        answer({"error": _one_line(error)})
        return
    for line in orders:
        order = json.loads(line)
        try:
            answer(getattr(streamer, order.pop("do"))(**order))
        except Exception as error:
            answer({"error": _one_line(error)})


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keeps output of libraries out of the answers
    serve(json.loads(sys.argv[1]), sys.stdin, replies)
