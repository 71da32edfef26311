"""Snapshots on one rank: the same bits, refusals, and files that are damaged in every place."""

import json
import os
import resource
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flashdreams.infra import snapshot
from flashdreams.infra.config import derive_config
from flashdreams.infra.controller import KeyCamera
from flashdreams.infra.snapshot import remove_unfinished
from flashdreams.infra.snapshot_header import SnapshotError, read_header
from flashdreams.runtime.actions import KeyMotion
from flashdreams.runtime.checkpoint import CheckpointConfig
from flashdreams.runtime.noise import NoiseSource
from tests.tiny import tiny_pipeline
from tests.unit.infra.test_state import advance, prompt

HEADER = "snapshot.json"
PART = "part-00000.safetensors"


def begin(config, steps, **context):
    pipeline = config.setup(device="cpu")
    guided = config.diffusion_model.guidance_scale is not None
    negative = prompt(1) if guided else None
    cache = pipeline.initialize_cache(text=prompt(0), negative_text=negative, seed=5, **context)
    advance(pipeline, cache, 0, steps)
    return pipeline, cache


def resumed(config, folder, first, last, **options):
    pipeline = config.setup(device="cpu")
    return advance(pipeline, pipeline.resume(folder, **options), first, last)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A snapshot of the plain tiny method after four AR steps."""
    pipeline, cache = begin(tiny_pipeline(), 4)
    folder = tmp_path_factory.mktemp("snapshots") / "s"
    pipeline.save(cache, folder)
    return folder


@settings(max_examples=15, deadline=None)
@given(
    sink=st.integers(0, 2), window=st.integers(2, 5), len_t=st.integers(1, 2),
    steps=st.integers(0, 6), relative=st.booleans(), guided=st.booleans(),
)  # fmt: skip
def test_saving_and_resuming_commutes_with_stepping(
    tmp_path_factory, sink, window, len_t, steps, relative, guided
):
    config = tiny_pipeline(
        sink_size_t=sink, window_size_t=window, len_t=len_t, relative_rope=relative and sink > 0
    )
    config = derive_config(config, diffusion_model=dict(guidance_scale=2.0 if guided else None))
    pipeline, cache = begin(config, steps)
    folder = tmp_path_factory.mktemp("any") / "s"
    pipeline.save(cache, folder)
    again = resumed(config, folder, steps, steps + 2)
    fork = cache.clone()
    for a, b, c in zip(
        again,
        advance(pipeline, cache, steps, steps + 2),
        advance(pipeline, fork, steps, steps + 2),
        strict=True,
    ):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_the_report_has_the_bytes_of_the_files(tmp_path):
    pipeline, cache = begin(tiny_pipeline(), 1)
    report = pipeline.save(cache, tmp_path / "a" / "s")
    assert report.bytes == sum(file.stat().st_size for file in report.path.iterdir())
    assert report.seconds > 0 and "MiB in" in str(report)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["s"]


def test_no_value_in_the_state_counts_for_nothing(saved, tmp_path):
    """Negative control: a KV cache of zeros makes other frames."""
    expected = resumed(tiny_pipeline(), saved, 4, 5)[0]
    pipeline = tiny_pipeline().setup(device="cpu")
    cache = pipeline.resume(saved)
    for layer in cache.diffusion.conditional.layers():
        layer.k.zero_()
    assert not torch.equal(advance(pipeline, cache, 4, 5)[0], expected)


def test_a_light_snapshot_computes_the_window_anew(tmp_path):
    config = tiny_pipeline(sink_size_t=1, window_size_t=3)
    pipeline, cache = begin(config, 6)
    whole = pipeline.save(cache, tmp_path / "whole")
    light = pipeline.save(cache, tmp_path / "light", light=True)
    expected = advance(pipeline, cache, 6, 8)
    assert light.bytes < whole.bytes
    found = resumed(config, tmp_path / "light", 6, 8)
    error = max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
    )
    assert 0 < error < 0.2  # evicted frames took part in what the window held


def test_a_light_snapshot_of_a_window_that_lost_nothing_is_exact(tmp_path):
    config = tiny_pipeline(sink_size_t=1, window_size_t=7)
    pipeline, cache = begin(config, 4)
    pipeline.save(cache, tmp_path / "s", light=True)
    for a, b in zip(
        resumed(config, tmp_path / "s", 4, 5), advance(pipeline, cache, 4, 5), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_another_config_is_refused_with_the_field(saved):
    config = tiny_pipeline(window_size_t=7)
    with pytest.raises(
        SnapshotError,
        match=r"another config: diffusion_model\.transformer\.window_size_t: \d there, 7",
    ):
        config.setup(device="cpu").resume(saved)


def test_another_way_to_compute_is_not_another_method(saved):
    config = tiny_pipeline(attention_backend="sdpa")
    assert len(resumed(config, saved, 4, 5)) == 1


def with_weights(path):
    return derive_config(
        tiny_pipeline(),
        diffusion_model=dict(transformer=dict(checkpoint=CheckpointConfig(source=str(path)))),
    )


def test_other_weights_are_refused_with_the_component(tmp_path):
    transformer = tiny_pipeline().setup(device="cpu").diffusion_model.transformer
    tensors = dict(transformer.state_dict())
    for name in ("a", "b"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        tensors = {key: x + 1e-3 for key, x in tensors.items()}
    pipeline, cache = begin(with_weights(tmp_path / "a.safetensors"), 1)
    pipeline.save(cache, tmp_path / "s")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    assert len(resumed(with_weights(tmp_path / "c.safetensors"), tmp_path / "s", 1, 2)) == 1
    with pytest.raises(SnapshotError, match=r"another weights: diffusion_model\.transformer: "):
        with_weights(tmp_path / "b.safetensors").setup(device="cpu").resume(tmp_path / "s")


def rewrite(folder, change):
    """Change a header and seal it again, as someone with bad intentions could."""
    from flashdreams.infra.snapshot_header import _sealed

    content = json.loads((folder / HEADER).read_bytes())["content"]
    change(content)
    (folder / HEADER).write_bytes(_sealed(content))


def test_a_newer_format_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "s")
    rewrite(folder, lambda content: content.update(format=99))
    with pytest.raises(SnapshotError, match=r"snapshot format 99; this release reads format 1"):
        tiny_pipeline().setup(device="cpu").resume(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["parts"][0].update(file="../../etc/passwd"),
        lambda c: next(iter(c["tensors"].values()))[2][0][1].__setitem__(0, [0, 10**9, 1]),
        lambda c: c["tensors"].pop(next(iter(c["tensors"]))),
        lambda c: next(iter(c["tensors"].values())).__setitem__(1, "Tensor"),
        lambda c: c.update(tensors=[]),
        lambda c: c["values"].update(encoder={"kind": "tensor"}),
        lambda c: c.pop("values"),
        lambda c: c.update(autoregressive_index=3),
        lambda c: c["values"].update(next_index="4"),
        lambda c: c["values"].update(seed=9),
        lambda c: c.update(fingerprint=[]),
        lambda c: c.update(light="no"),
        lambda c: c["parts"].clear(),
    ],
)
def test_a_header_that_lies_is_refused(saved, tmp_path, change):
    folder = shutil.copytree(saved, tmp_path / "s")
    rewrite(folder, change)
    with pytest.raises((SnapshotError, ValueError)):
        tiny_pipeline().setup(device="cpu").resume(folder)


def test_files_that_are_cut_or_changed_anywhere_are_refused(saved, tmp_path):
    pipeline = tiny_pipeline().setup(device="cpu")
    folder = shutil.copytree(saved, tmp_path / "s")
    begun = []
    pipeline.new_cache = lambda *_, **__: begun.append(1)
    for name in (HEADER, PART):
        data = (folder / name).read_bytes()
        places = range(0, len(data), max(1, len(data) // 200))
        damaged = [data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :] for at in places]
        damaged += [data[:at] for at in places] + [data + b" ", data + data[:64], b""]
        for bad in damaged:
            (folder / name).write_bytes(bad)
            with pytest.raises(SnapshotError, match=r"damaged|no snapshot"):
                pipeline.resume(folder)
        (folder / name).write_bytes(data)
    assert not begun  # no rollout was even begun


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_change_of_a_header_executes_anything(saved, data):
    raw = bytearray((saved / HEADER).read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    if bytes(raw) == (saved / HEADER).read_bytes():
        return
    folder = saved.parent / f"fuzz{os.getpid()}"
    folder.mkdir(exist_ok=True)
    (folder / HEADER).write_bytes(bytes(raw))
    with pytest.raises(SnapshotError):
        read_header(folder)


@pytest.mark.parametrize("name", [HEADER, PART])
@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)])
def test_what_is_no_file_is_refused_and_not_waited_for(saved, tmp_path, name, put):
    folder = shutil.copytree(saved, tmp_path / "s")
    (folder / name).unlink()
    put(folder / name)
    with pytest.raises(SnapshotError, match=r"is not a (file|snapshot)|cannot be read"):
        tiny_pipeline().setup(device="cpu").resume(folder)


def test_an_absent_part_is_named(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "s")
    (folder / PART).unlink()
    with pytest.raises(SnapshotError, match=f"{PART} cannot be read"):
        tiny_pipeline().setup(device="cpu").resume(folder)


def test_a_folder_that_exists_is_never_written_over(saved):
    pipeline, cache = begin(tiny_pipeline(), 1)
    before = (saved / HEADER).read_bytes()
    with pytest.raises(ValueError, match="already exists"):
        pipeline.save(cache, saved)
    assert (saved / HEADER).read_bytes() == before


def test_a_full_disk_leaves_nothing_and_the_rollout_goes_on(tmp_path, monkeypatch):
    pipeline, cache = begin(tiny_pipeline(), 2)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "write_part", full)
        with pytest.raises(OSError, match="No space left"):
            pipeline.save(cache, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []
    pipeline.save(cache, tmp_path / "s")
    assert torch.equal(
        resumed(tiny_pipeline(), tmp_path / "s", 2, 3)[0], advance(pipeline, cache, 2, 3)[0]
    )


@pytest.mark.parametrize("limit", [10, 4096, 16000])
def test_a_file_that_may_not_grow_leaves_nothing_either(limit, tmp_path):
    """The system itself refuses to write on; of 17088 bytes of the part, so many are allowed."""
    pipeline, cache = begin(tiny_pipeline(), 4)
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, allowed[1]))
        with pytest.raises(OSError, match="File too large"):
            pipeline.save(cache, tmp_path / "s")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert list(tmp_path.iterdir()) == []


def test_resumes_and_forks_follow_one_another(tmp_path):
    """Save, resume, save, resume; a fork of a fork; a rewind after the source has gone."""
    pipeline, cache = begin(tiny_pipeline(), 2)
    pipeline.save(cache, tmp_path / "a")
    pipeline.update_prompt(cache, prompt(3))
    fork = cache.fork(1)[0].fork(2)[1]
    pipeline.save(cache, tmp_path / "prompt")
    expected = advance(pipeline, cache, 2, 6)
    cache.release()
    second = tiny_pipeline().setup(device="cpu")
    again = second.resume(tmp_path / "prompt")
    found = advance(second, again, 2, 4)
    second.save(again, tmp_path / "b")
    third = second.resume(tmp_path / "b")
    shutil.rmtree(tmp_path / "b")  # nothing is read from it any more
    for chunks in (
        [*found, *advance(second, third, 4, 6)],
        advance(pipeline, fork, 2, 6),
    ):
        assert all(torch.equal(a, b) for a, b in zip(chunks, expected, strict=True))
    old = resumed(tiny_pipeline(), tmp_path / "a", 2, 3)[0]
    assert not torch.equal(old, expected[0])  # the old prompt


def test_what_a_killed_save_leaves_is_removed(saved):
    left = saved.with_name(".s.12345678.tmp")
    left.mkdir()
    remove_unfinished(saved.parent)
    assert not left.exists() and saved.exists()
    remove_unfinished(saved.parent / "nowhere")


def test_there_is_no_snapshot_between_generate_and_finalize(tmp_path):
    pipeline, cache = begin(tiny_pipeline(), 1)
    pipeline.generate(1, cache, 0.0)
    with pytest.raises(ValueError, match="no snapshot between generate and finalize"):
        pipeline.save(cache, tmp_path / "s")


def test_noise_and_controller_are_asked_for_again(tmp_path):
    pipeline = tiny_pipeline().setup(device="cpu")
    cache = pipeline.initialize_cache(text=prompt(0), noise=lambda *key: NoiseSource(4)(*key))
    camera = KeyCamera(
        KeyMotion(move_per_frame=1.0, turn_per_frame_rad=0.1), to_input=lambda poses, held: 0.0
    )
    cache.controller = camera.new_state()
    cache.controller.pose[0, 3] = 4.0
    pipeline.save(cache, tmp_path / "s")
    with pytest.raises(ValueError, match=r"noise=\.\.\."):
        pipeline.resume(tmp_path / "s", controller=camera)
    with pytest.raises(ValueError, match=r"controller=\.\.\."):
        pipeline.resume(tmp_path / "s", noise=NoiseSource(4))
    again = pipeline.resume(tmp_path / "s", noise=NoiseSource(4), controller=camera)
    assert torch.equal(again.controller.pose, cache.controller.pose)
