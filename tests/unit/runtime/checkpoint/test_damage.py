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


def refused(path: Path, **rules) -> str:
    """The line that loading ends in; the module is seen to be as it was."""
    module = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(module, CheckpointConfig(source=str(path), **rules))
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


def write_index_without(folder: Path, name: str, **shards: dict[str, Tensor]) -> None:
    weight_map = write_shards(folder, **shards)
    del weight_map[name]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_tensor_beyond_the_index_is_taken(tmp_path: Path) -> None:
    content = {"weight": torch.full((2, 3), 2.0), "bias": torch.full((2,), 3.0)}
    write_index_without(tmp_path, "bias", a=content)
    module = nn.Linear(3, 2)
    load_checkpoint(module, CheckpointConfig(source=str(tmp_path)))
    assert all(torch.equal(content[name], t) for name, t in module.state_dict().items())


def test_a_tensor_beyond_index_and_model_is_named_unless_ignored(tmp_path: Path) -> None:
    write_index_without(
        tmp_path, "extra", a=tensors(), b={"extra": torch.ones(1), "y": torch.ones(1)}
    )
    said = refused(tmp_path)
    assert "2 unexpected in the file" in said and "extra" in said
    ignoring = CheckpointConfig(source=str(tmp_path), ignore=("extra", "y"))
    assert load_checkpoint(nn.Linear(3, 2), ignoring).tensors == 2


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
    assert "1 entries are not dense tensors with a name" in refused(tmp_path / "w.pt")


def test_entries_that_are_no_tensors_may_be_ignored(tmp_path: Path) -> None:
    torch.save({**tensors(), "epoch": 3}, tmp_path / "w.pt")
    assert "epoch" in refused(tmp_path / "w.pt")
    ignoring = CheckpointConfig(source=str(tmp_path / "w.pt"), ignore=("epoch",))
    assert load_checkpoint(nn.Linear(3, 2), ignoring).tensors == 2


FORMAT_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Types of safetensors 0.8 and their bits."""


@pytest.mark.parametrize("kind", FORMAT_BITS)
def test_every_type_of_the_format_is_recognised(tmp_path: Path, kind: str) -> None:
    extra = FORMAT_BITS[kind]  # bytes of 8 values
    header = {
        "bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]},
        "extra": {"dtype": kind, "shape": [8], "data_offsets": [32, 32 + extra]},
    }
    path = write_header(tmp_path / "w.safetensors", json.dumps(header).encode(), 32 + extra)
    assert "1 unexpected in the file:\n    extra" in refused(path)
    assert (
        load_checkpoint(
            nn.Linear(3, 2), CheckpointConfig(source=str(path), ignore=("extra",))
        ).tensors
        == 2
    )
    header["extra"]["data_offsets"][1] += 1
    path = write_header(tmp_path / "w.safetensors", json.dumps(header).encode(), 33 + extra)
    assert "damaged" in refused(path)  # negative control: the size is checked


@pytest.mark.parametrize("kind", ["F4", "F6_E2M3", "F8_E8M0", "C64", "I32", "BOOL"])
def test_a_type_that_cannot_be_used_is_named(tmp_path: Path, kind: str) -> None:
    count = 8 * FORMAT_BITS[kind] // 8
    header = {
        "bias": {"dtype": kind, "shape": [8], "data_offsets": [0, count]},
        "weight": {"dtype": "F32", "shape": [8, 3], "data_offsets": [count, count + 96]},
    }
    path = write_header(tmp_path / "w.safetensors", json.dumps(header).encode(), count + 96)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(nn.Linear(3, 8), CheckpointConfig(source=str(path)))
    said = str(caught.value)
    spelled = {"C64": "complex64", "I32": "int32", "BOOL": "bool"}.get(kind, kind)
    assert spelled in said and "bias" in said and "damaged" not in said


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
        assert "is not a plain file of tensors" in said and "safetensors version" in said
        assert "weights_only" not in said and "\n" not in said


def test_a_home_that_does_not_exist_is_no_crash() -> None:
    assert find_local(CheckpointConfig(source="~no-such-user/w.safetensors")) is None
