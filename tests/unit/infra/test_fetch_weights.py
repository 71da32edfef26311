"""Who fetches weights when several ranks start."""

from pathlib import Path

import torch.distributed as dist

from flashdreams.infra import weights
from flashdreams.infra.config import derive_config
from flashdreams.runtime.checkpoint import CheckpointConfig
from tests.harness import run_ranks
from tests.tiny import tiny_pipeline


def fetch(folder: str) -> None:
    checkpoint = CheckpointConfig(source="org/repo", download=True)
    config = derive_config(
        tiny_pipeline(), diffusion_model=dict(transformer=dict(checkpoint=checkpoint))
    )
    log = Path(folder) / "order.txt"

    def record(_: CheckpointConfig) -> None:
        with log.open("a") as file:
            file.write(f"{dist.get_rank()}\n")

    weights.ensure_local = record
    weights.fetch_weights(config)


def test_one_rank_of_a_node_fetches_first(tmp_path):
    run_ranks(fetch, 2, str(tmp_path))
    assert (tmp_path / "order.txt").read_text().split() == ["0", "1"]
