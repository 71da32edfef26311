"""LoRAs under tensor parallelism: each rank merges its part, and the bits are those of one rank."""

import torch
from safetensors.torch import save_file

from flashdreams.infra.config import derive_config
from flashdreams.integrations.self_forcing.config import TINY_PIPELINE
from flashdreams.parallel.mesh import ParallelConfig, build_mesh, resolve_degrees
from tests.harness import run_ranks


def roll(source: str, world_size: int, lora: str):
    """This rank's weights and their slices, and the first latent."""
    loras = (lora,) if lora else ()
    transformer = dict(checkpoint=dict(source=source), loras=loras)
    config = derive_config(TINY_PIPELINE, diffusion_model=dict(transformer=transformer))
    parallel = ParallelConfig(tensor_parallel_degree=world_size)
    pipeline = config.setup(device="cpu", load=False)
    degrees = resolve_degrees(parallel, world_size, config.diffusion_model.transformer.num_heads)
    reports = pipeline.parallelize(build_mesh(degrees, "cpu", parallel))
    pipeline.load()
    cache = pipeline.initialize_cache(text=torch.ones(1, 4, 32), seed=1)
    pipeline.generate(0, cache)
    weights = dict(pipeline.diffusion_model.transformer.state_dict())
    return weights, reports["transformer"].slices, cache.latent


def test_ranks_merge_their_parts(tmp_path):
    torch.manual_seed(0)
    weights = TINY_PIPELINE.diffusion_model.transformer.setup().state_dict()
    base, lora = tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    save_file(weights, base)
    update = {}
    for name, value in weights.items():
        if name.startswith("blocks.") and name.endswith(".weight") and value.ndim == 2:
            stem = f"diffusion_model.{name.removesuffix('.weight')}"
            update[f"{stem}.lora_A.weight"] = torch.randn(4, value.shape[1])
            update[f"{stem}.lora_B.weight"] = 0.1 * torch.randn(value.shape[0], 4)
            update[f"{stem}.diff_b"] = torch.randn(value.shape[0])
    save_file(update, lora)
    whole, _, latent = run_ranks(roll, 1, str(base), 1, str(lora))[0]
    for found, slices, other in run_ranks(roll, 2, str(base), 2, str(lora)):
        assert len(slices) > 20
        for name, value in found.items():
            part = slices.get(name)
            expected = whole[name] if part is None else whole[name].narrow(*part[:3])
            assert torch.equal(value, expected), name
        torch.testing.assert_close(other, latent, rtol=0, atol=1e-5)
    plain = run_ranks(roll, 1, str(base), 1, "")[0][2]
    assert (plain - latent).abs().max() > 1e-2  # negative control
