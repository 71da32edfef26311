"""The camera encoder in both modes, and the first image's condition."""

import pytest
import torch

from flashdreams.integrations.lingbot_world.camera import (
    camera_rays,
    clip_poses,
    pixel_frames,
    relative_poses,
    resample_poses,
    scale_intrinsics,
    to_tokens,
)
from flashdreams.integrations.lingbot_world.encoder import (
    CameraEncoderConfig,
    CameraPath,
    ImageConditionEncoderConfig,
)
from flashdreams.models.wan.config import TINY_VAE_IMAGE_ENCODER
from flashdreams.runtime.actions import KeyMotion, integrate, parse_actions
from flashdreams.runtime.image_file import gradient_image

ATOL = 1e-6
CONDITION = torch.zeros(1, 20, 4, 4, 6)
MOTION = KeyMotion(move_per_frame=0.2, turn_per_frame_rad=0.05)


def walk(actions: str = "w14 wl9 a5 s8", *, drift: float = 0.0) -> CameraPath:
    """A walk from key presses, its focal length drifting."""
    poses = integrate(parse_actions(actions), MOTION)
    intrinsics = torch.tensor([470.0, 480.0, 410.0, 236.0]).repeat(len(poses), 1)
    intrinsics[:, 0] += drift * torch.arange(len(poses))
    keys = torch.rand(len(poses), 4, generator=torch.Generator().manual_seed(0)).round()
    return CameraPath(poses, intrinsics, keys)


def stream(encoder, camera: CameraPath, steps: int) -> list[torch.Tensor]:
    cache = encoder.initialize_cache(condition=CONDITION)
    tokens, start = [], 0
    for i in range(steps):
        end = pixel_frames((i + 1) * encoder.config.len_t)
        tokens.append(encoder(camera.part(slice(start, end)), i, cache))
        start = end
    return tokens


def offline(encoder, camera: CameraPath, steps: int) -> list[torch.Tensor]:
    cache = encoder.initialize_cache(condition=CONDITION, camera=camera)
    return [encoder(None, i, cache) for i in range(steps)]


def clip_scale(camera: CameraPath) -> float:
    return float(1 / relative_poses(camera.poses[::4])[:, :3, 3].norm(dim=1).max())


def test_streaming_equals_offline_where_both_are_defined():
    camera = walk().part(slice(0, 33))
    whole = offline(CameraEncoderConfig(pose_mode="offline").setup(), camera, 3)
    encoder = CameraEncoderConfig(world_scale=clip_scale(camera)).setup()
    for found, expected in zip(stream(encoder, camera, 3), whole, strict=True):
        assert found.shape == (1, 3 * 6, 6 * 256) and found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
    unscaled = stream(CameraEncoderConfig().setup(), camera, 3)  # negative control
    assert (unscaled[1] - whole[1]).abs().max() > 0.1


def test_both_modes_take_the_intrinsics_of_their_frames():
    """33 poses are 9 latent frames, which fall on every fourth pose."""
    camera, steady = walk(drift=3.0).part(slice(0, 33)), walk().part(slice(0, 33))
    moving = stream(CameraEncoderConfig(world_scale=clip_scale(camera)).setup(), camera, 3)
    whole = offline(CameraEncoderConfig(pose_mode="offline").setup(), camera, 3)
    for found, expected in zip(whole, moving, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
    still = offline(CameraEncoderConfig(pose_mode="offline").setup(), steady, 3)
    assert (whole[2] - still[2]).abs().max() > 1e-2  # negative control


def test_offline_can_take_the_first_intrinsics_for_all_frames():
    camera, steady = walk(drift=3.0).part(slice(0, 33)), walk().part(slice(0, 33))
    first = CameraEncoderConfig(pose_mode="offline", intrinsics="first").setup()
    found = [offline(first, path, 3)[2] for path in (camera, steady)]
    assert torch.equal(*found)
    every = CameraEncoderConfig(pose_mode="offline").setup()
    assert torch.equal(offline(every, steady, 3)[2], found[1])  # a lens that stays is exact
    with pytest.raises(ValueError, match="allowed are 'per_frame' and 'first'"):
        CameraEncoderConfig(intrinsics="last")


def test_interleaved_rollouts_keep_their_own_anchor():
    encoder, paths = CameraEncoderConfig().setup(), (walk(), walk("d30 jw12"))
    solo = [stream(encoder, path, 2) for path in paths]
    caches = [encoder.initialize_cache(condition=CONDITION) for _ in paths]
    for i, part in enumerate((slice(0, 9), slice(9, 21))):
        for path, cache, expected in zip(paths, caches, solo, strict=True):
            assert torch.equal(encoder(path.part(part), i, cache), expected[i])


def test_tokens_are_the_rays_of_the_scaled_camera():
    camera = walk()
    tokens = stream(CameraEncoderConfig(world_scale=0.5).setup(), camera, 1)[0]
    poses = relative_poses(camera.poses[:9:4])
    poses[:, :3, 3] *= 0.5
    rays = camera_rays(poses, scale_intrinsics(camera.intrinsics[:3], 32, 48).double(), 32, 48)
    torch.testing.assert_close(tokens[0], to_tokens(rays).float(), rtol=0, atol=ATOL)


@pytest.mark.parametrize("mode", ["offline", "streaming"])
def test_act_is_directions_then_keys(mode):
    camera = walk().part(slice(0, 21))
    config = CameraEncoderConfig(control_type="act", pose_mode=mode)
    tokens = (offline if mode == "offline" else stream)(config.setup(), camera, 2)
    for i, chunk in enumerate(tokens):
        channels = chunk.view(3, 6, 7, 256)
        keys = camera.keys[::4][3 * i : 3 * i + 3]
        torch.testing.assert_close(channels[:, :, 3:], keys[:, None, :, None].expand(3, 6, 4, 256))
        lengths = channels[:, :, :3].norm(dim=2)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=ATOL)


