"""The wheel holds what an installed package needs, and nothing else."""

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flashdreams.registry import GROUP
from tests.architecture.sources import PACKAGES, ROOT, SOURCE_ROOTS

MAX_WEIGHTS_MB = 10


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the sources, so that no old ``build`` folder gets into it."""
    pytest.importorskip("build", reason="the wheel is built with: pip install build")
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    clean = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("flashdreams", "kernels", "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=clean)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(file)


def _files(wheel: zipfile.ZipFile, suffix: str) -> set[str]:
    return {name for name in wheel.namelist() if name.endswith(suffix)}


def _in_source(pattern: str) -> set[str]:
    """The files of both packages, by the names that they have in a wheel."""
    return {
        file.relative_to(root).as_posix()
        for root, package in zip(SOURCE_ROOTS, PACKAGES, strict=True)
        for file in package.rglob(pattern)
    }


@pytest.mark.slow
def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    folders = {Path(name).parts[0] for name in wheel.namelist()}
    (metadata,) = (name for name in folders if name.endswith(".dist-info"))
    assert folders - {metadata} == {"flashdreams", "flashdreams_kernels"}
    assert _files(wheel, ".py") == _in_source("*.py")
    assert f"{metadata}/licenses/LICENSE" in wheel.namelist()


@pytest.mark.slow
def test_the_wheel_holds_the_weights_and_the_type_marker(wheel: zipfile.ZipFile) -> None:
    weights = _files(wheel, ".safetensors")
    assert weights
    assert weights == _in_source("*.safetensors")
    total_bytes = sum(wheel.getinfo(name).file_size for name in weights)
    assert total_bytes <= MAX_WEIGHTS_MB * 1e6, f"{total_bytes / 1e6:.1f} MB of weights"
    assert "flashdreams/py.typed" in wheel.namelist()


@pytest.mark.slow
def test_the_wheel_registers_the_command_and_the_shipped_runners(wheel: zipfile.ZipFile) -> None:
    (file,) = _files(wheel, ".dist-info/entry_points.txt")
    points = configparser.ConfigParser(delimiters="=")
    points.optionxform = str  # type: ignore[assignment, method-assign]
    points.read_string(wheel.read(file).decode())
    assert points["console_scripts"]["flashdreams-run"] == "flashdreams.run:entry_point"
    assert "toy-world" in points[GROUP]
    for reference in points[GROUP].values():
        module = reference.split(":")[0].replace(".", "/")
        assert f"{module}.py" in wheel.namelist()
