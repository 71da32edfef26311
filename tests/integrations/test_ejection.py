"""A shipped integration works from any folder and under any name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flashdreams import run
from flashdreams.registry import VARIABLE

REPOSITORY = Path(__file__).parents[2]
TOY_WORLD = REPOSITORY / "flashdreams" / "integrations" / "toy_world"

SHORT = ("--total-blocks", "2", "--device", "cpu", "--hash-frames", "True")

WITHOUT_THE_SHIPPED_ONES = """
import sys
sys.modules["flashdreams.integrations"] = None  # whoever imports from there now fails
from flashdreams.run import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def ejected(tmp_path: Path) -> Path:
    """A folder that holds a copy of the toy world under another package name and slug."""
    copy = tmp_path / "atrium"
    shutil.copytree(TOY_WORLD, copy, ignore=shutil.ignore_patterns("__pycache__"))
    config = copy / "config.py"
    text = config.read_text()
    assert text.count('runner_name="toy-world"') == 1
    config.write_text(text.replace('runner_name="toy-world"', 'runner_name="atrium"'))
    return tmp_path


def _run_alone(folder: Path, slug: str) -> subprocess.CompletedProcess[str]:
    """Run two chunks of a slug in a process that cannot import any shipped integration."""
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        VARIABLE: "atrium=atrium.config:RUNNER_CONFIGS",
    }
    words = [slug, *SHORT, "--output-dir", "out"]
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_SHIPPED_ONES, *words],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def _checksums(folder: Path, slug: str) -> list[str]:
    stats = json.loads((folder / f"stats_{slug}.json").read_text())
    return [record["frames_sha256"] for record in stats["records"]]


@pytest.mark.slow
def test_a_copy_elsewhere_makes_the_frames_of_the_original(ejected: Path, tmp_path: Path) -> None:
    done = _run_alone(ejected, "atrium")
    assert done.returncode == 0, done.stderr
    assert (ejected / "out" / "atrium.mp4").stat().st_size > 0
    words = ["toy-world", *SHORT]
    assert run.main([*words, "--output-dir", str(tmp_path / "original")]) == 0
    original = _checksums(tmp_path / "original", "toy-world")
    assert len(original) == 2
    assert _checksums(ejected / "out", "atrium") == original
    other_seed = [*words, "--seed", "1", "--output-dir", str(tmp_path / "other")]
    assert run.main(other_seed) == 0
    assert _checksums(tmp_path / "other", "toy-world") != original


@pytest.mark.slow
def test_what_depends_on_its_place_is_noticed(ejected: Path) -> None:
    """Negative control: an absolute import of the original's own file."""
    config = ejected / "atrium" / "config.py"
    text = config.read_text()
    assert "from .codec import" in text
    moved = "from flashdreams.integrations.toy_world.codec import"
    config.write_text(text.replace("from .codec import", moved))
    done = _run_alone(ejected, "atrium")
    assert done.returncode == 2
    assert "the plug-in 'atrium'" in done.stderr
    assert "flashdreams.integrations" in done.stderr
