"""Memory that runs out ends in what was needed, what there was, and what would fit."""

import pytest
import torch

from flashdreams import run
from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.planning.shortage import ShortageError, is_shortage, with_advice
from flashdreams.registry import discover


def on_the_host(*_: object, **__: object) -> None:
    torch.empty(2**50, dtype=torch.uint8)  # a true error of the allocator


def on_cuda(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 ...")


@pytest.mark.parametrize(("fails", "asked"), [(on_the_host, "1048576.00"), (on_cuda, "20.00")])
def test_a_run_says_what_it_needs(tmp_path, monkeypatch, capsys, fails, asked):
    monkeypatch.setattr(StreamInferencePipeline, "generate", fails)
    code = run.main(["self-forcing-tiny-random", "--output-dir", str(tmp_path)])
    printed = capsys.readouterr().err
    assert code == 1 and "Traceback" not in printed
    assert f"error: out of memory on the host, at {asked} GiB. A rollout needs " in printed
    assert "kv cache" in printed and "there are " in printed


def test_other_errors_stay_as_they_are():
    """Negative control."""
    config = discover().resolve("self-forcing-tiny-random")
    other = RuntimeError("shape mismatch")
    assert with_advice(other, config) is other and not is_shortage(other)
    memory = MemoryError()
    found = with_advice(memory, config)
    assert isinstance(found, ShortageError) and found.__cause__ is memory
