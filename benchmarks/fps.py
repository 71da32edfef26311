"""Frames per second and latency of a method's steady AR steps.

``python benchmarks/fps.py toy-world --json out.json``, or under torchrun, where the time of a
step is that of the slowest rank. Weights that are not on this machine are random, in full size. A
step is generate and finalize; the latency is that of generate alone, which returns the chunk. On a
CPU, a ``processor_share`` far below the number of threads means that other processes were using
the machine and the times are too long.
"""

import argparse
import time
from typing import Any

import command
import report
import rollout
import torch
from torch import Tensor

from flashdreams.parallel import environment
from flashdreams.planning.devices import DEVICES
from flashdreams.planning.plans import Planner
from flashdreams.runtime.stats import memory_stats, sha256_of

COLUMNS = (
    "case", "variant", "fps", "p50_ms", "p95_ms", "p99_ms", "latency_p50_ms", "first_frame_ms",
    "peak_gib", "tflops", "fraction_of_matmul", "processor_share",
)  # fmt: skip
FIELDS = (
    "fps", "frames_per_step", "latency_p50_ms", "latency_p95_ms", "latency_p99_ms", "setup_s",
    "warm_up_s", "first_frame_cold_ms", "first_frame_ms", "peak_gib", "flops_per_step",
    "flops_from", "tflops", "matmul_tflops", "fraction_of_matmul", "fraction_of_datasheet",
    "weights", "ranks", "processor_share",
)  # fmt: skip
DATASHEET_TFLOPS = {"A100": 312.0, "H100": 989.4, "H200": 989.4, "B200": 2250.0}
"""Dense bfloat16 rates from the vendors' data sheets, by part of the device's name."""


def measure(
    subject: rollout.Subject, device: torch.device, steps: int, setup_s: float
) -> dict[str, Any]:
    """Warm up, start a new rollout, fill its window and time the steps after that.

    Args:
        subject: the pipeline to stream.
        device: of this rank.
        steps: timed AR steps.
        setup_s: time to build the pipeline, for the row.
    """
    start = time.perf_counter()
    subject.pipeline.warm_up()
    first_frame_cold_ms = _first_frame_ms(subject, device)
    first_frame_ms = _first_frame_ms(subject, device)
    cache = subject.new_rollout()
    for _ in range(subject.steps_to_fill):
        subject.step(cache)
    rollout.synchronize(device)
    warm_up_s = time.perf_counter() - start
    flops, flops_from = _flops(subject, cache)
    start, worked = time.perf_counter(), time.process_time()
    times, latencies, chunk = _time_steps(subject, cache, device, steps)
    processor_share = (time.process_time() - worked) / (time.perf_counter() - start)
    row: dict[str, Any] = {"case": subject.slug, **report.timing_fields(times)}
    for name in ("p50_ms", "p95_ms", "p99_ms"):
        row[f"latency_{name}"] = report.timing_fields(latencies)[name]
    dtype = subject.pipeline.diffusion_model.transformer.dtype
    rate, product = flops / row["p50_ms"] / 1e9, matmul_tflops(device, dtype)
    frames = chunk.shape[1] if subject.pipeline.decoder is not None else chunk.shape[2]
    return row | {
        "output_sha256": sha256_of(chunk),
        "fps": 1e3 * frames / row["p50_ms"],
        "frames_per_step": frames,
        "setup_s": setup_s,
        "warm_up_s": warm_up_s,
        "first_frame_cold_ms": first_frame_cold_ms,
        "first_frame_ms": first_frame_ms,
        "peak_gib": memory_stats(device)["mem_peak_gib"],
        "flops_per_step": flops,
        "flops_from": flops_from,
        "tflops": rate,
        "matmul_tflops": product,
        "fraction_of_matmul": rate / product,
        "fraction_of_datasheet": fraction_of_datasheet(rate, device, dtype),
        "weights": subject.weights,
        "processor_share": processor_share,
        **subject.pipeline.stats(),
    }


