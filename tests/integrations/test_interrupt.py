"""Ctrl-C at every stage of a run: one line, code 130, and what was done is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashdreams import run
from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.integrations.toy_world import config

ROOT = Path(__file__).parents[2]

AT_AN_IMPORT = """
import os, signal, sys
sys.argv[0:2], interrupted = ["flashdreams-run"], sys.argv[1]

class Interrupt:
    def find_spec(self, name, *_):
        if name == interrupted:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

from flashdreams.run import entry_point
sys.meta_path.insert(0, Interrupt())
entry_point()
"""


@pytest.mark.slow
@pytest.mark.parametrize("module", ["torch.nn", "tyro"])
def test_an_interrupted_import_is_not_begun_again(module: str, tmp_path: Path) -> None:
    """A second import of half of PyTorch crashes the interpreter."""
    words = ["toy-world", "--device", "cpu", "--output-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", AT_AN_IMPORT, module, *words],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "flashdreams-run: interrupted\n")


@pytest.mark.skipif(
    not (Path(config.__file__).parent / "weights" / "transformer.safetensors").exists(),
    reason="needs the toy world's weights",
)
def test_a_step_that_is_interrupted_leaves_those_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decode = StreamInferencePipeline._decode

    def interrupted(self: StreamInferencePipeline, latent, index, cache):
        if index == 3:
            raise KeyboardInterrupt
        return decode(self, latent, index, cache)

    monkeypatch.setattr(StreamInferencePipeline, "_decode", interrupted)
    words = ["toy-world", "--device", "cpu", "--output-dir", str(tmp_path)]
    assert run.main(words) == 130
    assert capsys.readouterr().err.endswith("flashdreams-run: interrupted\n")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"toy-world.partial.mp4", "stats_toy-world.json", "log_toy-world.jsonl"}
    records = json.loads((tmp_path / "stats_toy-world.json").read_text())["records"]
    assert [record["autoregressive_index"] for record in records] == [0, 1, 2]
    assert all(record["frames"] == 1 and record["latent_sha256"] for record in records)

    import imageio_ffmpeg

    assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "toy-world.partial.mp4"))[0] == 3
