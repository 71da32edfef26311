"""The decoders' fast forms, and their graph, on a real GPU."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashdreams.models.decode_graph import DecodeGraph
from flashdreams.models.decoder_forms import FAST, PAIRED, PLAIN, DecoderForms, forms_for
from tests.unit.models.test_decoder_forms import CONFIGS, decoder_of, latents

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ATOL = 2e-4
"""float32 without TF32, frames from -1 to 1."""
BF16_RMS = 1.2
"""Root mean square error against float32, as a multiple of that of the plain forms."""
FORMS = {
    "fast": FAST,
    "PyTorch between": replace(FAST, pointwise="reference"),
    "interpolated": replace(FAST, upsampling="interpolate"),
    "stacked": replace(FAST, memory="stack"),
    "pairs of frames": PAIRED,
}


def on_gpu(kind: str, forms: DecoderForms, dtype: str = "float32"):
    """Wider than on a CPU, so that tensor cores have whole tiles and odd rests."""
    width = {"channels": (48, 24, 24, 16)} if kind.startswith("taehv") else {"dim": 12}
    decoder = decoder_of(kind, dtype=dtype, **width).to("cuda")
    decoder.take_forms(forms)
    return decoder


def clip(kind: str) -> Tensor:
    return latents(kind).repeat(1, 1, 2, 3, 5).cuda()


def decode(decoder, z: Tensor, call=None) -> Tensor:
    cache, chunks = decoder.initialize_cache(), []
    for index, chunk in enumerate(z.split(3, dim=2)):
        chunks.append((call or decoder)(chunk, index, cache))
    return torch.cat(chunks, dim=1)


@pytest.fixture(autouse=True)
def full_float32():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        matmul = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        yield
        torch.backends.cuda.matmul.allow_tf32 = matmul


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_form_gives_the_frames_of_the_plain_one(kind: str, form: str) -> None:
    z = clip(kind)
    expected, found = decode(on_gpu(kind, PLAIN), z), decode(on_gpu(kind, FORMS[form]), z)
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
    # Negative control: other latents.
    assert (decode(on_gpu(kind, FAST), z.flip(1)) - expected).abs().max() > 20 * ATOL


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_in_bfloat16_the_fast_forms_are_as_near_to_float32_as_the_plain_one(kind: str) -> None:
    z = clip(kind)
    exact = decode(on_gpu(kind, PLAIN), z)
    plain, fast = (decode(on_gpu(kind, f, "bfloat16"), z) - exact for f in (PLAIN, PAIRED))
    assert 0 < fast.square().mean() < BF16_RMS**2 * plain.square().mean()


@torch.no_grad()
def test_a_graph_gives_the_bits_of_eager_decoding() -> None:
    decoder, z = on_gpu("taehv", FAST, "bfloat16"), clip("taehv")
    clips = z, z.flip(2)
    expected = [decode(decoder, clip) for clip in clips]
    graph = DecodeGraph(decoder.decode, decoder.device)
    assert graph.capture(z[:, :, :3])

    def call(latent: Tensor, index: int, cache) -> Tensor:
        cache.begin_chunk(index)
        video = graph(latent, cache)
        cache.chunks += 1
        return video

    caches = [decoder.initialize_cache() for _ in clips]
    found: list[list[Tensor]] = [[], []]
    for index in range(4):
        for turn, cache in enumerate(caches):
            found[turn].append(call(clips[turn][:, :, 3 * index : 3 * index + 3], index, cache))
    for chunks, frames in zip(found, expected, strict=True):
        assert torch.equal(torch.cat(chunks, dim=1), frames)
    assert not torch.equal(*expected) and graph.call.replays == 6


@torch.no_grad()
def test_a_decoder_on_a_gpu_takes_the_fast_forms_and_captures_its_chunk() -> None:
    decoder = on_gpu("taehv", PLAIN, "bfloat16")
    decoder.after_load()
    chosen = forms_for(decoder.device, decoder.dtype)
    assert chosen == FAST
    assert {m.forms for m in decoder.modules() if hasattr(m, "forms")} == {chosen}
    z = clip("taehv")
    expected = decode(decoder, z)
    decoder.capture(z[:, :, :3])
    held = torch.cuda.memory_allocated()
    assert torch.equal(decode(decoder, z), expected)
    (call,) = decoder.graphed_calls()
    assert (call.captures, call.replays, call.eager_calls) == (1, 3, 1)
    assert torch.cuda.memory_allocated() <= held
    decoder.drop_graphs()
    assert torch.equal(decode(decoder, z), expected)
