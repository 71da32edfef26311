"""Every family of methods is served: its events, prompts and commands (tiny, random weights)."""

from dataclasses import replace

import pytest
import torch

from flashdreams.infra.runner import Runner, RunnerConfig
from flashdreams.registry import discover
from flashdreams.serving.server import check_served
from tests.live import Visit, served

STREAMS = ["self-forcing", "longlive", "causal-forcing", "lingbot-world", "matrix-game-2"]


def runner_of(slug, folder):
    config = discover().resolve(f"{slug}-tiny-random")
    if hasattr(config, "test_image"):
        config = replace(config, test_image=True)
    return replace(config.for_serving(), output_dir=folder).setup()


@pytest.mark.slow
@pytest.mark.parametrize("slug", STREAMS)
def test_streaming_methods_take_events_prompts_and_commands(slug, tmp_path):
    with served(runner_of(slug, tmp_path), state_dir=tmp_path / "s", park_after_s=0.0) as server:
        offer, visit = server.host.offer, Visit(server.host)
        properties = (offer.controls or {"properties": {}})["properties"]
        assert ("keys" in properties) == (slug in ("lingbot-world", "matrix-game-2"))
        visit.ask(2)
        if "keys" in properties:
            assert properties["keys"]["x-keys"]["w"] == "forward"
            server.host.control(visit.id, {"keys": "w", "look": [5, -3]}, "k")
        if offer.prompts_change:
            server.host.prompt(visit.id, "a dog on a beach", "p")
        visit.command("fork", name="a")
        once = visit.ask(2)
        assert once.shape[1:] == (offer.height, offer.width, 3)
        visit.command("rewind", name="a")
        server.host.detach(visit.id)
        visit.client.wait(lambda: visit.client.states[-1][0] == "parked")
        server.host.attach(visit.id, visit.client)
        if "keys" in properties:
            server.host.control(visit.id, {"keys": "w", "look": [5, -3]}, "k2")
        if offer.prompts_change:
            server.host.prompt(visit.id, "a dog on a beach", "p2")
        assert torch.equal(visit.ask(2), once)
        assert visit.client.refused == []


@pytest.mark.parametrize("slug", ["wan21", "wan21-i2v", "wan22-ti2v"])
def test_method_of_one_ar_step_is_a_session_of_one_chunk(slug, tmp_path):
    with served(runner_of(slug, tmp_path), state_dir=tmp_path / "s") as server:
        assert server.host.offer.commands == () and not server.host.offer.prompts_change
        visit = Visit(server.host)
        visit.client.asked = 9
        server.host.pause(visit.id, False)
        visit.client.wait(lambda: visit.client.end is not None)
    assert visit.client.end == (None, False)
    assert len(visit.client.chunks) == 1 and len(visit.client.frames) == 9


class OwnRunner(Runner):
    """As the seed's: a run of its own and nothing else."""

    def run(self):
        """Nothing."""


def test_runner_with_a_run_alone_is_refused():
    config = discover().resolve("toy-world")
    check_served(config)
    alone = RunnerConfig(runner_name="own", pipeline=config.pipeline, _target=OwnRunner)
    with pytest.raises(ValueError, match=r"conditions\(\).*controller\(\)"):
        check_served(alone)


@pytest.mark.parametrize(
    ("slug", "field"), [("lingbot-world", "pose_path"), ("matrix-game-2", "action_path")]
)
def test_files_that_steer_are_refused(slug, field, tmp_path):
    named = {"actions": None, field: tmp_path / "file"}
    config = replace(discover().resolve(f"{slug}-tiny-random"), **named)
    with pytest.raises(ValueError, match="steered by its client"):
        config.for_serving()
