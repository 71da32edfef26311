import pytest
import torch.distributed as dist

from flashdreams.parallel.mesh import (
    Mesh,
    ParallelConfig,
    ParallelDegrees,
    build_mesh,
    resolve_degrees,
)
from tests.harness import run_ranks


@pytest.mark.parametrize(
    ("world_size", "num_heads", "guided", "expected"),
    [
        (1, 12, False, "1 = cfg 1 x ring 1 x ulysses 1 x tp 1"),
        (8, 12, False, "8 = cfg 1 x ring 2 x ulysses 4 x tp 1"),
        (8, 12, True, "8 = cfg 2 x ring 1 x ulysses 4 x tp 1"),
        (8, 40, False, "8 = cfg 1 x ring 1 x ulysses 8 x tp 1"),
        (3, 12, True, "3 = cfg 1 x ring 1 x ulysses 3 x tp 1"),
        (5, 12, False, "5 = cfg 1 x ring 5 x ulysses 1 x tp 1"),
        (4, 6, False, "4 = cfg 1 x ring 2 x ulysses 2 x tp 1"),
        (4, None, False, "4 = cfg 1 x ring 4 x ulysses 1 x tp 1"),
    ],
)
def test_auto_degrees_print_as_arithmetic(world_size, num_heads, guided, expected):
    degrees = resolve_degrees(ParallelConfig(), world_size, num_heads, guided)
    assert str(degrees) == expected


def test_named_degrees_leave_the_rest_to_the_others():
    config = ParallelConfig(tensor_parallel_degree=2, ring_degree=1)
    assert resolve_degrees(config, 8, 40) == ParallelDegrees(ulysses=4, tp=2)
    assert resolve_degrees(ParallelConfig(ulysses_degree=1), 6, 12) == ParallelDegrees(ring=6)


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        (
            ParallelConfig(ulysses_degree=8),
            8,
            r"num_heads=12 is not divisible by tensor_parallel_degree \* ulysses_degree = 1 \* 8 "
            r"\(allowed ulysses degrees here: 1, 2, 4\).*--parallel.ring-degree 2 "
            r"--parallel.ulysses-degree 4",
        ),
        (ParallelConfig(tensor_parallel_degree=8), 8, "Try .*"),
        (ParallelConfig(ulysses_degree=3), 4, "product 3 does not divide the world size 4"),
        (ParallelConfig(ulysses_degree=0), 4, "ulysses_degree=0 must be at least 1"),
        (ParallelConfig(cfg_parallel_degree=2), 4, "uses no guidance"),
        (ParallelConfig(cfg_parallel_degree=3), 3, "two branches"),
        (ParallelConfig(strict=True, tensor_parallel_degree=2), 2, "changes bits"),
        (ParallelConfig(strict=True, ring_method="rotate"), 2, "ring-method gather"),
        (
            ParallelConfig(
                ulysses_degree=2, ring_degree=1, cfg_parallel_degree=1, tensor_parallel_degree=1
            ),
            4,
            "product is 2, the world size 4",
        ),
    ],
)
def test_impossible_degrees_are_refused_with_what_works(config, world_size, message):
    with pytest.raises(ValueError, match=message):
        resolve_degrees(config, world_size, 12)


def test_refusal_keeps_the_wishes_that_can_be_kept():
    config = ParallelConfig(tensor_parallel_degree=2, ulysses_degree=8)
    with pytest.raises(ValueError, match=r"ulysses-degree 2 --parallel.tensor-parallel-degree 2"):
        resolve_degrees(config, 16, 12)


def test_a_model_that_may_stay_whole_takes_every_degree():
    for config, expected in (
        (ParallelConfig(), ParallelDegrees(ring=2, ulysses=4)),
        (ParallelConfig(ulysses_degree=8), ParallelDegrees(ulysses=8)),
        (ParallelConfig(tensor_parallel_degree=8), ParallelDegrees(tp=8)),
    ):
        assert resolve_degrees(config, 8, 12, any_degree=True) == expected
    with pytest.raises(ValueError, match="product 3 does not divide the world size 4"):
        resolve_degrees(ParallelConfig(ulysses_degree=3), 4, 12, any_degree=True)


def test_what_a_cache_cannot_do_is_refused():
    rotate = ParallelConfig(ring_method="rotate", ring_degree=2)
    assert resolve_degrees(rotate, 4, 12).ring == 2
    assert resolve_degrees(rotate, 4, 12, cached_frame_tokens=16).ring == 2
    with pytest.raises(ValueError, match="15 tokens are not divisible by ring_degree=2"):
        resolve_degrees(rotate, 4, 12, cached_frame_tokens=15)
    xfuser = ParallelConfig(context_backend="xfuser")
    assert resolve_degrees(xfuser, 4, 12).ulysses == 4
    with pytest.raises(ValueError, match="cannot serve a streaming model"):
        resolve_degrees(xfuser, 4, 12, cached_frame_tokens=16)


def test_one_rank_needs_no_process_group():
    mesh = build_mesh(ParallelDegrees(), "cpu")
    assert isinstance(mesh, Mesh) and mesh.sequence.group is None
    with pytest.raises(ValueError, match="single rank"):
        mesh.channel(mesh.ring)
    with pytest.raises(ValueError, match="needs 2 ranks; there are 1"):
        build_mesh(ParallelDegrees(ulysses=2), "cpu")


def _coordinates():
    mesh = build_mesh(ParallelDegrees(ring=2, ulysses=2), "cpu")
    axes = (mesh.cfg, mesh.ring, mesh.ulysses, mesh.tp, mesh.sequence, mesh.decode)
    members = dist.get_process_group_ranks(mesh.ring.group)
    return [axis.rank for axis in axes], members


def test_mesh_orders_axes_from_outer_to_inner():
    results = run_ranks(_coordinates, 4)
    assert [r[0] for r in results] == [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 1, 1],
        [0, 1, 0, 0, 2, 2],
        [0, 1, 1, 0, 3, 3],
    ]
    assert results[1][1] == [1, 3]
