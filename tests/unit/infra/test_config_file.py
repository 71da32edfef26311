"""Configs as YAML text: the round trip, what is refused, and the hash."""

import enum
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from flashdreams.infra.config import InstantiateConfig, derive_config
from flashdreams.infra.config_file import (
    MOVED_MODULES,
    config_hash,
    dump_config,
    known_types,
    load_config,
)
from flashdreams.infra.video_runner import TextToVideoRunnerConfig
from flashdreams.integrations.self_forcing.config import RUNNER_CONFIGS
from flashdreams.runtime.checkpoint import CheckpointConfig

OLD_FILE = Path(__file__).parents[2] / "data" / "configs" / "self_forcing_0.1.yaml"


class Mode(enum.Enum):
    FAST = "fast"
    SLOW = "slow"


class Thing:
    def __init__(self, config: Any) -> None:
        self.config = config


class OtherThing(Thing):
    pass


@dataclass(kw_only=True)
class PlainStandIn:
    """A plain dataclass, named by an annotation only."""

    path: str | Path = "weights"
    degree: int | Literal["auto"] = "auto"


@dataclass(kw_only=True)
class PartStandInConfig(InstantiateConfig):
    """A component."""

    _target: type[Thing] = field(default_factory=lambda: Thing)
    dim: int = 8
    scale: float = 0.5
    bias: float | None = None
    patch_size: tuple[int, int, int] = (1, 2, 2)
    names: list[str] = field(default_factory=lambda: ["q", "k"])
    plan: dict[Any, Any] = field(default_factory=lambda: {"head": 1, "tail": (1, [2])})
    mode: Mode = Mode.FAST
    checkpoint: PlainStandIn | None = None
    hook: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim={self.dim} must be at least 1.")


@dataclass(kw_only=True)
class SpecialPartStandInConfig(PartStandInConfig):
    """A subclass that only a default mentions."""

    extra: str = "x"


@dataclass(kw_only=True)
class RunStandInConfig(InstantiateConfig):
    """A runner."""

    _target: type[Thing] = field(default_factory=lambda: Thing)
    runner_name: str
    description: str = ""
    part: PartStandInConfig = field(default_factory=SpecialPartStandInConfig)
    spare: PartStandInConfig | None = None
    parts: list[PartStandInConfig] = field(default_factory=list)
    output_dir: Path = Path("outputs")


@pytest.fixture
def base() -> RunStandInConfig:
    return RunStandInConfig(runner_name="run")


def _tag(kind: type) -> str:
    return f"!{kind.__module__}:{kind.__qualname__}"


def test_a_config_round_trips_through_text(base: RunStandInConfig) -> None:
    config = derive_config(
        base,
        output_dir=Path("a b/ü"),
        part=dict(scale=1e-7, bias=3, mode=Mode.SLOW, patch_size=(4, 5, 6), names=[], plan={}),
        spare=PartStandInConfig(checkpoint=PlainStandIn(path=Path("x"), degree=2)),
        parts=[PartStandInConfig(), SpecialPartStandInConfig(extra="y")],
    )
    text = dump_config(config)
    again = load_config(text, [base])
    assert again == config
    assert type(again.part.patch_size) is tuple
    assert type(again.spare.checkpoint.path) is type(Path())
    assert again != base
    assert dump_config(again) == text


@pytest.mark.parametrize(
    "words",
    ["", " ", "1", "1e5", "true", "null", "~", "2020-01-01", "=", "<<", "a: b # c", "- x", "!t",
     "*a", "'", '"', "two\nlines\n", "\n\n", "tab\there", "end \nspace ", "ünï ☃ 🌍", "a\x85b",
     "\\n", "%", "0x1F", "1:30", "on", "no", ".inf", "---", "...", "\u2028",
     "a\rb\r\n\nc\x07\ufeff\x00", "x" * 500],
)  # fmt: skip
def test_any_string_survives(base: RunStandInConfig, words: str) -> None:
    config = derive_config(base, description=words, part=dict(plan={words: words}))
    assert load_config(dump_config(config), [base]) == config


@pytest.mark.parametrize("number", [0.0, -0.0, 1e300, 1e-300, 0.1, 1e16, 3, -7, float("inf")])
def test_any_number_survives(base: RunStandInConfig, number: float) -> None:
    again = load_config(dump_config(derive_config(base, part=dict(scale=number))), [base])
    assert repr(again.part.scale) == repr(number)


