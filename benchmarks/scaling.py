"""Per-rank work, traffic and predicted time on 1 to 64 GPUs, and the same counts measured.

``python benchmarks/scaling.py --model wan-1.3b --plot scaling.svg`` predicts from a small cost
model. ``torchrun --nproc-per-node 4 benchmarks/scaling.py --check`` runs a tiny model on gloo ranks
and compares the counted FLOPs, calls and bytes with the cost model's: they must be equal.
"""

import argparse
import itertools
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import command
import report
import rollout
import torch

from flashdreams.infra.config import derive_config
from flashdreams.models.wan.config import WAN_TRANSFORMER_1_3B, WAN_TRANSFORMER_14B
from flashdreams.models.wan.transformer import WanTransformer, WanTransformerConfig
from flashdreams.parallel import environment
from flashdreams.parallel.collectives import Traffic, sent_bytes
from flashdreams.parallel.mesh import ParallelConfig, ParallelDegrees, build_mesh, resolve_degrees
from flashdreams.parallel.parallelize import parallelize

MODELS = {
    "tiny": WanTransformerConfig(
        dim=48, ffn_dim=72, num_heads=6, num_layers=2, freq_dim=16, text_dim=12, text_len=5,
        in_channels=4, out_channels=4, len_t=2, latent_height=6, latent_width=8, window_size_t=4,
    ),
    "wan-1.3b": WAN_TRANSFORMER_1_3B,
    "wan-14b": WAN_TRANSFORMER_14B,
    "wan-14b-window63": derive_config(
        WAN_TRANSFORMER_14B, window_size_t=63, latent_height=58, latent_width=104
    ),
}  # fmt: skip
CHECKED = (
    ParallelConfig(),
    ParallelConfig(ulysses_degree=1),
    ParallelConfig(ulysses_degree=1, ring_method="rotate"),
)
COLUMNS = ("ranks", "mesh", "tflop", "mib_sent", "compute_ms", "exchange_ms", "total_ms", "speedup")


@dataclass(frozen=True)
class Call:
    """One network call of one batch entry, seen from one rank (a rank with full tokens)."""

    flops: int
    traffic: dict[str, Traffic]