def _first_frame_ms(subject: rollout.Subject, device: torch.device) -> float:
    """Time from the prompt to the first frames on the device."""
    rollout.synchronize(device)
    start = time.perf_counter()
    cache = subject.new_rollout()
    subject.pipeline.generate(autoregressive_index=0, cache=cache, input=subject.input(0))
    rollout.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def _time_steps(
    subject: rollout.Subject, cache: Any, device: torch.device, steps: int
) -> tuple[list[float], list[float], Tensor]:
    """Milliseconds of whole steps and of generate, ascending, and the last chunk."""
    times, latencies, chunk = [], [], None
    pipeline = subject.pipeline
    for _ in range(steps):
        if not subject.streaming:
            cache.release()
            cache = subject.new_rollout()
        index = cache.next_index
        control = subject.input(index)
        rollout.synchronize(device)
        start = time.perf_counter()
        made = pipeline.generate(autoregressive_index=index, cache=cache, input=control)
        rollout.synchronize(device)
        between = time.perf_counter()
        pipeline.finalize(autoregressive_index=index, cache=cache)
        rollout.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
        latencies.append(1e3 * (between - start))
        chunk = made if made is not None else chunk
    if chunk is None:  # rank zero decodes, and it writes the report
        chunk = cache.latent
    slowest = torch.tensor([times, latencies], dtype=torch.float64)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
    whole, shown = slowest.tolist()
    return sorted(whole), sorted(shown), chunk


def _flops(subject: rollout.Subject, cache: Any) -> tuple[int, str]:
    """Operations of a step on this rank, and how they were determined."""
    network: Any = subject.pipeline.diffusion_model.transformer
    if network.config.use_cuda_graph and network.device.type == "cuda":
        # The operations of a replayed graph cannot be counted; rates of a device do not matter.
        planner = Planner(
            subject.pipeline.config, DEVICES["H200-141GB"], parallel=subject.mesh.config
        )
        return planner.plan(subject.mesh.degrees).work.flops, "counted on the meta device"
    rolling = cache if subject.streaming else subject.new_rollout()
    return rollout.count_flops(lambda: subject.step(rolling)), "counted"


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of a large square matmul, in 10^12 operations per second."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = report.time_calls(lambda: a @ b, device, 10)
    return 2 * size**3 / report.percentile(times, 0.5) / 1e9


def fraction_of_datasheet(tflops: float, device: torch.device, dtype: torch.dtype) -> Any:
    """Fraction of the data sheet's rate; "unknown" for devices and dtypes that are not listed."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for part, rate in DATASHEET_TFLOPS.items():
            if part in name:
                return tflops / rate
    return "unknown"


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("slug", help="a method, as on the command line")
    parser.add_argument("--backend", default=None, help="attention backend; default: the method's")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default=None)
    parser.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="replay the network call as CUDA graphs; a CPU is always eager",
    )
    parser.add_argument("--threads", type=command.count, default=1, help="CPU threads of a rank")
    options = command.parse(parser, arguments, ranks=True)
    torch.set_num_threads(options.threads)
    place = environment.init(options.device)
    start = time.perf_counter()
    subject = rollout.load_subject(
        options.slug,
        place,
        backend=options.backend,
        use_cuda_graph=options.cuda_graph,
        dtype=options.dtype,
    )
    rollout.synchronize(place.device)
    setup_s = time.perf_counter() - start
    repeats = options.repeats or (30 if place.device.type == "cuda" else 100)
    with torch.no_grad():
        row = measure(subject, place.device, repeats, setup_s)
    graphs = options.cuda_graph and place.device.type == "cuda"
    graph = "graphs" if graphs else "eager"
    row["variant"] = f"{options.backend or 'default attention'}, {graph}, {subject.mesh.degrees}"
    row["ranks"] = place.world_size
    if place.is_rank_zero:
        config = {
            "slug": options.slug,
            "repeats": repeats,
            "parallel": str(subject.mesh.degrees),
            "pipeline": repr(subject.pipeline.config),
        }
        found = report.new_report(
            "fps", place.device, config, [row], options.git_commit, row_fields=FIELDS
        )
        report.finish(found, options, COLUMNS)
    environment.shutdown()


if __name__ == "__main__":
    command.run(main)
