"""The config system: setting up, comparing, printing and deriving."""

import copy
import enum
import subprocess
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from flashdreams.infra.config import (
    REMOVED_FIELDS,
    InstantiateConfig,
    conforms,
    derive_config,
    field_annotation,
)
from flashdreams.infra.ranges import check_range

if TYPE_CHECKING:
    from nowhere import OnlyForTypeCheckers


class Mode(enum.Enum):
    FAST = "fast"
    SLOW = "slow"


class Thing:
    def __init__(self, config: Any, **kwargs: Any) -> None:
        self.config = config
        self.kwargs = kwargs


@dataclass(kw_only=True)
class CheckpointStandIn:
    """A plain dataclass nested in a config."""

    path: str | Path = "model.safetensors"
    strict: bool = True


@dataclass(kw_only=True)
class EncoderStandInConfig(InstantiateConfig):
    """An encoder."""

    _target: type["EncoderStandIn"] = field(default_factory=lambda: EncoderStandIn)
    embedding_dim: int = 512
    num_layers: int = 6
    scale: float = 1.0
    checkpoint: CheckpointStandIn | None = None


class EncoderStandIn(Thing):
    pass


@dataclass(kw_only=True)
class WideEncoderStandInConfig(EncoderStandInConfig):
    """A variant with one more field."""

    width: int = 3


@dataclass(kw_only=True)
class TransformerStandInConfig(InstantiateConfig):
    """A transformer."""

    _target: type[Thing] = field(default_factory=lambda: Thing)
    num_heads: int = 6
    dim: int = 48
    head_dim: int = field(init=False)
    use_cuda_graph: bool = False
    patch_size: tuple[int, int, int] = (1, 2, 2)
    timesteps: tuple[int, ...] = (1000, 750)
    names: list[str] = field(default_factory=lambda: ["q", "k"])
    plan: dict[str, int] = field(default_factory=lambda: {"head": 1, "tail": 2})
    backend: Literal["auto", "sdpa"] = "auto"
    mode: Mode = Mode.FAST
    odd: "OnlyForTypeCheckers" = 5

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} is not divisible by num_heads={self.num_heads}.")
        self.head_dim = self.dim // self.num_heads


@dataclass(kw_only=True)
class PipelineStandInConfig(InstantiateConfig):
    """A pipeline."""

    _target: type[Thing] = field(default_factory=lambda: Thing)
    name: str
    encoder: EncoderStandInConfig | None = None
    transformer: TransformerStandInConfig = field(default_factory=TransformerStandInConfig)
    output_dir: Path = Path("outputs")


@pytest.fixture
def base() -> PipelineStandInConfig:
    return PipelineStandInConfig(name="base", encoder=EncoderStandInConfig())


def test_setup_calls_the_target_with_the_config_and_the_keywords() -> None:
    config = EncoderStandInConfig(embedding_dim=8)
    thing = config.setup(device="cpu")
    assert type(thing) is EncoderStandIn
    assert thing.config is config
    assert thing.kwargs == {"device": "cpu"}


def test_equal_fields_make_equal_configs(base: PipelineStandInConfig) -> None:
    again = PipelineStandInConfig(name="base", encoder=EncoderStandInConfig())
    assert base == again
    again.encoder.num_layers = 7  # type: ignore[union-attr]
    assert base != again
    assert EncoderStandInConfig() != WideEncoderStandInConfig()


def test_str_is_one_line_per_field(base: PipelineStandInConfig) -> None:
    lines = str(base).splitlines()
    assert lines[0] == "PipelineStandInConfig("
    assert "    encoder=EncoderStandInConfig(" in lines
    assert "        embedding_dim=512," in lines
    assert "        patch_size=(1, 2, 2)," in lines
    assert "        head_dim=8," in lines
    assert lines[-1] == ")"
    assert "_target" not in str(base)


def test_str_shows_a_target_that_is_not_the_default_and_configs_in_containers() -> None:
    @dataclass(kw_only=True)
    class ManyConfig(InstantiateConfig):
        _target: type = Thing
        items: list[CheckpointStandIn] = field(default_factory=lambda: [CheckpointStandIn()])
        by_name: dict[str, CheckpointStandIn] = field(
            default_factory=lambda: {"a": CheckpointStandIn()}
        )

    text = str(ManyConfig(_target=EncoderStandIn))
    assert "_target=<class" in text
    assert "    items=[\n        CheckpointStandIn(\n            path='model.saf" in text
    assert "    by_name={\n        'a': CheckpointStandIn(\n" in text


def test_derive_overrides_nested_fields_and_keeps_the_rest(base: PipelineStandInConfig) -> None:
    variant = derive_config(base, name="variant", encoder=dict(embedding_dim=1024))
    assert type(variant) is PipelineStandInConfig
    assert variant.name == "variant"
    assert variant.encoder == EncoderStandInConfig(embedding_dim=1024)
    assert variant.transformer == base.transformer


