"""LingBot-World base: literals against facts and manifests, and clips at toy size end to end."""

import mediapy
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flashdreams.infra.component import load_component
from flashdreams.infra.config import derive_config
from flashdreams.infra.weights import memory_estimate, named_checkpoints
from flashdreams.integrations.lingbot_world import runner
from flashdreams.integrations.lingbot_world.config import (
    BASE_PIPELINE,
    BASE_RUNNER,
    BASE_TINY_RUNNER,
    BASE_TRANSFORMER,
)
from flashdreams.parallel.mesh import ParallelDegrees
from flashdreams.planning.devices import DEVICES, GIB
from flashdreams.planning.plans import Planner
from flashdreams.run import main
from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError
from tests.manifests import load_manifest, write_sparse_safetensors

SLUG = BASE_TINY_RUNNER.runner_name
FULL_SIZE = BASE_RUNNER.runner_name


def clip(folder, *flags: str) -> torch.Tensor:
    """The latent of a run."""
    argv = [SLUG, *flags, "--device", "cpu", "--output-dir", str(folder), "--save-latents", "True"]
    assert main(argv) == 0
    return load_file(folder / f"latents_{SLUG}.safetensors")["latents"]


def frames_of(folder) -> np.ndarray:
    return np.asarray(mediapy.read_video(folder / f"{SLUG}.mp4"))


def test_literals_are_the_published_ones():
    model, c = BASE_PIPELINE.diffusion_model, BASE_TRANSFORMER
    assert (model.scheduler.num_inference_steps, model.scheduler.shift) == (70, 10.0)
    assert (model.guidance_scale, c.boundary) == (5.0, 0.947)
    assert (c.streaming, c.len_t, c.camera_channels) == (False, 41, 6)
    assert (8 * c.latent_height, 8 * c.latent_width) == (464, 832)
    assert BASE_RUNNER.negative_prompt and BASE_RUNNER.total_blocks == 1
    timesteps = model.scheduler.setup().timesteps
    high = int((timesteps >= 947).sum())
    assert 0 < high < 70 and timesteps.dtype == torch.int64


def load_sparse(folder, high: str, low: str) -> int:
    """Both networks from zeros of these manifests' names and shapes, strictly; their parameters."""
    files = {}
    for field, name in (("checkpoint", high), ("low_noise_checkpoint", low)):
        path = folder / f"{field}.safetensors"
        write_sparse_safetensors(path, load_manifest(name))
        files[field] = CheckpointConfig(source=str(path))
    with torch.device("meta"):
        model = derive_config(BASE_TRANSFORMER, **files).setup()
    load_component(model, torch.device("meta"))
    return sum(p.numel() for p in model.parameters())


def test_both_networks_take_exactly_the_published_tensors(tmp_path):
    assert load_sparse(tmp_path, *["lingbot_world_base_cam"] * 2) == 2 * 18_544_332_864
    files = dict(named_checkpoints(BASE_PIPELINE))
    for field, expert in (("checkpoint", "high"), ("low_noise_checkpoint", "low")):
        found = files[f"diffusion_model.transformer.{field}"]
        assert found.source == "robbyant/lingbot-world-base-cam"
        assert found.file.startswith(f"{expert}_noise_model/")
        assert found.size_bytes == 4 * 18_544_332_864


@pytest.mark.parametrize("wrong", [0, 1])
def test_another_checkpoint_in_either_place_is_refused(wrong, tmp_path):
    """Negative control: neither network is loaded loosely."""
    names = ["lingbot_world_base_cam"] * 2
    names[wrong] = "lingbot_world_act"
    with pytest.raises(CheckpointError, match=r"patch_embedding_wancamctrl\.weight"):
        load_sparse(tmp_path, *names)


