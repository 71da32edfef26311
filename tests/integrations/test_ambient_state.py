"""What a program has set for all of PyTorch does not reach the frames of a rollout."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flashdreams.infra.config import derive_config
from flashdreams.integrations.lingbot_world.config import TINY_RUNNER as LINGBOT
from flashdreams.integrations.lingbot_world.runner import camera_path
from flashdreams.integrations.self_forcing.config import TINY_RUNNER as SELF_FORCING
from flashdreams.integrations.toy_world.config import TOY_WORLD_PIPELINE
from flashdreams.integrations.toy_world.runner import walk
from flashdreams.integrations.wan21.config import I2V_TINY_PIPELINE


def image(height: int, width: int) -> Tensor:
    values = torch.linspace(-1, 1, 3 * height * width, dtype=torch.float32, device="cpu")
    return values.view(1, 3, height, width)


def stream(pipeline: Any, steps: int, control: Callable[[range], Any], **context: Any) -> Tensor:
    cache = pipeline.initialize_cache(seed=0, **context)
    chunks = []
    for index in range(steps):
        given = control(pipeline.pixel_frames(index))
        chunks.append(pipeline.generate(index, cache, given).clone())
        pipeline.finalize(index, cache)
    return torch.cat(chunks, 1)


def toy_world(pipeline: Any) -> Tensor:
    def control(frames: range) -> Tensor:
        return walk("w2 l1", frames=frames.stop)[frames.start :]

    return stream(pipeline, 3, control, text=["dusk sky, red floor, white pillars"])


def self_forcing(pipeline: Any) -> Tensor:
    return stream(pipeline, 3, lambda frames: None, text=["a fox"])


def image_to_video(pipeline: Any) -> Tensor:
    context = {"text": ["a"], "negative_text": [""], "image": image(32, 48)}
    return stream(pipeline, 1, lambda frames: None, **context)


def lingbot(pipeline: Any) -> Tensor:
    def control(frames: range) -> Any:
        poses = torch.eye(4, dtype=torch.float64, device="cpu").repeat(len(frames), 1, 1)
        poses[:, 2, 3] = 0.1 * torch.tensor(list(frames), dtype=torch.float64, device="cpu")
        return camera_path((477.0, 477.0, 416.0, 240.0), False, poses, [])

    return stream(pipeline, 2, control, text=["a street"], image=image(64, 112))


ROLLOUTS = {
    "toy-world": (TOY_WORLD_PIPELINE, toy_world),
    "self-forcing": (SELF_FORCING.pipeline, self_forcing),
    "image-to-video": (I2V_TINY_PIPELINE, image_to_video),
    "lingbot": (derive_config(LINGBOT.pipeline, encoder={"pose_mode": "streaming"}), lingbot),
}


@contextlib.contextmanager
def ambient(kind: str) -> Iterator[None]:
    if kind == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
        return
    if kind == "deterministic":
        torch.use_deterministic_algorithms(True)
    elif kind == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, kind))
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module", params=ROLLOUTS)
def plain(request: pytest.FixtureRequest) -> tuple[Any, Callable[[Any], Tensor], Tensor]:
    config, rollout = ROLLOUTS[request.param]
    return config, rollout, rollout(config.setup(device="cpu"))


@pytest.mark.parametrize("kind", ["bfloat16", "float64", "meta", "deterministic", "autocast"])
def test_defaults_of_torch_change_no_bit(
    plain: tuple[Any, Callable[[Any], Tensor], Tensor], kind: str
) -> None:
    config, rollout, expected = plain
    with ambient(kind):
        found = rollout(config.setup(device="cpu"))
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_the_comparison_sees_a_default_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: noise that is drawn in the default type."""
    config, rollout = ROLLOUTS["self-forcing"]
    pipeline = config.setup(device="cpu")
    expected = rollout(pipeline)
    sample = pipeline.diffusion_model.scheduler.sample

    def coarse(flow: Any, noise: Callable[[int], Tensor]) -> Tensor:
        return sample(flow, lambda step: noise(step).to(torch.get_default_dtype()).float())

    monkeypatch.setattr(pipeline.diffusion_model.scheduler, "sample", coarse)
    assert torch.equal(rollout(pipeline), expected)
    with ambient("bfloat16"):
        assert not torch.equal(rollout(pipeline), expected)
