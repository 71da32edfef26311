"""Weights files that ask for more than they have: refused soon, in one line, in little memory."""

import json
import random
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError, load_checkpoint
from flashdreams.runtime.checkpoint.pickles import HostileFile, check_pickle_file
from flashdreams.runtime.checkpoint.read import read_header
from flashdreams.runtime.checkpoint.source import find_local

LIMIT_S = 30.0
"""Of processor time, while memory is traced, which takes most of it."""
LIMIT_BYTES = 600e6


def refused(path: Path) -> str:
    """The line that loading a small module from the file ends in."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(nn.Linear(3, 2), CheckpointConfig(source=str(path)))
        assert time.process_time() - begin < LIMIT_S
        assert tracemalloc.get_traced_memory()[1] < LIMIT_BYTES
    finally:
        tracemalloc.stop()
    said = str(caught.value)
    assert path.name in said and len(said) < 4000 and said.isprintable(), said
    return said


def archive(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file of torch's zip format with this pickle in it."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in (("data.pkl", content), ("byteorder", b"little"), ("version", b"3\n")):
            file.writestr(f"w/{name}", data)
    return path


def unfolding_tuple(levels: int = 60) -> bytes:
    """``t = (t, t)``, again and again, and then as a key, which is hashed."""
    body = b"\x80\x02}(" + b"K\x01K\x02\x86" + b"q\x00h\x00\x86" * levels
    return body + b"K\x01u."


def colliding_keys(count: int = 100_000) -> bytes:
    prime = 2**61 - 1
    keys = b"".join(
        b"\x8a\x0a" + (i * prime).to_bytes(10, "little") + b"N" for i in range(1, count)
    )
    return b"\x80\x02}(" + keys + b"u."


CALLS = {
    "bytearray": b"cbuiltins\nbytearray\n(\x8a\x06\x00\x00\x00\x00\x00\x10tR",
    "torch.FloatStorage": b"ctorch\nFloatStorage\n(\x8a\x06\x00\x00\x00\x00\x00\x10tR",
    "torch.FloatTensor": b"ctorch\nFloatTensor\n(\x8a\x06\x00\x00\x00\x00\x00\x10tR",
}


@pytest.mark.parametrize("name", CALLS)
def test_a_pickle_that_takes_memory_by_a_call_is_refused(name: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "w.pt", b"\x80\x02" + CALLS[name] + b".")
    assert f"it asks Python to run {'builtins.' * (name == 'bytearray')}{name}" in refused(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (unfolding_tuple(), "unfolds into more than"),
        (b"\x80\x02}(" + b"K\x01" + b"\x85" * 300_000 + b"K\x01u.", "nested more than"),
        (colliding_keys(), "keys are not text"),
        (b"\x80\x02" + b"]" * 2_000_000 + b".", "instructions"),
        (b"\x80\x02X" + struct.pack("<I", 5_000_000) + b"a" * 5_000_000 + b".", "longer than"),
    ],
)
def test_a_pickle_without_end_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    assert reason in refused(archive(tmp_path / "w.pt", content))


def test_records_that_unpack_to_more_than_the_file_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "w.pt", b"a" * 50_000_000, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    assert "compressed" in refused(path)


def test_a_directory_longer_than_the_limit_is_not_read(tmp_path: Path) -> None:
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, 2**31, 0, 0)
    path = tmp_path / "w.pt"
    path.write_bytes(b"PK\x03\x04" + bytes(1000) + end)
    assert "list of records has 2147483648 bytes" in refused(path)


def test_a_small_file_with_a_huge_repeated_tensor_is_refused(tmp_path: Path) -> None:
    """A stride of zero repeats one number into terabytes."""
    for old in (False, True):
        content = {"weight": torch.zeros(1, 1).expand(2**20, 2**20), "bias": torch.zeros(2)}
        torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
        assert "claims 4398046511104 bytes, the file has" in refused(tmp_path / "w.pt")


def test_a_storage_larger_than_the_file_is_refused_in_the_old_format(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    tensors = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    good = path.read_bytes()
    check_pickle_file(path)  # negative control
    place = good.index(b"K\x06", good.index(b"FloatStorage"))
    path.write_bytes(good[:place] + b"J\xff\xff\xff\x7f" + good[place + 2 :])
    assert "a storage of 2147483647 numbers in a file of" in refused(path)


@pytest.mark.parametrize("old", [False, True])
def test_what_pytorch_writes_passes(old: bool, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    content = {
        "model": module.state_dict(), "parameters": dict(module.named_parameters()),
        "optimizer": optimizer.state_dict(), "step": 3, "sizes": [torch.Size([1, 2]), (3.0, None)],
        "half": torch.ones(2, dtype=torch.bfloat16), "wide": torch.ones(2, dtype=torch.uint16),
        "other": torch.eye(2).to_sparse(), "device": torch.device("cpu"), "dtype": torch.float16,
    }  # fmt: skip
    path = tmp_path / "w.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    check_pickle_file(path)


def test_many_tensors_pass(tmp_path: Path) -> None:
    content = {f"blocks.{i}.self_attn.norm.weight": torch.ones(1) for i in range(5000)}
    torch.save(content, tmp_path / "w.pt")
    check_pickle_file(tmp_path / "w.pt")


def test_the_scan_stops_at_what_no_tensor_needs(tmp_path: Path) -> None:
    path = archive(tmp_path / "w.pt", b"\x80\x02}X\x01\x00\x00\x00acos\nsystem\ns.")
    check_pickle_file(path)  # a name alone is left to the loader
    assert "asks Python to run os.system" in refused(path)
    path = archive(tmp_path / "w.pt", b"(i__main__\nInstance\n.")
    with pytest.raises(HostileFile, match="the instruction INST"):
        check_pickle_file(path)


# ---- safetensors and indexes


def write_header(path: Path, header: object, data: bytes = bytes(4)) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(shape: object, end: object = 4) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"x": entry([1] * 2_000_000)},
        {"x": entry([10**4000] * 1500)},
        {"x": entry([2**62, 2**62, 0], 0)},
        {"x": entry([1.0])},
        {"x": entry("1")},
        {"x": entry([True])},
        {"x": entry([[[1]]])},
        {"x": entry([1], 10**4000)},
        {"x" * 1_000_000: entry([1])},
        {"x": {"dtype": "F" * 1_000_000, "shape": [1], "data_offsets": [0, 4]}},
        {"x": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"\x1b]0;owned\x07\x1b[2J": entry([1])},
        {"\u202eevil": entry([1])},
        {f"{i}" * 100: entry([0], 0) for i in range(3)},
        {"x": entry([-1, -1])},
        {"x": entry([3])},
        {"x": {"dtype": "F32"}},
        {"x": {"dtype": "F 99", "shape": [1], "data_offsets": [0, 4]}},
        b'{"x": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}',
        b'{"x":' + b'{"x":' * 200_000,
        b"[" * 200_000,
        b"\xff\xfe\x00",
        b"no json",
        b"[1, 2]",
        b"null",
    ],
)
def test_hostile_headers_end_in_one_short_line(header: object, tmp_path: Path) -> None:
    path = write_header(tmp_path / "w.safetensors", header)
    begin = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(nn.Linear(3, 2), CheckpointConfig(source=str(path)))
    said = str(caught.value)
    assert time.process_time() - begin < LIMIT_S and len(said) < 4000, len(said)
    assert said.replace("\n", "").isprintable() and "w.safetensors" in said
    assert "is damaged" in said or "does not fit" in said


def test_a_header_of_many_megabytes_is_not_parsed(tmp_path: Path) -> None:
    header = b'{"x":' + b" " * 20_000_000 + b"}"
    assert "its header needs 20000006 bytes" in refused(
        write_header(tmp_path / "w.safetensors", header)
    )


def test_long_alike_names_are_not_compared_for_ever(tmp_path: Path) -> None:
    names = {f"{'ab' * 450}{i:05}": entry([0], 0) for i in range(4000)}
    path = write_header(tmp_path / "w.safetensors", names, b"")
    assert len(read_header(path)) == 4000
    begin = time.process_time()
    with pytest.raises(CheckpointError, match="4000 unexpected"):
        load_checkpoint(nn.Linear(3, 2), CheckpointConfig(source=str(path)))
    assert time.process_time() - begin < LIMIT_S


@pytest.mark.parametrize(
    "shard", ["..", ".", "*", "a/b.safetensors", "../x.safetensors", "\x1b[2J", "", "x" * 10**6, 3]
)
def test_an_index_names_plain_files_only(shard: object, tmp_path: Path) -> None:
    """Its names become paths, and patterns of what is downloaded."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": shard}}))
    said = refused(index)
    assert "should name files in its own folder" in said and len(said) < 1000


