"""The planner's counts against tensors and measurements, and its text."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from flashdreams import plan
from flashdreams.infra.config import derive_config
from flashdreams.infra.weights import weight_nbytes
from flashdreams.integrations.lingbot_world.config import PIPELINE as LINGBOT
from flashdreams.integrations.lingbot_world.config import TAEHV_PIPELINE as LINGBOT_TAEHV
from flashdreams.integrations.lingbot_world.config import TINY_PIPELINE as LINGBOT_TINY
from flashdreams.integrations.matrix_game.config import TINY_PIPELINE as MATRIX_GAME
from flashdreams.integrations.self_forcing.config import TAEHV_PIPELINE, TINY_PIPELINE
from flashdreams.integrations.toy_world.config import TOY_WORLD_PIPELINE as TOY_WORLD
from flashdreams.models.wan.transformer import WanTransformer
from flashdreams.parallel.dry import dry_mesh
from flashdreams.parallel.mesh import ParallelConfig, ParallelDegrees
from flashdreams.planning import plans
from flashdreams.planning.advice import explain
from flashdreams.planning.counts import Work, count, storages
from flashdreams.planning.devices import DEVICES, GIB, read_devices, resolve_gpus
from flashdreams.planning.operators import OperatorTimes, _in_turn, control_ms
from flashdreams.planning.plans import Planner, predict_ms

H200 = DEVICES["H200-141GB"]


def test_equal_layers_are_extrapolated_exactly():
    transformer = derive_config(TINY_PIPELINE.diffusion_model.transformer, num_layers=5)
    config = derive_config(TINY_PIPELINE, diffusion_model={"transformer": transformer})
    planner, mesh = Planner(config, H200), dry_mesh(ParallelDegrees(ulysses=2), ParallelConfig())
    fast, whole = planner._network(transformer, mesh), planner._run_network(transformer, mesh)
    for name in ("call", "clean", "begin"):
        found, expected = getattr(fast, name), getattr(whole, name)
        assert replace(found, operators={}) == replace(expected, operators={})
    assert (fast.weights, fast.caches, fast.state) == (whole.weights, whole.caches, whole.state)


def test_meshes_that_a_run_would_refuse_are_not_planned():
    """Three tokens per latent frame on two ranks, and a feed-forward that they do not divide."""
    odd = {"latent_height": 2, "latent_width": 6, "ffn_dim": 91}

    def meshes(parallel=None, **changes):
        config = derive_config(TINY_PIPELINE, diffusion_model={"transformer": changes})
        plans = Planner(config, H200, parallel=parallel).plans(2)
        return {(p.degrees.ring, p.degrees.ulysses, p.degrees.tp) for p in plans}

    everything = {(2, 1, 1), (1, 2, 1), (1, 1, 2)}
    assert meshes() == everything
    assert meshes(**odd) == everything - {(1, 1, 2)}
    assert meshes(ParallelConfig(strict=True)) == everything - {(1, 1, 2)}
    assert meshes(ParallelConfig(ring_method="rotate"), **odd) == {(1, 2, 1)}


def test_weights_and_state_are_those_of_a_rollout():
    pipeline = TINY_PIPELINE.setup(device="cpu")
    cache = pipeline.initialize_cache(text=["a red fox"])
    for index in range(4):
        pipeline.generate(index, cache)
        pipeline.finalize(index, cache)
    (found,) = Planner(TINY_PIPELINE, H200).plans(1)
    transformer = pipeline.diffusion_model.transformer
    assert found.memory.transformer == storages(list(transformer.parameters()))
    assert found.memory.kv_cache == storages(cache.diffusion.conditional.caches)
    measured = storages([cache.diffusion.conditional, cache.decoder])
    assert found.memory.session == pytest.approx(measured, rel=0.05)


def test_context_may_hold_numbers(monkeypatch):
    def with_batch_size(self, batch_size):
        return {"text": torch.zeros(batch_size, 8, 32), "batch_size": batch_size}

    (plain,) = Planner(TINY_PIPELINE, H200).plans(1)
    monkeypatch.setattr(WanTransformer, "example_context", with_batch_size)
    (found,) = Planner(TINY_PIPELINE, H200).plans(1)
    assert found.memory.kv_cache == plain.memory.kv_cache


def test_the_step_that_was_measured_on_an_h200_is_met():
    """344 ms with the defaults and TAEHV, 437 without fused kernels; 10 GiB, no text encoder."""
    config = derive_config(TAEHV_PIPELINE, text_encoder=None)
    (found,) = Planner(config, H200).plans(1)
    assert found.ms.total == pytest.approx(344, rel=0.06)
    unfused = dict(transformer=dict(fused_kernels=False))
    (slower,) = Planner(derive_config(config, diffusion_model=unfused), H200).plans(1)
    assert slower.ms.total == pytest.approx(437, rel=0.12)
    assert (found.memory.total - found.memory.reserve) / GIB == pytest.approx(10, rel=0.05)
    assert found.frames == 12 and found.is_real_time and found.limit == "attention"


def test_an_fp8_cache_is_read_at_a_rate_of_its_own_by_hopper_alone():
    """Both measured in FP8 at commit 0748e3c; LingBot's row was not used for the rate."""
    fp8 = {"transformer": {"precision": "fp8"}}
    for pipeline, measured_ms, native_ms in (
        (TAEHV_PIPELINE, 287.5, 344.9),
        (LINGBOT_TAEHV, 1525, 1712),
    ):
        config = derive_config(pipeline, text_encoder=None)
        (found,) = Planner(derive_config(config, diffusion_model=fp8), H200).plans(1)
        (native,) = Planner(config, H200).plans(1)
        assert found.ms.total == pytest.approx(measured_ms, rel=0.05)
        assert native.ms.total == pytest.approx(native_ms, rel=0.06)
        assert native.ms.total > 1.05 * measured_ms  # negative control
        assert found.memory.kv_cache == pytest.approx(native.memory.kv_cache / 2, rel=0.01)
    config = derive_config(TINY_PIPELINE, diffusion_model=fp8)
    with pytest.raises(ValueError, match="FP8 attention needs a Hopper GPU"):
        Planner(config, DEVICES["A100-80GB"]).plans(1)


