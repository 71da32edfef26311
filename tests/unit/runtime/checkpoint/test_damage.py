"""Checkpoints that no writer would make: one clear line each, and nothing of them is loaded."""

import json
import struct
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError, load_checkpoint
from flashdreams.runtime.checkpoint.read import load_pickle
from flashdreams.runtime.checkpoint.source import find_local

SIZES = {"weight": (2, 3), "bias": (2,)}


def tensors() -> dict[str, Tensor]:
    return {name: torch.ones(shape) for name, shape in SIZES.items()}


def refused(path: Path) -> str:
    """The line that loading ends in; the module is seen to be as it was."""
    module = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(module, CheckpointConfig(source=str(path)))
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    return str(caught.value)


def write_shards(folder: Path, **shards: dict[str, Tensor]) -> dict[str, str]:
    """Files of these contents under an index that places a tensor in the last that has it."""
    weight_map: dict[str, str] = {}
    for stem, content in shards.items():
        save_file(content, folder / f"{stem}.safetensors")
        weight_map |= dict.fromkeys(content, f"{stem}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    bias = torch.zeros(2)
    write_shards(tmp_path, a=tensors(), b={"bias": bias})
    said = refused(tmp_path)
    assert "a.safetensors: the index places 1 of this shard's tensors elsewhere" in said
    assert ": bias." in said


def test_a_shard_that_holds_more_than_its_index_says_is_refused(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path, a=tensors(), b={"bias": torch.zeros(2)})
    del weight_map["bias"]
    weight_map["extra"] = "b.safetensors"
    save_file({"extra": torch.zeros(2)}, tmp_path / "b.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "a.safetensors: the index places 1 of this shard's tensors elsewhere" in refused(
        tmp_path
    )


def write_header(path: Path, header: bytes, data_bytes: int) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(data_bytes))
    return path


@pytest.mark.parametrize(
    ("weight", "bias", "data_bytes"), [((0, 24), (0, 8), 24), ((0, 24), (28, 36), 36)]
)
def test_tensors_that_overlap_or_leave_a_gap_are_refused(tmp_path, weight, bias, data_bytes):
    header = {
        name: {"dtype": "F32", "shape": SIZES[name], "data_offsets": place}
        for name, place in (("weight", weight), ("bias", bias))
    }
    path = write_header(tmp_path / "w.safetensors", json.dumps(header).encode(), data_bytes)
    assert "w.safetensors is damaged" in refused(path) and "overlap, or leave a gap" in refused(
        path
    )


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
    ],
)
def test_headers_that_make_no_sense_are_refused(tmp_path: Path, header: bytes) -> None:
    assert "w.safetensors is damaged" in refused(
        write_header(tmp_path / "w.safetensors", header, 4)
    )


def test_an_index_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[" * 200_000)
    assert "is not a shard index" in refused(tmp_path)


def test_a_pt_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(tensors(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        said = refused(path)
        assert "w.pth" in said and "\n" not in said
    path.write_bytes(whole)
    load_checkpoint(nn.Linear(3, 2), CheckpointConfig(source=str(path)))  # the whole file is good


@pytest.mark.parametrize(
    "content",
    [
        {3: torch.zeros(2)},
        {("bias",): torch.zeros(2)},
        {"weight": torch.zeros(2, 3).to_sparse(), "bias": torch.zeros(2)},
        {"weight": torch.zeros(2, 3, device="meta"), "bias": torch.zeros(2)},
    ],
)
def test_entries_without_a_name_or_dense_values_are_refused(tmp_path: Path, content: dict) -> None:
    torch.save(content, tmp_path / "w.pt")
    assert "1 entries are no dense tensors with a name" in refused(tmp_path / "w.pt")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 11 GB")],
)
def test_a_host_without_memory_is_no_damaged_file(tmp_path, monkeypatch, error) -> None:
    """Nobody downloads a good file again because the machine is full."""
    path = tmp_path / "model.pth"
    torch.save(tensors(), path)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)) as caught:
        load_pickle(path)
    assert caught.value is error


def test_nobody_is_told_to_load_a_file_that_may_run_code(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3)), tmp_path / "script.pt")
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    for name in ("script.pt", "old.pt"):
        said = refused(tmp_path / name)
        assert "is no plain file of tensors" in said and "safetensors version" in said
        assert "weights_only" not in said and "\n" not in said


def test_a_home_that_does_not_exist_is_no_crash() -> None:
    assert find_local(CheckpointConfig(source="~no-such-user/w.safetensors")) is None
