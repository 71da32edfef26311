import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "source" / "examples" / "cluster_job.py"


@pytest.mark.slow
def test_cluster_job_streams_a_video_on_two_ranks(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "12 chunks on 2 = cfg 1 x ring 1 x ulysses 2 x tp 1\n" in done.stdout
    assert (tmp_path / "cluster_job.mp4").stat().st_size > 5_000
