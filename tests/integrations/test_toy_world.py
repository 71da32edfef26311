"""The embedded world end to end, with the weights that the package ships."""

import json
import subprocess
import sys

import pytest
import torch

from flashdreams.integrations.toy_world.config import COURTYARD_PIPELINE, TOY_WORLD_PIPELINE
from flashdreams.integrations.toy_world.metrics import psnr_db
from flashdreams.integrations.toy_world.runner import walk
from flashdreams.run import main
from training.toy_world.evaluate import (
    draw_held_out,
    hide_floor_and_sky,
    self_rollout,
)
from training.toy_world.worlds import WORLDS


@pytest.fixture(scope="module")
def pipeline():
    torch.set_num_threads(1)
    return TOY_WORLD_PIPELINE.setup(device="cpu")


@pytest.fixture(scope="module")
def walks():
    return draw_held_out(walks=4, frames=40, seed=31_000)


def test_self_rollout_follows_the_truth(pipeline, walks):
    """Mean PSNR on held-out walks; the negative control is the same video of another scene."""
    frames = self_rollout(pipeline, walks, walks.scene)
    reached = psnr_db(frames, walks.truth).mean()
    assert reached >= 26
    assert psnr_db(frames, walks.truth.roll(1, 0)).mean() < reached - 6
    repeated = psnr_db(walks.truth[:, :1].expand_as(walks.truth), walks.truth)[:, 1:].mean()
    assert reached >= repeated + 6


def test_memory_carries_what_the_prompt_hides(pipeline, walks):
    """A broken cache cannot pass: hidden slots are known from the first frame alone."""
    hidden, first = hide_floor_and_sky(walks.scene), walks.truth[:, 0]
    kept = self_rollout(pipeline, walks, hidden, first)
    wiped = self_rollout(pipeline, walks, hidden, first, wipe=True)
    gain = psnr_db(kept, walks.truth)[:, 1:] - psnr_db(wiped, walks.truth)[:, 1:]
    assert gain.mean() >= 3
    assert gain[:, -8:].mean() >= 3


@pytest.mark.slow
def test_the_courtyard_follows_the_truth_and_remembers():
    """28 dB on held-out walks with a full prompt, and at least 3 dB of memory where slots hide."""
    torch.set_num_threads(1)
    courtyard = COURTYARD_PIPELINE.setup(device="cpu")
    held = draw_held_out(2, 24, seed=32_000, world=WORLDS["courtyard"])
    reached = psnr_db(self_rollout(courtyard, held, held.scene), held.truth).mean()
    assert reached >= 28
    assert psnr_db(held.truth.roll(1, 0), held.truth).mean() < reached - 10
    hidden, first = hide_floor_and_sky(held.scene), held.truth[:, 0]
    kept = psnr_db(self_rollout(courtyard, held, hidden, first), held.truth)[:, 1:]
    wiped = psnr_db(self_rollout(courtyard, held, hidden, first, wipe=True), held.truth)[:, 1:]
    assert (kept - wiped).mean() >= 3


@pytest.mark.slow
def test_the_courtyards_command_shows_the_truth_of_its_own_size(tmp_path):
    words = ["courtyard", "--total-blocks", "3", "--compare-to-truth", "True"]
    main([*words, "--output-dir", str(tmp_path)])
    assert video_frames(tmp_path / "courtyard.mp4").shape == (3, 4 * 128, 2 * 4 * 160, 3)
    records = json.loads((tmp_path / "stats_courtyard.json").read_text())["records"]
    assert all(record["psnr_db"] > 28 for record in records)


def test_an_image_becomes_the_first_latent(pipeline, walks):
    image = walks.truth[:1, 0]
    poses = walk("w2", 2)
    text = ["red floor"]
    cache = pipeline.initialize_cache(text=text, image=image)
    given = pipeline.generate(0, cache, input=poses[0][None])
    assert psnr_db(given[:, 0], image) > 30
    free = pipeline.generate(0, pipeline.initialize_cache(text=text), input=poses[0][None])
    assert psnr_db(free[:, 0], image) < 25


def video_frames(path):
    import imageio_ffmpeg
    import mediapy

    mediapy.set_ffmpeg(imageio_ffmpeg.get_ffmpeg_exe())
    return torch.from_numpy(mediapy.read_video(path).copy()).float()


def test_command_line_makes_a_video_and_its_stats(tmp_path, capsys):
    words = [
        "toy-world",
        "--actions",
        "w3 l2",
        "--total-blocks",
        "6",
        "--output-dir",
        str(tmp_path),
    ]
    assert main([*words, "--compare-to-truth", "True", "--save-latents", "True"]) == 0
    stats = json.loads((tmp_path / "stats_toy-world.json").read_text())
    assert len(stats["records"]) == 6
    assert all(record["psnr_db"] > 15 for record in stats["records"])
    assert stats["header"]["parallel"] == {"cfg": 1, "ring": 1, "ulysses": 1, "tp": 1}
    beside = video_frames(tmp_path / "toy-world.mp4")
    names = {path.name for path in tmp_path.iterdir()}
    files = {"toy-world.mp4", "stats_toy-world.json", "latents_toy-world.safetensors"}
    assert names == {*files, "log_toy-world.jsonl"}

    assert main([*words, "--seed", "0"]) == 0
    again = json.loads((tmp_path / "stats_toy-world.json").read_text())
    sums = [[r["latent_sha256"] for r in run["records"]] for run in (stats, again)]
    assert sums[0] == sums[1]
    alone = video_frames(tmp_path / "toy-world.mp4")
    halves = beside[:, :, : alone.shape[2]], beside[:, :, alone.shape[2] :]
    errors = [float((half - alone).square().mean()) for half in halves]
    assert errors[1] < 8 < 40 < errors[0], (
        "the truth on the left, the generated frames on the right"
    )
    assert main([*words, "--seed", "1"]) == 0
    other = json.loads((tmp_path / "stats_toy-world.json").read_text())
    assert other["records"][0]["latent_sha256"] != sums[0][0]


@pytest.mark.slow
def test_a_run_does_not_wait_for_the_compiler(tmp_path):
    """PyTorch imports it for some operations on the meta device, and half of the start goes by."""
    words = ["toy-world", "--total-blocks", "2", "--device", "cpu", "--output-dir", str(tmp_path)]
    code = (
        f"import sys; from flashdreams.run import main; assert main({words}) == 0; "
        "print(*(sys.modules.keys() & {'torch._dynamo', 'sympy', 'mediapy'}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "mediapy", "which it needs"
