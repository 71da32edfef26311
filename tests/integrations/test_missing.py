"""What is not on this machine: all of it in one answer, with options and commands that work."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashdreams import run
from flashdreams.infra import weights
from flashdreams.models.prompts import INSTALL_HINT, TEXT_PACKAGES
from tests.unit.runtime.hub import fetch_as_told, serve_repository

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "flashdreams/integrations/toy_world/weights"
SMALL = ["toy-world", "--total-blocks", "1", "--scale", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def said(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    assert run.main(list(words)) == code
    return capsys.readouterr().err


def test_packages_and_weights_are_in_one_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = weights.importlib.util.find_spec
    lacking = lambda name: None if name in TEXT_PACKAGES else found(name)  # noqa: E731
    monkeypatch.setattr(weights.importlib.util, "find_spec", lacking)
    text = said(capsys, 1, "self-forcing-wan2.1-t2v-1.3b")
    first, *listed = text.splitlines()
    assert "packages that are not installed: transformers, ftfy. Install them with: pip" in first
    assert "needs 4 checkpoints that are not on this machine, 17.6 GB on disk" in listed[0]
    assert sum("Download it with: " in line for line in listed) == 4
    assert all(line.startswith("  ") for line in listed)
    assert not Path("outputs").exists() or not list(Path("outputs").iterdir())


STEERED = ["--test-image", "True", "--actions", "w8"]
FULL_SIZE = {
    "causal-forcing-wan2.1-t2v-1.3b-framewise": (
        [], ["zhuhz22/Causal-Forcing", "framewise/causal_forcing.pt", "GB on disk", "Memory"]),
    "wan22-ti2v-5b-704p-taehv": (
        [], ["Wan-AI/Wan2.2-TI2V-5B", "20.0 GB", "1f14a568", "taew2_2", "2.8 GB", "Memory"]),
    "lingbot-world-fast": (STEERED, [
        "robbyant/lingbot-world-fast",
        "transformer 37.5 GB in bfloat16 and float32, KV cache 77.8 GB"]),
    "lingbot-world-fast-taehv-window15-sink3": (STEERED, ["KV cache 22.2 GB"]),
    "lingbot-world-base": (STEERED, [
        "high_noise_model/diffusion_pytorch_model.safetensors.index.json",
        "low_noise_model/diffusion_pytorch_model.safetensors.index.json", "transformer 74.9 GB"]),
    "matrix-game-2-universal": (STEERED, ["Skywork/Matrix-Game-2.0", "KV cache 1.3 GB"]),
}  # fmt: skip


@pytest.mark.parametrize("slug", FULL_SIZE)
def test_weights_of_a_method_are_listed_before_anything_is_fetched(
    slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Good input gets as far as the weights: the families' tests of bad input end before."""
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch"))
    flags, parts = FULL_SIZE[slug]
    text = said(capsys, 1, slug, *flags, "--device", "cpu")
    assert all(part in text for part in parts), text
    assert not (tmp_path / "hub").exists()


def test_the_packages_that_messages_name_are_those_of_the_extra() -> None:
    extra = re.search(r"(?m)^text = (\[.*\])$", (ROOT / "pyproject.toml").read_text())
    assert extra and sorted(ast.literal_eval(extra[1])) == sorted(TEXT_PACKAGES.values())
    command = re.search(r"pip install ([^;]+);", INSTALL_HINT)
    assert command and shlex.split(command[1]) == list(TEXT_PACKAGES.values())


def test_a_missing_file_names_the_option_that_mends_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    option = "--pipeline.decoder.checkpoint.source"
    text = said(capsys, 1, *SMALL, option, "./missing.safetensors")
    assert "1 checkpoint that is not on this machine, of unknown size." in text
    assert " 0.0 GB" not in text
    advised = re.findall(r"--pipeline[\w.-]+[\w]", text)
    assert advised == [option]
    assert run.main([*SMALL, advised[0], str(WEIGHTS / "decoder.safetensors")]) == 0


def test_the_command_for_a_missing_file_mends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "decoder.safetensors"
    option = "--pipeline.decoder.checkpoint"
    words = [*SMALL, f"{option}.source", "org/name", f"{option}.file", name]
    (tmp_path / "repository").mkdir()
    shutil.copy(WEIGHTS / name, tmp_path / "repository")
    with serve_repository("org/name", tmp_path / "repository") as (url, seen):
        text = said(capsys, 1, *words)
        assert seen == [], "nothing is asked of the hub before"
        assert fetch_as_told(text, url, tmp_path / "hub") == f"hf download org/name {name}"
    assert run.main(words) == 0


def test_a_file_of_several_dictionaries_names_the_option_that_selects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    good = load_file(WEIGHTS / "decoder.safetensors")
    torch.save({"ema": good, "model": {}}, tmp_path / "two.pt")
    source = ["--pipeline.decoder.checkpoint.source", "two.pt"]
    text = said(capsys, 2, *SMALL, *source)
    option = re.findall(r"Choose with (--[\w.-]+)", text)
    assert option == ["--pipeline.decoder.checkpoint.select"]
    assert run.main([*SMALL, *source, option[0], "ema"]) == 0


def test_a_type_that_is_not_known_is_no_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (WEIGHTS / "decoder.safetensors").read_bytes()
    (tmp_path / "odd.safetensors").write_bytes(
        re.sub(rb'("dtype": *)"[BF]+[0-9]+"', rb'\1"F4X"', data)
    )
    text = said(capsys, 2, *SMALL, "--pipeline.decoder.checkpoint.source", "odd.safetensors")
    assert "is of type F4X, which is not supported; known: " in text
    assert "damaged" not in text and "Download" not in text


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
def test_a_program_without_output_streams_works_in_silence(tmp_path: Path, closed: str) -> None:
    shut = {"stdout": ">&-", "stderr": "2>&-", "both": ">&- 2>&-"}[closed]
    command = f"{sys.executable} -m flashdreams.run {' '.join(SMALL)} {shut}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, timeout=300)
    assert done.returncode == 0
    assert (tmp_path / "outputs" / "toy-world.mp4").is_file()