def test_an_index_without_bounds_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(3000)}}))
    assert "names 3000 files" in refused(index)
    for text in (" " * 20_000_000, "[" * 200_000):
        index.write_text(text)
        assert "is not a shard index" in refused(index)


def test_no_package_of_a_config_is_imported(tmp_path: Path, monkeypatch) -> None:
    """A config file is data, and importing a package is running it."""
    for name in ("hostile_package", "hostile_module"):
        folder = tmp_path / name
        (folder if name.endswith("package") else tmp_path).mkdir(exist_ok=True)
    (tmp_path / "hostile_package" / "__init__.py").write_text("raise SystemExit('ran')")
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('ran')")
    save_file({"x": torch.zeros(1)}, tmp_path / "hostile_package" / "w.safetensors")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = find_local(CheckpointConfig(source="package:hostile_package/w.safetensors"))
    assert found is not None and found.files[0].is_file()
    for source in ("package:hostile_module/x", "package:/x", "package:os.path/x"):
        with pytest.raises(CheckpointError, match="no package"):
            find_local(CheckpointConfig(source=source))


@pytest.mark.parametrize("revision", ["../../x", "a/../b", "/etc", "a b", "x\x1b", ""])
def test_a_revision_is_no_path(revision: str) -> None:
    with pytest.raises(CheckpointError, match="must be a branch, tag or commit"):
        CheckpointConfig(source="a/b", file="c", revision=revision or "-/..")
    CheckpointConfig(source="a/b", file="c", revision="refs/pr/3")  # negative control