def test_fp8_matmuls_are_counted_apart_and_weigh_a_byte():
    """Of LingBot's matmuls, all of a block but output projections and camera: 77 %."""
    config = derive_config(LINGBOT_TAEHV, text_encoder=None)
    plans = {}
    for precision in ("fp8", "fp8_gemm"):
        change = {"transformer": {"precision": precision}}
        (plans[precision],) = Planner(derive_config(config, diffusion_model=change), H200).plans(1)
    plain, found = plans["fp8"], plans["fp8_gemm"]
    assert plain.work.fp8_gemm_flops == 0 and found.work.gemm_flops == plain.work.gemm_flops
    assert found.work.fp8_gemm_flops / found.work.gemm_flops == pytest.approx(0.77, abs=0.01)
    assert found.ms.gemm < 0.7 * plain.ms.gemm and found.ms.attention == plain.ms.attention
    weights = 40 * (4 * 5120**2 + 2 * 5120 * 13824)  # bfloat16 before
    saved = plain.memory.transformer - found.memory.transformer
    assert saved == pytest.approx(weights, rel=1e-3)
    with pytest.raises(ValueError, match="precision='fp8_gemm' cannot be planned"):
        Planner(
            derive_config(config, diffusion_model=change), replace(H200, fp8_gemm_tflops=0)
        ).plans(1)


def test_layers_that_differ_are_all_run():
    """Matrix-Game's first blocks have an action module, the others none."""
    transformer = MATRIX_GAME.diffusion_model.transformer
    kept = derive_config(transformer, num_layers=3, action_blocks=2)
    config = derive_config(MATRIX_GAME, diffusion_model={"transformer": kept})
    planner, mesh = Planner(config, H200), dry_mesh(ParallelDegrees(), ParallelConfig())
    found = planner._network(kept, mesh)
    assert found.call == planner._run_network(kept, mesh).call
    all_alike = planner._run_network(derive_config(kept, action_blocks=3), mesh)
    assert found.call.flops < all_alike.call.flops  # negative control


