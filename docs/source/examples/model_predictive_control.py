"""Model-predictive control in the toy world: fork, try action sequences, keep the best.

The goal is a picture from a camera elsewhere in the courtyard. Every round forks the rollout into
one batch, moves each fork along one of eight action sequences, and compares its last frame with
the goal. The best fork becomes the rollout. Run it from a checkout:

    python docs/source/examples/model_predictive_control.py
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from flashdreams.infra.controller import Event, KeyCamera
from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.infra.rollout import StreamInferencePipelineCache
from flashdreams.integrations.toy_world.config import TOY_WORLD_RUNNER
from flashdreams.integrations.toy_world.metrics import psnr_db
from flashdreams.integrations.toy_world.runner import ToyWorldRunner, walk

CANDIDATES = ("", "w", "a", "d", "j", "l", "wj", "wl")
"""Keys that are held for a whole round; empty for no movement."""
HORIZON = 4
"""AR steps per round; the toy world generates one frame in each."""
GOAL_WALK = "w8 l8 w4"
"""The keys that lead to the goal; not used by the search."""


def advance(
    pipeline: StreamInferencePipeline,
    camera: KeyCamera,
    batch: StreamInferencePipelineCache,
    keys: Sequence[str],
) -> tuple[Tensor, list[Tensor]]:
    """Hold keys for a round, different ones in each fork of a batch.

    Returns:
        The last frame of each fork, ``[forks, 3, 64, 64]``, and the camera-to-world matrix
        ``[4, 4]`` of its camera.
    """
    events = [[Event(0, {"keys": held})] for held in keys]
    for index in range(batch.next_index, batch.next_index + HORIZON):
        frames = pipeline.pixel_frames(index)
        controls = [
            camera.advance(state, told, frames)
            for state, told in zip(batch.controller, events, strict=True)
        ]
        chunk = pipeline.generate(autoregressive_index=index, cache=batch, input=controls)
        pipeline.finalize(autoregressive_index=index, cache=batch)
        events = [[] for _ in keys]
    return chunk[:, -1], [control[-1] for control in controls]


def search(runner: ToyWorldRunner, rounds: int) -> list[tuple[str, str, float]]:
    """Search the way to the goal.

    Returns:
        For each round: the keys chosen with the model, those chosen with the rendered truth among
        the same candidates, and the PSNR in dB of the goal to the truth at the reached position.
    """
    pipeline, camera = runner.pipeline, runner.controller()
    cache = pipeline.initialize_cache(**runner.conditions(), seed=0)
    cache.controller = camera.new_state()
    goal = runner.truth(walk(GOAL_WALK, 21)[-1])
    control = camera.advance(cache.controller, [], pipeline.pixel_frames(0))
    pipeline.generate(autoregressive_index=0, cache=cache, input=control)
    pipeline.finalize(autoregressive_index=0, cache=cache)
    rows = []
    for _ in range(rounds):
        batch = cache.fork_batch(len(CANDIDATES))
        frames, poses = advance(pipeline, camera, batch, CANDIDATES)
        imagined = psnr_db(frames, goal).tolist()
        rendered = [float(psnr_db(runner.truth(pose), goal)) for pose in poses]
        best, ideal = imagined.index(max(imagined)), rendered.index(max(rendered))
        cache = batch.pick(best)
        rows.append((CANDIDATES[best], CANDIDATES[ideal], rendered[best]))
    return rows


def main(rounds: int = 6) -> None:
    """Print the search, round by round."""
    runner = TOY_WORLD_RUNNER.setup()
    with torch.no_grad():
        for best, ideal, reached in search(runner, rounds):
            print(f"model: {best!r:5} truth: {ideal!r:5} goal seen at {reached:.1f} dB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 6)
