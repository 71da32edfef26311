"""LongLive against a window that is a plain list of frames, in the official order (float32)."""

import pytest
import torch
from torch import Tensor

from flashdreams.infra.config import derive_config
from flashdreams.infra.diffusion.causal_state import StepInputs
from flashdreams.integrations.longlive.config import (
    INFINITY_PIPELINE,
    PIPELINE,
    SHOTS_IMAGE_PIPELINE,
    SHOTS_PIPELINE,
)
from flashdreams.models.wan.transformer import SELF_ATTENTION
from tests.listed_window import Layer, Window
from tests.tiny import TEXT_DIM, tiny_transformer

ATOL = 1e-5


class ByHand:
    """A rollout of the same network, scheduler and noise."""

    def __init__(self, pipeline, offset: float = 0.0, **changes) -> None:
        model = pipeline.diffusion_model
        self.net, self.scheduler = model.transformer, model.scheduler
        self.c = c = derive_config(self.net.config, **changes)
        self.window = Window(c.sink_size_t, c.sink_size_t + c.window_size_t)
        self.layers = [Layer(self.window, c.tokens_per_frame, c.relative_rope) for _ in "ab"]
        self.leap, self.offset, self.clean = 0.0, offset, []

    def prompt(self, text: Tensor) -> None:
        self.state = self.net.initialize_cache(text=text)
        self.state.caches = {SELF_ATTENTION: self.layers}

    @torch.no_grad()
    def call(self, latent: Tensor, timestep, frames: list[int]) -> Tensor:
        positions = torch.tensor(frames, dtype=torch.float64) + self.leap
        inputs = StepInputs(self.net.rotations(positions))
        timestep = torch.as_tensor(timestep, dtype=torch.float64)
        timestep = timestep if timestep.ndim else timestep[None]
        return self.net(latent, self.net.modulations(timestep), inputs, self.state)

    def chunk(self, index: int, noise, cut: bool = False, image: Tensor | None = None) -> Tensor:
        c, t = self.c, self.c.len_t
        frames = list(range(index * t, (index + 1) * t))
        self.leap += self.offset * cut
        self.window.admit(frames)

        def flow(latent: Tensor, timestep: Tensor) -> Tensor:
            if image is None:
                return self.call(latent, timestep.double(), frames)
            stamped = torch.cat([image, latent[:, :, 1:]], 2)
            times = [0.0] + [float(timestep)] * (t - 1)
            return self.call(stamped, [times], frames)

        latent = self.scheduler.sample(
            flow, lambda step: noise(index, step, self.net.latent_shape(1))
        )
        if image is not None:
            latent = torch.cat([image, latent[:, :, 1:]], 2)
        if cut and c.shot_clean_recache:
            self.window.frames = [*self.window.frames[: c.sink_size_t], *frames]
            self.window.pin = []
        self.call(latent, 0.0, frames)
        if cut and c.shot_sink_size_t:
            self.window.pin = frames[: c.shot_sink_size_t]
        self.clean.append(latent)
        return latent

    def recache(self, global_sink: bool) -> None:
        """All last frames in one forward, without a mask."""
        seen = len(self.clean) * self.c.len_t
        frames = list(range(max(0, seen - self.window.local), seen))
        stays = global_sink and frames[0] > 0
        sink = self.window.frames[: self.c.sink_size_t]
        rolling = frames[self.c.sink_size_t :]
        self.window.frames = [*sink, *rolling] if stays else list(frames)
        self.window.current, self.window.sink_stays = frames, stays
        latent = torch.cat(self.clean, 2)[:, :, frames]
        self.call(latent, 0.0, frames)
        self.window.sink_stays = False


def text(number: int) -> Tensor:
    return torch.randn(1, 4, TEXT_DIM, generator=torch.Generator().manual_seed(number))


def noise(index: int, step: int, shape) -> Tensor:
    draw = torch.Generator().manual_seed(100 * index + step)
    return torch.randn(shape, generator=draw)


def build(pipeline, **changes):
    """A shipped literal at tiny size with weights that tell."""
    shipped = pipeline.diffusion_model.transformer
    kept = ("rewritten_sink", "relative_rope", "shot_sink_size_t", "shot_rope_offset")
    fields = {name: getattr(shipped, name) for name in kept}
    config = derive_config(
        pipeline,
        text_encoder=None,
        image_encoder=None,
        decoder=None,
        diffusion_model=dict(transformer=tiny_transformer(**{**fields, **changes})),
    )
    built = config.setup(device="cpu")
    torch.manual_seed(1)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built


