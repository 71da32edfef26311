"""Mistakes on a real command line: one line that helps, an exit code, and no half-written file."""

import contextlib
import json
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashdreams import __version__, run
from flashdreams.infra.config import derive_config
from flashdreams.infra.config_file import dump_config
from flashdreams.integrations.toy_world.config import TOY_WORLD_RUNNER
from flashdreams.registry import VARIABLE, discover
from flashdreams.runtime import video
from flashdreams.runtime.files import open_owned
from flashdreams.runtime.latents import read_latent_parts
from tests.full_disk import fill_disk, needs_full_device
from tests.integrations.published_method import register, write_published_method

WEIGHTS = Path(__file__).parents[2] / "flashdreams/integrations/toy_world/weights"
DECODER_SOURCE = "--pipeline.decoder.checkpoint.source"
USAGE, FAILED = 2, 1

Fails = Callable[..., str]


@pytest.fixture(autouse=True)
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory, nothing registered besides what is installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Fails:
    """Types a command that must fail, and gives what it says."""

    def fails(code: int, slug: str, *flags: str) -> str:
        where = [] if "--output-dir" in flags else ["--output-dir", "out"]
        before = _finished(tmp_path)
        assert run.main([slug, *flags, *where]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        # A progress bar may stand before the line, it draws over itself; files may be listed below.
        bars, start, said = captured.err.replace("\r", "\n").rpartition("flashdreams-run: error: ")
        assert all("chunk" in bar for bar in bars.splitlines() if bar), captured.err
        line, *listed = said.splitlines()
        assert start and all(item.startswith("  ") for item in listed), captured.err
        assert _finished(tmp_path) == before
        for stats in tmp_path.rglob("stats_*.json"):
            assert json.loads(stats.read_text())["records"], "what was done is on record"
        return "\n".join([line, *listed])

    return fails


def _finished(folder: Path) -> dict[Path, bytes]:
    """The videos and latents that bear their final names, by what they hold."""
    videos = (path for path in folder.rglob("*.mp4") if ".partial." not in path.name)
    return {path: path.read_bytes() for path in (*videos, *folder.rglob("latents_*"))}


@contextlib.contextmanager
def no_file_beyond(size_bytes: int) -> Iterator[None]:
    """Fail every write beyond a size, in this process and in ffmpeg: like a disk that is full."""
    resource = pytest.importorskip("resource", reason="file sizes are limited on POSIX only")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_unknown_slug(fails: Fails) -> None:
    line = fails(USAGE, "toy-wrold")
    assert "Unknown slug 'toy-wrold'. Did you mean 'toy-world'? Valid slugs: " in line
    valid = line.partition("Valid slugs: ")[2].rstrip(".").split(", ")
    assert set(valid) == set(discover()), "slugs alone, no groups of them"


def test_no_slug_at_all_names_one_that_runs_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([]) == USAGE
    assert capsys.readouterr().err.endswith("e.g. flashdreams-run toy-world.\n")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--version"]) == 0
    versions = f"flashdreams {__version__}, Python {platform.python_version()}, torch "
    assert capsys.readouterr().out.startswith(versions)


def test_an_unknown_field(fails: Fails) -> None:
    line = fails(USAGE, "toy-world", "--total-blocs", "3")
    assert "--total-blocs" in line
    assert "Did you mean --total-blocks? Type flashdreams-run toy-world --help" in line
    line = fails(USAGE, "toy-world", "--pipeline.decoder.widht", "3")
    assert "Did you mean --pipeline.decoder.width" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--total-blocks", "many"), "--total-blocks takes an integer"),
        (("--total-blocks", "2.5"), "--total-blocks takes an integer"),
        (("--save-latents", "maybe"), "'--save-latents'. Expected one of ('True', 'False')"),
        (("--pipeline.decoder.dtype", "int8"), "'int8' for argument '--pipeline.decoder.dtype'"),
        (("--device", "tpu"), "Unknown device 'tpu'. Allowed: auto, cpu, cuda"),
    ],
)  # fmt: skip
def test_a_wrong_type(fails: Fails, flags: tuple[str, ...], message: str) -> None:
    assert message in fails(USAGE, "toy-world", *flags)


