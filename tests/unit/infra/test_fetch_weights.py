"""Who asks for weights, and who fetches them, when several ranks start."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from flashdreams.infra import weights
from flashdreams.infra.config import derive_config
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.models.wan.config import TINY_TEXT_ENCODER
from flashdreams.parallel.environment import OtherRankError
from flashdreams.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError
from tests.harness import run_ranks
from tests.tiny import tiny_pipeline

CHECKPOINT = CheckpointConfig(source="org/repo", file="w.safetensors", download=True)
CONFIG = derive_config(
    tiny_pipeline(), diffusion_model=dict(transformer=dict(checkpoint=CHECKPOINT))
)
WITH_TEXT_ENCODER = derive_config(
    CONFIG,
    text_encoder=derive_config(
        TINY_TEXT_ENCODER,
        text_len=6,
        text_dim=12,
        checkpoint=replace(CHECKPOINT, source="org/text"),
    ),
)


def fetch(folder: str, config: StreamInferencePipelineConfig, text_on_rank_zero: bool) -> None:
    log = Path(folder) / "order.txt"

    def record(checkpoint: CheckpointConfig) -> None:
        with log.open("a") as file:
            file.write(f"{dist.get_rank()} {checkpoint.source}\n")

    weights.ensure_local = record
    weights.fetch_weights(config, text_on_rank_zero=text_on_rank_zero)


def test_one_rank_of_a_node_fetches_first(tmp_path):
    run_ranks(fetch, 2, str(tmp_path), CONFIG, False)
    assert (tmp_path / "order.txt").read_text().split()[::2] == ["0", "1"]


@pytest.mark.parametrize(("alone", "ranks"), [(True, ["0"]), (False, ["0", "1"])])
def test_rank_zero_alone_fetches_what_it_alone_runs(alone, ranks, tmp_path):
    run_ranks(fetch, 2, str(tmp_path), WITH_TEXT_ENCODER, alone)
    fetched = [line.split() for line in (tmp_path / "order.txt").read_text().splitlines()]
    assert sorted(rank for rank, source in fetched if source == "org/text") == ranks
    assert sorted(rank for rank, source in fetched if source == "org/repo") == ["0", "1"]


NO_DOWNLOADS = derive_config(
    WITH_TEXT_ENCODER,
    text_encoder=dict(checkpoint=dict(download=False)),
    diffusion_model=dict(transformer=dict(checkpoint=dict(download=False))),
)


def missing_files() -> list[str]:
    """What a rank of two says before it loads a pipeline that is shared, and one of its own."""
    first = dist.get_rank() == 0
    weights.find_local = lambda checkpoint: None
    weights.describe_missing = lambda checkpoint, flag: checkpoint.source
    texts = []
    for shared in (True, False):
        pipeline = NO_DOWNLOADS.setup(device="cpu", load=False)
        if shared:
            pipeline.parallelize(build_mesh(resolve_degrees(ParallelConfig(), 2, 2), "cpu"))
        with pytest.raises(CheckpointError if first or not shared else OtherRankError) as caught:
            pipeline.load()
        texts.append(str(caught.value))
    return texts


def test_of_ranks_that_share_a_pipeline_the_first_of_a_node_asks_for_weights():
    first, second = run_ranks(missing_files, 2)
    assert all("needs 2 checkpoints" in text and "org/text" in text for text in first)
    assert second[0] == "The first rank of 1 node(s) failed; see its own message."
    assert "needs 2 checkpoints" in second[1] and "org/text" in second[1]


@pytest.mark.parametrize(("rank", "count"), [("0", 2), ("1", 1)])
def test_a_runner_asks_by_the_rank_that_torchrun_gave(rank, count, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(weights, "find_local", lambda checkpoint: None)
    monkeypatch.setattr(weights, "describe_missing", lambda checkpoint, flag: checkpoint.source)
    with pytest.raises(CheckpointError, match=f"needs {count} checkpoint"):
        weights.require_weights(NO_DOWNLOADS)
