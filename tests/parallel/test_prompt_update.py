"""A prompt changed in mid-rollout, window encoded again: N ranks against one (float32, 1e-5)."""

import pytest
import torch

from flashdreams.infra.diffusion.transformer import ContextChunk
from flashdreams.parallel.environment import OtherRankError
from flashdreams.parallel.mesh import Mesh, ParallelConfig
from flashdreams.parallel.parallelize import parallelize
from tests.harness import run_ranks
from tests.parallel.pipelines import begin, build_pipeline, prompt
from tests.parallel.rollout import build_model, make_mesh, relative_error
from tests.tiny import TEXT_DIM

SIZES = dict(latent_width=8, window_size_t=3, sink_size_t=1, relative_rope=True, control_dim=7)
"""12 tokens per latent frame, which two ranks can share; the window does not divide the chunk."""

STRATEGIES = {
    "ulysses": ParallelConfig(),
    "gather": ParallelConfig(ulysses_degree=1),
    "rotate": ParallelConfig(ulysses_degree=1, ring_method="rotate"),
    "tensor": ParallelConfig(tensor_parallel_degree=2),
}


@torch.no_grad()
def updated_rollout(mesh: Mesh, reencode: bool = True) -> list[torch.Tensor]:
    model = build_model(**SIZES)
    parallelize(model, model.parallel_plan(), mesh)
    draw = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    cache = model.initialize_cache(text=randn(1, 4, 12))
    chunks, flows = [], []
    for step in range(5):
        control, latent = randn(1, 24, 7), randn(1, 4, 2, 6, 8)
        if step == 4:
            model.update_context(cache, randn(1, 4, 12))
            if reencode:
                held = model.context_frames(cache)
                kept = [(c, tuple(t for t in (0, 1) if 2 * i + t in held)) for i, c in chunks]
                context = [
                    ContextChunk(
                        frames=tuple(2 * i + t for t in keep),
                        kept=keep,
                        latent=latent[:, :, list(keep)],
                        control=control,
                    )
                    for (i, _), ((latent, control), keep) in zip(chunks, kept, strict=True)
                    if keep
                ]
                model.rewrite_context(cache, context, torch.tensor(0.0))
        model.begin_step(step, cache, control)
        flows.append(model.predict_flow(latent, torch.tensor(700.0), cache))
        model.update_cache(latent, torch.tensor(0.0), cache)
        chunks.append((step, (latent, control)))
    return flows


def on_ranks(strategy: str) -> list[torch.Tensor]:
    return updated_rollout(make_mesh(STRATEGIES[strategy], 2))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_reencoding_equals_one_rank(strategy):
    expected = updated_rollout(Mesh())
    for flows in run_ranks(on_ranks, 2, strategy):
        assert relative_error(flows, expected) <= 1e-5


def test_reencoding_is_seen():
    """Negative control: the last flow depends on it, the earlier ones do not."""
    with_it, without = updated_rollout(Mesh()), updated_rollout(Mesh(), reencode=False)
    assert relative_error(with_it[:4], without[:4]) == 0
    assert relative_error(with_it[4:], without[4:]) > 1e-3


def refused_on_both_branches() -> list[str]:
    """What each rank says to prompts that only the conditional branch looks at."""
    changes = {"diffusion_model": {"transformer": {"rewritten_sink": "moved"}}}
    pipeline, _ = build_pipeline("guided", 2, **changes)
    cache, said = begin(pipeline, "guided"), []
    wide = torch.zeros(1, 4, TEXT_DIM + 1)
    for work in (
        lambda: pipeline.initialize_cache(text=wide, negative_text=prompt(9)),
        lambda: pipeline.update_prompt(cache, wide),
        lambda: pipeline.update_prompt(cache, prompt(1), reencode_window="chunks"),
    ):
        with pytest.raises((ValueError, OtherRankError)) as error:
            work()
        said.append(str(error.value))
    pipeline.generate(0, cache, 0.0)  # and the ranks still agree
    return said


def test_a_prompt_that_one_branch_of_guidance_refuses_is_refused_on_all_ranks():
    (*wide, moved), other = run_ranks(refused_on_both_branches, 2)
    assert all(text.startswith("Text embeddings must be") for text in wide)
    assert moved == 'rewritten_sink="moved" requires mode="once".'
    assert other == ["Another rank refused the prompt; see its own message."] * 2 + [moved]
