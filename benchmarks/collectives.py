"""Bytes and time of each collective of a model on a mesh.

``python benchmarks/collectives.py --table`` prints what one rank sends per layer and network call,
compared with schemes that communicate the cached window. ``torchrun --nproc-per-node 4
benchmarks/collectives.py --model wan-1.3b`` times every collective on the ranks of torchrun.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import command
import report
import scaling
import torch
from torch import Tensor

from flashdreams.models.wan.transformer import WanTransformerConfig
from flashdreams.parallel import environment
from flashdreams.parallel.collectives import sent_bytes
from flashdreams.parallel.mesh import Mesh, ParallelConfig, build_mesh, resolve_degrees
from flashdreams.runtime.stats import sha256_of

TABLE_COLUMNS = ("model", "ranks", "mesh", "native", "gather", "cached_ulysses", "cached_gather")
COLUMNS = ("case", "variant", "mib_sent", "p50_ms", "p95_ms", "p99_ms", "gb_per_s")


def bytes_table(models: dict[str, WanTransformerConfig]) -> list[dict[str, Any]]:
    """MiB that one rank sends per layer and network call, by scheme.

    ``native`` is the choice of "auto"; ``gather`` gathers the new chunk's keys and values;
    ``cached_ulysses`` and ``cached_gather`` communicate the keys and values of the whole window.
    """
    rows = []
    for name, c in models.items():
        item = torch.empty((), dtype=getattr(torch, c.dtype)).element_size()
        chunk = c.len_t * c.tokens_per_frame * c.dim * item
        window = (c.window_size_t + c.sink_size_t) * c.tokens_per_frame * c.dim * item
        for ranks in (2, 4, 8):
            degrees = resolve_degrees(ParallelConfig(), ranks, c.num_heads)
            call = scaling.predict_call(c, degrees, c.window_size_t + c.sink_size_t)
            layers = [t.bytes_sent for n, t in call.traffic.items() if not n.startswith("seq")]
            schemes = {
                "native": sum(layers) / c.num_layers,
                "gather": sent_bytes("all_gather", 2 * chunk // ranks, ranks),
                "cached_ulysses": sent_bytes("all_to_all", 2 * (chunk + window) // ranks, ranks),
                "cached_gather": sent_bytes("all_gather", 2 * window // ranks, ranks),
            }
            mib = {scheme: nbytes / 2**20 for scheme, nbytes in schemes.items()}
            rows.append({"model": name, "ranks": ranks, "mesh": str(degrees), **mib})
    return rows


def exchanges(
    config: WanTransformerConfig, mesh: Mesh, device: torch.device
) -> dict[str, tuple[Callable[[], Tensor], str, int]]:
    """Every collective of one network call: the call, its name in the meter, calls per layer."""
    c, d = config, mesh.degrees
    own = -(-c.len_t * c.tokens_per_frame // d.sequence)
    width, dtype = c.dim // d.tp, getattr(torch, c.dtype)

    def data(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.arange(count, device=device).remainder_(251).to(dtype).reshape(shape)

    found: dict[str, tuple[Callable[[], Tensor], str, int]] = {}
    if d.ulysses > 1:
        channel = mesh.channel(mesh.ulysses)
        qkv, out = (
            data(d.ulysses, 3, own, width // d.ulysses),
            data(d.ulysses, own, width // d.ulysses),
        )
        found["q, k, v to heads"] = (lambda: channel.all_to_all(qkv), "ulysses.all_to_all", 1)
        found["output to tokens"] = (lambda: channel.all_to_all(out), "ulysses.all_to_all", 1)
    if d.ring > 1:
        ring = mesh.channel(mesh.ring)
        kv = data(2, own * d.ulysses, width // d.ulysses)
        found["k, v of the chunk"] = (lambda: ring.all_gather(kv, 1), "ring.all_gather", 1)
    if d.tp > 1:
        tp = mesh.channel(mesh.tp)
        partial, squares = data(own, c.dim), data(own, 1, dtype=torch.float32)
        found["partial sums"] = (lambda: tp.all_reduce(partial.clone()), "tp.all_reduce", 3)
        found["norm statistics"] = (lambda: tp.all_reduce(squares.clone()), "tp.all_reduce", 3)
    if d.sequence > 1:
        sequence = mesh.channel(mesh.sequence)
        patch = c.patch_size[0] * c.patch_size[1] * c.patch_size[2]
        patches = data(1, own, c.out_channels * patch)
        found["patches"] = (lambda: sequence.all_gather(patches, 1), "sequence.all_gather", 0)
    return found


def measure(config: WanTransformerConfig, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every collective on the ranks of torchrun; rank zero prints."""
    place = environment.init(options.device)
    parallel = ParallelConfig(
        ulysses_degree=options.ulysses_degree or "auto",
        ring_degree=options.ring_degree or "auto",
        tensor_parallel_degree=options.tensor_parallel_degree or "auto",
    )
    degrees = resolve_degrees(parallel, place.world_size, config.num_heads)
    mesh = build_mesh(degrees, place.device.type, parallel)
    rows = []
    repeats = options.repeats or (20 if place.device.type == "cpu" else 100)
    for case, (call, name, per_layer) in exchanges(config, mesh, place.device).items():
        before = mesh.meter.snapshot()
        digest = sha256_of(call())
        sent = mesh.meter.since(before)[name].bytes_sent
        times = report.time_calls(call, place.device, repeats)
        fields = report.timing_fields(times)
        rows.append(
            {
                "case": case,
                "variant": name,
                **fields,
                "output_sha256": digest,
                "bytes_sent": sent,
                "mib_sent": sent / 2**20,
                "calls_per_layer": per_layer,
                "gb_per_s": sent / fields["p50_ms"] / 1e6,
            }
        )
    if place.is_rank_zero:
        if not rows:
            raise ValueError(
                "One rank has no communication. Start with torchrun --nproc-per-node 2."
            )
        chosen = {"model": options.model, "mesh": str(degrees), "ranks": place.world_size}
        found = report.new_report("collectives", place.device, chosen, rows, options.git_commit)
        sys.stdout.write(f"{options.model} on {degrees}\n")
        report.finish(found, options, COLUMNS)
    environment.shutdown()
    return rows


def main() -> None:
    """Print the table, or measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=scaling.MODELS, default="tiny")
    parser.add_argument("--table", action="store_true", help="print bytes by scheme and stop")
    parser.add_argument("--ulysses-degree", type=command.count, default=None)
    parser.add_argument("--ring-degree", type=command.count, default=None)
    parser.add_argument("--tensor-parallel-degree", type=command.count, default=None)
    options = command.parse(parser, None, ranks=True)
    if options.table:
        models = {name: c for name, c in scaling.MODELS.items() if name != "tiny"}
        sys.stdout.write("MiB sent per rank, layer and network call\n")
        sys.stdout.write(report.table(bytes_table(models), TABLE_COLUMNS))
        return
    measure(scaling.MODELS[options.model], options)


if __name__ == "__main__":
    command.run(main)