def test_what_a_control_input_needs_is_counted_once_per_step():
    """LingBot makes scale and shift of every block from the camera, before the first call."""
    planner = Planner(LINGBOT_TINY, H200)
    mesh = dry_mesh(ParallelDegrees(), ParallelConfig())
    found = planner._run_network(LINGBOT_TINY.diffusion_model.transformer, mesh)
    assert found.begin.gemm_flops > 0
    (plan_of_it,) = planner.plans(1)
    steps = LINGBOT_TINY.diffusion_model.scheduler.setup().num_inference_steps
    once = plan_of_it.work.gemm_flops - steps * found.call.gemm_flops - found.clean.gemm_flops
    decoder = planner._decoder(LINGBOT_TINY.diffusion_model.transformer, mesh)[1]
    assert once == found.begin.gemm_flops + decoder.gemm_flops


def test_collectives_of_the_control_input_are_counted():
    """With split weights, scale and shift of every block are gathered once per step."""
    planner = Planner(LINGBOT_TINY, H200)
    mesh = dry_mesh(ParallelDegrees(tp=2), ParallelConfig())
    found = planner._run_network(LINGBOT_TINY.diffusion_model.transformer, mesh)
    (plan_of_it,) = [plan for plan in planner.plans(2) if plan.degrees.tp == 2]
    steps = LINGBOT_TINY.diffusion_model.scheduler.setup().num_inference_steps
    once = plan_of_it.work.sent_bytes - steps * found.call.sent_bytes - found.clean.sent_bytes
    decoder = planner._decoder(LINGBOT_TINY.diffusion_model.transformer, mesh)[1]
    assert found.begin.sent_bytes > 0 and once == found.begin.sent_bytes + decoder.sent_bytes


@pytest.mark.parametrize("pipeline", [LINGBOT_TINY, MATRIX_GAME, TOY_WORLD])
def test_the_control_encoder_takes_time_on_a_host(pipeline, monkeypatch):
    transformer = Planner(pipeline, H200)._transformer
    assert 0 < control_ms(pipeline.encoder, transformer, 12) < 1000
    assert control_ms(None, transformer, 12) == 0
    monkeypatch.setattr(plans, "control_ms", lambda *_: 50.0)
    host = replace(H200, is_host=True)
    (with_it,) = Planner(pipeline, host).plans(1)
    (without,) = Planner(derive_config(pipeline, encoder=None), H200).plans(1)
    assert with_it.ms.calls == pytest.approx(without.ms.calls + 50)


def test_operators_are_timed_at_their_own_shapes_where_a_device_says_so():
    with torch.device("meta"):
        linear, conv = nn.Linear(64, 64), nn.Conv3d(4, 4, 3)
        rows, clip = torch.empty(8, 64), torch.empty(1, 4, 4, 9, 9)
    work = count(linear, lambda: linear(rows).relu_())[0] + count(conv, lambda: conv(clip))[0]
    by_kind = {operator.kind: operator for operator in work.operators}
    assert set(by_kind) == {"gemm", "memory", "convolution"}
    weights = by_kind["gemm"].args[2]
    assert weights.kept and not by_kind["gemm"].args[1].kept
    times = OperatorTimes(budget_s=0.002)
    seconds = times.seconds(work.operators)
    assert set(seconds) == set(work.operators) and all(0 < s < 1 for s in seconds.values())
    assert times.seconds(work.operators) == seconds  # each is timed once
    slow = replace(H200, times=times, call_us=0.0)
    found = predict_ms(work, ParallelDegrees(), slow)
    assert found.total == pytest.approx(1e3 * sum(seconds.values()))
    huge = replace(by_kind["gemm"], flops=10**12)
    assert times.seconds({huge: 1}) == {}
    assert predict_ms(work, ParallelDegrees(), H200).total < found.total  # negative control


def test_operators_take_turns_as_often_as_in_a_step():
    assert _in_turn([1, 4, 2]) == [1, 2, 1, 0, 1, 2, 1]
    assert _in_turn([]) == []


