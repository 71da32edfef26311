"""The archives hold what an installed package needs, and nothing else, and the wheel works."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import flashdreams
from flashdreams.registry import GROUP
from tests.architecture.law import BASE_PACKAGES
from tests.architecture.sources import PACKAGES, ROOT, SOURCE_ROOTS, imports_of, python_files

MAX_WEIGHTS_MB = 20


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and with the wheel that was built from the sdist.

    They are made from a copy of the sources, so that no old ``build`` folder gets into them.
    """
    pytest.importorskip("build", reason="the wheel is built with: pip install build")
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    clean = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("flashdreams", "kernels", "tests", "benchmarks", "training", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=clean)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return copy / "dist"


@pytest.fixture
def wheel(dist: Path) -> zipfile.ZipFile:
    (file,) = dist.glob("*.whl")
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
    assert _files(wheel, "py.typed") == _in_source("py.typed")
    assert {"flashdreams/py.typed", "flashdreams_kernels/py.typed"} <= set(wheel.namelist())
    assert _files(wheel, "README.md") == _in_source("README.md")


@pytest.mark.slow
def test_the_wheel_holds_the_page(wheel: zipfile.ZipFile) -> None:
    for pattern in ("*.html", "*.css", "*.js", "*.svg"):
        assert _files(wheel, pattern[1:]) == _in_source(pattern)
    assert "flashdreams/serving/page/index.html" in wheel.namelist()


SECTIONS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
"""Of a release in the form of Keep a Changelog."""


def faults_of_changelog(text: str) -> list[str]:
    """What is against the form: releases from the newest on, each with known sections, once."""
    found = []
    releases = re.findall(r"(?m)^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", text)
    titles = re.findall(r"(?m)^## .*", text)
    if len(releases) != len(titles) or any(bool(d) == (v == "Unreleased") for v, d in releases):
        found.append(f"a title is no release with its date: {titles}")
    dated = [(Version(version), date) for version, date in releases if date]
    if dated != sorted(dated, reverse=True) or "Unreleased" in [v for v, _ in releases[1:]]:
        found.append(f"the newest is not first: {titles}")
    if not dated or str(dated[0][0]) != flashdreams.__version__:
        found.append(f"the newest release is not {flashdreams.__version__}")
    for release in re.split(r"(?m)^## ", text)[1:]:
        sections = re.findall(r"(?m)^### (.*)$", release)
        if not set(sections) <= set(SECTIONS) or len(set(sections)) < len(sections):
            found.append(f"{release.splitlines()[0]} has the sections {sections}")
    continued = re.findall(r"(?m)^ +\S.*$", text)
    return found + [f"an entry of several lines: {line}" for line in continued]


def test_the_changelog_has_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert faults_of_changelog(text) == []
    newest = f"## [{flashdreams.__version__}]"
    for wrong in (
        text.replace(newest, "## [0.0.1]"),
        text.replace(newest, f"## {flashdreams.__version__}"),
        text.replace("### Fixed", "### Mended", 1),
        text.replace("### Changed", "### Added", 1),
        text + "- An entry\n  of two lines.\n",
    ):
        assert len(faults_of_changelog(wrong)) > 0


@pytest.mark.slow
def test_the_wheel_registers_the_command_and_the_shipped_runners(wheel: zipfile.ZipFile) -> None:
    (file,) = _files(wheel, ".dist-info/entry_points.txt")
    points = configparser.ConfigParser(delimiters="=")
    points.optionxform = str  # type: ignore[assignment, method-assign]
    points.read_string(wheel.read(file).decode())
    assert points["console_scripts"]["flashdreams-run"] == "flashdreams.commands:run"
    assert "toy-world" in points[GROUP]
    for reference in points[GROUP].values():
        module = reference.split(":")[0].replace(".", "/")
        assert f"{module}.py" in wheel.namelist()


