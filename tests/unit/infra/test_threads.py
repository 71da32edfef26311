"""Pipelines that are built beside each other."""

import threading

import torch

from flashdreams.integrations.self_forcing.config import TINY_PIPELINE


def weights(pipeline) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in pipeline.state_dict().items()}


def test_pipelines_of_several_threads_get_the_weights_of_one() -> None:
    alone = weights(TINY_PIPELINE.setup(device="cpu"))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    start = threading.Barrier(4)
    built: list[dict[str, torch.Tensor]] = []

    def build() -> None:
        start.wait()
        for _ in range(3):
            built.append(weights(TINY_PIPELINE.setup(device="cpu")))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 12
    for found in built:
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], alone[name]) for name in alone)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator is as it was"
    assert any(x.std() > 0 for x in alone.values() if x.numel() > 10)  # negative control
