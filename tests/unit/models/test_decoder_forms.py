"""Every form of the decoders' layers against the plain one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashdreams.models import decoder_forms
from flashdreams.models.decoder_forms import (
    FAST,
    PAIRED,
    PLAIN,
    DecoderForms,
    forms_for,
    frames_at_once,
    join_pairs,
    pair_weight,
    select_forms,
    takes_pairs,
)
from flashdreams.models.taehv import TAEHVDecoderConfig
from flashdreams.models.wan.vae import WanVAEDecoderConfig
from flashdreams.models.wan.vae22 import WanVAE22DecoderConfig
from tests.kernels.conftest import switch_to_interpreter

ATOL = 5e-5  # float32, frames from -1 to 1; at most 1e-5 was measured
CONFIGS = {
    "wan": WanVAEDecoderConfig(dim=4),
    "wan22": WanVAE22DecoderConfig(dim=4),
    "taehv": TAEHVDecoderConfig(channels=(16, 8, 6, 6)),
    "taehv with patches": TAEHVDecoderConfig(
        channels=(16, 8, 6, 6), latent_channels=48, patch_size=2
    ),
}
ON_CPU = replace(PAIRED, pointwise="reference")
FORMS = {
    "all": ON_CPU,
    "pointwise": DecoderForms(pointwise="reference"),
    "phases": DecoderForms(upsampling="phases"),
    "halves": DecoderForms(memory="halves"),
    "16 channels out": replace(ON_CPU, head_channels=16),
    "stacked": replace(ON_CPU, memory="stack"),
    "single frames": replace(ON_CPU, frames="single"),
}


def decoder_of(kind: str, forms: DecoderForms = PLAIN, at_once: int | None = None, **changes):
    torch.manual_seed(3)
    decoder: Any = replace(CONFIGS[kind], decode_frames_at_once=at_once, **changes).setup()
    for parameter in decoder.parameters():
        parameter.data.mul_(1.5 if "taehv" in kind else 1.0)
    decoder.take_forms(forms)
    return decoder


def latents(kind: str, batch: int = 1) -> Tensor:
    channels = CONFIGS[kind].z_dim if kind.startswith("wan") else CONFIGS[kind].latent_channels
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, channels, 6, 3, 2, generator=generator)


def decode(decoder, z: Tensor, split: list[int]) -> Tensor:
    cache = decoder.initialize_cache()
    chunks = [decoder(chunk, i, cache) for i, chunk in enumerate(z.split(split, dim=2))]
    return torch.cat(chunks, dim=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_form_gives_the_frames_of_the_plain_one(kind: str, form: str) -> None:
    z = latents(kind, batch=2)
    expected = decode(decoder_of(kind), z, [3, 3])
    fast = decoder_of(kind, FORMS[form])
    for split in ([3, 3], [1, 2, 3]):
        torch.testing.assert_close(decode(fast, z, split), expected, rtol=0, atol=ATOL)
    assert not torch.equal(expected[0], expected[1]) and expected.std() > 0.01
    for name, module in fast.named_modules():  # negative control: another gain or weight
        if name.endswith(("head.0", "decoder.22")):
            next(module.parameters()).data.mul_(1.1)
    fast.take_forms(FORMS[form])
    assert (decode(fast, z, [3, 3]) - expected).abs().max() > 20 * ATOL


@pytest.mark.parametrize("kind", ["wan", "taehv"])
def test_one_latent_frame_per_pass_gives_the_same_frames(kind: str) -> None:
    z = latents(kind)
    expected = decode(decoder_of(kind), z, [3, 3])
    fast = decoder_of(kind, ON_CPU, at_once=1)
    torch.testing.assert_close(decode(fast, z, [3, 3]), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", ["wan", "taehv"])
def test_state_moves_between_the_forms(kind: str) -> None:
    """Carried frames are the same in all of them, so a rollout may go on on another device."""
    z, cache = latents(kind), decoder_of(kind).initialize_cache()
    expected = decode(decoder_of(kind), z, [3, 3])
    first = decoder_of(kind)(z[:, :, :3], 0, cache)
    found = torch.cat([first, decoder_of(kind, ON_CPU)(z[:, :, 3:], 1, cache)], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", ["wan", "taehv"])
def test_kernels_in_the_interpreter_give_the_same_frames(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    switch_to_interpreter(monkeypatch)
    z = latents(kind)[..., :2, :1]
    expected = decode(decoder_of(kind), z[:, :, :3], [1, 2])
    found = decode(decoder_of(kind, PAIRED), z[:, :, :3], [1, 2])
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("kind", ["wan", "taehv"])
def test_in_bfloat16_the_fast_forms_are_as_near_to_float32_as_the_plain_one(kind: str) -> None:
    """At most 1.2 times the root mean square error; 0.8 to 1.0 times was measured."""
    z = latents(kind, batch=2)
    exact = decode(decoder_of(kind), z, [3, 3])
    plain, fast = (
        decode(decoder_of(kind, forms, dtype="bfloat16"), z, [3, 3]) - exact
        for forms in (PLAIN, ON_CPU)
    )
    assert 0 < fast.square().mean() < 1.2**2 * plain.square().mean()


def test_a_convolution_over_pairs_of_frames_is_the_causal_one() -> None:
    """float64, 1e-12."""
    x, weight = torch.randn(1, 3, 8, 4, 5).double(), torch.randn(2, 3, 3, 3, 3).double()
    expected = F.conv3d(x, weight, padding=(0, 1, 1))

    def in_pairs(weight: Tensor) -> Tensor:
        pairs = join_pairs(x[0].transpose(0, 1)).transpose(0, 1)[None]
        return F.conv3d(pairs, pair_weight(weight), padding=(0, 1, 1))

    wanted = join_pairs(expected[0].transpose(0, 1)).transpose(0, 1)[None]
    torch.testing.assert_close(in_pairs(weight), wanted, rtol=0, atol=1e-12)
    assert (in_pairs(weight.flip(2)) - wanted).abs().max() > 0.1  # negative control


@pytest.mark.parametrize("dim", [4, 64])
def test_pairs_are_for_channels_that_fill_no_whole_step(dim: int) -> None:
    """And for chunks of an even number of frames: the first has one less than a multiple of 4."""
    decoder, z, seen = decoder_of("wan", ON_CPU, dim=dim), latents("wan")[..., :2, :1], []
    last = decoder.decoder.upsamples[-1]
    last.register_forward_pre_hook(lambda module, inputs: seen.append(list(inputs[0].shape[1:3])))
    decode(decoder, z[:, :, :3], [1, 2])
    assert seen == ([[4, 1], [8, 4]] if dim == 4 else [[64, 1], [64, 8]])
    assert not takes_pairs(PLAIN, 96) and not takes_pairs(replace(PLAIN, frames="pairs"), 96)


def test_a_gpu_takes_pairs_only_where_it_is_told_to(monkeypatch) -> None:
    monkeypatch.setattr(decoder_forms, "why_unusable", lambda *_: None)
    assert forms_for(torch.device("cuda", 0), torch.bfloat16) == FAST
    assert not takes_pairs(FAST, 96) and takes_pairs(PAIRED, 96)


def test_a_cpu_takes_the_plain_form_and_a_gpu_the_fast_one() -> None:
    decoder = decoder_of("wan", ON_CPU)
    assert {m.forms for m in decoder.modules() if hasattr(m, "forms")} == {ON_CPU}
    decoder.after_load()
    assert {m.forms for m in decoder.modules() if hasattr(m, "forms")} == {PLAIN}
    assert forms_for(torch.device("cpu"), torch.bfloat16) == PLAIN
    assert frames_at_once("auto", torch.device("cpu"), 3) == 1
    assert frames_at_once("auto", torch.device("cuda"), 3) == 4
    assert frames_at_once(None, torch.device("cpu"), 3) == frames_at_once(0, torch.device("cpu"), 3)


def test_other_components_have_no_forms() -> None:
    layer = torch.nn.Conv2d(2, 2, 3)
    select_forms(layer, FAST)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
