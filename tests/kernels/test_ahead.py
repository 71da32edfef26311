"""Every kernel compiles for every GPU generation, on a machine without one."""

import json
import os
import subprocess
import sys

import pytest

SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
KERNELS = {
    "attention.attend",
    "attention.merge_splits",
    "linear.linear_pointers",
    "rope_qknorm.norm_rope",
    "adaln.norm_modulate",
    "adaln.gate_add",
    "channels.norm_silu",
    "channels.add",
    "channels.sum_halves",
    "channels.spread_phases",
}


@pytest.mark.slow
def test_kernels_compile_ahead_of_time(tmp_path) -> None:
    """In a process of its own: here the programs may belong to the interpreter."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    options = ["80", "90", "100", "--num-splits", "2"]
    command = [sys.executable, "-m", "flashdreams_kernels.ahead", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    for capability, limit in SHARED_LIMIT_BYTES.items():
        mine = [report for report in reports if report["capability"] == capability]
        later = {"linear.linear_descriptors", "e4m3.gelu_quantize"} if capability >= 90 else set()
        assert {report["kernel"] for report in mine} == KERNELS | later
        assert all(report["shared_bytes"] <= limit for report in mine)
        assert all(report["cubin_bytes"] > 0 for report in mine)
        if mine[0]["spill_bytes"] is not None:
            assert all(report["spill_bytes"] == 0 for report in mine), mine
    print(done.stdout)
