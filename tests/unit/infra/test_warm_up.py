"""What is built before the first rollout, with a recorder in the place of CUDA's."""

import torch

from flashdreams.runtime.cuda_graph import GraphedCallable
from tests.tiny import tiny_pipeline
from tests.unit.runtime.test_cuda_graph import TraceCapture


def graphed_pipeline(**transformer):
    """A tiny pipeline whose network call is recorded on a CPU as on CUDA."""
    pipeline = tiny_pipeline(use_cuda_graph=True, **transformer).setup(device="cpu")
    model = pipeline.diffusion_model.transformer
    key = model.network.key
    model.network = GraphedCallable(
        model.__call__, torch.device("cpu"), key=key, backend=TraceCapture()
    )
    return pipeline


def test_a_cpu_has_nothing_to_build():
    pipeline = tiny_pipeline(use_cuda_graph=True).setup(device="cpu")
    assert pipeline.warm_up().steps == 0
    assert pipeline.diffusion_model.transformer.network.eager_calls == 0


def test_every_fill_phase_and_its_clean_pass_are_captured_once():
    pipeline = graphed_pipeline()
    done = pipeline.warm_up()
    graphs = pipeline.diffusion_model.transformer.network
    assert graphs.captures == 2 * 3
    assert pipeline.warm_up() is done
    assert graphs.captures == 2 * 3
