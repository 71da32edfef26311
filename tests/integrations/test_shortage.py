"""Memory that runs out ends in what was needed, what there was, and what would fit."""

import re
from dataclasses import replace

import pytest
import torch

from flashdreams import run
from flashdreams.infra.config import derive_config
from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.parallel.mesh import ParallelDegrees
from flashdreams.planning.advice import explain
from flashdreams.planning.devices import DEVICES, GIB
from flashdreams.planning.plans import Planner
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
    assert f"out of memory on the host ({asked} GiB more could not be allocated). A roll" in printed
    assert "libraries" in printed and "there are " in printed


def test_what_is_advised_on_a_host_fits_with_room_to_spare():
    """Ranks on a host share its memory, so more of them are no advice."""
    config = derive_config(discover().resolve("toy-world").pipeline)
    window = dict(transformer=dict(window_size_t=400_000))
    host = replace(DEVICES["H200-141GB"], memory_gib=2.4, is_host=True, fp8_tflops=1)
    text = explain(derive_config(config, diffusion_model=window), host, ParallelDegrees())
    size = int(re.search(r"fits: --pipeline\S+window-size-t (\d+)\.$", text)[1])
    smaller = dict(transformer=dict(window_size_t=size))
    (plan,) = Planner(derive_config(config, diffusion_model=smaller), host).plans(1)
    assert 0.8 < plan.memory.total / GIB / 2.4 < 0.95


def test_a_smaller_video_is_advised_in_pixels_where_a_command_takes_them():
    config = derive_config(discover().resolve("self-forcing-tiny-random").pipeline)
    large = dict(transformer=dict(latent_height=128, latent_width=128))
    host = replace(DEVICES["H200-141GB"], memory_gib=1.7, is_host=True)
    text = explain(derive_config(config, diffusion_model=large), host, ParallelDegrees(), pixels=8)
    assert "The cheapest change that fits: a smaller video: --height 512 --width 512." in text
    assert "torchrun" not in text


def test_nothing_is_advised_that_cannot_help_or_be_typed():
    """What fits by count needs no change, and commands without --height have no --prompt-embeds."""
    config = discover().resolve("self-forcing-tiny-random").pipeline
    host = replace(DEVICES["H200-141GB"], memory_gib=64, is_host=True)
    assert explain(config, host, ParallelDegrees(), pixels=8).endswith("end other programs.")
    small = replace(host, memory_gib=0.1)
    assert "No single change fits" in explain(config, small, ParallelDegrees())


def test_other_errors_stay_as_they_are():
    """Negative control."""
    config = discover().resolve("self-forcing-tiny-random")
    other = RuntimeError("shape mismatch")
    assert with_advice(other, config) is other and not is_shortage(other)
    memory = MemoryError()
    found = with_advice(memory, config)
    assert isinstance(found, ShortageError) and found.__cause__ is memory
