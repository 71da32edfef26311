"""The command line: listing, help, overrides, config files, errors and exit codes."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from flashdreams import run
from flashdreams.infra.config import InstantiateConfig, derive_config
from flashdreams.parallel.environment import OtherRankError
from flashdreams.registry import VARIABLE, PluginError, Registry, Source
from flashdreams.runtime.checkpoint import CheckpointError, MissingWeightsError
from flashdreams.runtime.termination import Terminated

ROOT = Path(__file__).parents[2]
LONG_TO_IMPORT = {
    "tyro", "IPython", "diffusers", "huggingface_hub", "imageio_ffmpeg", "matplotlib", "mediapy",
    "transformers",
}  # fmt: skip


class Thing:
    def __init__(self, config: Any) -> None:
        self.config = config


@dataclass(kw_only=True)
class EncoderStandInConfig(InstantiateConfig):
    """Encodes."""

    _target: type[Thing] = field(default_factory=lambda: Thing)
    checkpoint: str | None = None
    """Where the weights are."""


@dataclass(kw_only=True)
class WideEncoderStandInConfig(EncoderStandInConfig):
    """Encodes widely."""

    embedding_dim: int = 512
    """Width of what is encoded. A wider one takes more memory and more time, so choose it
    no wider than what the network behind it was trained with."""


@dataclass(kw_only=True)
class TransformerStandInConfig(InstantiateConfig):
    """Transforms."""

    _target: type[Thing] = field(default_factory=lambda: Thing)
    use_cuda_graph: bool = False
    """Capture the network call."""
    timesteps: tuple[int, ...] = (1000, 750)
    """Denoising timesteps."""
    backend: Literal["auto", "sdpa"] = "auto"
    """Attention backend."""


@dataclass(kw_only=True)
class DiffusionStandInConfig(InstantiateConfig):
    """Diffuses."""

    _target: type[Thing] = field(default_factory=lambda: Thing)
    transformer: TransformerStandInConfig = field(default_factory=TransformerStandInConfig)


@dataclass(kw_only=True)
class PipelineStandInConfig(InstantiateConfig):
    """Streams."""

    _target: type[Thing] = field(default_factory=lambda: Thing)
    diffusion_model: DiffusionStandInConfig = field(default_factory=DiffusionStandInConfig)
    encoder: EncoderStandInConfig | None = None
    """The control encoder, if any."""


@dataclass(kw_only=True)
class RunnerStandInConfig(InstantiateConfig):
    """Runs."""

    _target: type["RunnerStandIn"] = field(default_factory=lambda: RunnerStandIn)
    runner_name: str
    description: str = ""
    pipeline: PipelineStandInConfig = field(default_factory=PipelineStandInConfig)
    output_dir: Path = Path("outputs")
    total_blocks: int = 3
    """How many chunks to make."""
    prompt: str = "a cat"

    def __post_init__(self) -> None:
        if self.total_blocks < 1:
            raise ValueError(f"total_blocks={self.total_blocks} must be at least 1.")


class RunnerStandIn:
    """Notes what is called on it, and raises on request."""

    calls: list[Any] = []  # noqa: RUF012
    errors: dict[str, BaseException] = {}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        self._note("setup", config)

    def run(self) -> None:
        self._note("run")

    def close(self) -> None:
        self._note("close")

    def abort(self) -> None:
        self._note("abort")

    def _note(self, name: str, *what: Any) -> None:
        self.calls.append((name, *what))
        if name in self.errors:
            raise self.errors[name]


PLAIN = RunnerStandInConfig(runner_name="plain", description="The plain one, 100 % of it.")
WIDE = derive_config(
    PLAIN, runner_name="wide-one", pipeline=dict(encoder=WideEncoderStandInConfig())
)
RUNNERS = {"plain": PLAIN, "wide-one": WIDE}


def failing() -> None:
    raise OSError("no licence")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two runners, one hidden one and one broken plug-in; calls are noted from zero."""
    sources = [
        Source("stand-ins", f"{__name__}:RUNNERS", "the package stand-ins"),
        Source("hidden", f"{__name__}:copy_of_wide", "the package hidden"),
        Source("faulty", f"{__name__}:failing", "the package faulty"),
    ]
    monkeypatch.setattr(run, "discover", lambda: Registry(sources))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(RunnerStandIn, "calls", [])
    monkeypatch.setattr(RunnerStandIn, "errors", {})
    yield


def copy_of_wide() -> RunnerStandInConfig:
    return derive_config(WIDE, description="The hidden one.")


