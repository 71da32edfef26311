"""Latents on disk: readable at any time, one safetensors file at the end."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flashdreams.runtime import latents
from flashdreams.runtime.latents import LatentWriter, read_latent_parts


def chunks() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, frames, 4, 5, generator=generator) for frames in (1, 3, 3)]


def write(path: Path) -> LatentWriter:
    writer = LatentWriter(path)
    for chunk in chunks():
        writer.append(chunk)
    return writer


@pytest.mark.parametrize("block_bytes", [1, 200, 2**24])
def test_the_final_file_is_that_of_safetensors(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one frame, of two, of all; chunks of different lengths."""
    monkeypatch.setattr(latents, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "latents_toy.safetensors"
    write(path).finish()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    expected = torch.cat(chunks(), dim=2)
    assert torch.equal(load_file(path)["latents"], expected)
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["latents"]
    save_file({"latents": expected}, tmp_path / "reference")
    assert path.read_bytes() == (tmp_path / "reference").read_bytes()
    save_file({"latents": expected.flip(2)}, tmp_path / "reference")
    assert path.read_bytes() != (tmp_path / "reference").read_bytes()


def test_parts_can_be_read_after_every_chunk(tmp_path: Path) -> None:
    writer, written = LatentWriter(tmp_path / "latents_toy.safetensors"), []
    for chunk in chunks():
        writer.append(chunk)
        written.append(chunk)
        parts = read_latent_parts(tmp_path / "latents_toy.partial.npy")
        assert torch.equal(parts, torch.cat(written, dim=2))
    assert np.load(writer.partial_path).shape == (7, 2, 3, 4, 5)


def test_half_a_chunk_is_not_read(tmp_path: Path) -> None:
    """A process that is killed between a chunk and its header."""
    writer = write(tmp_path / "latents_toy.safetensors")
    writer.close()
    with writer.partial_path.open("ab") as file:
        file.write(b"\0" * 100)
    assert torch.equal(read_latent_parts(writer.partial_path), torch.cat(chunks(), dim=2))


def test_other_data_types_become_float32(tmp_path: Path) -> None:
    writer = LatentWriter(tmp_path / "latents_toy.safetensors")
    writer.append(chunks()[0].bfloat16())
    writer.finish()
    found = load_file(writer.path)["latents"]
    assert torch.equal(found, chunks()[0].bfloat16().float())


def test_latents_of_another_size_are_refused(tmp_path: Path) -> None:
    writer = write(tmp_path / "latents_toy.safetensors")
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 6\] does not fit .* \[2, 3, 4, 5\]"):
        writer.append(torch.zeros(2, 3, 1, 4, 6))
    assert read_latent_parts(writer.partial_path).shape[2] == 7
