"""Texts of a Python file: messages and docstrings."""

import ast
from collections.abc import Iterator


def texts_of(source: str) -> Iterator[str]:
    """Every text of a file, docstrings included; what an f-string fills in reads ``{}``."""
    tree = ast.parse(source)
    filled = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    inside = {id(part) for node in filled for part in node.values}
    for node in filled:
        yield "".join(
            part.value if isinstance(part, ast.Constant) else "{}" for part in node.values
        )
    for node in ast.walk(tree):
        text = isinstance(node, ast.Constant) and id(node) not in inside and node.value
        if isinstance(text, str):
            yield text