def test_a_far_origin_costs_no_more_than_rounding():
    """Streaming is float64 until the motion is known, offline until positions are relative."""
    camera = walk().part(slice(0, 9))
    far = camera.poses.clone()
    far[:, :3, 3] += torch.tensor([5000.0, -300.0, 2000.0])
    moved = CameraPath(far, camera.intrinsics)
    encoder = CameraEncoderConfig().setup()
    near = stream(encoder, camera, 1)[0]
    torch.testing.assert_close(stream(encoder, moved, 1)[0], near, rtol=0, atol=ATOL)
    close, distant = clip_poses(camera.poses, 3), clip_poses(far, 3)
    torch.testing.assert_close(distant, close, rtol=0, atol=ATOL)
    rounded = relative_poses(resample_poses(far, 3).float())  # negative control: rounded first
    rounded[:, :3, 3] /= rounded[:, :3, 3].norm(dim=-1).max()
    assert (rounded - close).abs().max() > 10 * ATOL


@pytest.mark.parametrize(
    ("mode", "call", "message"),
    [
        ("streaming", lambda e, c: offline(e, c, 1), "step by step, as generate's input"),
        ("offline", lambda e, c: stream(e, c, 1), "at the rollout.s start"),
        ("offline", lambda e, c: offline(e, c.part(slice(0, 8)), 1), "8 poses are fewer than one"),
        ("offline", lambda e, c: offline(e, c.part(slice(0, 20)), 2), "AR step 1 is beyond"),
        ("streaming", lambda e, c: stream(e, c.part(slice(0, 7)), 1), "takes 9 poses.*got 7"),
        ("streaming", lambda e, c: stream(e, c.part(slice(0, 20)), 2), "takes 12 poses.*got 11"),
        ("streaming", lambda e, c: e(c.poses, 0, e.initialize_cache(CONDITION)), "got Tensor"),
        ("streaming", lambda e, c: e(c, 0), "needs its rollout's cache"),
        ("streaming", lambda e, c: stream(e, CameraPath(2 * c.poses, c.intrinsics), 1), "last row"),
    ],
)
def test_input_of_another_kind_is_refused(mode, call, message):
    encoder = CameraEncoderConfig(pose_mode=mode).setup()
    with pytest.raises(ValueError, match=message):
        call(encoder, walk())


def test_act_without_keys_is_refused():
    camera = walk()
    encoder = CameraEncoderConfig(control_type="act").setup()
    with pytest.raises(ValueError, match=r"\[frames, 4\], here \[9, 4\]; got None"):
        stream(encoder, CameraPath(camera.poses, camera.intrinsics), 1)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_world_without_size_is_refused(scale):
    with pytest.raises(ValueError, match=r"world_scale=.*must be positive, at most 1e\+06"):
        CameraEncoderConfig(world_scale=scale)


def test_condition_is_mask_then_image_and_grey():
    encoder = ImageConditionEncoderConfig(vae=TINY_VAE_IMAGE_ENCODER, latent_frames=4).setup()
    image = gradient_image(16, 16)
    condition = encoder(image)["condition"]
    assert condition.shape == (1, 20, 4, 2, 2)
    assert (condition[:, :4, 0] == 1).all() and (condition[:, :4, 1:] == 0).all()
    clip = torch.cat([image[:, :, None], torch.zeros(1, 3, 12, 16, 16)], dim=2)
    assert torch.equal(condition[:, 4:], encoder.vae(clip))


def test_thirty_latent_frames_of_condition_are_exact_for_any_length():
    """From then on the autoencoder sees grey alone, and every latent is the same."""
    encoder = ImageConditionEncoderConfig(vae=TINY_VAE_IMAGE_ENCODER, latent_frames=36).setup()
    latent = encoder(gradient_image(16, 16))["condition"][:, 4:]
    assert ImageConditionEncoderConfig().latent_frames == 30
    assert (latent[:, :, 29:] == latent[:, :, 29:30]).all()
    same = [(latent[:, :, t] == latent[:, :, 29]).all().item() for t in range(30)]
    assert not all(same[:20])  # negative control: sooner it is not
