"""What is left of a run that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flashdreams.integrations.toy_world import config
from flashdreams.runtime.latents import read_latent_parts

ROOT = Path(__file__).parents[2]
LIMIT_S = 120


@pytest.mark.slow
@pytest.mark.skipif(
    not (Path(config.__file__).parent / "weights" / "transformer.safetensors").exists(),
    reason="needs the toy world's weights",
)
def test_a_killed_run_leaves_records_and_latents(tmp_path: Path) -> None:
    words = ["toy-world", "--device", "cpu", "--total-blocks", "100000", "--save-latents", "True"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flashdreams.run", *words, "--output-dir", str(tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )  # fmt: skip
    lines = tmp_path / "stats_toy-world.partial.jsonl"
    deadline = time.monotonic() + LIMIT_S
    try:
        while not lines.exists() or lines.read_bytes().count(b"\n") < 10:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(LIMIT_S)
    names = {path.name for path in tmp_path.iterdir()}
    lock = ".toy-world.lock"  # nobody's now: the next run takes it
    assert names == {"toy-world.partial.mp4", lines.name, "latents_toy-world.partial.npy", lock}
    header, *records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert header["runner_name"] == "toy-world" and len(records) >= 9
    assert [r["autoregressive_index"] for r in records] == list(range(len(records)))
    assert all(record["total_ms"] > 0 and record["latent_sha256"] for record in records)
    latents = read_latent_parts(tmp_path / "latents_toy-world.partial.npy")
    assert latents.shape[2] >= len(records)
    assert latents.dtype == torch.float32 and latents.isfinite().all() and latents.std() > 0.1