@pytest.mark.parametrize(
    "rules", [{"ignore": ("[1",)}, {"rename": (("(", ""),)}, {"rename": (("a", r"\1"),)}]
)
def test_a_rule_that_is_no_regular_expression_is_refused_with_the_config(rules):
    with pytest.raises(CheckpointError, match="is not a regular expression: "):
        CheckpointConfig(source="a.safetensors", **rules)


@pytest.mark.parametrize("source", ["hf://a/b/../../c", "a/b"])
def test_a_file_lies_inside_its_repository(source: str) -> None:
    with pytest.raises(CheckpointError, match="not inside the repository"):
        find_local(CheckpointConfig(source=source, file="../../../c"))


# ---- every byte


def saved(kind: str, path: Path) -> bytes:
    tensors = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "pt")
    return path.read_bytes()


def damaged(whole: bytes, kind: str) -> list[bytes]:
    """Every region overwritten, cut and doubled, and bits turned here and there."""
    random.seed(0)
    step = max(1, len(whole) // 120)
    found = []
    for at in range(0, len(whole), step):
        end = min(at + step, len(whole))
        found += [whole[:at] + fill * (end - at) + whole[end:] for fill in (b"\x00", b"\xff")]
        found += [whole[:at], whole[:at] + whole[end:], whole[:end] + whole[at:]]
    for _ in range(300):
        copy = bytearray(whole)
        copy[random.randrange(len(copy))] ^= 1 << random.randrange(8)
        found.append(bytes(copy))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "pt", "old"])
def test_damage_anywhere_ends_in_one_line_or_in_nothing(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"w.{'safetensors' if kind == 'safetensors' else 'pt'}"
    whole, refusals = saved(kind, path), 0
    read: Callable[[], object] = lambda: load_checkpoint(  # noqa: E731
        nn.Linear(3, 2), CheckpointConfig(source=str(path))
    )
    read()
    for content in damaged(whole, kind):
        path.write_bytes(content)
        begin = time.process_time()
        try:
            read()
        except CheckpointError as error:
            refusals += 1
            said = str(error).replace("\n", "")
            assert said.isprintable() and path.name in said and len(said) < 4000
        assert time.process_time() - begin < LIMIT_S
    assert refusals > 100
