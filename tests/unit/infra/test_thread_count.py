"""How many CPU threads a runner takes."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashdreams.infra.runner import SMALL_PARAMETERS, set_threads

MANY = 3


@pytest.fixture(autouse=True)
def many(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(MANY)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(before)


def pipeline(parameters: int, device: str = "cpu") -> Any:
    weights = [torch.empty(parameters, device="meta")]
    return SimpleNamespace(parameters=lambda: weights, target_device=torch.device(device))


@pytest.mark.parametrize(
    ("asked", "parameters", "device", "expected"),
    [
        (None, SMALL_PARAMETERS - 1, "cpu", 1),
        (None, SMALL_PARAMETERS, "cpu", MANY),
        (None, 1, "cuda", MANY),
        (2, SMALL_PARAMETERS, "cpu", 2),
        (2, 1, "cpu", 2),
    ],
)
def test_threads(asked: int | None, parameters: int, device: str, expected: int) -> None:
    set_threads(asked, pipeline(parameters, device))
    assert torch.get_num_threads() == expected


def test_what_the_environment_says_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(MANY))
    set_threads(None, pipeline(1))
    assert torch.get_num_threads() == MANY
