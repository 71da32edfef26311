"""Snapshots of several ranks: who writes what, and what is refused on all of them."""

import json
import os
import shutil
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashdreams.infra import fingerprint, resumable, saved_rollouts, snapshot
from flashdreams.infra.snapshot_header import read_header
from flashdreams.parallel.environment import Launch, OtherRankError
from flashdreams.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from flashdreams.runtime.parts import read_part
from tests.harness import RankError, run_ranks
from tests.parallel.pipelines import begin, build_pipeline, roll_from_files
from tests.parallel.test_migration import slowly
from tests.tiny import tiny_pipeline

CUT = {
    "plain": "conditional/caches/",
    "tensor": "conditional/context/pairs",
    "rotate": "conditional/caches/",
    "split_decode": "decoder/slots",
    "guided": "unconditional/caches/",
}


@pytest.mark.parametrize("case", ["plain", *slowly("tensor", "rotate", "split_decode", "guided")])
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_rank_writes_its_own_and_nothing_twice(case, ranks, tmp_path):
    run_ranks(roll_from_files, ranks, case, ranks, 0, 2, tmp_path)
    header = read_header(tmp_path / "2")
    files = {part.file: read_part(tmp_path / "2" / part.file) for part in header.parts}
    assert len(files) == ranks
    alone = tmp_path / "alone"
    run_ranks(roll_from_files, 1, case, 1, 0, 2, alone)
    whole = read_part(alone / "2" / "part-00000.safetensors")
    assert sum(x.nbytes for tensors in files.values() for x in tensors.values()) == sum(
        x.nbytes for x in whole.values()
    )
    cut = [t for path, t in header.tensors.items() if path.startswith(CUT[case])]
    if not (case == "guided" and ranks == 2):  # there each branch is on one rank, whole
        assert cut and any(len(t.slices) > 1 for t in cut)
    assert len({piece.file for t in cut for piece in t.slices}) >= (1 if case == "guided" else 2)
    assert header.tensors.keys() == whole.keys()


def fail_on(rank, folder, module, name):
    pipeline, _ = build_pipeline("plain", 2)
    cache = begin(pipeline, "plain")
    module = import_module(module)
    own = torch.distributed.get_rank()
    real = getattr(module, name)

    def full(*_):
        raise OSError(28, "No space left on device")

    if own == rank:
        setattr(module, name, full)
    try:
        pipeline.save(cache, folder / "s")
        return "saved"
    except (OSError, OtherRankError) as error:
        setattr(module, name, real)
        pipeline.save(cache, folder / "second")  # and the ranks still agree
        return str(error)


@pytest.mark.parametrize(
    ("rank", "module", "name"),
    [
        (0, snapshot, "write_part"),
        (1, snapshot, "write_part"),
        (1, saved_rollouts, "hash_weights"),
        (1, fingerprint, "_version"),
    ],
)
def test_a_file_that_fails_on_one_rank_ends_the_snapshot_on_all(rank, module, name, tmp_path):
    said = run_ranks(fail_on, 2, rank, tmp_path, module.__name__, name)
    assert "No space left" in said[rank] and "Another rank" in said[1 - rank]
    assert [path.name for path in tmp_path.iterdir()] == ["second"]


def resume_there(folder):
    pipeline, _ = build_pipeline("plain", 2)
    pipeline.resume(folder)


def test_a_part_that_is_damaged_stops_every_rank(tmp_path):
    run_ranks(roll_from_files, 2, "plain", 2, 0, 1, tmp_path)
    part = tmp_path / "1" / "part-00001.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(RankError, match=r"part-00001\.safetensors is damaged|Another rank"):
        run_ranks(resume_there, 2, tmp_path / "1")


def test_nodes_that_do_not_share_the_folder_are_told(tmp_path, monkeypatch):
    with pytest.raises(RankError, match=r"several nodes need a shared folder|Another rank"):
        run_ranks(save_apart, 2, tmp_path)


def test_nodes_that_do_not_share_the_folder_are_told_at_the_start(tmp_path):
    with pytest.raises(RankError, match=r"Rank 1 on .* does not see|Another rank"):
        run_ranks(start_apart, 2, tmp_path, True)
    run_ranks(start_apart, 2, tmp_path, False)  # negative control: one folder


def start_apart(folder, apart):
    """Begin a run on ranks that, if ``apart``, have an output folder each."""
    resumable.SHARED_FOLDER_S = 0.2
    own = folder / str(torch.distributed.get_rank() if apart else 0)
    resumable.ResumableRun(own, Launch("", 0), every=2, kept=1, resume=False)


def save_apart(folder):
    pipeline, _ = build_pipeline("plain", 2)
    cache = begin(pipeline, "plain")
    if torch.distributed.get_rank() == 1:
        made = snapshot.from_rank_zero
        snapshot.from_rank_zero = lambda fn: made(fn).with_name("elsewhere")
    pipeline.save(cache, folder / "s")


def test_a_header_needs_every_slice(tmp_path):
    """Negative control: without one rank's slices the snapshot is refused."""
    run_ranks(roll_from_files, 2, "plain", 2, 0, 1, tmp_path)
    folder = shutil.copytree(tmp_path / "1", tmp_path / "less")
    from tests.unit.infra.test_snapshot import rewrite

    def drop(content):
        path = next(p for p, entry in content["tensors"].items() if len(entry[2]) > 1)
        content["tensors"][path][2].pop()

    rewrite(folder, drop)
    with pytest.raises(ValueError, match="do not cover it"):
        read_header(folder)
    assert json.loads((tmp_path / "1" / "snapshot.json").read_bytes())["content"]["format"] == 1


@torch.no_grad()
def roll_random(sizes, first, last, folder):
    """AR steps of a tiny method of these sizes under strict; resumed and saved in ``folder``."""
    config = tiny_pipeline(**sizes)
    ranks = torch.distributed.get_world_size()
    parallel = ParallelConfig(strict=True)
    pipeline = config.setup(device="cpu", load=False)
    heads = config.diffusion_model.transformer.num_heads
    mesh = build_mesh(resolve_degrees(parallel, ranks, heads, False), "cpu", parallel)
    pipeline.parallelize(mesh)
    pipeline.load()
    cache = pipeline.resume(folder / f"{first}") if first else begin(pipeline, "plain")
    latents = []
    for index in range(first, last):
        pipeline.generate(index, cache, 0.1 * index)
        pipeline.finalize(index, cache)
        latents.append(cache.latent.clone())
    pipeline.save(cache, folder / f"{last}")
    return latents


@pytest.mark.slow
@settings(max_examples=int(os.environ.get("FLASHDREAMS_EXAMPLES", "2")), deadline=None)
@given(
    saved_on=st.integers(1, 4), resumed_on=st.integers(1, 4), steps=st.integers(1, 5),
    sink=st.integers(0, 2), window=st.integers(2, 5), len_t=st.integers(1, 2),
    relative=st.booleans(),
)  # fmt: skip
def test_saving_on_any_ranks_and_resuming_on_any_commutes_with_stepping(
    tmp_path_factory, saved_on, resumed_on, steps, sink, window, len_t, relative
):
    sizes = dict(
        sink_size_t=sink, window_size_t=window, len_t=len_t, relative_rope=relative and sink > 0
    )
    folder, last = tmp_path_factory.mktemp("any"), steps + 2
    found = [
        *run_ranks(roll_random, saved_on, sizes, 0, steps, folder)[0],
        *run_ranks(roll_random, resumed_on, sizes, steps, last, folder)[0],
    ]
    expected = run_ranks(roll_random, 1, sizes, 0, last, folder / "alone")[0]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
