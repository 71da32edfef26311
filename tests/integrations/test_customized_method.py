"""The example package of "add a new method", installed and run; and the published runner."""

import importlib.metadata
import json
import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashdreams import run
from flashdreams.registry import VARIABLE, discover
from tests.integrations.published_method import register, write_published_method

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "docs/source/examples/customized_method"

STEP_KEYS = {
    "encode_ms", "diffuse_ms", "decode_ms", "finalize_ms", "total_ms", "frames", "fps",
    "latent_sha256",
}  # fmt: skip
HEADER_KEYS = {
    "flashdreams", "runner_name", "config_hash", "device", "torch", "first_frame_latency_ms",
    "parallel",
}  # fmt: skip


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """A copy of the example, so that installing it leaves nothing in the checkout."""
    copy = tmp_path / "customized_method"
    for file in EXAMPLE.rglob("*"):
        if file.suffix in (".py", ".toml"):
            target = copy / file.relative_to(EXAMPLE)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return copy


@pytest.fixture
def own_python(tmp_path: Path) -> Path:
    """The Python of a new environment that sees the packages of this one, pip among them.

    ``system_site_packages`` would show those of the system's Python, not of the environment that
    runs this test; ``addsitedir`` also reads the .pth files there, which editable installs need.
    """
    for tool in ("pip", "setuptools"):
        # Not find_spec: a look at pip makes setuptools 65 unusable in the process that looks.
        if not list(importlib.metadata.distributions(name=tool)):
            pytest.skip(f"installing offline needs {tool} beside pytest: pip install {tool}")
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    question = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([python, "-c", question], text=True).strip())
    parents = [*site.getsitepackages(), str(REPOSITORY), str(REPOSITORY / "kernels")]
    lines = [f"import site; site.addsitedir({parent!r})" for parent in parents]
    (packages / "parent.pth").write_text("\n".join(lines) + "\n")
    return python


def command(python: Path, *words: str, cwd: Path, **variables: str) -> str:
    """What a command prints; fails with its messages if it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in (VARIABLE, "PYTHONPATH")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [python, *words], cwd=cwd, env={**environment, **variables},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_made_a_video(folder: Path, steps: int) -> None:
    stats = json.loads((folder / "stats_customized-method.json").read_text())
    assert len(stats["records"]) == steps
    assert (folder / "customized-method.mp4").stat().st_size > 2000
    assert not list(folder.glob("*.partial*"))


def test_the_example_has_the_documented_files() -> None:
    names = {path.name for path in (EXAMPLE / "customized_method").glob("*.py")}
    assert names == {
        "__init__.py", "runner.py", "config.py", "transformer.py", "encoder.py", "decoder.py"
    }  # fmt: skip
    assert (EXAMPLE / "pyproject.toml").is_file()


@pytest.mark.slow
def test_the_example_is_installed_listed_and_run(
    example: Path, own_python: Path, tmp_path: Path
) -> None:
    """Once it is uninstalled it is gone, so what ran before was the installed one."""
    program = ("-m", "flashdreams.run")
    pip = ("-m", "pip", "--disable-pip-version-check", "-q")
    install = (*pip, "install", "--no-deps", "--no-build-isolation", "-e", ".")
    command(own_python, *install, cwd=example)

    listing = command(own_python, *program, "--help", cwd=tmp_path)
    assert "customized-method Moving patterns from a network" in " ".join(listing.split())
    prompt = ("--prompt", "A beautiful custom generation.", "--total-blocks", "4")
    words = ("customized-method", *prompt, "--output-dir", "installed")
    said = command(own_python, *program, *words, cwd=tmp_path)
    assert_made_a_video(tmp_path / "installed", steps=4)
    files = ("customized-method.mp4", "stats_customized-method.json", "log_customized-method.jsonl")
    written = [f"installed/{file}" for file in files]
    assert said.splitlines()[-1].split() == ["written:", *written]
    command(own_python, *pip, "uninstall", "-y", "customized_method", cwd=tmp_path)
    assert "customized-method" not in command(own_python, *program, "--help", cwd=tmp_path)


@pytest.mark.slow
def test_the_example_runs_without_being_installed(example: Path, tmp_path: Path) -> None:
    registered = {VARIABLE: "customized-method=customized_method.config:RUNNER_CONFIGS"}
    words = ("-m", "flashdreams.run", "customized-method", "--total-blocks", "4")
    where = ("--output-dir", str(tmp_path / "out"))
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    command(Path(sys.executable), *words, *where, cwd=example, PYTHONPATH=paths, **registered)
    assert_made_a_video(tmp_path / "out", steps=4)


def test_the_example_repeats_itself_and_listens_to_prompt_and_seed(
    example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, example)
    config = discover()["customized-method"].pipeline  # type: ignore[attr-defined]
    pipeline = config.setup(device="cpu")

    def dream(prompt: str, seed: int) -> Tensor:
        cache = pipeline.initialize_cache(text=[prompt], seed=seed)
        chunks = []
        for i in range(3):
            chunks.append(pipeline.generate(autoregressive_index=i, cache=cache))
            pipeline.finalize(autoregressive_index=i, cache=cache)
        return torch.cat(chunks, dim=1)

    first = dream("A cat surfing.", 0)
    assert first.shape == (1, 12, 3, 128, 192)
    assert first.abs().max() <= 1
    assert first.std() > 0.3, "the frames are nearly grey"
    assert torch.equal(dream("A cat surfing.", 0), first)
    assert not torch.equal(dream("A dog surfing.", 0), first)
    assert not torch.equal(dream("A cat surfing.", 1), first)
    steps = first.diff(dim=1).abs().mean(dim=(0, 2, 3, 4))
    assert steps.max() < 0.2, "the frames jump"


def test_the_published_runner_unchanged_leaves_complete_stats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes nothing itself: its ``if self.is_rank_zero`` holds an ellipsis."""
    write_published_method(tmp_path)
    register(monkeypatch, tmp_path)
    out = tmp_path / "out"
    assert run.main(["customized-method", "--total-blocks", "3", "--output-dir", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "stats_customized-method.json", "log_customized-method.jsonl"
    }  # fmt: skip
    stats = json.loads((out / "stats_customized-method.json").read_text())
    assert stats["header"].keys() >= HEADER_KEYS
    assert None not in stats["header"].values()
    assert [record["autoregressive_index"] for record in stats["records"]] == [0, 1, 2]
    for record in stats["records"]:
        assert record.keys() >= STEP_KEYS
        assert any(key.startswith("mem_") for key in record)
        assert None not in record.values()
        assert "frames_sha256" not in record, "only with --hash-frames True"


def test_the_seed_of_the_command_line_reaches_a_runner_that_never_mentions_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_published_method(tmp_path)
    register(monkeypatch, tmp_path)
    sums = []
    for seed in ("0", "7", "7"):
        words = ["customized-method", "--total-blocks", "2", "--seed", seed]
        assert run.main([*words, "--output-dir", str(tmp_path / "out")]) == 0
        stats = json.loads((tmp_path / "out" / "stats_customized-method.json").read_text())
        sums.append([record["latent_sha256"] for record in stats["records"]])
    assert sums[0] != sums[1] == sums[2]