@pytest.mark.slow
def test_the_wheel_bears_the_version_of_the_package_and_of_the_citation(
    wheel: zipfile.ZipFile,
) -> None:
    (name,) = _files(wheel, ".dist-info/METADATA")
    version = message_from_string(wheel.read(name).decode())["Version"]
    assert version == flashdreams.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def test_every_required_package_is_imported_and_the_other_way_round() -> None:
    """A requirement that nobody imports is downloaded for nothing."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    listed = re.search(r"\ndependencies = \[(.*?)\n\]", text, re.S)
    assert listed is not None
    names = {Requirement(line).name for line in re.findall(r'"(.+?)"', listed[1])}
    modules = {"pyyaml": "yaml", "pillow": "PIL"}
    assert {modules.get(name, name.replace("-", "_")) for name in names} == BASE_PACKAGES
    imported = {
        item.name.split(".")[0]
        for file in python_files(*PACKAGES)
        for item in imports_of(ast.parse(file.read_text("utf-8")), "")
    }
    assert imported >= BASE_PACKAGES


@pytest.mark.slow
def test_an_index_would_take_both_archives(dist: Path) -> None:
    pytest.importorskip("twine", reason="the archives are checked with: pip install twine")
    files = sorted(map(str, dist.iterdir()))
    assert len(files) == 2
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True
    )
    assert done.returncode == 0 and "WARNING" not in done.stdout, done.stdout


@pytest.mark.slow
def test_the_sdist_holds_no_folder_that_is_not_installed(dist: Path) -> None:
    (file,) = dist.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        folders = {Path(name).parts[1] for name in archive.getnames() if name.count("/") > 1}
    assert folders == {"flashdreams", "kernels", "flashdreams.egg-info"}


@pytest.fixture(scope="module")
def empty(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, the packages that it requires, and nothing else.

    The packages are links into this environment: installing PyTorch again would take minutes.
    """
    folder = tmp_path_factory.mktemp("empty") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (wheel,) = dist.glob("*.whl")
    for name in required(wheel):
        link(name, packages)
    python = str(folder / "bin/python")
    command = ["-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([sys.executable, *command, str(wheel)], check=True)
    return folder


def required(wheel: Path) -> set[str]:
    """Names of the packages that a wheel requires without extras, and that these require."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        own = message_from_string(archive.read(name).decode()).get_all("Requires-Dist")
    found: set[str] = set()
    seen: set[str] = set()
    waiting = [(line, "") for line in own or ()]
    while waiting:
        line, extra = waiting.pop()
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            found.add(requirement.name)
            for wanted in {"", *requirement.extras}:
                if (key := f"{requirement.name}[{wanted}]") not in seen:
                    seen.add(key)
                    lines = metadata.requires(requirement.name) or ()
                    waiting += [(line, wanted) for line in lines]
    return found


def link(name: str, packages: Path) -> None:
    """Link what an installed package put into its site-packages into those of another."""
    installed = metadata.distribution(name)
    tops = {file.parts[0] for file in installed.files or ()}
    for top in tops - {"..", "__pycache__"}:
        source = Path(str(installed.locate_file(top)))
        if source.exists() and source.suffix != ".pth" and not (packages / top).exists():
            (packages / top).symlink_to(source)


def in_empty(empty: Path, cwd: Path, *words: str) -> str:
    """What a command of the empty environment prints, in a folder far from the checkout."""
    hidden = ("PYTHON", "VIRTUAL_ENV", "FLASHDREAMS_")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    done = subprocess.run(
        [str(empty / "bin" / words[0]), *words[1:]],
        cwd=cwd, env=variables | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_empty_environment_makes_the_video_from_the_wheel(empty: Path, tmp_path: Path) -> None:
    code = "import flashdreams, flashdreams_kernels as k; print(flashdreams.__file__, k.__file__)"
    for file in in_empty(empty, tmp_path, "python", "-c", code).split():
        assert Path(file).is_relative_to(empty), f"{file} is not from the wheel"
    in_empty(empty, tmp_path, "flashdreams-run", "toy-world", "--total-blocks", "6")
    assert (tmp_path / "outputs/toy-world.mp4").stat().st_size > 1000
    assert (tmp_path / "outputs/stats_toy-world.json").is_file()


@pytest.mark.slow
def test_the_empty_environment_is_empty(empty: Path, tmp_path: Path) -> None:
    """What only the checkout or an extra has cannot be imported, so nothing leaned on it."""
    for name in ("tests", "benchmarks", "training", "customized_method", "pytest", "transformers"):
        code = f"from importlib.util import find_spec; assert find_spec({name!r}) is None"
        in_empty(empty, tmp_path, "python", "-c", code)
