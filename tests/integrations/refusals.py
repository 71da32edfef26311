"""What a command line says when it fails."""

from pathlib import Path

import pytest

from flashdreams.run import main


def error_of(argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and the one error of a run on a CPU, from "error:" on."""
    code = main([*argv, "--device", "cpu", "--output-dir", str(folder)])
    said = capsys.readouterr().err
    assert said.count("error:") == 1, said
    return code, said[said.index("error:") :]
