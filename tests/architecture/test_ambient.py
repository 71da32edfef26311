"""No tensor of the package takes its type or its device from what a program has set as default."""

import ast
from collections.abc import Iterator
from pathlib import Path

import flashdreams

FACTORIES = frozenset(
    [
        "arange",
        "as_tensor",
        "empty",
        "eye",
        "full",
        "linspace",
        "logspace",
        "ones",
        "rand",
        "randn",
        "tensor",
        "zeros",
    ]
)
AT_BUILD = ("nn.Parameter", "self.register_buffer")
"""Calls around what is made while a component is built, under defaults that the assembly sets."""


def ambient_calls(source: str) -> Iterator[str]:
    """Calls ``torch.zeros(...)`` and the like that leave out the type or the device."""
    waiting: list[tuple[ast.AST, bool]] = [(ast.parse(source), False)]
    while waiting:
        node, built = waiting.pop()
        built |= isinstance(node, ast.Call) and ast.unparse(node.func) in AT_BUILD
        built |= isinstance(node, ast.FunctionDef) and node.name in ("__init__", "new_modulation")
        if isinstance(node, ast.Call) and not built:
            owner, _, name = ast.unparse(node.func).rpartition(".")
            given = {keyword.arg for keyword in node.keywords}
            stated = {"dtype", "device"} <= given or None in given  # None: **options
            if owner == "torch" and name in FACTORIES and not stated:
                yield f"line {node.lineno}: {ast.unparse(node)}"
        waiting.extend((child, built) for child in ast.iter_child_nodes(node))


def test_types_and_devices_are_stated() -> None:
    folder = Path(flashdreams.__file__).parent
    found = [
        f"{path.relative_to(folder)}, {call}"
        for path in sorted(folder.rglob("*.py"))
        for call in ambient_calls(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_the_check_sees_what_is_left_out() -> None:
    """Negative control."""
    assert list(ambient_calls("x = torch.zeros(3)")) == ["line 1: torch.zeros(3)"]
    assert list(ambient_calls("x = f(torch.arange(3, dtype=t) + 0.5)"))
    assert not list(ambient_calls("x = torch.zeros(3, dtype=t, device=d)"))
    assert not list(ambient_calls("x = nn.Parameter(torch.ones(3))"))