def test_the_text_is_made_for_people(base: RunStandInConfig) -> None:
    lines = dump_config(base).splitlines()
    assert lines[0] == _tag(RunStandInConfig)
    assert "runner_name: run" in lines
    assert f"part: {_tag(SpecialPartStandInConfig)}" in lines
    assert "  patch_size: !tuple [1, 2, 2]" in lines
    assert "output_dir: !path 'outputs'" in lines
    assert "  names: [q, k]" in lines
    assert f"  mode: {_tag(Mode)} 'FAST'" in lines
    assert "_target" not in dump_config(base)


def test_a_person_writes_only_what_differs(base: RunStandInConfig) -> None:
    text = f"{_tag(RunStandInConfig)}\nrunner_name: mine\npart: {_tag(PartStandInConfig)}\n"
    config = load_config(text + "  scale: 1e-3\n", [base])
    assert config == RunStandInConfig(runner_name="mine", part=PartStandInConfig(scale=0.001))


@pytest.mark.parametrize(
    ("line", "field", "expected"),
    [
        ("output_dir: out/run", "output_dir", Path("out/run")),
        ("output_dir: 010", "output_dir", Path("010")),
        ("output_dir: 12:30", "output_dir", Path("12:30")),
        ("description: 12:30", "description", "12:30"),
        ("description: no", "description", "no"),
        ("description: 1_000", "description", "1_000"),
        ("description: 2026-01-02", "description", "2026-01-02"),
        ("description: 7", "description", "7"),
        ("part: {P} {{patch_size: [4, 5, 6]}}", "patch_size", (4, 5, 6)),
        ("part: {P} {{names: !tuple [q]}}", "names", ["q"]),
        ("part: {P} {{mode: SLOW}}", "mode", Mode.SLOW),
        ("part: {P} {{scale: 2}}", "scale", 2),
    ],
)
def test_what_a_person_types_becomes_what_the_field_is(
    base: RunStandInConfig, line: str, field: str, expected: object
) -> None:
    line = line.format(P=_tag(PartStandInConfig))
    config = load_config(f"{_tag(RunStandInConfig)}\nrunner_name: x\n{line}\n", [base])
    found = getattr(config if hasattr(config, field) else config.part, field)
    assert found == expected and type(found) is type(expected)
    assert load_config(dump_config(config), [base]) == config


def test_a_target_of_its_own_round_trips_if_a_registered_config_has_it(
    base: RunStandInConfig,
) -> None:
    config = derive_config(base, part=dict(_target=OtherThing))
    text = dump_config(config)
    assert load_config(text, [base, config]).part._target is OtherThing
    with pytest.raises(ValueError, match=r"Unknown target .*:OtherThing'"):
        load_config(text, [base])


@pytest.mark.parametrize(
    "tag",
    ["!flashdreams_nowhere.evil:Config", "!os:system", "!!python/object/apply:os.system",
     "!!python/name:flashdreams_nowhere.x", "!path2"],
)  # fmt: skip
def test_a_tag_of_no_registered_type_is_refused_with_nothing_imported(
    base: RunStandInConfig, tag: str
) -> None:
    text = f"{_tag(RunStandInConfig)}\nrunner_name: x\ndescription: fine\npart: {tag} [echo]\n"
    before = set(sys.modules)
    with pytest.raises(ValueError, match=r"run\.yaml, line 4: Unknown type .*registered configs"):
        load_config(text, [base], "run.yaml")
    assert set(sys.modules) == before
    with pytest.raises(ValueError, match=r"holds no config|Unknown type"):
        load_config(f"{tag} {{}}", [base])


def test_a_tag_below_one_that_fails_is_refused_before_anything_is_built(
    base: RunStandInConfig,
) -> None:
    text = (
        f"{_tag(RunStandInConfig)}\nrunner_name: x\npart: {_tag(PartStandInConfig)}\n  dim: -1\n"
        "description: !os:system x\n"
    )
    with pytest.raises(ValueError, match="line 5: Unknown type '!os:system'"):
        load_config(text, [base])