def test_the_program_around_operators_and_steps_takes_time():
    work, one = Work(calls=10), ParallelDegrees()
    device = replace(H200, call_us=5.0, step_us=300.0)
    assert predict_ms(work, one, device).calls == pytest.approx(0.35)
    assert predict_ms(work, one, H200).calls == 0  # negative control: hidden on a GPU


def test_all_legal_degrees_are_there_and_the_best_is_first():
    found = Planner(TINY_PIPELINE, H200).plans(4)  # two heads
    assert {(p.degrees.ring, p.degrees.ulysses, p.degrees.tp) for p in found} == {
        (4, 1, 1), (2, 2, 1), (2, 1, 2),
    }  # fmt: skip
    assert [p.ms.total for p in found] == sorted(p.ms.total for p in found)
    assert found[0].sessions > 1 and found[0].longest_window_t > 7


def test_more_memory_is_advised_where_it_does_not_fit():
    small = DEVICES["H100-80GB"]
    text = explain(LINGBOT, small, ParallelDegrees())
    assert "KV cache 72.48" in text and "there are 79.60 GiB" in text
    assert "The cheapest change that fits: 2 ranks: torchrun --nproc-per-node 2" in text


def test_a_text_encoder_in_host_memory_is_advised_first():
    small = replace(H200, memory_gib=16.0)
    config = derive_config(TAEHV_PIPELINE, diffusion_model={"transformer": {"window_size_t": 9}})
    text = explain(config, small, ParallelDegrees())
    assert "that fits: --pipeline.text-encoder.offload True" in text
    offloaded = derive_config(config, text_encoder={"offload": True})
    before, after = (Planner(c, small).plan(ParallelDegrees()) for c in (config, offloaded))
    assert after.fits and not before.fits
    with torch.device("meta"):
        weights = weight_nbytes(config.text_encoder.setup())
    assert after.memory.others == before.memory.others - weights
    host = Planner(offloaded, replace(small, is_host=True))  # which ignores it
    assert host._other_weights == weights


def test_a_file_changes_the_table(tmp_path):
    path = tmp_path / "devices.yaml"
    path.write_text("H200-141GB: {gemm_tflops: 100}\n")
    table = read_devices(path)
    assert table["H200-141GB"].gemm_tflops == 100 and str(path) in table["H200-141GB"].source
    path.write_text("H200-141GB: {gem_tflops: 100}\n")
    with pytest.raises(ValueError, match=r"H200-141GB: .*gem_tflops"):
        read_devices(path)


@pytest.mark.parametrize("value", ["0", "-1", ".nan", ".inf", "'9'", "true", "[1]"])
def test_figures_of_a_file_that_are_none_are_refused(value, tmp_path):
    path = tmp_path / "devices.yaml"
    path.write_text(f"H200-141GB: {{gemm_tflops: {value}}}\n")
    with pytest.raises(ValueError, match=r"--devices .*H200-141GB: gemm_tflops cannot be"):
        read_devices(path)


@pytest.mark.parametrize("fps", ["0", "-3", "nan", "inf"])
def test_a_rate_that_is_none_is_refused(fps, capsys):
    assert plan.main(["toy-world", "--gpus", "H200", "--fps", fps]) == 2
    assert f"--fps {float(fps)}: must be positive" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["3: {gemm_tflops: 1}", "a: [1]", "[" * 2000, "\xff"])
def test_a_file_of_no_devices_is_refused(text, tmp_path):
    path = tmp_path / "devices.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="--devices "):
        read_devices(path)


@pytest.mark.parametrize(
    ("text", "number", "name"),
    [("8xH100-80GB", 8, "H100-80GB"), ("h200", 1, "H200-141GB"), ("2xb200", 2, "B200-180GB")],
)
def test_gpus_are_read(text, number, name):
    found, device = resolve_gpus(text, DEVICES)
    assert (found, device.name) == (number, name)


@pytest.mark.parametrize("text", ["8xH99", "xH200", "0xH200", "8xA100", ""])
def test_unknown_gpus_are_refused_with_all_kinds(text):
    with pytest.raises(ValueError, match="Kinds: H200-141GB, H100-80GB"):
        resolve_gpus(text, DEVICES)


