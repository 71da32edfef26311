"""What the runner of text-to-video methods asks of a transformer's config."""

from dataclasses import dataclass, replace

import pytest

from flashdreams.infra.diffusion.transformer import TransformerConfig
from flashdreams.infra.video_runner import TextToVideoRunnerConfig
from tests.tiny import tiny_pipeline


@dataclass(kw_only=True)
class OtherFamilyConfig(TransformerConfig):
    patch_size: tuple[int, int, int] = (1, 4, 4)
    text_dim: int = 8
    text_len: int = 4
    streaming: bool = True


def runner_config(transformer: TransformerConfig, **fields: object) -> TextToVideoRunnerConfig:
    pipeline = tiny_pipeline()
    model = replace(pipeline.diffusion_model, transformer=transformer)
    pipeline = replace(pipeline, diffusion_model=model)
    return TextToVideoRunnerConfig(runner_name="other", pipeline=pipeline, **fields)


def test_any_family_with_the_fields_is_taken() -> None:
    transformer = OtherFamilyConfig()
    assert runner_config(transformer, height=64).transformer is transformer
    with pytest.raises(ValueError, match="--height 48: must be a multiple of 32 pixels"):
        runner_config(transformer, height=48)


def test_a_config_without_them_is_refused_by_name() -> None:
    expected = (
        "other needs a transformer config with patch_size, text_dim, text_len, streaming, which "
        "TransformerConfig lacks."
    )
    with pytest.raises(TypeError) as caught:
        runner_config(TransformerConfig())
    assert str(caught.value) == expected
