"""Forks that go on as one batch: the frames of forks in turn, and one of them taken out again."""

import pytest
import torch

from flashdreams.infra.config import derive_config
from flashdreams.infra.controller import Event
from flashdreams.integrations.toy_world.config import TOY_WORLD_RUNNER
from tests.tiny import tiny_pipeline
from tests.unit.infra.test_fork import Counter
from tests.unit.infra.test_snapshot import begin
from tests.unit.infra.test_state import advance, prompt

INPUTS = (0.0, 1.0, -2.0)


def in_turn(pipeline, cache, steps, inputs=INPUTS):
    """Chunks ``[forks, ...]`` of each AR step, and the forks."""
    forks = cache.fork(len(inputs))
    chunks = [advance_with(pipeline, fork, x, steps) for fork, x in zip(forks, inputs, strict=True)]
    return [torch.cat(step) for step in zip(*chunks, strict=True)], forks


def advance_with(pipeline, cache, given, steps):
    chunks = []
    for index in range(cache.next_index, cache.next_index + steps):
        chunks.append(pipeline.generate(index, cache, given).clone())
        pipeline.finalize(index, cache)
    return chunks


def assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


CASES = {
    "plain": {},
    "relative": dict(relative_rope=True),
    "no sink": dict(sink_size_t=0),
    "int8": dict(kv_cache_dtype="int8"),
    "fp8": dict(precision="fp8", dim=128, num_heads=2),
    "two prompts": {},
    "guided": {},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_batch_makes_the_frames_of_forks_in_turn(case, steps):
    config = tiny_pipeline(**CASES[case])
    bits = 1e-3 if case in ("int8", "fp8") else 1e-5  # 8 bits may round the other way
    if case == "guided":
        config = derive_config(config, diffusion_model=dict(guidance_scale=2.0))
    pipeline, cache = begin(config, steps)
    if case == "two prompts":
        cache.release()
        cache = pipeline.initialize_cache(text=torch.cat([prompt(0), prompt(3)]), seed=5)
        advance(pipeline, cache, 0, steps)
    expected, forks = in_turn(pipeline, cache, 4)
    batch = cache.fork_batch(3)
    found = advance_with(pipeline, batch, list(INPUTS), 4)
    assert_close(found, expected, bits)
    assert not torch.allclose(expected[-1][0], expected[-1][-1])  # negative control
    picked = batch.pick(1)
    late = advance_with(pipeline, picked, 1.0, 3)
    assert_close(late, advance_with(pipeline, forks[1], 1.0, 3), bits)
    assert_close(advance_with(pipeline, cache, 1.0, 4), [x.chunk(3)[1] for x in expected], bits)
    assert_close(advance_with(pipeline, batch, list(INPUTS), 1)[0].chunk(3)[1:2], late[:1], bits)


def test_each_fork_has_a_prompt_of_its_own():
    pipeline, cache = begin(tiny_pipeline(), 2)
    batch, forks = cache.fork_batch(2), cache.fork(2)
    pipeline.update_prompt(batch, torch.cat([prompt(0), prompt(7)]), reencode_window=True)
    for fork, text in zip(forks, (0, 7), strict=True):
        pipeline.update_prompt(fork, prompt(text), reencode_window=True)
    expected = [advance_with(pipeline, fork, 0.0, 2) for fork in forks]
    found = advance_with(pipeline, batch, [0.0, 0.0], 2)
    assert_close(found, [torch.cat(step) for step in zip(*expected, strict=True)])
    picked = batch.pick(1)
    assert torch.equal(picked.context["text"], prompt(7))
    assert_close(advance_with(pipeline, picked, 0.0, 2), advance_with(pipeline, forks[1], 0.0, 2))


def test_a_picked_fork_can_be_saved_and_forked_again(tmp_path):
    pipeline, cache = begin(tiny_pipeline(), 2)
    batch = cache.fork_batch(3)
    advance_with(pipeline, batch, list(INPUTS), 2)
    picked = batch.pick(2)
    pipeline.save(picked, tmp_path / "s")
    again, fork, second = pipeline.resume(tmp_path / "s"), picked.fork(1)[0], picked.fork_batch(2)
    expected = advance_with(pipeline, picked, 0.5, 2)
    for found in (advance_with(pipeline, again, 0.5, 2), advance_with(pipeline, fork, 0.5, 2)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert_close([x[:1] for x in advance_with(pipeline, second, [0.5, 9.0], 2)], expected)


def test_controllers_of_forks_are_their_own():
    _, cache = begin(tiny_pipeline(), 1)
    cache.controller = Counter()
    batch = cache.fork_batch(2)
    batch.controller[1].total += 1
    picked = batch.pick(1)
    picked.controller.seen.append(4)
    assert float(cache.controller.total) == float(batch.controller[0].total) == 0
    assert float(picked.controller.total) == 1 and batch.controller[1].seen == []


def test_what_a_batch_refuses(tmp_path):
    pipeline, cache = begin(tiny_pipeline(), 1)
    with pytest.raises(ValueError, match=r"fork_batch\(0\)"):
        cache.fork_batch(0)
    with pytest.raises(ValueError, match="not a batch of forks"):
        cache.pick(0)
    batch = cache.fork_batch(2)
    with pytest.raises(ValueError, match="pick\\(2\\): the batch has the forks 0 to 1"):
        batch.pick(2)
    for call in (batch.clone, lambda: batch.fork(1), lambda: batch.fork_batch(2), batch.state_dict):
        with pytest.raises(ValueError, match=r"A batch of 2 forks has no .* cache\.pick\(i\)"):
            call()
    for keep in (lambda: pipeline.save(batch, tmp_path / "s"), lambda: pipeline.park(batch)):
        with pytest.raises(ValueError, match="A batch of 2 forks has no"):
            keep()
    for bad in (0.0, [0.0], [0.0] * 3):
        with pytest.raises(ValueError, match="a list of 2 inputs"):
            pipeline.generate(1, batch, bad)
    pipeline.generate(1, batch, [0.0, 0.0])
    with pytest.raises(ValueError, match="no pick between generate and finalize"):
        batch.pick(0)


def test_a_method_without_a_batch_dim_is_refused():
    _, cache = begin(tiny_pipeline(), 1)
    cache.decoder["last"] = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"decoder/last \[3, 4\] does not have the batch \(1\)"):
        cache.fork_batch(2)
    assert len(cache.fork(2)) == 2  # in turn they can


def test_the_toy_world_walks_in_several_directions_at_once():
    runner = TOY_WORLD_RUNNER.setup()
    pipeline, camera = runner.pipeline, runner.controller()
    cache = pipeline.initialize_cache(text=["red floor"], seed=1)
    cache.controller = camera.new_state()

    def control(state, keys, index):
        return camera.advance(state, [Event(0, {"keys": keys})], pipeline.pixel_frames(index))

    pipeline.generate(0, cache, control(cache.controller, "", 0))
    pipeline.finalize(0, cache)
    keys, forks, batch = ("w", "d", "j"), cache.fork(3), cache.fork_batch(3)
    for index in range(1, 4):
        inputs = [control(own, k, index) for own, k in zip(batch.controller, keys, strict=True)]
        found = pipeline.generate(index, batch, inputs)
        pipeline.finalize(index, batch)
        for fork, k, frames in zip(forks, keys, found, strict=True):
            expected = pipeline.generate(index, fork, control(fork.controller, k, index))
            pipeline.finalize(index, fork)
            assert_close([frames[None]], [expected])
    picked = batch.pick(2)
    assert torch.equal(picked.controller.pose, forks[2].controller.pose)
    runner.close()


def test_a_fork_taken_out_has_the_strides_of_its_source():
    """A dim of size 1 leaves them open, and convolutions of other strides give other bits."""
    _, cache = begin(tiny_pipeline(), 2)
    last = cache.decoder["last"]
    cache.decoder["last"] = last.to(memory_format=torch.channels_last_3d)
    picked = cache.fork_batch(1).pick(0)
    assert picked.decoder["last"].stride() == cache.decoder["last"].stride() != last.stride()
