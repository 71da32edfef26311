"""The toy world's camera embedding, prompt encoder and codec."""

import math

import pytest
import torch

from flashdreams.integrations.toy_world.camera import (
    CameraEncoderConfig,
    control_features,
    ray_features,
)
from flashdreams.integrations.toy_world.codec import (
    LATENT_CHANNELS,
    PATCH,
    PatchDecoder,
    PatchDecoderConfig,
    PatchEncoder,
    PatchEncoderConfig,
)
from flashdreams.integrations.toy_world.prompt import (
    PROMPT_DIM,
    ScenePromptEncoderConfig,
    embed_scene,
)
from flashdreams.integrations.toy_world.scene import HIDDEN, scene_from_text
from flashdreams.integrations.toy_world.world import pose_to_camera

SIZE = (64, 64)


def features(*pose: float) -> torch.Tensor:
    return ray_features(torch.tensor(pose), 4, 4, SIZE)


def test_ray_features_have_the_promised_shape():
    assert features(0.3, -1.0, 2.0).shape == (16, control_features(4, 4))


def test_ray_features_know_a_full_turn_but_not_half_of_one():
    whole, half = features(1.0, 2.0, 0.4 + 2 * math.pi), features(1.0, 2.0, 0.4 + math.pi)
    torch.testing.assert_close(features(1.0, 2.0, 0.4), whole, atol=1e-5, rtol=0)
    assert (features(1.0, 2.0, 0.4) - half).abs().max() > 0.1


def test_turning_by_a_column_moves_the_rays_of_the_middle():
    """The ray features of one heading reappear, shifted, when the camera turns."""
    focal = 32 / math.tan(math.radians(37.5))
    near, far = math.atan(2 / focal), math.atan(6 / focal)
    turn = far - near
    ray = slice(0, 6)
    before = features(0.0, 0.0, 0.0)[2].unflatten(0, (-1,))
    per_ray = 22
    first = before[:per_ray][ray]
    after = features(0.0, 0.0, -turn)[2][per_ray : 2 * per_ray][ray]
    torch.testing.assert_close(first, after, atol=1e-5, rtol=0)


def test_camera_encoder_accepts_a_path_with_or_without_batch():
    encoder = CameraEncoderConfig().setup()
    poses = pose_to_camera(torch.tensor([[0.0, 1.0, 0.2], [0.5, 1.0, 0.4]]))
    assert encoder(poses).shape == (1, 32, control_features(4, 4))
    torch.testing.assert_close(encoder(poses[None]), encoder(poses))
    with pytest.raises(ValueError, match=r"\[B, T, 4, 4\].*NoneType"):
        encoder(None)


def test_prompt_tokens_are_one_hot_per_slot():
    encoder = ScenePromptEncoderConfig().setup()
    tokens = encoder(["red floor, unknown sky"])
    assert tokens.shape == (1, 10, PROMPT_DIM)
    assert torch.equal(tokens.sum(-1), torch.ones(1, 10))
    scene = scene_from_text("red floor, unknown sky")
    assert scene[9] == HIDDEN
    assert torch.equal(tokens, embed_scene(scene[None]))
    assert not torch.equal(tokens, encoder(["blue floor, unknown sky"]))


def orthonormal_encoder() -> PatchEncoder:
    encoder = PatchEncoder(PatchEncoderConfig())
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(3 * PATCH * PATCH, LATENT_CHANNELS, generator=generator)
    encoder.basis.copy_(torch.linalg.qr(square).Q.T)
    encoder.std.copy_(torch.linspace(2.0, 0.5, LATENT_CHANNELS))
    encoder.mean.fill_(0.1)
    return encoder


def test_encoder_inverts_the_patches_that_its_basis_spans():
    encoder = orthonormal_encoder()
    latent = torch.randn(2, LATENT_CHANNELS, 3, 4, generator=torch.Generator().manual_seed(1))
    scaled = latent * encoder.std[:, None, None]
    patches = torch.einsum("bchw,cp->bphw", scaled, encoder.basis)
    picture = torch.nn.functional.pixel_shuffle(patches + 0.1, PATCH)
    torch.testing.assert_close(encoder(picture)[:, :, 0], latent, atol=1e-5, rtol=0)


def test_decoder_in_chunks_equals_decoder_in_one():
    decoder = PatchDecoder(PatchDecoderConfig()).eval()
    latent = torch.randn(1, LATENT_CHANNELS, 5, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = decoder(latent)
        cache = decoder.initialize_cache()
        chunks = [decoder(part, i, cache) for i, part in enumerate(latent.split([1, 2, 2], 2))]
        stateless = decoder(latent[:, :, 1:])
    torch.testing.assert_close(torch.cat(chunks, 1), whole, atol=1e-5, rtol=0)
    assert (stateless - whole[:, 1:]).abs().max() > 1e-4