def test_derive_never_mutates_the_base_and_shares_nothing(base: PipelineStandInConfig) -> None:
    before = copy.deepcopy(base)
    variant = derive_config(base, transformer=dict(num_heads=4))
    assert variant.encoder is not None
    variant.encoder.embedding_dim = 1
    variant.transformer.names.append("v")
    variant.transformer.plan["head"] = 9
    assert base == before
    assert derive_config(base) == before
    assert derive_config(base) is not base


def test_derive_shares_nothing_with_the_overrides(base: PipelineStandInConfig) -> None:
    names = ["a"]
    variant = derive_config(base, transformer=dict(names=names))
    names.append("b")
    assert variant.transformer.names == ["a"]


def test_derive_takes_a_class_and_instantiates_it_first() -> None:
    variant = derive_config(EncoderStandInConfig, num_layers=2)
    assert variant == EncoderStandInConfig(num_layers=2)


def test_derive_takes_a_class_whose_required_fields_are_given() -> None:
    variant = derive_config(PipelineStandInConfig, name="x", encoder=dict(scale=2.0))
    assert variant == PipelineStandInConfig(name="x", encoder=EncoderStandInConfig(scale=2.0))
    with pytest.raises(TypeError, match="cannot be made without name"):
        derive_config(PipelineStandInConfig, output_dir=Path("x"))


def test_derive_reruns_post_init(base: PipelineStandInConfig) -> None:
    assert derive_config(base, transformer=dict(dim=96)).transformer.head_dim == 16
    with pytest.raises(ValueError, match="dim=48 is not divisible by num_heads=5"):
        derive_config(base, transformer=dict(num_heads=5))


def test_unknown_field_names_the_path_the_nearest_and_all(base: PipelineStandInConfig) -> None:
    with pytest.raises(ValueError) as error:
        derive_config(base, encoder=dict(embeding_dim=3))
    message = str(error.value)
    assert "'encoder.embeding_dim' of EncoderStandInConfig" in message
    assert "Did you mean 'embedding_dim'" in message
    assert "Valid fields: embedding_dim, num_layers, scale, checkpoint." in message
    assert "_target" not in message


@pytest.mark.parametrize("name", REMOVED_FIELDS)
def test_a_removed_field_is_refused_with_the_reason(name: str, base: PipelineStandInConfig) -> None:
    said = f"^{name} was removed in 0.2: measured slower .* Remove it; see CHANGELOG.md.$"
    with pytest.raises(ValueError, match=said):
        derive_config(base, transformer={name: False})
    with pytest.raises(TypeError, match=said):
        TransformerStandInConfig(**{name: True})


def test_a_field_of_ones_own_may_have_a_removed_name() -> None:
    @dataclass(kw_only=True)
    class OwnConfig(InstantiateConfig):
        _target: type[Thing] = field(default_factory=lambda: Thing)
        compile_blocks: bool = False

    assert derive_config(OwnConfig(), compile_blocks=True) == OwnConfig(compile_blocks=True)


