"""Model-predictive control in the toy world: fork, try action sequences, keep the best.

The goal is a picture: what a camera sees that stands somewhere else in the courtyard. Every round
forks the rollout, walks each fork along one of eight action sequences, and compares its last frame
with the goal. The rollout itself then follows the best one. Run it from a checkout:

    python docs/source/examples/model_predictive_control.py
"""

import sys

import torch
from torch import Tensor

from flashdreams.infra.controller import Event, KeyCamera
from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.infra.rollout import StreamInferencePipelineCache
from flashdreams.integrations.toy_world.config import TOY_WORLD_RUNNER
from flashdreams.integrations.toy_world.metrics import psnr_db
from flashdreams.integrations.toy_world.runner import ToyWorldRunner, walk

CANDIDATES = ("", "w", "a", "d", "j", "l", "wj", "wl")
"""Keys that are held for a whole round; none for standing still."""
HORIZON = 4
"""AR steps of a round; the toy world makes one frame in each."""
GOAL_WALK = "w8 l8 w4"
"""The keys that lead to the goal; the search does not know them."""


def advance(
    pipeline: StreamInferencePipeline,
    camera: KeyCamera,
    cache: StreamInferencePipelineCache,
    keys: str,
) -> tuple[Tensor, Tensor]:
    """Hold keys for a round.

    Returns:
        The last frame ``[1, 3, 64, 64]`` and the camera-to-world matrix ``[4, 4]`` of its camera.
    """
    events = [Event(0, {"keys": keys})]
    for index in range(cache.next_index, cache.next_index + HORIZON):
        control = camera.advance(cache.controller, events, pipeline.pixel_frames(index))
        chunk = pipeline.generate(autoregressive_index=index, cache=cache, input=control)
        pipeline.finalize(autoregressive_index=index, cache=cache)
        events = []
    return chunk[:, -1], control[-1]


def search(runner: ToyWorldRunner, rounds: int) -> list[tuple[str, str, float]]:
    """Walk towards the goal.

    Returns:
        For each round the keys that the model chose, those that the rendered truth would have
        chosen among the same candidates, and the PSNR in dB of the goal and the truth at the place
        that was reached.
    """
    pipeline, camera = runner.pipeline, runner.controller()
    cache = pipeline.initialize_cache(**runner.conditions(), seed=0)
    cache.controller = camera.new_state()
    goal = runner.truth(walk(GOAL_WALK, 21)[-1])
    advance(pipeline, camera, cache, "")
    rows = []
    for _ in range(rounds):
        forks = cache.fork(len(CANDIDATES))
        tried = [
            advance(pipeline, camera, fork, keys)
            for fork, keys in zip(forks, CANDIDATES, strict=True)
        ]
        imagined = [float(psnr_db(frame, goal)) for frame, _ in tried]
        rendered = [float(psnr_db(runner.truth(pose), goal)) for _, pose in tried]
        best = CANDIDATES[imagined.index(max(imagined))]
        ideal = CANDIDATES[rendered.index(max(rendered))]
        _, pose = advance(pipeline, camera, cache, best)
        rows.append((best, ideal, float(psnr_db(runner.truth(pose), goal))))
    return rows


def main(rounds: int = 6) -> None:
    """Print the search, round by round."""
    runner = TOY_WORLD_RUNNER.setup()
    with torch.no_grad():
        for best, ideal, reached in search(runner, rounds):
            print(f"model: {best!r:5} truth: {ideal!r:5} goal seen at {reached:.1f} dB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 6)
