"""Ctrl-C at every stage of a run: one line, code 130, and what was done is kept."""

import json
import os
import re
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

sys.meta_path.insert(0, Interrupt())
"""

SCRIPTS = re.findall(
    r'(?m)^(flashdreams-\w+) = "([\w.]+):(\w+)"$', (ROOT / "pyproject.toml").read_text("utf-8")
)
"""Programs with module and function, as an installed script has them."""


def interrupt(code: str, module: str, *words: str) -> tuple[int, str]:
    """Exit code and stderr of a process that is interrupted when it begins to import a module."""
    done = subprocess.run(
        [sys.executable, "-c", AT_AN_IMPORT + code, module, *words],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "module", "words"),
    [
        ("run", "torch.nn", ["toy-world", "--device", "cpu"]),
        ("run", "tyro", ["toy-world", "--device", "cpu"]),
        ("plan", "torch.nn", ["toy-world", "--gpus", "8xH100-80GB"]),
        ("check", "torch.nn", ["toy-world"]),
    ],
)
def test_an_interrupted_import_is_not_begun_again(
    program: str, module: str, words: list[str]
) -> None:
    """A second import of half of PyTorch crashes the interpreter."""
    found = interrupt(
        f"from flashdreams.{program} import entry_point; entry_point()", module, *words
    )
    assert found == (130, f"flashdreams-{program}: interrupted\n")


@pytest.mark.parametrize(("program", "module", "function"), SCRIPTS)
def test_a_command_that_has_only_begun_ends_with_one_line(
    program: str, module: str, function: str
) -> None:
    first = {"client": "flashdreams.serving"}.get(function, f"flashdreams.{function}")
    code = f"from {module} import {function}; {function}()"
    assert interrupt(code, first) == (130, f"{program}: interrupted\n")


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("run", "flashdreams.infra.config"),
        ("serve", "tyro"),
        ("plan", "tyro"),
        ("check", "tyro"),
        ("serving.client_command", "tyro"),
    ],
)
def test_a_module_that_has_only_begun_ends_with_one_line(module: str, imported: str) -> None:
    """``python -m``, and as the negative control an import that has a name of its own."""
    run_it = "import runpy; runpy.run_module('flashdreams.{}', run_name='{}')"
    code, said = interrupt(run_it.format(module, "__main__"), imported)
    program = "client" if "client" in module else module
    assert (code, said) == (130, f"flashdreams-{program}: interrupted\n")
    if module == "plan":
        code, said = interrupt(run_it.format(module, "imported"), imported)
        assert "Traceback" in said and said.count("\n") > 3


STOPS_ITS_REPORT = """
import os, signal, sys
from flashdreams import {0} as program

def stop(error, *_, **__):
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("went on")

program.report = stop
sys.argv[0:] = ["flashdreams-{0}", "no-such-slug"]
program.entry_point()
"""


@pytest.mark.parametrize("program", ["run", "serve"])
def test_a_signal_while_an_error_is_reported_shows_no_traceback(program: str) -> None:
    """torchrun sends it to the other ranks of one that has died, whose errors follow from that."""
    code, said = interrupt(STOPS_ITS_REPORT.format(program), "of no import")
    assert (code, said) == (143, f"flashdreams-{program}: terminated\n")


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