def test_memory_counts_both_networks():
    assert "transformer 74.9 GB in bfloat16 and float32" in memory_estimate(BASE_PIPELINE)
    found = Planner(BASE_PIPELINE, DEVICES["H200-141GB"]).plan(ParallelDegrees())
    assert found.memory.transformer / 1e9 == pytest.approx(74.9, abs=0.1)
    assert found.memory.kv_cache == 0 and found.fits
    # One block's scale and shift are 2.5 GB in bfloat16; those of 40 would be 51 GB.
    assert found.memory.activations / GIB < 12 and found.memory.state / GIB < 8


def test_a_camera_steers_the_clip(tmp_path, capsys):
    moving = clip(tmp_path, "--actions", "w20", "--show-path", "True")
    assert moving.shape == (1, 16, 6, 8, 14) and frames_of(tmp_path).shape == (21, 64, 112, 3)
    assert "instead of" not in capsys.readouterr().out
    assert torch.equal(clip(tmp_path, "--actions", "w20"), moving)
    turning = clip(tmp_path, "--actions", "l20")
    free = clip(tmp_path)
    for other in (turning, free):
        assert other.shape == moving.shape and (other - moving).abs().max() > 1e-3


def test_a_short_path_makes_a_short_clip(tmp_path, capsys):
    assert clip(tmp_path, "--actions", "w9 l5").shape[2] == 4
    assert "path has 15 poses: the clip has 13 frames instead of 21" in capsys.readouterr().out
    assert len(frames_of(tmp_path)) == 13


def test_a_path_is_read_once(tmp_path, monkeypatch):
    """It may be long; the clip is sized after it and follows it."""
    poses = np.tile(np.eye(4, dtype=np.float32), (13, 1, 1))
    np.save(tmp_path / "poses.npy", poses)
    seen, read = [], runner.load_array
    monkeypatch.setattr(runner, "load_array", lambda path: seen.append(path.name) or read(path))
    assert clip(tmp_path, "--pose-path", str(tmp_path / "poses.npy")).shape[2] == 4
    assert seen == ["poses.npy"]


def test_guidance_and_the_boundary_matter(tmp_path):
    expected = clip(tmp_path)
    model = "--pipeline.diffusion-model"
    for flags in ([f"{model}.guidance-scale", "3"], [f"{model}.transformer.boundary", "0.5"]):
        assert (clip(tmp_path, *flags) - expected).abs().max() > 1e-3


def test_intrinsics_of_every_frame_are_used(tmp_path):
    poses = np.tile(np.eye(4, dtype=np.float32), (21, 1, 1))
    poses[:, 2, 3] = 0.1 * np.arange(21)
    lens = np.tile(np.float32([477, 477, 416, 240]), (21, 1))
    zoom = lens * np.linspace(1, 2, 21, dtype=np.float32)[:, None] ** [1, 1, 0, 0]
    np.save(tmp_path / "poses.npy", poses)
    found = {}
    for name, rows in (("lens", lens), ("one", lens[:1]), ("zoom", zoom.astype(np.float32))):
        np.save(tmp_path / f"{name}.npy", rows)
        flags = ["--pose-path", str(tmp_path / "poses.npy")]
        flags += ["--intrinsic-path", str(tmp_path / f"{name}.npy")]
        found[name] = clip(tmp_path, *flags)
        found[f"{name} first"] = clip(tmp_path, *flags, "--pipeline.encoder.intrinsics", "first")
    assert torch.equal(found["one"], found["lens"])
    assert torch.equal(found["zoom first"], found["lens"])
    assert not torch.equal(found["zoom"], found["lens"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--total-blocks", "2"], "makes the whole video in one AR step"),
        (["--show-path", "True"], "--show-path without a camera: give --pose-path FILE"),
        (["--intrinsic-path", "x.npy"], "--intrinsic-path without a camera"),
        (["--actions", "w8 q4"], "unknown key 'q'"),
        (["--pipeline.diffusion-model.transformer.boundary", "947"], "boundary=947.0 must be at"),
    ],
)
def test_bad_flags_are_refused_before_weights(flags, message, tmp_path, capsys):
    argv = [FULL_SIZE, *flags, "--test-image", "True", "--output-dir", str(tmp_path)]
    assert main([*argv, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
