"""What a newcomer meets first: the list of slugs, and a folder that is gone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flashdreams import run

ROOT = Path(__file__).parents[2]


def test_help_lists_first_what_runs_without_weights(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run.main(["--help"]) == 0
    _, *parts = re.split(r"\n\n", capsys.readouterr().out)
    slugs = [re.findall(r"^  (\S+)", part, re.MULTILINE) for part in parts]
    assert parts[0].startswith("slugs that run as they are:") and slugs[0][0] == "toy-world"
    assert parts[1].startswith("slugs that need weights;") and "lingbot-world-fast" in slugs[1]
    assert all(s in ("toy-world", "courtyard") or s.endswith("-random") for s in slugs[0])
    assert not any(s.endswith("-random") for s in slugs[1])


def test_a_flag_of_an_absent_component_says_how_to_give_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run.main(["toy-world", "--pipeline.encoder.checkpoint.source", "x"]) == 2
    assert "--pipeline.encoder.checkpoint is None, so it has no flags." in capsys.readouterr().err
    assert run.main(["toy-world", "--pipeline.decoder.checkpoint.source", "x"]) == 1
    assert "is None" not in capsys.readouterr().err, "negative control"


def test_a_command_in_a_deleted_folder_ends_with_one_line(tmp_path: Path) -> None:
    begin = "from flashdreams.runtime.first_signals import begin_command; begin_command('x')"
    for deletes, code, said in (
        (
            f"import os; os.rmdir({str(tmp_path)!r}); ",
            2,
            "x: error: the working directory: ",
        ),
        ("", 0, ""),
    ):
        words, where = [sys.executable, "-c", deletes + begin], tmp_path
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, cwd=where, env=environment, capture_output=True, text=True)
        assert done.returncode == code and done.stderr.startswith(said), done.stderr
        assert done.stderr.count("\n") == (code > 0)
        tmp_path.mkdir(exist_ok=True)
