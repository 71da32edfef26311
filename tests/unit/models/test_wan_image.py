"""The image condition of Wan 2.1 image-to-video."""

import pytest
import torch

from flashdreams.models.wan.config import TINY_IMAGE_CONDITION_ENCODER
from flashdreams.models.wan.image import WanImageConditionEncoderConfig
from flashdreams.runtime.image_file import gradient_image


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return TINY_IMAGE_CONDITION_ENCODER.setup()


def test_condition_is_mask_and_latents_of_the_image_and_grey_frames(encoder):
    image = gradient_image(16, 24)
    condition = encoder(image)["condition"]
    assert condition.shape == (1, 20, 3, 2, 3)
    assert (condition[:, :4, 0] == 1).all() and not condition[:, :4, 1:].any()
    video = torch.zeros(1, 3, 9, 16, 24)
    video[:, :, 0] = image
    assert torch.equal(condition[:, 4:], encoder.vae(video))
    black = video.clone()
    black[:, :, 1:] = -1
    assert not torch.equal(condition[:, 4:], encoder.vae(black))  # negative control


def test_tokens_are_those_of_the_image(encoder):
    image = gradient_image(16, 24)
    tokens = encoder(image)["image_tokens"]
    assert tokens.shape == (1, 5, 32)
    assert torch.equal(tokens, encoder.clip(image))
    assert not torch.equal(tokens, encoder(-image)["image_tokens"])


def test_tokens_are_those_of_the_image_before_it_was_resized(encoder):
    whole, frame = gradient_image(40, 60), gradient_image(16, 24).flip(3)
    both = encoder({"frame": frame, "whole": whole})
    assert torch.equal(both["image_tokens"], encoder.clip(whole))
    assert torch.equal(both["condition"], encoder(frame)["condition"])
    assert not torch.equal(both["image_tokens"], encoder(frame)["image_tokens"])


def test_images_that_cannot_be_encoded_are_refused(encoder):
    with pytest.raises(ValueError, match="height 20 is not divisible by 8"):
        encoder(torch.zeros(1, 3, 20, 24))
    with pytest.raises(ValueError, match=r"shape \[3, 16, 24\]"):
        encoder(torch.zeros(3, 16, 24))
    with pytest.raises(ValueError, match="latent_frames=0 must be at least 1"):
        WanImageConditionEncoderConfig(latent_frames=0)