IMAGE = torch.randn(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(9))
TWO = dict(len_t=2, sink_size_t=2, window_size_t=6, shot_sink_size_t=2)
SHOTS = {  # changes of the literal, chunks that begin a shot, chunks whose prompt alone changes
    "an early cut, leaps of no whole frame": (dict(TWO, shot_rope_offset=2.5), (1, 4), (5,)),
    "cuts one after the other": (TWO, (2, 3, 4), ()),
    "a sink of one chunk and a half": (dict(TWO, sink_size_t=3, window_size_t=5), (2, 6), ()),
    "chunks of three": (
        dict(len_t=3, sink_size_t=3, window_size_t=9, shot_sink_size_t=3), (2, 5), (3,)),
    "fewer pinned frames than a chunk": (
        dict(len_t=2, sink_size_t=1, window_size_t=7, shot_sink_size_t=1), (2, 5), ()),
    "clean recache": (dict(TWO, shot_clean_recache=True, shot_rope_offset=0.0), (2, 5), ()),
    "relative": (
        dict(TWO, shot_sink_size_t=0, shot_rope_offset=0.0, relative_rope=True), (), (5,)),
    "image": (TWO, (2,), (5,)),
}  # fmt: skip


def both(case: str, **other) -> tuple[Tensor, Tensor]:
    """The pipeline's latents, and those by hand with some fields of another value."""
    changes, cuts, switches = SHOTS[case]
    image = IMAGE if case == "image" else None
    pipeline = build(SHOTS_PIPELINE if image is None else SHOTS_IMAGE_PIPELINE, **changes)
    offset = other.pop("offset", pipeline.diffusion_model.transformer.config.shot_rope_offset)
    return rolled(pipeline, ByHand(pipeline, offset, **other), 9, cuts, switches, image)


def rolled(pipeline, hand, count, cuts=(), switches=(), image=None, recache=None):
    """Latents of the pipeline and of the list of frames."""
    hand.prompt(text(0))
    given = {} if image is None else {"image": image}
    cache = pipeline.initialize_cache(text=text(0), noise=noise, **given)
    found, expected = [], []
    for index in range(count):
        if index in cuts or index in switches:
            pipeline.update_prompt(cache, text(index), begins_shot=index in cuts)
            hand.prompt(text(index))
            if recache is not None:
                hand.recache(recache)
        found.append(pipeline.generate(index, cache))
        pipeline.finalize(index, cache)
        expected.append(hand.chunk(index, noise, index in cuts, image if index == 0 else None))
    return torch.cat(found, 2), torch.cat(expected, 2)


@pytest.mark.parametrize("case", SHOTS)
def test_shots_equal_a_list_of_frames(case):
    found, expected = both(case)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
    assert found.std() > 0.1


@pytest.mark.parametrize(
    ("case", "other"),
    [
        ("an early cut, leaps of no whole frame", dict(offset=2.0)),
        ("cuts one after the other", dict(shot_sink_size_t=0)),
        ("fewer pinned frames than a chunk", dict(shot_sink_size_t=2)),
        ("clean recache", dict(shot_clean_recache=False)),
        ("relative", dict(relative_rope=False)),
    ],
)
def test_another_rule_is_seen(case, other):
    """Negative control."""
    found, expected = both(case, **other)
    assert (found - expected).abs().max() > 100 * ATOL


ONE = dict(len_t=3, sink_size_t=3)
SWITCHES = {  # literal, changes, AR steps with another prompt, AR steps
    "sink kept": (PIPELINE, dict(ONE, window_size_t=6), (2, 3, 5, 6), 8),
    "sink kept, chunks of two": (
        PIPELINE, dict(len_t=2, sink_size_t=1, window_size_t=5), (3, 4, 7), 8),
    "sink moved": (PIPELINE, dict(ONE, window_size_t=6, rewritten_sink="moved"), (3, 5, 6), 8),
    "sink moved, one frame": (
        PIPELINE, dict(len_t=1, sink_size_t=2, window_size_t=3, rewritten_sink="moved"),
        (4, 7, 8), 12),
    "endless": (INFINITY_PIPELINE, dict(ONE, window_size_t=6), (2, 5, 6), 8),
}  # fmt: skip


def switched(case: str, kept: bool | None = None, relative: bool | None = None):
    literal, changes, switches, count = SWITCHES[case]
    pipeline = build(literal, **changes)
    hand = ByHand(pipeline, **({} if relative is None else {"relative_rope": relative}))
    kept = hand.c.rewritten_sink == "kept" if kept is None else kept
    return rolled(pipeline, hand, count, switches=switches, recache=kept)


@pytest.mark.parametrize("case", SWITCHES)
def test_switches_equal_a_list_of_frames(case):
    found, expected = switched(case)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
    assert found.std() > 0.1


@pytest.mark.parametrize(
    ("case", "other"),
    [("sink kept", dict(kept=False)), ("sink moved", dict(kept=True)),
     ("endless", dict(relative=False))],
)  # fmt: skip
def test_another_sink_is_seen(case, other):
    """Negative control."""
    found, expected = switched(case, **other)
    assert (found - expected).abs().max() > 100 * ATOL
