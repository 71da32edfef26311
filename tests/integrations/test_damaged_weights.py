"""Damaged weights end a run before it begins: one line with file and option, exit code 2."""

import json
import random
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashdreams import run
from flashdreams.infra import component
from flashdreams.infra.config import derive_config
from flashdreams.integrations.self_forcing.config import TINY_RUNNER as SELF_FORCING
from flashdreams.models.umt5 import UMT5TextEncoder
from flashdreams.runtime.checkpoint import CheckpointConfig
from tests.tiny_umt5 import tiny_config, write_tokenizer

WEIGHTS = Path(component.__file__).parents[1] / "integrations/toy_world/weights"
GOOD = WEIGHTS / "decoder.safetensors"
DECODER = "--pipeline.decoder.checkpoint.source"
NOISE = random.Random(0).randbytes(9000)


def pickled(tmp_path: Path) -> bytes:
    torch.save(load_file(GOOD), tmp_path / "whole.pt")
    return (tmp_path / "whole.pt").read_bytes()


def damage(kind: str, tmp_path: Path) -> Path:
    """A file that is damaged in this way."""
    good = GOOD.read_bytes()
    (size,) = struct.unpack("<Q", good[:8])
    contents = {
        "noise.safetensors": lambda: NOISE,
        "cut-in-data.safetensors": lambda: good[:-1000],
        "no-json.safetensors": lambda: good[:8] + b"{" * size + good[8 + size :],
        "other-model.safetensors": (WEIGHTS / "encoder.safetensors").read_bytes,
        "noise-in-zip.pth": lambda: b"PK\x03\x04" + NOISE,
        "cut.pt": lambda: pickled(tmp_path)[:-50],
        "unknown.ckpt": lambda: good,
        "model.safetensors.index.json": lambda: b"{",
    }
    path = tmp_path / kind
    path.write_bytes(contents[kind]())
    return path


KINDS = [
    "noise.safetensors", "cut-in-data.safetensors", "no-json.safetensors",
    "other-model.safetensors", "noise-in-zip.pth", "cut.pt", "unknown.ckpt",
    "model.safetensors.index.json",
]  # fmt: skip
"""One of each reader and refusal; `tests/unit/runtime/checkpoint` has every kind."""


def refused(capsys: pytest.CaptureFixture[str], option: str, path: Path, code: int) -> str:
    """The first line of the error; further ones are a list of tensors."""
    text = capsys.readouterr().err
    first, *listed = text.splitlines()
    assert code == 2, text
    assert first.startswith(f"flashdreams-run: error: {option}: ") and str(path) in first, text
    assert all(line.startswith("  ") for line in listed) and "Traceback" not in text
    assert not re.search(r"\b(NoneType|object has no|expected at most|EOFError)\b", text)
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_damage_is_usage(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = damage(kind, tmp_path)
    read = []
    load = component.load_checkpoint

    def watch(module, *arguments, **options):
        read.append(options["device"])
        return load(module, *arguments, **options)

    monkeypatch.setattr(component, "load_checkpoint", watch)
    output = tmp_path / "out"
    words = ["toy-world", "--device", "cpu", "--total-blocks", "1", "--output-dir", str(output)]
    text = refused(capsys, DECODER, path, run.main([*words, DECODER, str(path)]))
    assert set(read) <= {"meta"}, "weights of other components were read before"
    assert not list(output.iterdir())
    assert ("22 missing in the file" in text) == (kind == "other-model.safetensors")


def test_a_whole_file_is_no_damage(tmp_path: Path) -> None:
    """Negative control."""
    words = ["toy-world", "--device", "cpu", "--total-blocks", "1", "--output-dir", str(tmp_path)]
    assert run.main([*words, DECODER, str(GOOD)]) == 0


@pytest.mark.parametrize("part", ["image-encoder.checkpoint.source", "decoder.checkpoint.source",
                                  "diffusion-model.transformer.checkpoint.source",
                                  "diffusion-model.transformer.loras"])  # fmt: skip
def test_every_component_names_its_option(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, option = damage("cut-in-data.safetensors", tmp_path), f"--pipeline.{part}"
    words = ["toy-world", "--device", "cpu", "--output-dir", str(tmp_path / "out")]
    refused(capsys, option, path, run.main([*words, option, str(path)]))


@pytest.mark.parametrize("what", ["checkpoint", "tokenizer"])
@pytest.mark.parametrize("content", [b"", NOISE, None])
def test_damaged_files_of_the_text_encoder_name_their_option(
    what: str, content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("transformers", "tokenizers", "ftfy"):
        pytest.importorskip(package)
    sizes = {"text_dim": 32, "text_len": 32, "num_layers": 1}
    weights = tmp_path / "t5.safetensors"
    save_file(UMT5TextEncoder(tiny_config(**sizes)).encoder.state_dict(prefix="encoder."), weights)
    config = tiny_config(
        **sizes,
        tokenizer=write_tokenizer(tmp_path),
        checkpoint=CheckpointConfig(source=str(weights)),
    )
    path = tmp_path / {"checkpoint": "t5.safetensors", "tokenizer": "tokenizer.json"}[what]
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    runner = derive_config(
        SELF_FORCING, pipeline={"text_encoder": config}, device="cpu", total_blocks=2,
        output_dir=tmp_path / "out", prompt="a street",
    )  # fmt: skip
    option = f"--pipeline.text-encoder.{what}.source"
    refused(capsys, option, path, run._run(runner, debug=False))


def test_an_index_that_names_absent_shards_is_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"linear.weight": "1.safetensors"}}))
    words = ["toy-world", "--device", "cpu", "--output-dir", str(tmp_path / "out")]
    refused(capsys, DECODER, index, run.main([*words, DECODER, str(tmp_path)]))
