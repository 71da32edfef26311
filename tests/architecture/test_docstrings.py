"""Every public name says what it is, and every config field what it means."""

import ast
from collections.abc import Iterator

from tests.architecture.sources import EXAMPLES, PACKAGES, module_name, python_files

Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _undocumented(tree: ast.Module, module: str) -> Iterator[str]:
    if tree.body and ast.get_docstring(tree) is None:
        yield module
    for node in tree.body:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            yield from _undocumented_below(node, f"{module}.{node.name}")


def _undocumented_below(node: Documented, name: str) -> Iterator[str]:
    overload = any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)
    if ast.get_docstring(node) is None and not overload:
        yield name
    if not isinstance(node, ast.ClassDef):
        return
    for child in node.body:
        if isinstance(child, Documented) and not child.name.startswith("_"):
            yield from _undocumented_below(child, f"{name}.{child.name}")
    if node.name.endswith("Config") and not name.startswith("flashdreams_kernels."):
        yield from (f"{name}.{field}" for field in _fields_without_text(node))


def _fields_without_text(config: ast.ClassDef) -> Iterator[str]:
    """Fields that the command line would show without a word; a set-up class is no such field."""
    for statement, following in zip(config.body, [*config.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        told = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if not statement.target.id.startswith("_") and not told:
            yield statement.target.id


def test_every_public_name_has_a_docstring() -> None:
    files = python_files(*PACKAGES, EXAMPLES)
    missing = [
        name
        for file in files
        for name in _undocumented(ast.parse(file.read_text("utf-8")), module_name(file))
    ]
    assert not missing


def test_a_name_without_a_docstring_is_noticed() -> None:
    """Negative control."""
    source = '''
def told():
    """Told."""

class ThingConfig:
    """A config."""
    _target: type
    size: int = 1
    """The size."""
    depth: int = 2

    def method(self): ...
    def _hidden(self): ...
'''
    assert list(_undocumented(ast.parse(source), "m")) == [
        "m",
        "m.ThingConfig.method",
        "m.ThingConfig.depth",
    ]
