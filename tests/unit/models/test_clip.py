"""The CLIP image tower against ``transformers`` (float32, atol 1e-5) and its public checkpoint."""

import pytest
import torch
from torch import Tensor

from flashdreams.models.clip import (
    CLIP_IMAGE_MEAN,
    CLIP_IMAGE_STD,
    UNUSED_TENSORS,
    CLIPImageEncoder,
    CLIPImageEncoderConfig,
)
from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError, load_checkpoint
from tests.manifests import load_manifest, zero_state_dict

ATOL = 1e-5
MANIFEST = "clip_xlm_roberta_vit_h14"
TINY = {"image_size": 28, "dim": 32, "out_dim": 8, "num_heads": 4, "num_layers": 3}


def tiny_encoder(**overrides) -> CLIPImageEncoder:
    encoder = CLIPImageEncoder(CLIPImageEncoderConfig(**{**TINY, **overrides}))
    generator = torch.Generator().manual_seed(3)
    for parameter in encoder.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return encoder


def as_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of ``CLIPVisionModel``."""
    renamed = {
        "embeddings.class_embedding": state["visual.cls_embedding"][0, 0],
        "embeddings.patch_embedding.weight": state["visual.patch_embedding.weight"],
        "embeddings.position_embedding.weight": state["visual.pos_embedding"][0],
    }
    for kind in ("weight", "bias"):
        renamed[f"pre_layrnorm.{kind}"] = state[f"visual.pre_norm.{kind}"]
        renamed[f"post_layernorm.{kind}"] = state[f"visual.post_norm.{kind}"]
        for block in range(TINY["num_layers"]):
            ours, theirs = f"visual.transformer.{block}", f"encoder.layers.{block}"
            fused = state[f"{ours}.attn.to_qkv.{kind}"].chunk(3)
            for letter, part in zip("qkv", fused, strict=True):
                renamed[f"{theirs}.self_attn.{letter}_proj.{kind}"] = part
            renamed[f"{theirs}.self_attn.out_proj.{kind}"] = state[f"{ours}.attn.proj.{kind}"]
            renamed[f"{theirs}.layer_norm1.{kind}"] = state[f"{ours}.norm1.{kind}"]
            renamed[f"{theirs}.layer_norm2.{kind}"] = state[f"{ours}.norm2.{kind}"]
            renamed[f"{theirs}.mlp.fc1.{kind}"] = state[f"{ours}.mlp.0.{kind}"]
            renamed[f"{theirs}.mlp.fc2.{kind}"] = state[f"{ours}.mlp.2.{kind}"]
    return renamed


def transformers_tokens(encoder: CLIPImageEncoder, pixels: Tensor, activation: str) -> Tensor:
    """Tokens before the last block of ``CLIPVisionModel`` with the same weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        hidden_act=activation,
    )
    peer = transformers.CLIPVisionModel(config).eval()
    names = peer.state_dict()
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in names) else ""
    weights = {prefix + n: t for n, t in as_transformers(encoder.state_dict()).items()}
    absent = set(names) - set(weights)
    assert all(name.endswith("position_ids") for name in absent)
    peer.load_state_dict(weights, strict=not absent)
    with torch.no_grad():
        return peer(pixels, output_hidden_states=True).hidden_states[-2]


def test_tokens_match_transformers() -> None:
    encoder = tiny_encoder()
    images = 2 * torch.rand(2, 3, 20, 36, generator=torch.Generator().manual_seed(1)) - 1
    tokens = encoder(images)
    assert tokens.shape == (2, 5, 32)
    pixels = encoder.preprocess(images)
    expected = transformers_tokens(encoder, pixels, "gelu")
    torch.testing.assert_close(tokens, expected, atol=ATOL, rtol=0)
    wrong = transformers_tokens(encoder, pixels, "quick_gelu")
    assert (tokens - wrong).abs().max() > 10 * ATOL


def test_preprocess_normalises_each_channel() -> None:
    encoder = tiny_encoder()
    grey = torch.full((3, 50, 40), 0.5)  # 0.75 in [0, 1]
    pixels = encoder.preprocess(grey)
    assert pixels.shape == (1, 3, 28, 28)
    for channel, (mean, std) in enumerate(zip(CLIP_IMAGE_MEAN, CLIP_IMAGE_STD, strict=True)):
        expected = torch.full((28, 28), (0.75 - mean) / std)
        torch.testing.assert_close(pixels[0, channel], expected, atol=1e-5, rtol=0)


def test_preprocess_resizes_the_whole_image_by_cubic_interpolation() -> None:
    encoder = tiny_encoder(image_size=14, patch_size=14)
    images = torch.rand(1, 3, 7, 28, generator=torch.Generator().manual_seed(2)) * 2 - 1
    std = torch.tensor(CLIP_IMAGE_STD).view(3, 1, 1)
    mean = torch.tensor(CLIP_IMAGE_MEAN).view(3, 1, 1)
    pixels = (encoder.preprocess(images) * std + mean) * 2 - 1
    rows, columns = cubic_weights(7, 14), cubic_weights(28, 14)
    expected = rows @ images @ columns.T
    torch.testing.assert_close(pixels, expected, atol=ATOL, rtol=0)


def cubic_weights(size: int, new_size: int, a: float = -0.75) -> Tensor:
    """Keys' cubic convolution between pixel centres, edge pixels repeated: ``[new_size, size]``."""
    weights = torch.zeros(new_size, size)
    for target in range(new_size):
        place = (target + 0.5) * size / new_size - 0.5
        first = int(place // 1) - 1
        for source in range(first, first + 4):
            d = abs(place - source)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[target, min(max(source, 0), size - 1)] += near if d <= 1 else far
    return weights


def test_full_size_loads_the_public_checkpoint_strictly(tmp_path, monkeypatch) -> None:
    # Files of zeros repeat one number, which no real file does.
    monkeypatch.setattr("flashdreams.runtime.checkpoint.read._refuse_inflated", lambda *_: None)
    manifest = load_manifest(MANIFEST)
    path = tmp_path / "clip.pth"
    torch.save(zero_state_dict(manifest), path)
    with torch.device("meta"):
        encoder = CLIPImageEncoder(CLIPImageEncoderConfig(dtype="float16"))
    state = {n: (tuple(t.shape), str(t.dtype)[6:]) for n, t in encoder.state_dict().items()}
    assert state == {n: info for n, info in manifest.items() if n.startswith("visual.")}
    config = CheckpointConfig(source=str(path), ignore=UNUSED_TENSORS)
    assert load_checkpoint(encoder, config, device="meta").tensors == 392
    with pytest.raises(CheckpointError, match="392 unexpected in the file"):
        load_checkpoint(encoder, CheckpointConfig(source=str(path)), device="meta")


def test_full_size_gives_257_tokens_of_1280_channels() -> None:
    with torch.device("meta"):
        encoder = CLIPImageEncoder(CLIPImageEncoderConfig(dtype="bfloat16"))
        tokens = encoder.visual(torch.empty(1, 3, 224, 224, dtype=torch.bfloat16))
    assert tokens.shape == (1, 257, 1280) and tokens.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 4, 8, 8),
        torch.zeros(8, 8),
        torch.zeros(8, 8, 3),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
    ],
)
def test_wrong_images_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="CLIP takes RGB images"):
        tiny_encoder()(images)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size=30 must be divisible by patch_size=14"):
        tiny_encoder(image_size=30)
