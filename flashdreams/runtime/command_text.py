"""Text of a command line: tables, tyro's help, and tyro's errors in one line."""

import contextlib
import os
import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from flashdreams.infra.config import removed_field


def table(rows: list[tuple[str, str]]) -> list[str]:
    """Lines of two columns, the second one wrapped to the width of the terminal."""
    width = min(max(len(name) for name, _ in rows), 40) + 4
    columns = max(shutil.get_terminal_size().columns, width + 40)
    lines = []
    for name, text in rows:
        text = " ".join(text.split())
        wrapped = textwrap.wrap(text, columns - width, break_on_hyphens=False) or [""]
        first = f"  {name}"
        if len(first) > width - 2:
            lines.append(first)
            first = ""
        lines.append(f"{first:{width}}{wrapped[0]}".rstrip())
        lines += [" " * width + more for more in wrapped[1:]]
    return lines


@contextlib.contextmanager
def terminal_width(wide: bool) -> Iterator[None]:
    """Keep tyro from breaking flags in two when it lays out an error for a narrow terminal."""
    before = os.environ.get("COLUMNS")
    if wide:
        os.environ["COLUMNS"] = "2000"
    try:
        yield
    finally:
        if wide and before is None:
            os.environ.pop("COLUMNS", None)
        elif wide and before is not None:
            os.environ["COLUMNS"] = before


@contextlib.contextmanager
def whole_paragraphs() -> Iterator[None]:
    """Let a field's help flow into the width of the terminal.

    tyro 1.0.17 keeps the line breaks of an indented docstring. Not needed once it joins its lines.
    """
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

    registry, asking = ConstructorRegistry(), False

    @registry.struct_rule
    def join_lines(info: StructTypeInfo) -> Any:
        nonlocal asking
        if asking:  # the rules of tyro itself come after this one
            return None
        asking = True
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            asking = False
        if not isinstance(spec, StructConstructorSpec):  # no struct, or a default that misfits
            return spec
        fields = []
        for field in spec.fields:
            text = field.helptext() if callable(field.helptext) else field.helptext
            paragraphs = (" ".join(part.split()) for part in (text or "").split("\n\n"))
            fields.append(replace(field, helptext="\n\n".join(paragraphs)))
        return replace(spec, fields=tuple(fields))

    with registry:
        yield


def one_line(rendered: str, program: str) -> str:
    """What tyro says in a box, in one line: the problem, the nearest flags, what to type."""
    blocks = re.split(r"\n *-{5,} *\n", rendered)  # title, problem, more on it, how to get help
    text = " ".join((blocks[1] if len(blocks) > 1 else rendered).split()).rstrip(".")
    text = re.sub(r"^Error parsing (?!--)\S+: ", "", text)  # what a config's own check says
    if text.startswith("Unrecognized options"):
        for name in re.findall(r"--(?:[\w-]+\.)*([\w-]+)", text):
            removed = removed_field(name.replace("-", "_"))
            if removed is not None:
                return removed
    nearest = []
    for block in blocks[2:]:
        if block.lstrip().startswith("Perhaps you meant"):
            nearest = re.findall(r"^ *(--[\w.-]+)", block, re.MULTILINE)[:3]
    hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
    return f"{text}.{hint} Type {program} --help for every flag."
