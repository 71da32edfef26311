"""The Wan transformer replayed as CUDA graphs on a real GPU."""

import pytest
import torch

from flashdreams.infra.config import derive_config
from flashdreams.models.wan.transformer import WanTransformer
from tests.tiny import CONTROL_DIM, TEXT_DIM, tiny_pipeline, tiny_transformer
from tests.unit.infra.test_warm_up import FILLING
from tests.unit.models.test_wan_graph import rollout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@torch.no_grad()
def test_graphs_on_and_off_give_the_same_bits():
    torch.manual_seed(0)
    weights = WanTransformer(tiny_transformer(control_dim=CONTROL_DIM)).state_dict()
    flows = []
    for use_cuda_graph in (False, True):
        config = tiny_transformer(control_dim=CONTROL_DIM, use_cuda_graph=use_cuda_graph)
        model = WanTransformer(config).eval().to("cuda")
        model.load_state_dict(weights)
        flows.append(rollout(model))
    assert all(torch.equal(a, b) for a, b in zip(*flows, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("use_cuda_graph", [False, True])
def test_kernels_change_no_result(use_cuda_graph):
    """float32, 1e-4 of the largest value; also captured."""
    torch.manual_seed(0)
    plain = WanTransformer(tiny_transformer(control_dim=CONTROL_DIM)).eval().to("cuda")
    changes = {"fused_kernels": True, "use_cuda_graph": use_cuda_graph}
    model = WanTransformer(tiny_transformer(control_dim=CONTROL_DIM, **changes)).eval().to("cuda")
    model.after_load()  # before the first call: graphs keep what they recorded
    expected = rollout(plain)
    assert any((a - b).abs().max() > 0.1 for a, b in zip(rollout(model), expected, strict=True))
    model.load_state_dict(plain.state_dict())
    for found, wanted in zip(rollout(model), expected, strict=True):
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def pipeline_on_gpu(use_cuda_graph: bool, guided: bool, **transformer):
    config = tiny_pipeline(use_cuda_graph=use_cuda_graph, **transformer)
    scale = {"guidance_scale": 3.0} if guided else {}
    return derive_config(config, max_rollouts=2, diffusion_model=scale).setup(device="cuda")


def begin(pipeline, seed: int):
    text = torch.randn(2, 1, 4, TEXT_DIM, generator=torch.Generator().manual_seed(seed))
    guided = pipeline.config.diffusion_model.guidance_scale is not None
    words = {"text": text[0], "negative_text": text[1]} if guided else {"text": text[0]}
    return pipeline.initialize_cache(**words, seed=seed)


def advance(pipeline, cache) -> torch.Tensor:
    index = cache.next_index
    pipeline.generate(autoregressive_index=index, cache=cache, input=0.1)
    pipeline.finalize(autoregressive_index=index, cache=cache)
    return cache.latent.clone()


def schedule(pipeline) -> list[torch.Tensor]:
    """A long rollout, a second one in its storage, and two interleaved."""
    first = begin(pipeline, 1)
    latents = [advance(pipeline, first) for _ in range(30)]
    first.release()
    second = begin(pipeline, 2)
    latents += [advance(pipeline, second) for _ in range(5)]
    third = begin(pipeline, 3)
    return latents + [advance(pipeline, cache) for _ in range(5) for cache in (second, third)]


@pytest.mark.parametrize("guided", [False, True])
def test_nothing_is_captured_after_warm_up_and_the_bits_are_those_of_eager_calls(guided):
    options = dict(guided=guided, attention_backend="sdpa")
    graphed, eager = (pipeline_on_gpu(graphs, **options) for graphs in (True, False))
    done = graphed.warm_up()
    branches = 2 if guided else 1
    assert done.captures == 2 * 2 * branches  # two of each storage and branch
    schedule(graphed)
    held = torch.cuda.memory_allocated()
    replayed = schedule(graphed)
    del replayed[:-1]
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= held + replayed[0].nbytes
    counts = graphed.stats()["cuda_graphs"]
    filling = 2 * 3 * 3 * FILLING * branches  # of two schedules with three rollouts each
    assert (counts["captures_after_ready"], counts["eager_calls"]) == (0, filling)
    pairs = zip(schedule(graphed), schedule(eager), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_auto_measures_and_keeps_a_backend_that_is_right():
    pipeline = pipeline_on_gpu(use_cuda_graph=True, guided=False, dim=128, dtype="bfloat16")
    choice = pipeline.warm_up().attention
    advance(pipeline, begin(pipeline, 1))
    assert [row.verdict for row in choice.rows].count("chosen") == 1