def predict_call(
    config: WanTransformerConfig,
    degrees: ParallelDegrees,
    visible_t: int,
    ring_method: str = "gather",
    write_only: bool = False,
) -> Call:
    """Count one network call, with its timestep's modulations already computed.

    Args:
        config: the model.
        degrees: the mesh.
        visible_t: latent frames that attention sees.
        ring_method: ``"gather"`` or ``"rotate"``.
        write_only: the clean pass, which ends with the last block's keys and values.
    """
    c, ring, ulysses, tp = config, degrees.ring, degrees.ulysses, degrees.tp
    tokens = c.len_t * c.tokens_per_frame
    visible = visible_t * c.tokens_per_frame
    own = -(-tokens // degrees.sequence)
    queries = tokens if ring == 1 else own * ulysses
    width, item = c.dim // tp, torch.empty((), dtype=getattr(torch, c.dtype)).element_size()
    patch = c.patch_size[0] * c.patch_size[1] * c.patch_size[2]

    linear = 2 * own * (6 * c.dim + 2 * c.ffn_dim) * width
    self_attention = 4 * queries * visible * width // ulysses
    cross_attention = 4 * own * c.text_len * width
    channels = c.in_channels + c.condition_channels
    entry = 2 * tokens * channels * patch * c.dim
    head = 2 * own * c.dim * c.out_channels * patch
    keys_values = 2 * own * 2 * c.dim * width
    layers, written = c.num_layers - write_only, int(write_only)
    flops = layers * (linear + self_attention + cross_attention) + written * keys_values
    flops += entry + (1 - written) * head

    traffic: dict[str, Traffic] = {}

    def add(name: str, size: int, calls: int, nbytes: int) -> None:
        if size > 1 and calls:
            sent = sent_bytes(name.rpartition(".")[2], nbytes, size)
            traffic[name] = traffic.get(name, Traffic()) + Traffic(calls, calls * sent)

    chunk = own * width * item
    add("ulysses.all_to_all", ulysses, layers, 3 * chunk)
    add("ulysses.all_to_all", ulysses, layers, chunk)
    add("ulysses.all_to_all", ulysses, written, 2 * chunk)
    if ring_method == "gather":
        add("ring.all_gather", ring, c.num_layers, 2 * chunk)
    else:
        share = visible // ring * width // ulysses * item
        add("ring.rotate", ring, layers * (ring - 1), 2 * share)
    add("tp.all_reduce", tp, 3 * layers, own * c.dim * item)
    add("tp.all_reduce", tp, 3 * layers + written, own * 4)
    wide = torch.empty((), dtype=getattr(torch, c.residual_dtype or c.dtype)).element_size()
    out = own * c.out_channels * patch * wide
    add("sequence.all_gather", degrees.sequence, 1 - written, out)
    return Call(flops, traffic)


@dataclass(frozen=True)
class Machine:
    """Assumptions of the cost model on a GPU and its links."""

    tflops: float
    """Rate of large matmuls, 10^12 operations per second."""
    bandwidth_gb_s: float
    """10^9 bytes per second that one rank sends within a node."""
    internode_gb_s: float
    """The same between nodes; used for the ring axis if there is more than one node."""
    latency_us: float
    """Latency of one collective."""
    ranks_per_node: int


def predict_chunk(
    config: WanTransformerConfig, degrees: ParallelDegrees, machine: Machine, calls: int
) -> dict[str, Any]:
    """Work, traffic and time of one chunk with a full window."""
    visible_t = config.window_size_t + config.sink_size_t if config.streaming else config.len_t
    call = predict_call(config, degrees, visible_t)
    exchange_s = 0.0
    for name, traffic in call.traffic.items():
        far = degrees.world_size > machine.ranks_per_node and name.split(".")[0] in (
            "ring",
            "sequence",
        )
        rate = machine.internode_gb_s if far else machine.bandwidth_gb_s
        exchange_s += traffic.bytes_sent / (rate * 1e9) + traffic.calls * machine.latency_us * 1e-6
    compute_s = call.flops / (machine.tflops * 1e12)
    return {
        "ranks": degrees.world_size,
        "mesh": str(degrees),
        "tflop": calls * call.flops / 1e12,
        "mib_sent": calls * sum(t.bytes_sent for t in call.traffic.values()) / 2**20,
        "compute_ms": 1e3 * calls * compute_s,
        "exchange_ms": 1e3 * calls * exchange_s,
        "total_ms": 1e3 * calls * (compute_s + exchange_s),
    }


def predict_scaling(
    config: WanTransformerConfig, machine: Machine, calls: int, ranks: list[int]
) -> list[dict[str, Any]]:
    """One row per number of ranks, with the degrees that "auto" chooses."""
    rows = []
    for count in ranks:
        degrees = resolve_degrees(ParallelConfig(), count, config.num_heads)
        rows.append(predict_chunk(config, degrees, machine, calls))
        rows[-1]["speedup"] = rows[0]["total_ms"] / rows[-1]["total_ms"]
    return rows


@torch.no_grad()
def count_call(
    config: WanTransformerConfig, parallel: ParallelConfig, write_only: bool = False
) -> tuple[Call, Call, ParallelDegrees]:
    """Run the model on the ranks of torchrun; returns the predicted and the counted call.

    The counted call is from a rollout's second AR step: a denoising step, or the clean pass.
    """
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    degrees = resolve_degrees(parallel, ranks, config.num_heads)
    mesh = build_mesh(degrees, "cpu", parallel)
    torch.manual_seed(0)
    model = WanTransformer(config).cast().eval()
    parallelize(model, model.parallel_plan(), mesh)
    cache = model.initialize_cache(text=torch.zeros(1, 1, config.text_dim))
    latent = torch.zeros(model.latent_shape(1))
    timestep = torch.tensor(500.0)
    model.begin_step(0, cache)
    model.update_cache(latent, timestep, cache)
    model.begin_step(1, cache)
    before = mesh.meter.snapshot()
    run = model.update_cache if write_only else model.predict_flow
    flops = rollout.count_flops(lambda: run(latent, timestep, cache))
    counted = Call(flops, mesh.meter.since(before))
    visible_t = min(2 * config.len_t, config.window_size_t + config.sink_size_t)
    predicted = predict_call(config, degrees, visible_t, parallel.ring_method, write_only)
    return predicted, counted, degrees


def check_counts() -> int:
    """Compare on the ranks of torchrun; returns an exit code."""
    place = environment.init("cpu")
    wrong = 0
    for parallel, write_only in itertools.product(CHECKED, (False, True)):
        predicted, counted, degrees = count_call(MODELS["tiny"], parallel, write_only)
        same = predicted == counted
        wrong += not same
        if place.is_rank_zero:
            verdict = "equal" if same else f"NOT equal: predicted {predicted}"
            call = "clean pass" if write_only else "denoising step"
            sys.stdout.write(
                f"{degrees}, {call}: {counted.flops} FLOP, {counted.traffic}: {verdict}\n"
            )
    environment.shutdown()
    return int(wrong > 0)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Predicted milliseconds per chunk over the number of ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    ranks = [row["ranks"] for row in rows]
    axes.loglog(ranks, [row["total_ms"] for row in rows], "o-", label="compute and communication")
    axes.loglog(ranks, [row["compute_ms"] for row in rows], "s--", label="compute alone")
    axes.loglog(ranks, [rows[0]["total_ms"] / r for r in ranks], ":", label="ideal")
    axes.set_xticks(ranks, [str(r) for r in ranks])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("predicted ms per chunk")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path)


def main() -> int:
    """Predict, or check the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="wan-1.3b")
    parser.add_argument("--ranks", type=command.count, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--calls", type=command.count, default=5, help="network calls per chunk")
    parser.add_argument("--tflops", type=float, default=650.0)
    parser.add_argument("--bandwidth-gb-s", type=float, default=300.0)
    parser.add_argument("--internode-gb-s", type=float, default=40.0)
    parser.add_argument("--latency-us", type=float, default=20.0)
    parser.add_argument("--ranks-per-node", type=command.count, default=8)
    parser.add_argument("--check", action="store_true", help="count on gloo ranks instead")
    command.add_output_options(parser)
    options = parser.parse_args()
    if options.check:
        return check_counts()
    machine = Machine(
        options.tflops,
        options.bandwidth_gb_s,
        options.internode_gb_s,
        options.latency_us,
        options.ranks_per_node,
    )
    rows = predict_scaling(MODELS[options.model], machine, options.calls, options.ranks)
    title = f"{options.model}, {options.calls} calls per chunk, full window: predicted"
    if options.json is not None:
        config = {"model": options.model, "calls": options.calls, "ranks": options.ranks}
        config |= asdict(machine)
        found = report.new_prediction("scaling", config, rows, options.git_commit)
        report.write(found, options.json)
    sys.stdout.write(f"{title}, not measured\n{machine}\n{report.table(rows, COLUMNS)}")
    if options.plot is not None:
        plot(rows, title, options.plot)
    return 0


if __name__ == "__main__":
    command.run(main)
