"""Command lines: every command refuses in one line, and loses its output in one line."""

import errno
import os
import sys
from pathlib import Path

import pytest

from flashdreams import check, plan, run, serve
from flashdreams.runtime.command_text import (
    LEAST_COLUMNS,
    lost_output_in_one_line,
    table,
    terminal_width,
)
from flashdreams.serving import client_command
from tests.full_disk import needs_full_device

COMMANDS = {
    check.PROGRAM: (check.main, ["--onlyy"], "Did you mean --only?"),
    plan.PROGRAM: (plan.main, ["toy-world", "--gpuss"], "Did you mean --gpus?"),
    client_command.PROGRAM: (client_command.main, ["--seconds", "x"], "--seconds takes a number"),
    serve.PROGRAM: (serve.main, ["toy-world", "--port", "x"], "--port takes an integer"),
    run.PROGRAM: (run.main, ["toy-world", "--fsp", "3"], "Did you mean --fps?"),
}


@pytest.mark.parametrize("program", COMMANDS)
def test_a_wrong_flag_is_one_line_for_every_command(
    program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main, argv, part = COMMANDS[program]
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"{program}: error: ")
    assert part in said.err and said.err.count("\n") == 1 and said.err.isascii()


@needs_full_device
@pytest.mark.parametrize(
    ("program", "argv"),
    [(check.PROGRAM, ["--names"]), (plan.PROGRAM, ["--help"]), (run.PROGRAM, ["--version"]),
     (run.PROGRAM, ["toy-world", "--help"])],
)  # fmt: skip
def test_output_that_finds_no_space_is_one_line(
    program: str,
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert COMMANDS[program][0](argv) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{program}: error: the output could not be written: No space left")
    assert said.count("\n") == 1


def test_a_reader_that_has_left_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def left(argv: object) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def failed(argv: object) -> int:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert lost_output_in_one_line("program")(left)([]) == 0
        assert capsys.readouterr().err == ""
        assert lost_output_in_one_line("program")(failed)([]) == 1
    said = "program: error: [Errno 2] No usable temporary directory found\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("words", [["--output-dir", ""], ["--output_dir="], ["--state-dir", ""]])
def test_an_empty_folder_is_not_the_current_one(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = serve if words[0] == "--state-dir" else run
    assert command.main(["toy-world", *words]) == 2
    assert "-dir is empty. Name a folder; --" in capsys.readouterr().err


def test_help_is_never_laid_out_for_a_terminal_of_a_few_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """tyro 1.0.17 takes more than a minute for one column."""
    for columns, wide, width in (("1", False, LEAST_COLUMNS), ("90", False, 90), ("1", True, 2000)):
        monkeypatch.setenv("COLUMNS", columns)
        with terminal_width(wide):
            assert os.environ["COLUMNS"] == str(width)
        assert os.environ["COLUMNS"] == columns


def test_a_table_takes_a_description_that_is_none_or_has_escapes() -> None:
    assert table([("a", None), ("b", "\x1b[2Jred")]) == ["  a", r"  b  \x1b[2Jred"]