def test_types_of_annotations_and_defaults_are_known(base: RunStandInConfig) -> None:
    tags = known_types([base]).tagged
    assert set(tags.values()) == {
        RunStandInConfig, PartStandInConfig, SpecialPartStandInConfig, PlainStandIn, Mode
    }  # fmt: skip
    assert _tag(Mode) in tags
    assert known_types([]).tagged == {}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("runner_name: x\npard: 3", r"line 3: Unknown field 'pard' .*Did you mean 'part'"),
        ("runner_name: x\npart: {P} {{dmi: 3}}", r"line 3: Unknown field 'part\.dmi'"),
        ("runner_name: x\npart: {P} {{fuse_clean_pass: true}}", r"line 3: fuse_.* was removed in"),
        (
            "runner_name: x\npart: {P} {{dim: a}}",
            r"part\.dim of .* must be a whole number.*; got 'a'",
        ),
        ("runner_name: x\npart: {P} {{dim: -1}}", r"line 3: dim=-1 must be at least 1"),
        ("runner_name: x\noutput_dir: [out]", r"line 3: output_dir .* a path such as out/run; got"),
        ("runner_name: x\npart: {P} {{dim: 010}}", r"line 3: 010 without quotes is 8 to YAML"),
        ("runner_name: x\npart: {P} {{dim: 12:30}}", r"line 3: 12:30 without quotes is 750"),
        ("runner_name: x\npart: {P} {{dim: on}}", r"line 3: on without quotes is True to YAML"),
        ("runner_name: x\nrunner_name: y", r"line 3: 'runner_name' is given twice"),
        ("description: x", r"line 1: RunStandInConfig needs a value for runner_name"),
        ("runner_name: x\npart: {P} {{mode: {M} FASD}}", r"Unknown member 'FASD'.*'FAST'"),
        ("runner_name: x\npart: {P} 3", r"must be followed by its fields"),
        (
            "runner_name: x\npart: {P} {{patch_size: [1, a, 2]}}",
            r"a list of 3: \[a whole number .*; got",
        ),
        ("runner_name: x\npart: {P} {{plan: {{a: 1:30}}}}", r"line 3: 1:30 without quotes is 90"),
        ("runner_name: x\npart: {P} {{names: !path [a]}}", r"line 3: Unknown type '!path'"),
        ("runner_name: x\npart: {P} {{dim: !!int a}}", r"line 3: invalid literal"),
        ("runner_name: &a x\ndescription: *a", r"line 3: aliases \(\*name\) are not allowed"),
        ("runner_name: [", r"not readable YAML: line 3"),
        ("? [a]\n: 3", r"line 2: a key must be a plain value"),
        ("runner_name: x\nparts: " + "[" * 5000, r"nested too deeply"),
    ],
)
def test_a_wrong_file_is_refused_with_the_line(
    base: RunStandInConfig, body: str, message: str
) -> None:
    body = body.format(P=_tag(PartStandInConfig), M=_tag(Mode))
    with pytest.raises((ValueError, TypeError), match=message):
        load_config(f"{_tag(RunStandInConfig)}\n{body}\n", [base])


def test_what_a_checkpoint_refuses_is_named_with_the_line() -> None:
    config = RUNNER_CONFIGS["self-forcing-wan2.1-t2v-1.3b"]
    text = dump_config(config).replace("revision: ", "revision: a b # ", 1)
    with pytest.raises(ValueError, match=r"line \d+: checkpoint .*: revision 'a b' must be"):
        load_config(text, [config])


@pytest.mark.parametrize("text", ["", "runner_name: x", "[1]", "3", "a: 1\n---\nb: 2"])
def test_a_text_without_a_config_is_refused(base: RunStandInConfig, text: str) -> None:
    with pytest.raises(ValueError, match=r"holds no config.*RunStandInConfig|not readable YAML"):
        load_config(text, [base])


def test_a_removed_field_that_is_off_is_ignored_with_a_note(base: RunStandInConfig) -> None:
    tag, notes = _tag(RunStandInConfig), []
    text = f"{tag}\nrunner_name: run\ncompile_blocks: false\nspare: null\n"
    assert load_config(text, [base], "run.yaml", notes.append) == base
    assert notes == [
        "run.yaml: compile_blocks was removed in 0.2 and is ignored because it is off."
    ]
    text = text.replace("compile_blocks: false", "linear_precision: native")
    assert load_config(text, [base], "run.yaml", notes.append) == base
    assert len(notes) == 2
    with pytest.raises(ValueError, match="line 3: linear_precision was removed"):
        load_config(text.replace("native", "fp8"), [base])
    text = text.replace("linear_precision: native", "compile_blocks: false")
    for value in ("true", "null", "0"):
        with pytest.raises(ValueError, match="line 3: compile_blocks was removed"):
            load_config(text.replace("false", value), [base])