@pytest.mark.parametrize("count", ["-3", "0"])
def test_a_block_count_below_one(fails: Fails, count: str) -> None:
    line = fails(USAGE, "toy-world", "--total-blocks", count)
    assert f"--total-blocks {count}: must be at least 1" in line


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("num_heads", "0", "num_heads=0 must be at least 1."),
        ("num_layers", "-1", "num_layers=-1 must be at least 1."),
        ("window_size_t", "9" * 26, "must be at most 2147483647."),
        ("eps", ".nan", "eps=nan must be at least 0."),
        ("guidance_scale", ".inf", "guidance_scale=inf must be at most"),
        ("shift", "9" * 26, "must be a positive number, at most 1000;"),
        ("token_columns", "0", "token_columns=0 must be at least 1."),
        ("seed", "-1", "--seed -1: must be from 0 to 2**64 - 1."),
        ("step_deadline_s", ".nan", "--step-deadline-s nan: must be at least 0.1."),
    ],
)
def test_a_number_that_no_config_may_hold(
    fails: Fails, tmp_path: Path, name: str, number: str, message: str
) -> None:
    """In a file, where nothing but the config itself looks at it."""
    text, count = re.subn(rf"(?m)^( *{name}): .*$", rf"\1: {number}", dump_config(TOY_WORLD_RUNNER))
    assert count == 1
    (tmp_path / "run.yaml").write_text(text)
    assert message in fails(USAGE, "--config", "run.yaml")


@pytest.mark.parametrize("folder", ["taken", "taken/out"])
def test_an_output_directory_that_cannot_be_written(
    fails: Fails, tmp_path: Path, folder: str
) -> None:
    """Also for root, who may write anywhere but not below a file."""
    (tmp_path / "taken").write_text("mine")
    line = fails(USAGE, "toy-world", "--output-dir", folder)
    assert f"--output-dir {folder} cannot be written" in line
    assert "Name another folder" in line
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize(
    "place", [".", "/dev/null", "taken/trace.json", "out/../out/stats_toy-world.json"]
)
def test_a_trace_that_could_not_be_written_is_refused_before_the_run(
    fails: Fails, tmp_path: Path, place: str
) -> None:
    (tmp_path / "taken").write_text("")
    said = fails(USAGE, "toy-world", "--total-blocks", "1", "--trace", place)
    assert f"--trace {place} cannot be written: " in said


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_variables_of_torchrun_that_are_no_numbers(
    fails: Fails, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "x")
    assert f"{name}='x' must be a whole number" in fails(USAGE, "toy-world")


def test_a_prompt_in_bytes_that_are_no_text(fails: Fails) -> None:
    said = fails(USAGE, "self-forcing-tiny-random", "--prompt", "a caf\udce9")
    assert "is not Unicode text" in said and "\udce9" not in said


@pytest.mark.parametrize("folder", ["10:30", "-x", "pipe:1", "caf\udce9"])
def test_a_run_with_snapshots_writes_into_folders_of_any_name(
    tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--total-blocks", "2", "--snapshot-every", "1", f"--output-dir={folder}"]
    precious, partial = tmp_path / "precious", tmp_path / folder / "toy-world.partial.mp4"
    precious.write_text("precious")
    partial.parent.mkdir()
    partial.symlink_to(precious)
    assert run.main(["toy-world", "--scale", "1", *words]) == 0, capsys.readouterr().err
    assert (tmp_path / folder / "toy-world.mp4").stat().st_size > 0
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("name", ["report_toy-world.html", "log_toy-world.jsonl"])
def test_a_folder_with_the_name_of_a_file_of_the_run(fails: Fails, name: str) -> None:
    Path("out", name).mkdir(parents=True)
    assert f"{name}, which the run may write, is a folder" in fails(USAGE, "toy-world")


def test_an_output_directory_in_which_the_slug_is_being_written(fails: Fails) -> None:
    with open_owned(Path("out/.toy-world.lock")):
        line = fails(USAGE, "toy-world")
        assert "--output-dir out: another run of toy-world writes its files there" in line
        advised = re.findall(r"--output-dir \S+(?=,)", line)
        assert advised == ["--output-dir out-2"]
        small = ["toy-world", *SMALL[:-1], "1"]
        assert run.main([*small, *advised[0].split()]) == 0
    assert run.main([*small, "--output-dir", "out"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "log_toy-world.jsonl",
        "stats_toy-world.json",
        "toy-world.mp4",
    ]


def test_a_runner_of_this_process_is_named_and_a_context_closes_it(tmp_path: Path) -> None:
    config = derive_config(TOY_WORLD_RUNNER, output_dir=tmp_path)
    with config.setup() as runner:
        with pytest.raises(ValueError, match=r"a runner of toy-world in this process .* close\(\)"):
            config.setup()
        runner.open_session().step()
    assert (tmp_path / "stats_toy-world.json").is_file()
    with pytest.raises(KeyError), config.setup() as runner:
        next(runner.stream(1))
        raise KeyError
    config.setup().close()  # neither holds the folder
    with open_owned(tmp_path / ".toy-world.lock") as file:
        file.write(b"another machine 1")
        file.flush()
        with pytest.raises(ValueError, match=r"another run of toy-world .* wait until it ends"):
            config.setup()


def test_a_tilde_in_a_path_is_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "words.txt").write_text("red floor")
    words = ["toy-world", *SMALL[:-1], "1", "--output-dir=~/out", "--prompt-path=~/words.txt"]
    assert run.main(words) == 0
    assert (tmp_path / "home" / "out" / "toy-world.mp4").is_file()
    assert not (tmp_path / "~").exists()


def test_a_prompt_file_that_does_not_exist(fails: Fails) -> None:
    line = fails(USAGE, "toy-world", "--prompt-path", "missing.txt")
    assert "--prompt-path missing.txt cannot be read" in line
    assert "No such file" in line


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("RUNNER = 5", "must be a RunnerConfig"),
    ],
)
def test_a_plug_in_that_raises_at_import(
    fails: Fails,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    message: str,
) -> None:
    monkeypatch.delitem(sys.modules, "faulty_plugin", raising=False)
    (tmp_path / "faulty_plugin.py").write_text(source)
    monkeypatch.setenv(VARIABLE, "faulty=faulty_plugin:RUNNER")
    line = fails(USAGE, "faulty")
    assert "'faulty' (faulty=faulty_plugin:RUNNER from FLASHDREAMS_RUNNER_CONFIGS)" in line
    assert message in line
    assert run.main(["--help"]) == 0
    listing = " ".join(capsys.readouterr().out.split())
    assert "faulty [broken]" in listing
    assert "toy-world A small courtyard" in listing
    assert run.main(["faulty", "--debug"]) == USAGE
    assert "Traceback" in capsys.readouterr().err


