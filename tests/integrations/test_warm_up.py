"""Runs with recorded calls on the command line, with a recorder in the place of CUDA's."""

import json
import re
from pathlib import Path

import pytest

from flashdreams.infra.diffusion import causal
from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.integrations.toy_world import config as toy_world
from flashdreams.run import main
from flashdreams.runtime.cuda_graph import GraphedCallable
from tests.unit.runtime.test_cuda_graph import TraceCapture

GRAPHS = "--pipeline.diffusion-model.transformer.use-cuda-graph"
HASHES = ("--hash-frames", "True")
HAS_WEIGHTS = (Path(toy_world.__file__).parent / "weights" / "transformer.safetensors").exists()
SLUGS = {
    "toy-world": ["--total-blocks", "12", "--start-from-truth", "True"],
    "self-forcing-tiny-random": ["--total-blocks", "4"],
    "lingbot-world-tiny-random": ["--total-blocks", "4", "--test-image", "True"],
    "wan21-i2v-tiny-random": ["--test-image", "True", "--total-blocks", "1"],
    "wan22-ti2v-tiny-random": ["--total-blocks", "1"],
}
CALLS = {
    "toy-world": (1 + 7 * 2, 4 * 2),  # eight frames fill the window; the first one is given
    "self-forcing-tiny-random": (2 * 5, 2 * 5),
    "lingbot-world-tiny-random": (2 * 5, 2 * 5),
    "wan21-i2v-tiny-random": (0, 2 * 6),  # guided, and no clean pass
    "wan22-ti2v-tiny-random": (0, 2 * 6),
}
"""Calls that are eager, since the window is filling, and calls that are replayed."""


class Recorded(GraphedCallable):
    """Records on a CPU."""

    def __init__(self, function, device, *, key, state_of) -> None:
        super().__init__(function, device, key=key, state_of=state_of, backend=TraceCapture())


def run(slug: str, graphs: bool, folder: Path) -> dict:
    flags = ["--output-dir", str(folder), "--device", "cpu", GRAPHS, str(graphs), *HASHES]
    assert main([slug, *SLUGS[slug], *flags]) == 0
    return json.loads((folder / f"stats_{slug}.json").read_text())


@pytest.mark.parametrize(
    "slug",
    [
        "self-forcing-tiny-random",
        *(pytest.param(s, marks=pytest.mark.slow) for s in SLUGS if not s.startswith("self")),
    ],
)
def test_recorded_calls_give_the_bits_of_eager_ones(slug, tmp_path, monkeypatch, capsys):
    """Controls, images and guidance included; no capture after the line that says ready."""
    if slug == "toy-world" and not HAS_WEIGHTS:
        pytest.skip("needs the toy world's weights")
    eager = run(slug, False, tmp_path)
    assert "ready:" not in capsys.readouterr().out
    assert "cuda_graphs" not in eager["header"]
    monkeypatch.setattr(causal, "GraphedCallable", Recorded)
    dropped = []
    drop = StreamInferencePipeline.drop_graphs
    monkeypatch.setattr(
        StreamInferencePipeline, "drop_graphs", lambda self: (dropped.append(slug), drop(self))
    )
    found = run(slug, True, tmp_path)
    ready = re.search(
        r"^ready: .* (\d+) CUDA graphs, attention sdpa$", capsys.readouterr().out, re.M
    )
    graphs = found["header"]["cuda_graphs"]
    assert ready is not None and int(ready[1]) == graphs["captures_at_warm_up"] > 0
    assert graphs["captures_after_ready"] == 0
    assert (graphs["eager_calls"], graphs["replays"]) == CALLS[slug]
    assert found["header"]["warm_up_ms"] > 0
    for name in ("latent_sha256", "frames_sha256"):
        assert [r[name] for r in found["records"]] == [r[name] for r in eager["records"]]
    assert dropped == [slug]


def test_a_run_that_fails_leaves_graphs_alone(tmp_path, monkeypatch):
    """Other ranks may wait in a collective: only the end of a good run takes anything down."""
    monkeypatch.setattr(causal, "GraphedCallable", Recorded)
    dropped = []
    monkeypatch.setattr(StreamInferencePipeline, "drop_graphs", lambda self: dropped.append(self))

    def fail(*args, **kwargs):
        raise OSError("no")

    monkeypatch.setattr(StreamInferencePipeline, "finalize", fail)
    flags = ["--output-dir", str(tmp_path), "--device", "cpu", "--total-blocks", "2"]
    assert main(["self-forcing-tiny-random", *flags]) == 1
    assert not dropped