def test_a_file_of_0_1_is_read() -> None:
    text, notes = OLD_FILE.read_text(), []
    config = load_config(text, RUNNER_CONFIGS.values(), note=notes.append)
    transformer = config.pipeline.diffusion_model.transformer
    assert type(config) is TextToVideoRunnerConfig
    assert type(transformer.checkpoint) is CheckpointConfig
    assert (config.runner_name, transformer.dim) == ("self-forcing-wan2.1-t2v-1.3b", 1536)
    assert [note.split()[2] for note in notes] == [
        "linear_precision",
        "fuse_clean_pass",
        "compile_blocks",
    ]
    with pytest.raises(ValueError, match=r"Unknown type .*wan\.runners:TextToVideo"):
        load_config(text.replace("wan.runner:", "wan.runners:"), RUNNER_CONFIGS.values())


def test_a_moved_target_is_found(monkeypatch: pytest.MonkeyPatch, base: RunStandInConfig) -> None:
    text = f"{_tag(RunStandInConfig)}\nrunner_name: run\n_target: left.behind:Thing\n"
    with pytest.raises(ValueError, match=r"line 3: Unknown target 'left\.behind:Thing'"):
        load_config(text, [base])
    monkeypatch.setitem(MOVED_MODULES, "left.behind", __name__)
    assert load_config(text, [base]) == base


def test_a_value_that_a_file_cannot_hold_is_named(base: RunStandInConfig) -> None:
    config = derive_config(base, part=dict(hook=print))
    with pytest.raises(TypeError, match=r"RunStandInConfig\.part\.hook holds <built-in"):
        dump_config(config)
    config = derive_config(base, part=dict(plan={(1, 2): 3}))
    with pytest.raises(TypeError, match=r"part\.plan has the key \(1, 2\)"):
        dump_config(config)


def test_the_hash_is_equal_for_equal_configs_only(base: RunStandInConfig) -> None:
    again = RunStandInConfig(runner_name="run")
    assert config_hash(base) == config_hash(again)
    assert config_hash(load_config(dump_config(base), [base])) == config_hash(base)
    one, two = (derive_config(base, part=dict(scale=s)) for s in (2, 2.0))
    assert one == two
    assert config_hash(one) == config_hash(two)
    others = [
        derive_config(base, part=dict(scale=0.25)),
        derive_config(base, part=dict(names=["q"])),
        derive_config(base, part=dict(mode=Mode.SLOW)),
        derive_config(base, part=dict(_target=OtherThing)),
        derive_config(base, part=PartStandInConfig()),
        derive_config(base, part=dict(plan={"head": "1", "tail": (1, [2])})),
        derive_config(base, part=dict(plan={"head": 1, "tail": (1, (2,))})),
        derive_config(base, output_dir=Path("elsewhere")),
        derive_config(base, part=dict(hook=print)),
    ]
    assert len({config_hash(c) for c in [base, *others]}) == len(others) + 1


def test_the_hash_does_not_depend_on_order_or_addresses(base: RunStandInConfig) -> None:
    forward = derive_config(base, part=dict(plan={"a": 1, "b": Thing(None)}))
    backward = derive_config(base, part=dict(plan={"b": Thing(None), "a": 1}))
    assert config_hash(forward) == config_hash(backward)


def test_the_hash_is_the_same_in_another_process(base: RunStandInConfig) -> None:
    config = derive_config(base, part=dict(plan={"set": {"a", "b", "c"}, "type": int}))
    code = (
        f"from {__name__} import *; from pathlib import Path; "
        "c = RunStandInConfig(runner_name='run'); "
        "c.part.plan = {'type': int, 'set': {'c', 'b', 'a'}}; print(config_hash(c))"
    )
    root = Path(__file__).parents[3]
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True
    )
    assert out.stdout.strip() == config_hash(config)
