from dataclasses import replace

import pytest
from torch import nn

from flashdreams.parallel.mesh import Axis, Mesh, ParallelConfig, ParallelDegrees
from flashdreams.parallel.parallelize import parallelize
from flashdreams.parallel.plan import trunk_is_cut, units_of
from tests.parallel.rollout import build_model


@pytest.fixture(scope="module")
def model():
    return build_model()


def test_one_rank_leaves_the_model_untouched(model):
    fresh = build_model()
    kinds = [type(m) for m in fresh.modules()]
    report = parallelize(fresh, fresh.parallel_plan(), Mesh())
    assert str(report) == "untouched" and not report.slices and not report.replicated
    assert [type(m) for m in fresh.modules()] == kinds
    assert not any(m._forward_hooks for m in fresh.modules())
    with pytest.raises(ValueError, match="already parallelized"):
        parallelize(fresh, fresh.parallel_plan(), Mesh())


def test_a_glob_without_match_lists_near_misses(model):
    plan = replace(model.parallel_plan(), gather={"heads": 1})
    with pytest.raises(ValueError, match=r"gather names 'heads'.*Near misses: head"):
        parallelize(model, plan, Mesh())
    plan = replace(model.parallel_plan(), attention=("blocks.*.attn.core",))
    with pytest.raises(ValueError, match=r"Near misses: .*blocks\.\*\.self_attn\.core"):
        parallelize(model, plan, Mesh())


def test_cores_and_units_have_to_match(model):
    for wrong in ({"cores": {"blocks.*.mouse": "all_tokens"}}, {"units": {"blocks.*.act": 4}}):
        (name,) = wrong
        with pytest.raises(ValueError, match=rf"plan's {name} names 'blocks"):
            parallelize(model, replace(model.parallel_plan(), **wrong), Mesh())


def test_units_are_those_of_the_submodule_that_a_name_is_in(model):
    plan = replace(model.parallel_plan(), units={"blocks.*.self_attn": 12, "blocks.*.ffn": 97})
    assert units_of(plan, "blocks.3.self_attn.norm_q") == units_of(plan, "blocks.0.self_attn") == 12
    assert units_of(plan, "blocks.0.ffn.2") == 97
    assert units_of(plan, "blocks.0.self_attn_2") is None and units_of(plan, "head") is None
    assert trunk_is_cut(plan, 3) and not trunk_is_cut(plan, 8)
    assert trunk_is_cut(model.parallel_plan(), 8)  # without units degrees divide anyway


def test_a_forgotten_linear_is_refused(model):
    plan = model.parallel_plan()
    tensor = {k: v for k, v in plan.tensor.items() if k != "blocks.*.ffn.2"}
    with pytest.raises(ValueError, match=r"omits linear layers of a block: blocks\.\*\.ffn"):
        parallelize(model, replace(plan, tensor=tensor), Mesh())
    tensor["blocks.*.ffn.2"] = "replicated"
    parallelize(build_model(), replace(plan, tensor=tensor), Mesh())


def test_half_a_sequence_plan_is_refused(model):
    plan = model.parallel_plan()
    for missing in ({"gather": {}}, {"attention": ()}):
        with pytest.raises(ValueError, match="needs split, gather, and attention or cores"):
            parallelize(model, replace(plan, **missing), Mesh())
    cores = dict.fromkeys(plan.attention, "all_tokens")
    parallelize(build_model(), replace(plan, attention=(), cores=cores), Mesh())


def test_a_module_without_a_plan_says_that_it_is_replicated():
    mesh = Mesh(degrees=ParallelDegrees(ring=2), sequence=Axis("sequence", 2, 0))
    report = parallelize(nn.Linear(2, 2), None, mesh)
    assert report.replicated and str(report).startswith("replicated")


def test_degrees_are_kept_in_the_config():
    assert Mesh().config == ParallelConfig()
