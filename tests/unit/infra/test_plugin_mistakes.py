"""Mistakes of people who write a method: named where they are made, with what to write."""

import logging
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from flashdreams.infra.assembly import count_heads
from flashdreams.infra.config import InstantiateConfig, derive_config
from flashdreams.infra.encoder.base import Encoder, EncoderConfig
from flashdreams.parallel.plan import ParallelPlan
from tests.tiny import TEXT_DIM, tiny_pipeline
from tests.unit.infra.test_finite import text


@dataclass(kw_only=True)
class CheckedConfig(InstantiateConfig):
    _target: type = field(default_factory=lambda: object)
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError("size must be at least 1.")


def test_a_config_that_leaves_out_inherited_checks_is_refused_where_it_is_defined() -> None:
    with pytest.raises(TypeError, match=r"Lax.__post_init__ skips .* super\(\).__post_init__"):

        class Lax(CheckedConfig):
            def __post_init__(self) -> None:
                self.size += 1

    @dataclass(kw_only=True)
    class Strict(CheckedConfig):  # as the message says
        other: int = 2

        def __post_init__(self) -> None:
            super().__post_init__()
            self.other = 2 * self.size

    assert Strict(size=3).other == 6
    with pytest.raises(ValueError, match="size must be at least 1"):
        Strict(size=0)

    class First(InstantiateConfig):  # nothing is inherited
        def __post_init__(self) -> None: ...


@pytest.mark.parametrize("name", ["tensor", "spatial"])
def test_an_unknown_style_of_a_plan_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"plan's {name} gives 'a.b' the style 'colwize'; allowed"
    ):
        ParallelPlan(**{name: {"a.b": "colwize"}})
    ParallelPlan(tensor={"a.b": "colwise"}, spatial={"c": "halo"})


@pytest.mark.parametrize("name", ["num_heads", "num_attention_heads", "n_heads", "heads"])
def test_heads_are_found_by_their_usual_names(name: str) -> None:
    assert count_heads(SimpleNamespace(config=SimpleNamespace(**{name: 8}))) == 8


def test_heads_that_cannot_be_found_are_reported(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ParallelPlan(attention=("core",))
    transformer = SimpleNamespace(config=SimpleNamespace(), parallel_plan=lambda: plan)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with caplog.at_level(logging.WARNING):
        assert count_heads(transformer) is None
    assert "SimpleNamespace has no field num_heads" in caplog.text


@dataclass(kw_only=True)
class KeyEncoderConfig(EncoderConfig):
    _target: type["KeyEncoder"] = field(default_factory=lambda: KeyEncoder)


class KeyEncoder(Encoder):
    def forward(self, input: Any) -> Any:
        return input.mean()


def test_an_encoder_without_input_says_what_generate_needs() -> None:
    pipeline = derive_config(tiny_pipeline(), encoder=KeyEncoderConfig()).setup(device="cpu")
    cache = pipeline.initialize_cache(text=text())
    with pytest.raises(
        ValueError, match=r"AR step 0: KeyEncoder cannot encode None .*input=\.\.\."
    ):
        pipeline.generate(autoregressive_index=0, cache=cache)
    assert text().shape[2] == TEXT_DIM
