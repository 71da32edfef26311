"""Copies from the host to a device."""

import pytest
import torch

from flashdreams.runtime.transfer import to_device


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_to_device_keeps_the_values(dtype: torch.dtype) -> None:
    values = torch.arange(12).view(3, 4).to(dtype)
    moved = to_device(values, "cpu")
    assert torch.equal(moved, values) and moved.dtype == dtype
    assert to_device(values, "meta").shape == values.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_to_device_copies_by_the_stream() -> None:
    values = torch.arange(65536).view(256, 256)
    moved = to_device(values, "cuda")
    assert moved.is_cuda
    assert torch.equal(moved.cpu(), values)
    wide = values[:1].expand(4, -1)
    assert torch.equal(to_device(wide, "cuda").cpu(), wide)
