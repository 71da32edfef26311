"""Loading of checkpoints into modules: what is filled, what is refused, how much is read."""

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flashdreams.runtime.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    KeyMap,
    TensorSlice,
    load,
    load_checkpoint,
)
from flashdreams.runtime.checkpoint.read import open_tensors
from flashdreams.runtime.checkpoint.source import LocalCheckpoint
from tests.harness import run_ranks
from tests.manifests import load_manifest, write_sparse_safetensors


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2, bias=False)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("table", torch.zeros(5), persistent=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(5, 3)
        self.inner = nn.Module()
        self.inner.embed = self.shared


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"first.weight": (4, 3), "first.bias": (4,), "second.weight": (2, 4), "mean": (2,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def saved(path: Path, content: dict[str, torch.Tensor], **rules) -> CheckpointConfig:
    save_file(content, path)
    return CheckpointConfig(source=str(path), **rules)


def sharded(folder: Path, content: dict[str, torch.Tensor]) -> CheckpointConfig:
    weight_map = {}
    for number, (name, tensor) in enumerate(content.items()):
        weight_map[name] = f"model-{number}.safetensors"
        save_file({name: tensor}, folder / weight_map[name])
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return CheckpointConfig(source=str(folder))


def meta(module_type: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return module_type()


def equals(module: nn.Module, content: dict[str, torch.Tensor]) -> bool:
    state = module.state_dict()
    return set(state) == set(content) and all(torch.equal(state[n], t) for n, t in content.items())


def test_load_fills_a_module_on_meta_and_leaves_other_buffers(tmp_path: Path) -> None:
    module, content = meta(Tiny), tensors()
    report = load_checkpoint(module, saved(tmp_path / "w.safetensors", content))
    assert equals(module, content)
    assert not equals(module, tensors(seed=1))  # the comparison can fail
    assert module.table.is_meta
    assert isinstance(module.first.weight, nn.Parameter)
    assert (report.tensors, report.bytes_read) == (4, 4 * (12 + 4 + 8 + 2))


def test_load_fills_a_real_module_in_place(tmp_path: Path) -> None:
    module, content = Tiny(), tensors()
    held, address = module.first.weight, module.first.weight.data_ptr()
    load_checkpoint(module, saved(tmp_path / "w.safetensors", content))
    assert equals(module, content)
    assert module.first.weight is held and held.data_ptr() == address


def test_load_casts_on_the_way(tmp_path: Path) -> None:
    module, content = meta(Tiny), tensors()
    config = saved(tmp_path / "w.safetensors", content)
    report = load_checkpoint(module, config, dtype=torch.bfloat16)
    assert equals(module, {name: tensor.bfloat16() for name, tensor in content.items()})
    assert report.bytes_read == 4 * 26  # of the file, in its own type
    load_checkpoint(module, config)  # the parameters keep the type they have
    assert module.first.weight.dtype == torch.bfloat16


def test_load_reads_all_shards_of_an_index(tmp_path: Path) -> None:
    module, content = meta(Tiny), tensors()
    load_checkpoint(module, sharded(tmp_path, content))
    assert equals(module, content)


def test_load_reads_only_the_slices_of_a_rank(tmp_path: Path) -> None:
    content = tensors()
    config = saved(tmp_path / "w.safetensors", content)
    module = meta(Tiny)
    with torch.device("meta"):
        module.first.weight = nn.Parameter(torch.empty(2, 3))
        module.second.weight = nn.Parameter(torch.empty(2, 2))
    slices = {"first.weight": (0, 2, 2), "second.weight": TensorSlice(1, 1, 2, size=4)}
    report = load_checkpoint(module, config, slices=slices)
    assert torch.equal(module.first.weight, content["first.weight"][2:])
    assert torch.equal(module.second.weight, content["second.weight"][:, 1:3])
    assert not torch.equal(module.second.weight, content["second.weight"][:, :2])
    assert report.bytes_read == 4 * (6 + 4 + 4 + 2)


def test_a_slice_takes_its_share_of_each_part(tmp_path: Path) -> None:
    packed = torch.arange(24.0).view(12, 2)  # queries, keys and values of four heads each
    config = saved(tmp_path / "w.safetensors", {"weight": packed})
    module = nn.Linear(2, 6, bias=False)
    part = TensorSlice(0, 2, 2, 12, parts=3)
    report = load_checkpoint(module, config, slices={"weight": part})
    assert torch.equal(module.weight, packed[[2, 3, 6, 7, 10, 11]])
    assert torch.equal(part.of(packed), packed[[2, 3, 6, 7, 10, 11]])
    assert not torch.equal(module.weight, TensorSlice(0, 6, 6).of(packed))
    assert report.bytes_read == 4 * 12
    for parts, start in ((5, 0), (3, 3)):
        with pytest.raises(CheckpointError, match="no slice"):
            load_checkpoint(
                module, config, slices={"weight": TensorSlice(0, start, 2, 12, parts=parts)}
            )


def test_load_refuses_a_slice_of_a_tensor_of_another_size(tmp_path: Path) -> None:
    config = saved(tmp_path / "w.safetensors", tensors())
    module = Tiny()
    module.first.weight = nn.Parameter(torch.empty(2, 3))
    with pytest.raises(CheckpointError, match=r"no slice \[0:2\] of 8 along dim 0"):
        load_checkpoint(module, config, slices={"first.weight": TensorSlice(0, 0, 2, size=8)})
    with pytest.raises(CheckpointError, match=r"no slice \[3:5\] along dim 0"):
        load_checkpoint(module, config, slices={"first.weight": (0, 3, 2)})
    with pytest.raises(ValueError, match="slices name no tensor of the module: third"):
        load_checkpoint(module, config, slices={"third": (0, 0, 1)})


def test_load_lets_a_module_take_part_of_a_tensor(tmp_path: Path) -> None:
    class LastRows(Tiny):
        def checkpoint_slices(self, shapes: dict[str, tuple[int, ...]]) -> dict:
            rows = shapes["second.weight"][0]
            return {"second.weight": (0, rows - 2, 2)}

    content = {**tensors(), "second.weight": torch.arange(24.0).view(6, 4)}
    module = LastRows()
    load_checkpoint(module, saved(tmp_path / "w.safetensors", content))
    assert torch.equal(module.second.weight, content["second.weight"][-2:])


@pytest.mark.parametrize("present", [["shared"], ["inner.embed"], ["shared", "inner.embed"]])
def test_load_fills_tied_tensors_from_any_of_their_names(tmp_path: Path, present: list) -> None:
    weight = torch.arange(15.0).view(5, 3)
    module = meta(Tied)
    content = {f"{name}.weight": weight.clone() for name in present}
    report = load_checkpoint(module, saved(tmp_path / "w.safetensors", content))
    assert torch.equal(module.inner.embed.weight, weight)
    assert module.shared.weight is module.inner.embed.weight
    assert report.tensors == 1


def test_load_compares_only_when_the_device_is_meta(tmp_path: Path) -> None:
    module = meta(Tiny)
    config = saved(tmp_path / "w.safetensors", tensors())
    report = load_checkpoint(module, config, device="meta")
    assert (report.tensors, report.bytes_read) == (4, 0)
    assert module.first.weight.is_meta


@pytest.mark.parametrize("wrapper", ["model.", "net.", "model._fsdp_wrapped_module."])
def test_load_takes_a_wrapped_sub_dictionary_of_a_pt_file(tmp_path: Path, wrapper: str) -> None:
    content = tensors()
    prefixed = {wrapper + name: tensor for name, tensor in content.items()}
    other = {wrapper + name: tensor for name, tensor in tensors(seed=1).items()}
    torch.save({"generator": other, "generator_ema": prefixed, "step": 7}, tmp_path / "w.pt")
    rules = {"source": str(tmp_path / "w.pt"), "strip_prefixes": ("model.", "net.")}
    module = meta(Tiny)
    load_checkpoint(module, CheckpointConfig(select=("generator_ema", "generator"), **rules))
    assert equals(module, content)
    load_checkpoint(module, CheckpointConfig(select=("generator",), **rules))
    assert equals(module, tensors(seed=1))
    with pytest.raises(CheckpointError, match="generator, generator_ema; none of critic is in it"):
        load_checkpoint(module, CheckpointConfig(select=("critic",), **rules))


def test_load_takes_a_flat_pth_file_as_it_is(tmp_path: Path) -> None:
    content = tensors()
    for old_format in (False, True):
        path = tmp_path / f"old{old_format}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=not old_format)
        module = meta(Tiny)
        config = CheckpointConfig(source=str(path), select=("generator_ema", "model"))
        report = load_checkpoint(module, config, slices={})
        assert equals(module, content)
        assert report.bytes_read == 4 * 26


def test_load_recognises_the_names_of_another_publisher(tmp_path: Path) -> None:
    theirs = KeyMap(
        name="theirs",
        marker="one\\.",
        rename=((r"^one\.", "first."), (r"^two\.", "second.")),
        ignore=("extra",),
    )
    content = tensors()
    renamed = {
        name.replace("first", "one").replace("second", "two"): tensor
        for name, tensor in content.items()
    }
    config = saved(tmp_path / "theirs.safetensors", {**renamed, "extra.scale": torch.ones(1)})
    module = meta(Tiny)
    with pytest.raises(CheckpointError, match=r"first\.weight \(nearest: "):
        load_checkpoint(module, config)
    module.checkpoint_key_maps = (theirs,)
    assert load_checkpoint(module, config).key_map == "theirs"
    assert equals(module, content)
    own = saved(tmp_path / "own.safetensors", content)
    assert load_checkpoint(module, own).key_map is None


def test_load_renames_and_ignores_as_the_config_says(tmp_path: Path) -> None:
    content = tensors()
    wrapped = {f"_orig_mod.net.{name}": tensor for name, tensor in content.items()}
    wrapped["_orig_mod.net.log_scale"] = torch.ones(())
    wrapped["_orig_mod.net.average"] = wrapped.pop("_orig_mod.net.mean")
    rules = {"strip_prefixes": ("net.",), "rename": (("^average$", "mean"),)}
    config = saved(tmp_path / "w.safetensors", wrapped, ignore=("log_",), **rules)
    module = meta(Tiny)
    load_checkpoint(module, config)
    assert equals(module, content)


def test_load_refuses_two_tensors_of_one_name(tmp_path: Path) -> None:
    content = {"a.x": torch.ones(1), "b.x": torch.ones(1)}
    config = saved(tmp_path / "w.safetensors", content, strip_prefixes=("a.", "b."))
    with pytest.raises(CheckpointError, match="would both be 'x'"):
        load_checkpoint(Tiny(), config)


def test_load_lists_what_does_not_fit_and_assigns_nothing(tmp_path: Path) -> None:
    content = tensors()
    content["first.wieght"] = content.pop("first.weight")
    content["second.weight"] = torch.ones(2, 5)
    content["mean"] = torch.ones(2, dtype=torch.int64)
    config = saved(tmp_path / "w.safetensors", content)
    module = Tiny()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(module, config)
    text = str(caught.value)
    assert "1 missing in the file:\n    first.weight (nearest: first.wieght)" in text
    assert "1 unexpected in the file:\n    first.wieght (nearest: first.weight)" in text
    assert "2 of another shape or type:" in text
    assert "second.weight [2, 5] in the file, [2, 4] in the module" in text
    assert "mean torch.int64 in the file, torch.float32 in the module" in text
    assert equals(module, before)


def test_load_lists_ten_names_and_counts_the_rest(tmp_path: Path) -> None:
    content = {f"blocks.{n}.scale": torch.ones(1) for n in range(25)}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(Tiny(), saved(tmp_path / "w.safetensors", content))
    text = str(caught.value)
    assert "25 unexpected in the file" in text and "... and 15 more" in text
    assert text.count("blocks.") <= 10 + 4  # ten listed, and nearest names of the four missing


def test_load_refuses_a_truncated_file(tmp_path: Path) -> None:
    config = saved(tmp_path / "w.safetensors", tensors())
    path, module = tmp_path / "w.safetensors", Tiny()
    size = path.stat().st_size
    for kept in (size - 1, 200, 9, 4, 0):
        os.truncate(path, kept)
        with pytest.raises(CheckpointError, match=r"w\.safetensors is truncated") as caught:
            load_checkpoint(module, config)
        assert "Download it again" in str(caught.value) and "\n" not in str(caught.value)


def test_load_refuses_a_truncated_shard(tmp_path: Path) -> None:
    config = sharded(tmp_path, tensors())
    shard = tmp_path / "model-2.safetensors"
    os.truncate(shard, shard.stat().st_size - 4)
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors is truncated"):
        load_checkpoint(Tiny(), config)


def test_load_refuses_an_index_whose_shard_lacks_a_tensor(tmp_path: Path) -> None:
    config = sharded(tmp_path, tensors())
    save_file({"other": torch.ones(1)}, tmp_path / "model-0.safetensors")
    with pytest.raises(CheckpointError, match=r"places tensor 'first\.weight' in this"):
        load_checkpoint(Tiny(), config)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("kind", ["zip", "old", "plain"])
def test_load_refuses_a_pickle_that_wants_to_run_code(tmp_path: Path, kind: str) -> None:
    path, trace = tmp_path / "w.pt", tmp_path / "executed"
    if kind == "plain":
        path.write_bytes(pickle.dumps({"first.weight": Bomb(trace)}, protocol=2))
    else:
        content = {**tensors(), "extra": Bomb(trace)}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match="refused and nothing of it was executed") as caught:
        load_checkpoint(Tiny(), CheckpointConfig(source=str(path)))
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    if kind == "plain":  # the file is indeed a trap
        pickle.loads(path.read_bytes())
        assert trace.exists()


def test_load_refuses_what_is_no_dictionary_of_tensors(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save([torch.ones(1)], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        load_checkpoint(Tiny(), CheckpointConfig(source=str(path)))
    (tmp_path / "w.txt").touch()
    with pytest.raises(CheckpointError, match="not a known kind of checkpoint"):
        load_checkpoint(Tiny(), CheckpointConfig(source=str(tmp_path / "w.txt")))


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    pytest.skip("this kernel does not report RssAnon")


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6400, 1024, bias=False) for _ in range(8))


def anonymous_growth(path: str) -> tuple[int, int]:
    """Most that loading shards adds to its own tensors, and what two kept copies add."""
    module, place, own, growth = meta(Rows), load._place, [], []

    def placed(*arguments: Any) -> torch.Tensor:
        growth.append(anonymous_bytes() - before - sum(own))
        tensor = place(*arguments)
        own.append(tensor.nbytes)
        return tensor

    load._place = placed
    before = anonymous_bytes()
    load_checkpoint(module, CheckpointConfig(source=path), device="cpu", dtype=torch.bfloat16)
    growth.append(anonymous_bytes() - before - sum(own))
    before = anonymous_bytes()
    kept = [torch.ones(1024, 6400) for _ in range(2)]
    return max(growth), anonymous_bytes() - before if kept else 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
def test_loading_keeps_anonymous_memory_far_below_the_file(tmp_path: Path) -> None:
    """In a process of its own: memory that earlier tests freed would take up copies unseen."""
    names, places = [f"blocks.{n}.weight" for n in range(8)], {}
    for file, half in (("a.safetensors", names[:4]), ("b.safetensors", names[4:])):
        write_sparse_safetensors(
            tmp_path / file, {name: ((1024, 6400), "float32") for name in half}
        )
        places |= dict.fromkeys(half, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    size = 8 * 1024 * 6400 * 4
    peak, with_copies = run_ranks(anonymous_growth, 1, str(tmp_path))[0]
    assert peak < 0.15 * size
    assert with_copies > 0.2 * size, "the measure does not see copies"


def test_opening_a_pt_file_reads_none_of_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    torch.save({"generator": {"weight": torch.zeros(4096, 4096)}}, path)
    with torch.device("meta"):
        module = nn.Linear(4096, 4096, bias=False)
    before = anonymous_bytes()
    config = CheckpointConfig(source=str(path), select=("generator",))
    load_checkpoint(module, config, device="meta")
    assert anonymous_bytes() - before < 0.1 * path.stat().st_size


def test_slices_of_a_large_file_are_all_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    write_sparse_safetensors(path, {"weight": ((4096, 8192), "float32")})
    with torch.device("meta"):
        module = nn.Linear(8192, 64, bias=False)
    config = CheckpointConfig(source=str(path))
    report = load_checkpoint(module, config, slices={"weight": (0, 128, 64)})
    assert report.bytes_read == 64 * 8192 * 4
    assert module.weight.shape == (64, 8192) and not module.weight.is_meta


def test_a_file_larger_than_memory_can_be_read(tmp_path: Path) -> None:
    path, name = tmp_path / "large.safetensors", "blocks.39.cam_shift_layer.weight"
    write_sparse_safetensors(path, load_manifest("lingbot_world_fast"))
    assert path.stat().st_size > 74e9
    store = open_tensors(LocalCheckpoint(files=(path,)))
    assert len(store.infos) == 1421
    ((found, tensor),) = store.read({name: TensorSlice(0, 5119, 1)})
    assert found == name and tensor.shape == (1, 5120) and not tensor.any()


def test_tensors_at_odd_places_are_read(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "one": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "none": {"dtype": "F32", "shape": [0, 3], "data_offsets": [1, 1]},
            "two": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        }
    ).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\1" + struct.pack("<2f", 2, 3))
    store = open_tensors(LocalCheckpoint(files=(path,)))
    found = dict(store.read(dict.fromkeys(store.infos)))
    assert found["one"].tolist() == [1] and found["two"].tolist() == [2.0, 3.0]
    assert found["none"].shape == (0, 3)
