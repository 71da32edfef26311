"""Files and functions stay small enough to read."""

import ast

from tests.architecture.sources import ROOT, module_name, python_files

MAX_FILE_LINES = 500
MAX_MODEL_FILE_LINES = 700
"""A model is one file, complete."""
MAX_FUNCTION_LINES = 70
MAX_FIRST_PAGE_LINES = 150
"""Of the README and of the guide for contributors."""

FOLDERS = tuple(
    ROOT / name
    for name in ("flashdreams", "kernels", "tests", "benchmarks", "training", "docs", "launch")
)


def _long_functions(source: str, name: str) -> list[str]:
    return [
        f"{name}:{node.lineno} {node.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


def test_no_file_is_longer_than_its_cap() -> None:
    long = []
    for file in python_files(*FOLDERS):
        is_model = module_name(file).startswith("flashdreams.models.")
        lines = len(file.read_text("utf-8").splitlines())
        if lines > (MAX_MODEL_FILE_LINES if is_model else MAX_FILE_LINES):
            long.append(f"{file.relative_to(ROOT)}: {lines} lines")
    assert not long


def test_the_first_pages_stay_short() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        assert len((ROOT / name).read_text("utf-8").splitlines()) <= MAX_FIRST_PAGE_LINES, name


def test_no_function_is_longer_than_its_cap() -> None:
    files = python_files(*FOLDERS)
    assert not [
        text
        for file in files
        for text in _long_functions(file.read_text("utf-8"), str(file.relative_to(ROOT)))
    ]


def test_a_long_function_is_noticed() -> None:
    """Negative control, one line on either side of the cap."""
    body = "    pass\n"
    assert _long_functions("def f():\n" + body * (MAX_FUNCTION_LINES - 1), "m") == []
    assert _long_functions("def f():\n" + body * MAX_FUNCTION_LINES, "m") == ["m:1 f"]
