"""Statistics files, checksums and memory figures."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flashdreams.runtime import stats
from flashdreams.runtime.stats import memory_stats, sha256_of, write_stats

RECORDS = [{"autoregressive_index": 0, "total_ms": 1.5, "psnr_db": None}]


def test_stats_come_back_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "stats.json"
    write_stats(path, {"slug": "toy"}, [])
    write_stats(path, {"slug": "toy-world"}, RECORDS)
    assert json.loads(path.read_text()) == {"header": {"slug": "toy-world"}, "records": RECORDS}
    assert [p.name for p in path.parent.iterdir()] == ["stats.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_stats_refuse_what_json_cannot_hold(tmp_path: Path, value: float) -> None:
    path = tmp_path / "stats.json"
    write_stats(path, {}, RECORDS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"records\[1\]\.psnr_db\[0\] is {value}"):
        write_stats(path, {}, [*RECORDS, {"psnr_db": [value]}])
    with pytest.raises(TypeError, match="Tensor"):
        write_stats(path, {}, [{"psnr_db": torch.zeros(1)}])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["stats.json"]


def test_stats_that_cannot_be_put_in_place_leave_the_former(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stats.json"
    write_stats(path, {}, RECORDS)
    before = path.read_bytes()

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stats.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_stats(path, {}, [])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["stats.json"]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64]
)
def test_checksum_is_that_of_the_raw_bytes(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype)
    raw = bytes(tensor.flatten().view(torch.uint8).tolist())
    assert sha256_of(tensor) == hashlib.sha256(raw).hexdigest()
    strided = tensor.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    assert sha256_of(strided) == sha256_of(tensor)
    assert sha256_of(tensor.transpose(0, 2)) != sha256_of(tensor)
    changed = tensor.clone()
    changed[1, 2, 3] += 1
    assert sha256_of(changed) != sha256_of(tensor)


def test_checksum_of_scalars_empty_and_graph_tensors() -> None:
    assert sha256_of(torch.tensor(1.5)) == hashlib.sha256(np.float32(1.5).tobytes()).hexdigest()
    assert sha256_of(torch.zeros(0)) == hashlib.sha256(b"").hexdigest()
    assert sha256_of(torch.zeros(2, requires_grad=True)) == sha256_of(torch.zeros(2))


def test_memory_on_a_cpu_is_the_largest_resident_size() -> None:
    before = memory_stats("cpu")["mem_peak_gib"]
    assert 0.01 < before < 1000
    block = np.ones(2**27 // 8)
    after = memory_stats("cpu")["mem_peak_gib"]
    assert block.nbytes == 2**27
    assert before <= after < before + 1
