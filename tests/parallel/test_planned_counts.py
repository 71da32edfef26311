"""The planner's counts against what real ranks compute and send."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flashdreams.infra.config import derive_config
from flashdreams.integrations.self_forcing.config import TINY_PIPELINE
from flashdreams.models.wan.config import WAN_TRANSFORMER_1_3B
from flashdreams.models.wan.transformer import WanTransformer, WanTransformerConfig
from flashdreams.parallel.dry import dry_mesh
from flashdreams.parallel.mesh import ParallelConfig, ParallelDegrees
from flashdreams.parallel.parallelize import parallelize
from flashdreams.planning.devices import DEVICES
from flashdreams.planning.plans import Planner
from tests.harness import run_ranks
from tests.parallel import rollout

TINY = WanTransformerConfig(**{**rollout.TINY, "latent_width": 8})
WIDE_RESIDUAL = derive_config(TINY, dtype="bfloat16", residual_dtype="float32")
PARALLEL = (
    ParallelConfig(),
    ParallelConfig(ulysses_degree=1, ring_method="rotate"),
    ParallelConfig(tensor_parallel_degree=2),
)


def attention_flops(q, k, v, *_, **__):
    batch, heads, queries, dim = q
    return 2 * batch * heads * queries * k[2] * (dim + v[3])


@torch.no_grad()
def count(config, parallel, write_only):
    """Operations and traffic of a call with a full window, on the ranks of the group."""
    mesh = rollout.make_mesh(parallel, torch.distributed.get_world_size())
    model = WanTransformer(config).cast().eval()
    parallelize(model, model.parallel_plan(), mesh)
    cache = model.initialize_cache(text=torch.zeros(1, 1, config.text_dim))
    latent, timestep = torch.zeros(model.latent_shape(1)), torch.tensor(500.0)
    model.begin_step(0, cache)
    model.update_cache(latent, timestep, cache)
    model.begin_step(1, cache)
    before = mesh.meter.snapshot()
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: attention_flops}) as counter:
        (model.update_cache if write_only else model.predict_flow)(latent, timestep, cache)
    return mesh.degrees, counter.get_total_flops(), mesh.meter.since(before)


def count_all():
    return [
        (config, parallel, write_only, count(config, parallel, write_only))
        for config in (TINY, WIDE_RESIDUAL)
        for parallel in PARALLEL
        for write_only in (False, True)
    ]


def planned(config, degrees, parallel=None):
    parallel = parallel or ParallelConfig()
    planner = Planner(TINY_PIPELINE, DEVICES["H200-141GB"], parallel=parallel)
    return planner._network(config, dry_mesh(degrees, parallel))


def test_planned_counts_are_those_of_real_ranks():
    for config, parallel, write_only, (degrees, flops, traffic) in run_ranks(count_all, 4)[0]:
        network = planned(config, degrees, parallel)
        work = network.clean if write_only else network.call
        assert flops > 0 and traffic
        assert (work.flops, work.traffic) == (flops, traffic)
        more = planned(replace(config, num_layers=3), degrees, parallel)  # negative control
        assert more.call.flops > network.call.flops and more.call.traffic != network.call.traffic


@pytest.mark.parametrize(("ulysses", "mib"), [(4, 10.3), (1, 20.6)])
def test_published_figures_of_wan_are_met(ulysses, mib):
    """202 TFLOP per chunk; 10.3 MiB by Ulysses and 20.6 by gathering on 4 ranks (1.3B, 480x832)."""
    one = planned(WAN_TRANSFORMER_1_3B, ParallelDegrees()).call
    assert 5 * one.flops == pytest.approx(202e12, rel=0.005)
    call = planned(WAN_TRANSFORMER_1_3B, ParallelDegrees(ulysses=ulysses, ring=4 // ulysses)).call
    layers = [t.bytes_sent for name, t in call.traffic.items() if not name.startswith("sequence")]
    assert round(sum(layers) / 2**20 / WAN_TRANSFORMER_1_3B.num_layers, 1) == mib
