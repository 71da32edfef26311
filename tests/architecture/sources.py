"""The repository's Python files, and what they import."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = (ROOT, ROOT / "kernels")
"""Folders that hold import packages."""
PACKAGES = (ROOT / "flashdreams", ROOT / "kernels" / "flashdreams_kernels")
EXAMPLES = ROOT / "docs" / "source" / "examples"
EXAMPLE_PACKAGES = [file.parent for file in EXAMPLES.glob("*/pyproject.toml")]
"""Examples that are installed, and so are source roots too."""


def python_files(*folders: Path) -> list[Path]:
    """All Python files below some folders, in order."""
    return sorted(file for folder in folders for file in folder.rglob("*.py"))


def module_name(file: Path) -> str:
    """The dotted name under which a file is imported."""
    for root in (ROOT / "kernels", *EXAMPLE_PACKAGES, ROOT):
        if file.is_relative_to(root):
            parts = file.relative_to(root).with_suffix("").parts
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    raise ValueError(f"{file} is not below {ROOT}.")


@dataclass(frozen=True)
class Import:
    """One imported name."""

    name: str
    """Dotted, absolute: ``from torch import nn`` gives ``torch.nn``."""
    line: int
    relative: bool
    lazy: bool
    """Inside a function or for type checkers only, so that importing the file does not need it."""


def imports_of(tree: ast.Module, package: str) -> Iterator[Import]:
    """Every import of a file.

    Args:
        tree: the parsed file.
        package: dotted name of the package that the file lies in, against which ``.x`` is resolved.
    """
    pending: list[tuple[ast.AST, bool]] = [(tree, False)]
    while pending:
        node, lazy = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lazy = True
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            lazy = True
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, relative=False, lazy=lazy)
        if isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = [*(parents if node.level else []), *([node.module] if node.module else [])]
            for alias in node.names:
                name = ".".join([*base, alias.name])
                yield Import(name, node.lineno, relative=node.level > 0, lazy=lazy)
        pending += [(child, lazy) for child in ast.iter_child_nodes(node)]


def is_below(name: str, *prefixes: str) -> bool:
    """Whether a dotted name is one of some names or lies below one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
