"""Statistics files, checksums and memory figures."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flashdreams.runtime import files, stats
from flashdreams.runtime.stats import StatsWriter, memory_stats, sha256_of

RECORDS = [{"autoregressive_index": 0, "total_ms": 1.5, "psnr_db": None}]


def write(path: Path, header: dict, records: list[dict]) -> StatsWriter:
    writer = StatsWriter(path, lambda: header)
    for record in records:
        writer.append(record)
    return writer


@pytest.mark.parametrize("count", [0, 1, 3])
def test_stats_come_back_from_the_file(count: int, tmp_path: Path) -> None:
    path = tmp_path / "new" / "stats.json"
    write(path, {"slug": "toy"}, []).finish()
    write(path, {"slug": "toy-world", "degrees": {"tp": 1}}, RECORDS * count).finish()
    expected = {"header": {"slug": "toy-world", "degrees": {"tp": 1}}, "records": RECORDS * count}
    assert json.loads(path.read_text()) == expected
    assert [p.name for p in path.parent.iterdir()] == ["stats.json"]


def test_every_record_is_on_disk_at_once_under_a_header(tmp_path: Path) -> None:
    header = {"slug": "toy", "graphs": 0}
    writer = write(tmp_path / "stats.json", header, RECORDS)
    lines = (tmp_path / "stats.partial.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [header, *RECORDS]
    header["graphs"] = 3
    writer.finish()
    assert json.loads((tmp_path / "stats.json").read_text())["header"]["graphs"] == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_stats_refuse_what_json_cannot_hold(tmp_path: Path, value: float) -> None:
    path = tmp_path / "stats.json"
    writer = write(path, {}, RECORDS)
    with pytest.raises(ValueError, match=rf"records\[1\]\.psnr_db\[0\] is {value}"):
        writer.append({"psnr_db": [value]})
    with pytest.raises(TypeError, match="Tensor"):
        writer.append({"psnr_db": torch.zeros(1)})
    writer.finish()
    assert json.loads(path.read_text())["records"] == RECORDS
    with pytest.raises(ValueError, match=f"header.rate is {value}"):
        write(path, {"rate": value}, []).finish()
    assert [p.name for p in tmp_path.iterdir()] == ["stats.json"]


def test_stats_that_cannot_be_put_in_place_leave_the_former_and_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stats.json"
    write(path, {}, RECORDS).finish()
    before = path.read_bytes()

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write(path, {}, RECORDS * 2).finish()
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"stats.json", "stats.partial.jsonl"}


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


def test_a_record_is_on_disk_at_every_moment_of_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed while it resumes leaves what the next attempt needs."""
    write(tmp_path / "stats.json", {}, RECORDS * 3).close()
    partial = tmp_path / "stats.partial.jsonl"
    seen = []
    monkeypatch.setattr(stats, "OutputGuard", lambda path: seen.append(path.read_bytes()))
    StatsWriter(tmp_path / "stats.json", dict).resume(2)
    assert seen == [partial.read_bytes()] and len(seen[0].splitlines()) == 3
