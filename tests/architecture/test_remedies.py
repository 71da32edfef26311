"""Options that error messages tell people to type are options that exist."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from flashdreams.registry import discover
from flashdreams.run import _OWN_OPTIONS
from tests.architecture.sources import ROOT, python_files

FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*")

OF_OTHER_PROGRAMS = {
    "--nproc-per-node", "--nnodes", "--max-restarts", "--rdzv-id", "--standalone",  # torchrun
    "--no-build-isolation",  # pip
    "--help",  # tyro
}  # fmt: skip


def flags_in_errors(source: str) -> Iterator[str]:
    """Options in the texts of ``raise`` statements; one that a value completes ends with . or -."""
    for statement in ast.walk(ast.parse(source)):
        if not isinstance(statement, ast.Raise) or statement.exc is None:
            continue
        for node in ast.walk(statement.exc):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from FLAG.findall(node.value)


def flags_of(config: Any, prefix: str = "--") -> Iterator[str]:
    """Options of a config on the command line."""
    for item in fields(config):
        name = prefix + item.name.replace("_", "-")
        yield name
        value = getattr(config, item.name)
        if is_dataclass(value) and not isinstance(value, type):
            yield from flags_of(value, f"{name}.")


def flags_of_commands(source: str) -> Iterator[str]:
    """Options that the fields of a command's settings, such as flashdreams-plan's, become."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    yield "--" + item.target.id.replace("_", "-")


@pytest.fixture(scope="module")
def known() -> set[str]:
    own = {text.split()[0] for text in _OWN_OPTIONS}
    of_slugs = {flag for config in discover().values() for flag in flags_of(config)}
    commands = [*(ROOT / "flashdreams").glob("*.py"), *python_files(ROOT / "flashdreams/serving")]
    of_commands = {flag for file in commands for flag in flags_of_commands(file.read_text("utf-8"))}
    return own | of_slugs | of_commands | OF_OTHER_PROGRAMS


def is_known(flag: str, known: set[str]) -> bool:
    plain = flag.rstrip(".-")
    if plain != flag and any(name.startswith(flag) for name in known):
        return True  # a value completes it, or a sentence ends here
    return plain in known


def test_every_option_in_an_error_exists(known: set[str]) -> None:
    unknown = [
        f"{file.relative_to(ROOT)}: {flag}"
        for file in python_files(ROOT / "flashdreams", ROOT / "kernels")
        for flag in flags_in_errors(file.read_text("utf-8"))
        if not is_known(flag, known)
    ]
    assert not unknown


def test_an_option_that_nobody_has_is_noticed(known: set[str]) -> None:
    """Negative control."""
    source = 'raise ValueError(f"{x}: type --output-dir {y} or --output-folder {y}.")'
    found = list(flags_in_errors(source))
    assert found == ["--output-dir", "--output-folder"]
    assert [is_known(flag, known) for flag in found] == [True, False]
    assert list(flags_of_commands("class A:\n    http_port: int = 1")) == ["--http-port"]
    assert is_known("--parallel.", known) and not is_known("--parallels.", known)
