"""What a machine without a GPU, or without triton, is told."""

import sys

import pytest
import torch
from flashdreams_kernels import adaln
from flashdreams_kernels.launch import check_tensor, load_programs


def test_cpu_tensors_are_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, gate = torch.zeros(1, 2, 16), torch.zeros(1, 1, 16)
    with pytest.raises(ValueError, match=r"got tensors on 'cpu'.*sdpa.*TRITON_INTERPRET=1"):
        adaln.gate_residual(x, x, gate)


def test_a_missing_triton_is_named_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "flashdreams_kernels.programs.adaln", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'triton>=3.6'"):
        load_programs("adaln")


def test_a_tensor_that_reaches_too_far_is_refused() -> None:
    long = torch.empty(1, 2**20, 1, device="meta").expand(1, 2**20, 2**12)
    like = torch.empty(0, device="meta")
    check_tensor("k", long[..., :1], (1, None, 1), like)
    far = torch.empty_strided((1, 2**20, 2), (2, 2**12, 1), device="meta")
    with pytest.raises(ValueError, match=r"k reaches over 42949.* at most 2147483647"):
        check_tensor("k", far, (1, None, 2), like)
