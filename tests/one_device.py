"""The parallel path on one device: groups of one rank, or two ranks that share it over gloo."""

import torch
import torch.distributed as dist

from flashdreams.infra.config import derive_config
from flashdreams.parallel.mesh import Axis, Mesh, ParallelConfig, build_mesh, resolve_degrees
from tests.parallel.pipelines import build_case, prompt
from tests.parallel.rollout import relative_error

STEPS = 7
"""Past the end of the window."""

ONE_RANK = {
    "ulysses": ({"ulysses", "sequence"}, {}),
    "gather": ({"ring", "sequence"}, {}),
    "rotate": ({"ring", "sequence"}, {"ring_method": "rotate"}),
    "tensor": ({"tp"}, {}),
    "split_decode": ({"decode"}, {"decode": "split"}),
    "all": ({"ring", "ulysses", "sequence", "tp", "decode"}, {"decode": "split"}),
}
"""Axes that get a group of one rank, and the strategy."""

TWO_RANKS = {
    "ulysses": {"ulysses_degree": 2},
    "gather": {"ring_degree": 2},
    "rotate": {"ring_degree": 2, "ring_method": "rotate"},
    "tensor": {"tensor_parallel_degree": 2},
    "guided": {"cfg_parallel_degree": 2},
    "split_decode": {"decode": "split"},
    "rank0_decode": {"decode": "rank0"},
    "strict": {"strict": True},
}


def one_rank_mesh(axes: set[str], config: ParallelConfig, device: str) -> Mesh:
    """A mesh of one rank whose named axes have groups, so that all wrappers are installed."""
    backend = "nccl" if device == "cuda" else "gloo"
    groups = {name: dist.new_group([0], backend=backend) for name in sorted(axes)}
    shared = {name: Axis(name, 1, 0, group) for name, group in groups.items()}
    return Mesh(config=config, device_type=device, **shared)


@torch.no_grad()
def roll(pipeline, guided: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Latents and frames of two rollouts in one storage; no frames where another rank decodes."""
    latents, frames = [], []
    for seed in (1, 2):
        negative = prompt(9) if guided else None
        cache = pipeline.initialize_cache(text=prompt(seed), negative_text=negative, seed=seed)
        for index in range(STEPS):
            chunk = pipeline.generate(index, cache, 0.1 * index)
            pipeline.finalize(index, cache)
            latents.append(cache.latent.cpu())
            frames += [] if chunk is None else [chunk.cpu()]
        cache.release()
    return latents, frames


def build(device: str, graphs: bool, mesh: Mesh | None, guided: bool):
    """The pipeline with a decoder that can be split, and what was installed in it."""
    scale = {"guidance_scale": 3.0} if guided else {}
    transformer = {"use_cuda_graph": graphs, "attention_backend": "sdpa", "sink_size_t": 2}
    config = derive_config(
        build_case("split_decode")[0], diffusion_model={"transformer": transformer, **scale}
    )
    pipeline = config.setup(device=device, load=False)
    reports = pipeline.parallelize(mesh or Mesh(device_type=device))
    pipeline.load()
    pipeline.warm_up()
    return pipeline, {name: report.installed for name, report in reports.items()}


def on_one_rank(device: str, graphs: bool) -> dict[str, dict]:
    """By way: errors against the plain path, what was installed and sent, and the graphs."""
    plain = roll(build(device, graphs, None, False)[0], False)
    found = {}
    for way, (axes, fields) in ONE_RANK.items():
        mesh = one_rank_mesh(axes, ParallelConfig(**fields), device)
        pipeline, installed = build(device, graphs, mesh, False)
        latents, frames = roll(pipeline, False)
        found[way] = {
            "latents": relative_error(latents, plain[0]),
            "frames": relative_error(frames, plain[1]),
            "installed": installed,
            "calls": sum(traffic.calls for traffic in mesh.meter.counts.values()),
            "graphs": pipeline.stats().get("cuda_graphs"),
        }
        pipeline.drop_graphs()
    return found


def on_two_ranks(device: str) -> dict[str, dict]:
    """By way: this rank's errors against the plain path; both ranks use the same device."""
    if device == "cuda":
        torch.cuda.set_device(0)
        torch.zeros(1, device="cuda")
    expected = {g: roll(build(device, False, None, g)[0], g) for g in (False, True)}
    found = {}
    for way, fields in TWO_RANKS.items():
        config, guided = ParallelConfig(**fields), way == "guided"
        mesh = build_mesh(resolve_degrees(config, 2, 2, guided), device, config)
        latents, frames = roll(build(device, False, mesh, guided)[0], guided)
        plain = expected[guided]
        if config.strict:
            alone = Mesh(config=config, device_type=device)
            plain = roll(build(device, False, alone, False)[0], False)
        found[way] = {
            "latents": relative_error(latents, plain[0]),
            "frames": relative_error(frames, plain[1]) if frames else None,
        }
    return found