def test_a_dict_on_a_leaf_is_refused_with_the_path(base: PipelineStandInConfig) -> None:
    with pytest.raises(TypeError, match=r"transformer\.dim of .* is a plain value, not a compon"):
        derive_config(base, transformer=dict(dim=dict(x=1)))
    with pytest.raises(TypeError, match=r"transformer\.odd of .* is a plain value"):
        derive_config(base, transformer=dict(odd=dict(x=1)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (dict(dim="48"), r"transformer\.dim of \w+ must be int, got '48' \(str\)"),
        (dict(dim=True), r"transformer\.dim .* must be int, got True"),
        (dict(dim=None), r"transformer\.dim .* must be int, got None"),
        (dict(use_cuda_graph=1), r"transformer\.use_cuda_graph .* must be bool"),
        (dict(patch_size=(1, 2)), r"must be tuple\[int, int, int\], got \(1, 2\)"),
        (dict(patch_size=[1, 2, 2]), r"must be tuple\[int, int, int\], got \[1, 2, 2\] \(list\)"),
        (dict(timesteps=(1000, "750")), r"transformer\.timesteps"),
        (dict(names="qk"), r"transformer\.names .* must be list\[str\]"),
        (dict(plan={"head": "one"}), r"transformer\.plan .* must be dict\[str, int\]"),
        (dict(plan=3), r"transformer\.plan"),
        (dict(backend="flash"), r"transformer\.backend .* must be Literal\['auto', 'sdpa'\]"),
        (dict(mode="fast"), r"transformer\.mode .* must be Mode"),
    ],
)
def test_a_leaf_of_the_wrong_type_is_refused(
    base: PipelineStandInConfig, override: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        derive_config(base, transformer=override)


def test_right_leaves_are_taken_and_an_int_is_a_float(base: PipelineStandInConfig) -> None:
    variant = derive_config(
        base,
        output_dir=Path("x"),
        encoder=dict(scale=2),
        transformer=dict(timesteps=(), mode=Mode.SLOW, backend="sdpa", patch_size=(1, 4, 4)),
    )
    assert variant.encoder is not None
    assert variant.encoder.scale == 2.0
    assert variant.transformer.mode is Mode.SLOW


def test_an_annotation_that_cannot_be_resolved_is_skipped(base: PipelineStandInConfig) -> None:
    variant = derive_config(base, transformer=dict(odd="anything", num_heads=4))
    assert variant.transformer.odd == "anything"
    with pytest.raises(TypeError, match="num_heads"):
        derive_config(base, transformer=dict(num_heads="4"))


def test_a_dict_typed_field_is_replaced_whole(base: PipelineStandInConfig) -> None:
    variant = derive_config(base, transformer=dict(plan={"body": 3}))
    assert variant.transformer.plan == {"body": 3}


def test_a_whole_config_replaces_a_component(base: PipelineStandInConfig) -> None:
    wide = WideEncoderStandInConfig(width=5)
    variant = derive_config(base, encoder=wide)
    assert variant.encoder == wide
    assert derive_config(base, encoder=None).encoder is None
    with pytest.raises(TypeError, match=r"encoder of \w+ must be EncoderStandInConfig \| None"):
        derive_config(base, encoder=CheckpointStandIn())


def test_a_component_that_is_none_can_be_set() -> None:
    bare = PipelineStandInConfig(name="bare")
    assert derive_config(bare, encoder=EncoderStandInConfig()).encoder == EncoderStandInConfig()
    variant = derive_config(bare, encoder=dict(num_layers=2, checkpoint=dict(strict=False)))
    assert variant.encoder == EncoderStandInConfig(
        num_layers=2, checkpoint=CheckpointStandIn(strict=False)
    )
    with pytest.raises(ValueError, match=r"'encoder\.checkpoint\.pth'.*Did you mean 'path'"):
        derive_config(bare, encoder=dict(checkpoint=dict(pth="x")))


def test_a_component_of_two_possible_classes_needs_a_whole_config() -> None:
    @dataclass(kw_only=True)
    class EitherConfig(InstantiateConfig):
        _target: type = Thing
        part: CheckpointStandIn | EncoderStandInConfig | None = None

    with pytest.raises(TypeError, match=r"give a whole config, CheckpointStandIn\(\.\.\.\) or"):
        derive_config(EitherConfig(), part=dict(path="x"))


def test_a_computed_field_cannot_be_set(base: PipelineStandInConfig) -> None:
    with pytest.raises(ValueError, match=r"'transformer\.head_dim' .* is computed"):
        derive_config(base, transformer=dict(head_dim=3))


def test_a_base_that_is_no_config_is_refused() -> None:
    with pytest.raises(TypeError, match="derive_config needs a config"):
        derive_config({"name": "x"}, name="y")


def test_a_field_may_be_called_base() -> None:
    @dataclass(kw_only=True)
    class OddConfig(InstantiateConfig):
        _target: type = Thing
        base: int = 1

    assert derive_config(OddConfig(), base=2).base == 2


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, float, True),
        (True, float, False),
        (None, int | None, True),
        (len, Callable[[str], int], True),
        (3, Callable[[str], int], False),
        (int, type[int], True),
        (3, type[int], False),
        (["a"], Sequence[str], True),
        ("a", Sequence[str], False),
        ("a", str | list[str], True),
        ({"a": 1}, Mapping[str, int], True),
        ({"a": "b"}, Mapping[str, int], False),
        (1, Literal[1, 2], True),
        (True, Literal[1, 2], False),
        (object(), Any, True),
    ],
)
def test_conforms(value: Any, annotation: Any, expected: bool) -> None:
    assert conforms(value, annotation) is expected


def test_annotations_are_read_in_the_module_that_wrote_them() -> None:
    assert field_annotation(WideEncoderStandInConfig, "checkpoint") == CheckpointStandIn | None


def test_the_config_system_needs_no_torch() -> None:
    code = (
        "import sys, flashdreams.infra.config; "
        "assert 'torch' not in sys.modules and 'tyro' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "frames=0 must be at least 1"),
        (2**40, "frames=1099511627776 must be at most 2147483647"),
        (float("nan"), "frames=nan must be at least 1"),
        (1, None),
        (None, None),
    ],
)
def test_a_number_out_of_range_is_refused(value, said):
    config = types.SimpleNamespace(frames=value)
    if said is None:
        check_range(config, "frames")
    else:
        with pytest.raises(ValueError, match=said):
            check_range(config, "frames")


def test_a_number_of_the_command_line_is_called_by_its_flag():
    with pytest.raises(ValueError, match=r"^--total-blocks 0: must be at least 1\.$"):
        check_range(types.SimpleNamespace(total_blocks=0), "total_blocks", as_flags=True)