def test_weights_that_are_missing(fails: Fails) -> None:
    line = fails(FAILED, "toy-world", DECODER_SOURCE, "./missing.safetensors")
    assert "./missing.safetensors" in line
    assert "checkpoint.source" in line


@pytest.mark.parametrize("blocks", ["1", "5"])
def test_weights_that_are_no_numbers_end_the_run(fails: Fails, tmp_path: Path, blocks: str) -> None:
    weights = load_file(WEIGHTS / "transformer.safetensors")
    weights["blocks.0.ffn.0.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "bad.safetensors")
    source = "--pipeline.diffusion-model.transformer.checkpoint.source"
    flags = [source, "bad.safetensors", "--device", "cpu", "--total-blocks", blocks]
    line = fails(FAILED, "toy-world", *flags)
    assert "AR step 0: stage 'diffuse' made values that are not finite" in line
    assert "transformer.blocks.0.ffn.0.weight contain NaN" in line
    assert not (tmp_path / "out" / "toy-world.mp4").exists()


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The output folder of a run that went well."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("toy-world.mp4", "latents_toy-world.safetensors"):
        (out / name).write_bytes(b"of an earlier run")
    return out


SMALL = ("--scale", "1", "--device", "cpu", "--total-blocks", "24")


@needs_full_device
def test_a_full_disk(fails: Fails, earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch, video, "toy-world.partial.mp4")
    line = fails(FAILED, "toy-world", *SMALL)
    assert "the video out/toy-world.mp4 could not be written: " in line
    assert "No space left on device. Free some space or choose another directory" in line


def test_a_disk_that_fills_up_while_the_video_grows(fails: Fails, earlier: Path) -> None:
    with no_file_beyond(2000):
        line = fails(FAILED, "toy-world", *SMALL)
    assert "the video out/toy-world.mp4 could not be written: " in line
    assert "--output-dir" in line
    assert (earlier / "toy-world.partial.mp4").stat().st_size == 2000


def test_a_disk_that_fills_up_with_latents(
    capsys: pytest.CaptureFixture[str], earlier: Path
) -> None:
    """The video was complete before, so it stands; the latents do not."""
    with no_file_beyond(140_000):
        words = ["toy-world", *SMALL, "--save-latents", "True", "--output-dir", "out"]
        assert run.main(words) == FAILED
    line = capsys.readouterr().err.splitlines()[-1]
    assert "latents_toy-world.safetensors could not be written" in line
    assert "--output-dir" in line
    latents = earlier / "latents_toy-world.safetensors"
    assert latents.read_bytes() == b"of an earlier run"
    assert (earlier / "toy-world.mp4").read_bytes() != b"of an earlier run"
    assert read_latent_parts(earlier / "latents_toy-world.partial.npy").shape[2] > 0


def test_a_disk_that_is_too_full_for_the_stats(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_published_method(tmp_path)
    register(monkeypatch, tmp_path)
    with no_file_beyond(500):
        line = fails(FAILED, "customized-method", "--total-blocks", "3")
    assert "stats_customized-method.json could not be written" in line
    assert "--output-dir" in line
    assert "What was written so far is in out/stats_customized-method.partial.jsonl." in line
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "stats_customized-method.partial.jsonl",
        "log_customized-method.jsonl",
    }


def test_the_check_of_these_tests_sees_a_half_written_video(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: a run that fails after a file got its final name."""

    def leave_half(argv: list[str]) -> int:
        (tmp_path / "half.mp4").write_bytes(b"half")
        return real(argv)

    real = run.main
    monkeypatch.setattr(run, "main", leave_half)
    with pytest.raises(AssertionError):
        fails(USAGE, "toy-wrold")
