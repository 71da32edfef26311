"""LingBot-World on several ranks: the camera branch and its weights; float32."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from flashdreams.integrations.lingbot_world.transformer import (
    LingBotTransformer,
    LingBotTransformerConfig,
)
from flashdreams.parallel.mesh import Mesh, ParallelConfig
from flashdreams.parallel.parallelize import parallelize
from flashdreams.parallel.tensor import GatheredColwiseLinear
from flashdreams.runtime.checkpoint import CheckpointConfig, load_checkpoint
from tests.harness import run_ranks
from tests.manifests import load_manifest, write_sparse_safetensors
from tests.parallel.rollout import make_mesh, relative_error

FLOAT32_TOLERANCE = 1e-5
NUM_HEADS = 4
STEPS = 4
CONFIG = LingBotTransformerConfig(
    dim=48,
    ffn_dim=96,
    num_heads=NUM_HEADS,
    num_layers=2,
    condition_channels=20,
    freq_dim=16,
    text_dim=12,
    text_len=6,
    latent_height=6,
    latent_width=10,
    window_size_t=6,
    sink_size_t=3,
)
"""45 tokens in a chunk, so that 2 and 4 ranks have to pad."""

STRATEGIES = {
    2: [{}, {"ulysses_degree": 1}, {"tensor_parallel_degree": 2}],
    4: [
        {},
        {"ulysses_degree": 2},
        {"tensor_parallel_degree": 2},
        {"tensor_parallel_degree": 4},
    ],
}


def build() -> LingBotTransformer:
    torch.manual_seed(0)
    model = LingBotTransformer(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def roll_out(model: LingBotTransformer, camera_offset: float = 0.0) -> list[torch.Tensor]:
    """Clean latents of every AR step, past the end of the window; a batch of two."""
    c, draw = CONFIG, torch.Generator().manual_seed(1)
    shape = (2, 16, c.len_t, c.latent_height, c.latent_width)
    text = torch.randn(2, 5, c.text_dim, generator=draw)
    condition = torch.randn(2, 20, 7, *shape[3:], generator=draw)
    state, latents = model.initialize_cache(text, condition=condition), []
    for step in range(STEPS):
        camera = torch.randn(1, c.len_t * c.tokens_per_frame, c.camera_dim, generator=draw)
        model.begin_step(step, state, camera + camera_offset)
        x = torch.randn(shape, generator=draw)
        for time in (947, 825):
            x = x - 0.5 * model.predict_flow(x, torch.tensor(time), state)
        model.update_cache(x, torch.tensor(0), state)
        latents.append(x)
    return latents


def parallel_model(world_size: int, strategy: dict) -> tuple[LingBotTransformer, Mesh]:
    mesh = make_mesh(ParallelConfig(**strategy), world_size, NUM_HEADS)
    model = build()
    parallelize(model, model.parallel_plan(), mesh)
    return model, mesh


def all_strategies(world_size: int) -> dict[str, list[torch.Tensor]]:
    found = {}
    for strategy in STRATEGIES[world_size]:
        model, mesh = parallel_model(world_size, strategy)
        found[f"{mesh.degrees} {strategy}"] = roll_out(model)
    return found


@cache
def one_rank() -> list[torch.Tensor]:
    return roll_out(build())


@pytest.mark.parametrize("world_size", [2, 4])
def test_rollouts_equal_one_rank(world_size):
    for latents in run_ranks(all_strategies, world_size, world_size):
        errors = {name: relative_error(x, one_rank()) for name, x in latents.items()}
        assert len(errors) == len(STRATEGIES[world_size])
        assert max(errors.values()) <= FLOAT32_TOLERANCE, errors


def another_camera_on_the_second_rank() -> list[torch.Tensor]:
    model, mesh = parallel_model(2, {})
    return roll_out(model, camera_offset=0.1 * mesh.ulysses.rank)


def test_a_camera_that_is_not_the_same_everywhere_is_seen():
    """Negative control: every rank reads the camera for its own tokens."""
    for latents in run_ranks(another_camera_on_the_second_rank, 2):
        assert relative_error(latents, one_rank()) > 1e-3


def test_camera_branch_is_split_over_sequence_and_weights():
    plan = build().parallel_plan()
    assert plan.split["camera_tokens"] == 1
    assert plan.tensor["blocks.*.cam_injector_layer1"] == "colwise"
    assert plan.tensor["blocks.*.cam_injector_layer2"] == "rowwise"


def gathered_traffic():
    model, mesh = parallel_model(2, {"tensor_parallel_degree": 2})
    roll_out(model)
    return {name: mesh.meter.counts[f"tp.{name}"] for name in ("all_gather", "all_reduce")}


def test_camera_scale_and_shift_are_gathered_once_per_step():
    """Two outputs per block and step, of which a rank sends its half; passes gather nothing."""
    c = CONFIG
    tokens = c.len_t * c.tokens_per_frame
    for traffic in run_ranks(gathered_traffic, 2):
        assert traffic["all_gather"].calls == 2 * c.num_layers * STEPS
        assert traffic["all_gather"].bytes_sent == traffic["all_gather"].calls * tokens * c.dim * 2
        assert traffic["all_reduce"].calls > 4 * traffic["all_gather"].calls


def forget_to_gather():
    GatheredColwiseLinear.forward = lambda self, input: F.pad(
        F.linear(input, self.weight, self.bias), (0, self.weight.shape[0] * (self.channel.size - 1))
    )
    model, _ = parallel_model(2, {"tensor_parallel_degree": 2})
    return roll_out(model)


def test_outputs_that_are_not_gathered_are_seen():
    """Negative control."""
    for latents in run_ranks(forget_to_gather, 2):
        assert relative_error(latents, one_rank()) > 1e-3


def load_slices(path: str, world_size: int):
    """Build with other weights, cut, read this rank's slices alone."""
    torch.manual_seed(5)
    model = LingBotTransformer(CONFIG)
    mesh = make_mesh(ParallelConfig(tensor_parallel_degree=world_size), world_size, NUM_HEADS)
    slices = parallelize(model, model.parallel_plan(), mesh).slices
    report = load_checkpoint(model, CheckpointConfig(source=path), slices=slices)
    own = sum(p.numel() for p in model.parameters()) * 4
    cut = {name for name in slices if ".cam_" in name or "c2ws" in name}
    return roll_out(model.requires_grad_(False)), report.bytes_read, own, len(cut)


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_rank_reads_its_slices_alone(world_size, tmp_path):
    model = build()
    path = str(tmp_path / "model.safetensors")
    save_file(model.state_dict(), path)
    whole = sum(p.numel() for p in model.parameters()) * 4
    for latents, read, own, cut in run_ranks(load_slices, world_size, path, world_size):
        assert read == own < whole
        # Two weights and a bias of each pair; weight and bias of scale and of shift.
        assert cut == 3 * (CONFIG.num_layers + 1) + 4 * CONFIG.num_layers
        assert relative_error(latents, one_rank()) <= FLOAT32_TOLERANCE


def fit_full_size(path: str, world_size: int) -> int:
    """Compare the full model's slices with the file; bytes of this rank's part of the file."""
    from flashdreams.integrations.lingbot_world.config import TRANSFORMER

    with torch.device("meta"):
        model = LingBotTransformer(TRANSFORMER)
    mesh = make_mesh(ParallelConfig(tensor_parallel_degree=world_size), world_size, 40)
    slices = parallelize(model, model.parallel_plan(), mesh).slices
    load_checkpoint(model, CheckpointConfig(source=path), slices=slices, device="meta")
    return sum(p.numel() for p in model.parameters()) * 4


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "share_gb"), [(2, 37.58), (4, 19.27)])
def test_full_size_slices_fit_the_checkpoint(world_size, share_gb, tmp_path):
    path = tmp_path / "zeros.safetensors"
    write_sparse_safetensors(path, load_manifest("lingbot_world_fast"))
    for own in run_ranks(fit_full_size, world_size, str(path), world_size):
        assert own / 1e9 == pytest.approx(share_gb, abs=0.01)
