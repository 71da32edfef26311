"""Who says what when several ranks find that weights are missing."""

import contextlib
import io
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from flashdreams import run
from flashdreams.infra import weights
from flashdreams.infra.config import derive_config
from flashdreams.integrations.self_forcing.config import TINY_RUNNER
from flashdreams.runtime.checkpoint import CheckpointConfig
from tests.harness import run_ranks

RUNNER = derive_config(
    TINY_RUNNER,
    device="cpu",
    pipeline={
        "text_encoder": {"checkpoint": CheckpointConfig(source="org/text", file="t5.pth")},
        "diffusion_model": {
            "transformer": {"checkpoint": CheckpointConfig(source="org/repo", file="w.pth")}
        },
    },
)
RANKS_PER_NODE = 2


def start(folder: Path, nodes_without: tuple[int, ...]) -> tuple[int, list[str]]:
    """Exit code of one rank, and what it says, where the disks of some nodes are empty."""
    node, local_rank = divmod(dist.get_rank(), RANKS_PER_NODE)
    os.environ["LOCAL_RANK"] = str(local_rank)
    weights.find_local = lambda checkpoint: None if node in nodes_without else "here"
    run._PAUSE_S = 0.0
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = run._run(derive_config(RUNNER, output_dir=folder), debug=False)
    return code, stderr.getvalue().splitlines()


@pytest.mark.parametrize("nodes_without", [(1,), (0, 1)])
def test_the_first_rank_of_each_node_without_weights_lists_them_once(nodes_without, tmp_path):
    listing = {RANKS_PER_NODE * node for node in nodes_without}
    said = run_ranks(start, 2 * RANKS_PER_NODE, tmp_path, nodes_without)
    for rank, (code, lines) in enumerate(said):
        assert code == run.RUN_FAILED
        if rank in listing:
            assert f"needs {2 if rank == 0 else 1} checkpoint" in lines[0]
            assert sum("Not on this machine: org/repo" in line for line in lines) == 1
            assert any("org/text" in line for line in lines) == (rank == 0)
        else:
            count = len(nodes_without)
            place = f" on rank {rank}" if rank else ""
            assert lines == [
                f"flashdreams-run: error{place}: The first rank of {count} node(s) failed; "
                "see its own message."
            ]
    assert not list(tmp_path.iterdir())
