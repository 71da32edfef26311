"""What spoils a benchmark is found before it measures, and said in one line."""

import argparse
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Import a script by name, as running it by path would, and forget it afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    yield importlib.import_module
    for name in [path.stem for path in FOLDER.glob("*.py")]:
        sys.modules.pop(name, None)


def parse(script, *words: str, **options) -> argparse.Namespace:
    return script("command").parse(argparse.ArgumentParser(), list(words), **options)


@pytest.mark.parametrize("words", [("--repeats", "0"), ("--repeats", "-3"), ("--repeats", "many")])
def test_a_number_of_calls_is_at_least_one(script, words, capsys):
    assert parse(script, "--repeats", "1", "--git-commit", "a").repeats == 1
    with pytest.raises(SystemExit, match="2"):
        parse(script, *words, "--git-commit", "a")
    assert "is no whole number from 1 on" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_found_at_once(script, tmp_path, capsys):
    path = tmp_path / "new" / "report.json"
    assert parse(script, "--json", str(path), "--git-commit", "a").json == path
    assert path.parent.is_dir() and not path.exists()
    (tmp_path / "file").touch()
    for word in (tmp_path, tmp_path / "file" / "report.json"):
        with pytest.raises(SystemExit, match="2"):
            parse(script, "--json", str(word), "--git-commit", "a")
        assert "cannot be written: " in capsys.readouterr().err


def test_a_picture_is_of_a_kind_that_can_be_drawn(script, tmp_path, capsys):
    path = tmp_path / "plot.PNG"
    assert parse(script, "--plot", str(path), "--git-commit", "a", draws=True).plot == path
    with pytest.raises(SystemExit, match="2"):
        parse(script, "--plot", str(tmp_path / "plot.docx"), "--git-commit", "a", draws=True)
    assert "must end in one of" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        parse(script, "--plot", str(path), "--git-commit", "a")
    assert "unrecognized arguments: --plot" in capsys.readouterr().err


def test_a_script_of_one_process_is_not_run_by_two(script, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    parse(script, "--git-commit", "a", ranks=True)
    with pytest.raises(SystemExit, match="2"):
        parse(script, "--git-commit", "a")
    assert "python instead of torchrun" in capsys.readouterr().err


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def make_checkout(folder: Path) -> None:
    """A repository with one commit."""
    me = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "-A"], [*me, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)


@pytest.fixture
def checkout(script, tmp_path, monkeypatch):
    """The report module as if it stood in a checkout of its own, and that checkout."""
    root = tmp_path / "checkout"
    (root / "benchmarks" / "results").mkdir(parents=True)
    (root / "flashdreams").mkdir()
    for name in ("benchmarks/report.py", "flashdreams/__init__.py"):
        (root / name).touch()
    report = script("report")
    monkeypatch.setattr(report, "__file__", str(root / "benchmarks" / "report.py"))
    monkeypatch.setattr(report, "flashdreams", argparse.Namespace(
        __name__="flashdreams", __file__=str(root / "flashdreams" / "__init__.py")))  # fmt: skip
    monkeypatch.setattr(report, "flashdreams_kernels", report.flashdreams)
    return report, root


@needs_git
def test_the_commit_is_that_of_the_measured_code(checkout):
    report, root = checkout
    make_checkout(root)
    commit, dirty = report.git_state()
    assert len(commit) == 40 and not dirty
    (root / "benchmarks" / "results" / "new.json").touch()
    assert report.git_state() == (commit, False), "results are no part of the code"
    (root / "flashdreams" / "new.py").touch()
    assert report.git_state() == (commit, True), "a new file is a change"


@needs_git
def test_code_without_a_commit_is_refused_before_it_is_measured(checkout, script):
    report, root = checkout
    with pytest.raises(ValueError, match="is no git checkout; give --git-commit SHA"):
        parse(script)
    make_checkout(root.parent)
    with pytest.raises(ValueError, match="is no git checkout; give --git-commit SHA"):
        report.git_state()
    shutil.rmtree(root.parent / ".git")
    make_checkout(root)
    assert parse(script).git_commit is None
    report.flashdreams.__file__ = __file__
    with pytest.raises(ValueError, match=r"is imported from .* Set PYTHONPATH="):
        report.git_state()


def test_a_mistake_ends_in_one_line(script, monkeypatch, capsys):
    command = script("command")

    def refuse() -> None:
        raise ValueError("no such\n  thing")

    monkeypatch.setattr(sys, "argv", ["folder/fps.py"])
    with pytest.raises(SystemExit, match="2"):
        command.run(refuse)
    assert capsys.readouterr().err == "fps.py: error: no such thing\n"
    with pytest.raises(SystemExit, match="1"):
        command.run(lambda: 1)
    monkeypatch.setattr(sys, "argv", ["fps.py", "--debug"])
    with pytest.raises(ValueError, match="no such"):
        command.run(refuse)


def test_a_run_that_is_cut_leaves_the_rows_it_had(script, tmp_path, monkeypatch):
    tiles, path = script("tiles"), tmp_path / "tiles.json"
    whole = tiles.measure

    def measure(case, device, repeats):
        if case.name.startswith("linear"):
            raise KeyboardInterrupt
        return whole(case, device, repeats)

    monkeypatch.setattr(tiles, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        tiles.main(["--repeats", "1", "--device", "cpu", "--json", str(path), "--git-commit", "a"])
    assert {row["case"] for row in json.loads(path.read_text())["rows"]} == {"attention 48 x 96"}
    assert [file.name for file in tmp_path.iterdir()] == ["tiles.json"]
