"""The memory layout of the Wan autoencoder: channels innermost from end to end."""

import pytest
import torch

from flashdreams.models.wan import vae_blocks
from flashdreams.models.wan.vae import WanVAEDecoderConfig
from flashdreams.models.wan.vae_blocks import RMSNorm, fold_frames, unfold_frames


@torch.no_grad()
def norms_with_other_layouts(frames_at_once: int | None) -> list[tuple[int, ...]]:
    """Strides of what the decoder's norms see, where the channels are not innermost."""
    config = WanVAEDecoderConfig(dim=8, decode_frames_at_once=frames_at_once)
    decoder, seen = config.setup(), []
    for module in decoder.modules():
        if isinstance(module, RMSNorm):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].stride()))
    cache = decoder.initialize_cache()
    for index in range(2):
        decoder(torch.randn(1, config.z_dim, 2, 2, 3), index, cache)
    assert seen
    return [strides for strides in seen if strides[1] != 1]


@pytest.mark.parametrize("frames_at_once", [1, None])
def test_the_decoder_keeps_the_channels_innermost(frames_at_once):
    assert norms_with_other_layouts(frames_at_once) == []


def test_a_stride_without_meaning_loses_the_layout(monkeypatch):
    """Negative control: the same views with any stride over a single frame."""
    monkeypatch.setattr(vae_blocks, "fold_frames", lambda x: x.transpose(1, 2).flatten(0, 1))
    assert norms_with_other_layouts(1)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_folding_is_a_view_and_unfolding_undoes_it(batch, frames):
    x = torch.randn(batch, 4, frames, 3, 5).to(memory_format=torch.channels_last_3d)
    folded = fold_frames(x)
    assert folded.data_ptr() == x.data_ptr()
    assert torch.equal(folded, torch.cat([clip.transpose(0, 1) for clip in x]))
    unfolded = unfold_frames(folded, batch)
    assert torch.equal(unfolded, x) and unfolded.stride() == x.stride()
