"""precision="fp8_gemm" in every method that has a KV cache, at tiny size or on meta."""

import pytest
import torch

from flashdreams.infra.component import select_context
from flashdreams.infra.config import config_fields, derive_config
from flashdreams.models.wan.matmuls import NORMED
from flashdreams.registry import discover

ALL = sorted([*NORMED, "ffn.2"])


def configs() -> dict:
    """Transformers of the registry by slug."""
    registry, found = discover(), {}
    for slug in sorted(registry):
        config = registry.resolve(slug).pipeline.diffusion_model.transformer
        if "precision" in config_fields(config) and config.streaming:
            found[slug] = config
    return found


CONFIGS = configs()
TINY = [slug for slug, config in CONFIGS.items() if config.dim < 256]
LARGE = {(type(c), c.dim): slug for slug, c in CONFIGS.items() if slug not in TINY}


def step(config) -> torch.Tensor:
    """The flow of the second chunk; large weights, so that FP8 shows."""
    torch.manual_seed(0)
    transformer = config.setup()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    transformer.requires_grad_(False).after_load()
    context = transformer.example_context(1)
    cache = transformer.initialize_cache(**select_context(transformer.initialize_cache, context))
    latent = torch.randn(transformer.latent_shape(1))
    for index in range(2):
        transformer.begin_step(index, cache, transformer.example_control(1))
        flow = transformer.predict_flow(latent, torch.tensor(500.0), cache)
        transformer.update_cache(latent, torch.tensor(0.0), cache)
    return flow


@pytest.mark.parametrize("slug", TINY)
@torch.no_grad()
def test_a_tiny_method_computes_wide_layers_in_fp8(slug):
    plain = derive_config(CONFIGS[slug], checkpoint=None, dtype="float32", precision="fp8")
    narrow = derive_config(plain, precision="fp8_gemm", fp8_gemm_min_width=16)
    expected, found = step(plain), step(narrow)
    error = float((found - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("slug", LARGE.values())
def test_a_method_of_full_size_quantizes_what_is_wide(slug):
    config = CONFIGS[slug]
    with torch.device("meta"):
        transformer = derive_config(config, precision="fp8_gemm", checkpoint=None).setup()
    transformer.quantize_weights()
    wanted = ALL if config.dim >= config.fp8_gemm_min_width else ["ffn.2"]
    assert transformer.resolved_choices()["fp8_layers"] == wanted
