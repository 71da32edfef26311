"""Which compiler torch.compile calls on which device."""

import re
import shutil

import pytest
import torch

from flashdreams.runtime.compilation import why_no_compiler

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def has(monkeypatch: pytest.MonkeyPatch, *names: str, **variables: str) -> None:
    """A Linux machine with these compilers and variables alone."""
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: name if name in names else None)
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)


@pytest.mark.parametrize(
    ("device", "names", "variables"),
    [
        (CPU, ["g++"], {}),
        (CPU, ["clang++"], {"CXX": "clang++"}),
        (CUDA, ["gcc"], {}),
        (CUDA, ["clang"], {}),
        (CUDA, ["icx"], {"CC": "icx"}),
    ],
)
def test_a_compiler_that_is_there_is_enough(monkeypatch, device, names, variables):
    has(monkeypatch, *names, **variables)
    assert why_no_compiler(device) is None


@pytest.mark.parametrize(
    ("device", "names", "variables", "said"),
    [
        (CPU, ["gcc", "clang++"], {}, r"g\+\+ is not found.*export CXX=clang\+\+$"),
        (CPU, ["g++"], {"CXX": "clang++"}, r"clang\+\+ is not found"),
        (CUDA, ["g++"], {}, "gcc or clang is not found.*export CC=clang$"),
        (CUDA, ["gcc"], {"CC": "icx", "CXX": "gcc"}, "icx is not found"),
    ],
)
def test_the_one_that_is_missing_is_named(monkeypatch, device, names, variables, said):
    """PyTorch and Triton do not try others than these, so neither may the check."""
    has(monkeypatch, *names, **variables)
    found = why_no_compiler(device)
    assert found is not None and re.search(said, found)
