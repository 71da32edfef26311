"""Decoding split by width against the whole decoder."""

from dataclasses import replace

import pytest
import torch

from flashdreams.models.decoder_forms import PAIRED
from flashdreams.models.taehv import TAEHVDecoderConfig
from flashdreams.models.wan.vae import WanVAEDecoderConfig
from flashdreams.models.wan.vae22 import WanVAE22DecoderConfig
from flashdreams.parallel import collectives
from flashdreams.parallel.mesh import Axis, Mesh, ParallelConfig
from flashdreams.parallel.parallelize import parallelize
from flashdreams.parallel.plan import ParallelPlan
from flashdreams.parallel.spatial import resolve_decode, split_by_width
from flashdreams.runtime.region import select_region
from tests.harness import run_ranks
from tests.parallel.rollout import make_mesh

TOLERANCE = {"float32": 2e-5, "bfloat16": 0.05}
"""Pixels run from -1 to 1. Convolutions of other widths sum in another order: at most 1.4e-5
was measured in float32; a bfloat16 decoder rounds every activation to 8 bits."""

KINDS = ("wan", "wan22", "taehv")
CHUNKS = (2, 1)
WIDTH = 5


def build_decoder(kind, dtype):
    torch.manual_seed(7)
    if kind == "wan":
        decoder = WanVAEDecoderConfig(dim=8, dtype=dtype).setup()
    elif kind == "wan22":
        decoder = WanVAE22DecoderConfig(dim=4, dtype=dtype).setup()
    else:
        decoder = TAEHVDecoderConfig(channels=(16, 8, 6, 6), dtype=dtype).setup()
    return decoder.requires_grad_(False).eval()


def as_it_is(decoder):
    return decoder


def fast(decoder):
    """The forms of a GPU, their data flow in PyTorch."""
    decoder.take_forms(replace(PAIRED, pointwise="reference"))
    return decoder


def decode(decoder, cache, first=0):
    draw = torch.Generator().manual_seed(9)
    channels = 48 if isinstance(decoder.config, WanVAE22DecoderConfig) else 16
    latent = torch.randn(1, channels, sum(CHUNKS), 2, WIDTH, generator=draw)
    chunks = list(enumerate(latent.split(CHUNKS, dim=2)))
    return [decoder(chunk, index, cache) for index, chunk in chunks[first:]]


def whole(kind, dtype="float32"):
    decoder = build_decoder(kind, dtype)
    return decode(decoder, decoder.initialize_cache())


def split(kind, dtype, world_size, form=as_it_is):
    decoder = build_decoder(kind, dtype)
    mesh = make_mesh(ParallelConfig(), world_size)
    report = parallelize(decoder, decoder.parallel_plan(), mesh)
    form(decoder)
    cache = decoder.initialize_cache()
    frames = decode(decoder, cache)
    return frames, mesh, report, cache


def narrow(mesh=None):
    """One latent column: fewer than ranks."""
    decoder = build_decoder("wan", "float32")
    if mesh is not None:
        parallelize(decoder, decoder.parallel_plan(), mesh)
    latent = torch.randn(1, 16, 2, 2, 1, generator=torch.Generator().manual_seed(3))
    return decoder(latent, 0, decoder.initialize_cache())


def split_cases(world_size):
    found = {}
    for kind in KINDS:
        frames, mesh, report, cache = split(kind, "float32", world_size)
        found[kind, "float32"] = frames
        layout = report.width_layout
        state = {}
        for name, x in cache.slots.items():
            region = layout.state_region(x.shape, WIDTH, is_whole=False)
            state[name] = layout.gather(x) if x.ndim else x
            assert torch.equal(select_region(state[name], region), x), name
        found[kind, "state"] = state
        found[kind, "counts"] = (cache.position, cache.chunks)
        assert mesh.meter.counts["decode.halo"].bytes_sent > 0
    found["narrow"] = narrow(make_mesh(ParallelConfig(), world_size))
    found["wan", "bfloat16"] = split("wan", "bfloat16", world_size)[0]
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_split_decode_equals_the_whole(world_size):
    for found in run_ranks(split_cases, world_size, world_size):
        for kind, dtype in (*((kind, "float32") for kind in KINDS), ("wan", "bfloat16")):
            for chunk, expected in zip(found[kind, dtype], whole(kind, dtype), strict=True):
                assert chunk.shape == expected.shape
                error = float((chunk - expected).abs().max())
                assert error <= TOLERANCE[dtype], (kind, dtype, error)
        assert torch.equal(found["narrow"], narrow())
        for kind in KINDS:
            decoder = build_decoder(kind, "float32")
            cache = decoder.initialize_cache()
            decode(decoder, cache)
            assert found[kind, "counts"] == (cache.position, cache.chunks)
            state = cache.slots
            assert {k: v.shape for k, v in state.items()} == {
                k: v.shape for k, v in found[kind, "state"].items()
            }
            for name, expected in state.items():
                scale = max(1.0, float(expected.abs().max()))
                error = float((found[kind, "state"][name] - expected).abs().max())
                assert error <= 1e-5 * scale, name


def fast_cases(world_size):
    found = {}
    for kind in KINDS:
        frames, _, _, cache = split(kind, "float32", world_size, fast)
        found[kind] = frames, {name: x.shape for name, x in cache.slots.items()}
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_split_decode_in_the_forms_of_a_gpu_equals_the_whole(world_size):
    for found in run_ranks(fast_cases, world_size, world_size):
        for kind, (frames, _) in found.items():
            for chunk, expected in zip(frames, whole(kind), strict=True):
                error = float((chunk - expected).abs().max())
                assert chunk.shape == expected.shape
                assert error <= TOLERANCE["float32"], (kind, error)


def forgotten_halo(kind, form=as_it_is):
    collectives.Channel.exchange_edges = lambda self, left, right: (None, None)
    return split(kind, "float32", 2, form)[0]


@pytest.mark.parametrize("form", [as_it_is, fast])
@pytest.mark.parametrize("kind", ["wan", "wan22"])
def test_forgotten_halo_is_seen(kind, form):
    frames = run_ranks(forgotten_halo, 2, kind, form)[0]
    expected = whole(kind)
    assert max(float((a - b).abs().max()) for a, b in zip(frames, expected, strict=True)) > 1e-2


def test_decode_is_resolved_with_reasons():
    plan = ParallelPlan(spatial={"conv": "halo"})

    def resolve(ranks, plan, columns, **wishes):
        mesh = Mesh(config=ParallelConfig(**wishes), decode=Axis("decode", ranks))
        return resolve_decode(mesh, plan, columns)

    assert resolve(2, plan, 8) == "split"
    assert resolve(1, plan, 8) == "replicated"
    assert resolve(2, None, 8) == "replicated"
    assert resolve(2, plan, 8, strict=True) == "replicated"
    assert resolve(2, plan, 8, decode="rank0") == "rank0"
    with pytest.raises(ValueError, match="has no spatial plan"):
        resolve(2, None, 8, decode="split")
    with pytest.raises(ValueError, match="3 latent columns cannot be split over 4 ranks"):
        resolve(4, plan, 3, decode="split")


def test_uncentred_convolution_is_refused():
    class FourRanks:
        size, rank, name = 4, 0, "decode"

    net = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3))
    with pytest.raises(ValueError, match="kernel 3, stride 1 and padding 0"):
        split_by_width(net, {"0": "halo"}, FourRanks())