def test_the_command(capsys, tmp_path):
    words = ["self-forcing-tiny-random", "--gpus", "2xH100-80GB", "--fps", "24", "--height", "64"]
    assert plan.main(words) == 0
    printed = capsys.readouterr().out
    assert "latents 8x6" in printed and "frames/s for 24 shown" in printed
    launch = "torchrun --standalone --nproc-per-node 2 -m flashdreams.run self-forcing-tiny-random"
    assert f"Type: {launch} --parallel.cfg-parallel-degree 1" in printed and "ASSUMED" in printed
    assert printed.split("Type: ")[1].splitlines()[0].endswith(" --height 64")
    assert "Launching kernels is not counted" in printed
    small = tmp_path / "devices.yaml"
    small.write_text("RTX-4090-24GB: {memory_gib: 0.01}\n")
    words = ["self-forcing-tiny-random", "--gpus", "RTX-4090", "--height", "64"]
    assert plan.main([*words, "--devices", str(small)]) == 1
    assert "No plan fits" in capsys.readouterr().out
    assert plan.main(["toy-world", "--gpus", "8xH99"]) == 2
    assert "Kinds: " in capsys.readouterr().err
    assert plan.main(["self-forcing-tiny-random", "--gpus", "H200", "--height", "63"]) == 2


def test_an_offloaded_text_encoder_is_planned_and_typed(capsys):
    slug = "self-forcing-wan2.1-t2v-1.3b-taehv"
    assert plan.main([slug, "--gpus", "RTX-4090", "--offload", "True"]) == 0
    printed = capsys.readouterr().out
    assert f"Type: flashdreams-run {slug} --pipeline.text-encoder.offload True\n" in printed
    assert plan.main(["toy-world", "--gpus", "RTX-4090", "--offload", "True"]) == 2
    assert "has no text encoder that can be offloaded" in capsys.readouterr().err


def test_the_fewest_ranks_for_real_time_are_named(capsys):
    planner = Planner(LINGBOT_TINY, replace(H200, convolution_tflops=1e-3), fps=16)
    (one,) = planner.plans(1)
    found = planner.fewest_for_real_time(1)
    ranks = found.degrees.world_size
    assert not one.is_real_time and found.is_real_time and ranks > 1
    assert ranks == 2 or not planner.plans(ranks // 2)[0].is_real_time
    slow = Planner(LINGBOT_TINY, replace(H200, convolution_tflops=1e-9), fps=16)
    assert slow.fewest_for_real_time(16) is None
    assert plan.main(["lingbot-world-tiny-random", "--gpus", "H200", "--fps", "1e9"]) == 0
    assert "Not real time on up to 64 x H200-141GB either." in capsys.readouterr().out
    assert plan.main(["lingbot-world-tiny-random", "--gpus", "H200"]) == 0
    assert "eal time on" not in capsys.readouterr().out


def test_a_decoder_is_run_once_for_all_plans_of_as_many_ranks():
    planner = Planner(LINGBOT_TINY, H200)
    planner.plans(4)
    assert list(planner._decoded) == [4]
    planner.plans(2)
    assert list(planner._decoded) == [4, 2] and planner._decoded[4] != planner._decoded[2]


def test_a_plan_needs_no_package_of_the_text_encoder(monkeypatch):
    planner = Planner(TAEHV_PIPELINE, H200)
    with_package = planner._other_weights
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="transformers"):
        TAEHV_PIPELINE.text_encoder.setup()
    assert Planner(TAEHV_PIPELINE, H200)._other_weights == with_package
    offloaded = derive_config(TAEHV_PIPELINE, text_encoder={"offload": True})
    assert Planner(offloaded, H200)._other_weights == 0


def test_this_machine_is_read_without_gpus(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plan.main(["toy-world"]) == 0
    printed = capsys.readouterr().out
    assert "measured now" in printed and "Launching" not in printed
    assert "Type: flashdreams-run toy-world\n" in printed, "no flags for one rank"