def _resolved(*argv: str) -> Any:
    """The config that a command line sets up."""
    assert run.main(argv) == 0
    assert [call[0] for call in RunnerStandIn.calls] == ["setup", "run", "close"]
    return RunnerStandIn.calls[0][1]


def _error(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    """The one line that a failing command line prints."""
    assert run.main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("flashdreams-run: error: ")
    return line


def test_a_slug_is_set_up_run_and_closed() -> None:
    assert _resolved("plain") == PLAIN


def test_flags_override_nested_fields_without_touching_the_literal() -> None:
    config = _resolved(
        "plain", "--pipeline.diffusion-model.transformer.use-cuda-graph", "True",
        "--pipeline.diffusion-model.transformer.timesteps", "9", "8", "7",
        "--total-blocks", "7", "--output-dir", "elsewhere", "--prompt", "A dog.",
    )  # fmt: skip
    assert config == derive_config(
        PLAIN,
        total_blocks=7,
        output_dir=Path("elsewhere"),
        prompt="A dog.",
        pipeline=dict(
            diffusion_model=dict(transformer=dict(use_cuda_graph=True, timesteps=(9, 8, 7)))
        ),
    )
    assert PLAIN.total_blocks == 3


@pytest.mark.parametrize(
    "words", [["fuse-clean-pass", "True"], ["fuse_clean_pass=True"], ["linear-precision", "fp8"]]
)
def test_a_removed_flag_is_refused_with_the_reason(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flag = f"--pipeline.diffusion-model.transformer.{words[0]}"
    line = _error(capsys, 2, "plain", flag, *words[1:])
    assert "_p" in line and " was removed in 0.2: measured slower (" in line
    assert line.endswith("Remove it; see CHANGELOG.md.")


def test_an_optional_component_is_no_subcommand_and_shows_the_fields_of_its_class(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = _resolved("wide-one", "--pipeline.encoder.embedding-dim", "8")
    assert config.pipeline.encoder == WideEncoderStandInConfig(embedding_dim=8)
    RunnerStandIn.calls.clear()
    assert _resolved("plain", "--total-blocks", "1").pipeline.encoder is None


@pytest.mark.parametrize("argv", [["--help"], ["-h"]])
def test_help_lists_every_slug_with_its_description(
    capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert run.main(argv) == 0
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "plain The plain one, 100 % of it." in lines
    assert any(line.startswith("wide-one ") for line in lines)
    assert "faulty [broken] OSError: no licence" in " ".join(lines)
    assert "is hidden by stand-ins=" in out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert not RunnerStandIn.calls


@pytest.mark.parametrize("argv", [["wide-one", "--help"], ["--help", "wide-one"]])
def test_help_of_a_slug_shows_every_nested_field_with_its_documentation(
    capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert run.main(argv) == 0
    out = capsys.readouterr().out
    for flag in (
        "--pipeline.diffusion-model.transformer.use-cuda-graph {True,False}",
        "--pipeline.encoder.embedding-dim INT",
        "--pipeline.encoder.checkpoint {None}|STR",
        "--total-blocks INT",
        "--output-dir PATH",
    ):
        assert flag in out
    assert out.index("encoder.embedding-dim") < out.index("encoder.checkpoint")
    for words in ("Capture the network call.", "Width of what is encoded.", "Where the weights"):
        assert words in out
    assert "The plain one, 100 % of it." in out
    assert "--print-config" in out
    assert "target" not in out
    assert "is None here" not in out
    assert not RunnerStandIn.calls


def test_help_of_a_field_fills_its_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line of the docstring ends within a line of the help, not at the end of one."""

    def help_of_the_field() -> list[str]:
        assert run.main(["wide-one", "--help"]) == 0
        lines = [line.strip(" │") for line in capsys.readouterr().out.splitlines()]
        at = next(i for i, line in enumerate(lines) if "--pipeline.encoder.embedding-dim" in line)
        return lines[at + 1 : at + 4]

    first, second, _ = help_of_the_field()
    assert first.startswith("Width of what is encoded. A wider one takes")
    assert "choose it no wider than" in second
    monkeypatch.setattr(run, "readable_help", contextlib.nullcontext)
    assert "choose it no wider than" not in " | ".join(help_of_the_field())


def test_help_of_a_slug_names_the_components_that_have_no_flags(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run.main(["plain", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "PyTorch and exit.\n\nComponents that are None" in printed, "a paragraph of its own"
    out = " ".join(printed.split())
    assert "None have no flags, set them with --config: pipeline.encoder." in out
    assert "checkpoint" not in out


def test_no_instantiate_prints_the_resolved_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["plain", "--no-instantiate", "--total-blocks", "9"]) == 0
    assert capsys.readouterr().out == f"{derive_config(PLAIN, total_blocks=9)}\n"
    assert not RunnerStandIn.calls


def test_a_printed_config_is_taken_back_and_names_its_slug(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--pipeline.encoder.embedding-dim", "8", "--prompt", "two\nlines: #1"]
    assert run.main(["wide-one", "--print-config", *flags]) == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    expected = derive_config(
        WIDE, prompt="two\nlines: #1", pipeline=dict(encoder=dict(embedding_dim=8))
    )
    assert _resolved("--config", str(file)) == expected
    for argv in (
        ["--config", str(file), "--total-blocks", "5"],
        [f"--config={file}", "--total-blocks", "5"],
        ["hidden", "--total-blocks", "5", "--config", str(file)],
    ):
        RunnerStandIn.calls.clear()
        assert _resolved(*argv) == derive_config(expected, total_blocks=5)
    assert "is a config of 'wide-one', not of 'plain'" in _error(
        capsys, 2, "plain", "--config", str(file)
    )


def test_a_config_file_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    assert "--config needs a file" in _error(capsys, 2, "plain", "--config")
    assert "--config needs a file" in _error(capsys, 2, "plain", "--config", "--debug-not")
    assert "No such file" in _error(capsys, 2, "--config", str(file))
    assert "Is a directory" in _error(capsys, 2, "--config", str(tmp_path))
    file.write_bytes(b"\xff\xfe\x00")
    assert "it is not UTF-8" in _error(capsys, 2, "--config", str(file))
    file.write_text("!os:system\ncommand: rm\n")
    assert f"{file}, line 1: Unknown type '!os:system'" in _error(capsys, 2, "--config", str(file))
    file.write_text(f"!{__name__}:RunnerStandInConfig\nrunner_name: plain\ntotal_blocks: a\n")
    assert "line 3: total_blocks" in _error(capsys, 2, "--config", str(file))
    file.write_text(f"!{__name__}:EncoderStandInConfig\ncheckpoint: null\n")
    assert "holds a EncoderStandInConfig, which is not a runner" in _error(
        capsys, 2, "--config", str(file)
    )
    assert not RunnerStandIn.calls


def test_a_removed_field_that_is_off_in_a_config_file_is_noted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    text = f"!{__name__}:RunnerStandInConfig\nrunner_name: plain\ncompile_blocks: "
    file.write_text(f"{text}true\n")
    assert "line 3: compile_blocks was removed" in _error(capsys, 2, "--config", str(file))
    file.write_text(f"{text}false\n")
    _resolved("--config", str(file))
    note = f"flashdreams-run: note: {file}: compile_blocks was removed in 0.2 and is ignored"
    assert capsys.readouterr().err.startswith(note)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plian"], "Unknown slug 'plian'. Did you mean 'plain'? Valid slugs: plain, wide-one"),
        (["faulty"], "the plug-in 'faulty' (faulty=tests.unit.test_run:failing from the package"),
        ([], "the first word must name what to run. Type flashdreams-run --help"),
        (["--total-blocks", "3"], "the first word must name what to run, got '--total-blocks'"),
        (["plain", "--total-blocks", "x"], "--total-blocks takes an integer, got 'x'"),
        (["plain", "--total-blocks", "-3"], "error: total_blocks=-3 must be at least 1. Type"),
        (["plain", "--total-blocks"], "Missing value for argument '--total-blocks'"),
        (["plain", "--total-blokcs", "3"], "Did you mean --total-blocks? Type flashdreams-run pl"),
        (["plain", "more"], "Unrecognized options: more. Type flashdreams-run plain --help"),
        (
            ["plain", "--pipeline.diffusion-model.transformer.backend", "flash"],
            "invalid choice 'flash' for argument '--pipeline.diffusion-model.transformer.backend'",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in _error(capsys, 2, *argv)
    assert not RunnerStandIn.calls


@pytest.mark.parametrize(
    ("where", "error", "code", "message"),
    [
        ("setup", ValueError("12 heads do not\n divide"), 2, "error: 12 heads do not divide"),
        ("setup", TypeError("wrong type"), 2, "error: wrong type"),
        ("setup", CheckpointError("x.safetensors is truncated"), 2, "error: x.safetensors is tr"),
        ("setup", MissingWeightsError("no x.safetensors"), 1, "error: no x.safetensors"),
        ("setup", FileNotFoundError(2, "No such file", "p.txt"), 1, "No such file: 'p.txt'"),
        ("run", ValueError("no such prompt"), 1, "error: no such prompt"),
        ("run", OSError(28, "No space left on device"), 1, "No space left on device"),
        ("run", KeyError("x"), 1, "KeyError: 'x' (run again with --debug for the traceback)"),
        ("run", RuntimeError(""), 1, "RuntimeError (run again with --debug"),
        ("run", ValueError(""), 1, "ValueError (run again with --debug"),
        ("close", OSError("cannot rename"), 1, "error: cannot rename"),
    ],
)
def test_a_failing_run_is_one_line_and_aborts_the_runner(
    capsys: pytest.CaptureFixture[str], where: str, error: Exception, code: int, message: str
) -> None:
    RunnerStandIn.errors[where] = error
    assert message in _error(capsys, code, "plain")
    calls = [call[0] for call in RunnerStandIn.calls]
    assert calls == {
        "setup": ["setup"], "run": ["setup", "run", "abort"], "close": ["setup", "run", "close"]
    }[where]  # fmt: skip


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    RunnerStandIn.errors["run"] = KeyError("x")
    assert run.main(["plain", "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "in _note" in err
    assert err.splitlines()[-1] == "flashdreams-run: error: KeyError: 'x'"
    assert run.main(["--debug", "faulty"]) == 2
    err = capsys.readouterr().err
    assert 'raise OSError("no licence")' in err
    assert PluginError.__name__ in err


@pytest.mark.parametrize("where", ["setup", "run"])
@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [(KeyboardInterrupt(), 130, "interrupted"), (Terminated(), 143, "terminated")],
)
def test_a_run_that_is_stopped_aborts_the_runner(
    capsys: pytest.CaptureFixture[str], where: str, stop: BaseException, code: int, said: str
) -> None:
    RunnerStandIn.errors[where] = stop
    assert run.main(["plain"]) == code
    assert capsys.readouterr().err == f"flashdreams-run: {said}\n"
    assert (("abort",) in RunnerStandIn.calls) is (where == "run")


def test_other_ranks_stay_silent_unless_they_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    for argv in (["--help"], ["plain", "--help"], ["plain", "--no-instantiate"], ["plain"]):
        assert run.main(argv) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    RunnerStandIn.errors["run"] = KeyError("x")
    assert run.main(["plain"]) == 1
    assert capsys.readouterr().err.startswith("flashdreams-run: error on rank 1: KeyError")
    assert run.main(["plain", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_rank_that_torchrun_ends_after_another_one_has_spoken_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(seconds: float) -> None:
        raise Terminated

    monkeypatch.setenv("RANK", "1")
    errors = [(ValueError("no"), "setup", 2), (OtherRankError("no"), "setup", 1)]
    for pause in (end, lambda seconds: None):
        monkeypatch.setattr(run.time, "sleep", pause)
        assert run.main(["plian"]) == 2  # of this rank's command line alone
        assert ("Unknown slug" in capsys.readouterr().err) is (pause is not end)
        for error, where, code in errors:
            RunnerStandIn.errors[where] = error
            assert run.main(["plain"]) == code
            said = "" if pause is end else "flashdreams-run: error on rank 1: no\n"
            assert capsys.readouterr().err == said


def test_a_label_runs_its_own_config_and_a_hidden_slug_is_noted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _resolved("hidden").description == "The hidden one."
    assert capsys.readouterr().err == ""
    RunnerStandIn.calls.clear()
    assert _resolved("wide-one").description == WIDE.description
    note = capsys.readouterr().err
    assert note.startswith("flashdreams-run: note: slug 'wide-one' of hidden=")
    assert "is hidden by stand-ins=" in note


@pytest.mark.slow
def test_the_module_runs_as_a_program() -> None:
    def words(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flashdreams.run", *argv]
        environment = {**os.environ, VARIABLE: f"x={__name__}:RUNNERS"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    wrong = words("wide-onne")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    (line,) = wrong.stderr.splitlines()
    assert "Unknown slug 'wide-onne'. Did you mean 'wide-one'" in line
    assert words("plain", "--total-blocks", "2").returncode == 0
    listing = words("--help")
    assert listing.returncode == 0
    assert "wide-one" in listing.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("argv", "slow"), [("--help", ""), ("toy-world --help", "tyro")])
def test_help_imports_torch_but_nothing_else_that_takes_long(argv: str, slow: str) -> None:
    """The second case is the negative control: the flags of a slug are tyro's to list."""
    code = (
        f"import sys; from flashdreams import run; run.main({argv.split()}); "
        f"print(*(sys.modules.keys() & {LONG_TO_IMPORT}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stderr.split() == slow.split()
