"""Text of a command line: tables, tyro's help, tyro's errors in one line, output that is lost."""

import contextlib
import functools
import inspect
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, TypeGuard

from flashdreams.infra.config import removed_field
from flashdreams.runtime.text import printable, reason_of, say

LEAST_COLUMNS = 40
"""Width below which tyro takes minutes to lay out help."""

_PLAIN_WORDS = {
    r"^Missing from \S+: (\S+) .*": r"\1 is missing",
    r"^Error parsing (?!--)\S+: ": "",  # the message of a config's own check follows
    r"^Error parsing (.*): no type matching (\S+) could .* from (\[.*?\])\. Got errors: .*": (
        r"\1 takes \2, got \3"
    ),
    r"^Error parsing (.*): invalid literal for int\(\) with base 10: ": (
        r"\1 takes an integer, got "
    ),
    r"^Error parsing (.*): could not convert string to float: ": r"\1 takes a number, got ",
}
"""Patterns of tyro's and Python's messages about a value, and what to say instead."""

_FOLDERS = ("--output-dir", "--state-dir", "--adopt-from")

Main = Callable[[Sequence[str]], int]


def table(rows: list[tuple[str, object]]) -> list[str]:
    """Lines of two columns, the second one wrapped to the width of the terminal."""
    width = min(max(len(name) for name, _ in rows), 40) + 4
    columns = max(shutil.get_terminal_size().columns, width + 40)
    lines = []
    for name, text in rows:
        words = printable(" ".join(str(text or "").split()))
        wrapped = textwrap.wrap(words, columns - width, break_on_hyphens=False) or [""]
        first = f"  {name}"
        if len(first) > width - 2:
            lines.append(first)
            first = ""
        lines.append(f"{first:{width}}{wrapped[0]}".rstrip())
        lines += [" " * width + more for more in wrapped[1:]]
    return lines


def read_options(form: Any, argv: Sequence[str], program: str, **options: Any) -> Any:
    """What tyro makes of a command line.

    Args:
        form: the dataclass of the options.
        argv: the words after the program's name.
        program: its name.
        options: of ``tyro.cli``.

    Raises:
        ValueError: it cannot be carried out as typed; one line.
        SystemExit: ``--help`` has been answered.
    """
    import tyro

    _refuse_empty_folders(argv)
    stderr = io.StringIO()
    asked = bool({"-h", "--help"} & set(argv))
    # Without --help nothing but an error is printed; its layout is plain text of one width whatever
    # the terminal, since stdout is no terminal then.
    stdout = sys.stdout if asked else io.StringIO()
    try:
        with (
            terminal_width(not asked),
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
        ):
            read = tyro.cli(form, args=list(argv), prog=program, **options)
    except SystemExit as exit:
        if exit.code in (None, 0):
            raise
        raise ValueError(one_line(stderr.getvalue(), program)) from None
    sys.stderr.write(stderr.getvalue())
    return read


def _refuse_empty_folders(argv: Sequence[str]) -> None:
    """Refuse an option whose empty value, as of an unset variable, would be the current folder."""
    for word, following in zip(argv, [*argv[1:], "."], strict=False):
        name, equals, value = word.replace("_", "-").partition("=")
        if name in _FOLDERS and not (value if equals else following):
            raise ValueError(f"{name} is empty. Name a folder; {name} . is the current one.")


def is_of_output(error: BaseException) -> TypeGuard[OSError]:
    """Whether stdout has failed: unlike files, it has no name, and unlike TMPDIR, it exists."""
    named = isinstance(error, FileNotFoundError) or getattr(error, "filename", None) is not None
    return isinstance(error, OSError) and error.errno is not None and not named


def lost_output(error: OSError, program: str) -> int:
    """The exit code where stdout takes no more; said in one line, unless its reader has left."""
    # Nothing may be flushed to it at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return 0
    say(printable(f"{program}: error: the output could not be written: {reason_of(error)}."))
    return 1


def lost_output_in_one_line(program: str) -> Callable[[Main], Main]:
    """A decorator of a ``main`` whose work is what it prints.

    A reader that has left (``| head``) is no error; a full disk, or a file that cannot be read or
    written, is exit code 1 and one line.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def called(argv: Sequence[str]) -> int:
            try:
                try:
                    return main(argv)
                finally:
                    if sys.stdout is not None:
                        sys.stdout.flush()
            except OSError as error:
                if is_of_output(error):
                    return lost_output(error, program)
                say(printable(f"{program}: error: {error}"))
                return 1

        return called

    return decorate


@contextlib.contextmanager
def terminal_width(wide: bool) -> Iterator[None]:
    """Keep tyro from breaking flags in two when it lays out an error for a narrow terminal.

    Help is laid out for the terminal's width, and for `LEAST_COLUMNS` where that is less.
    """
    before = os.environ.get("COLUMNS")
    width = 2000 if wide else max(shutil.get_terminal_size().columns, LEAST_COLUMNS)
    os.environ["COLUMNS"] = str(width)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = before


@contextlib.contextmanager
def readable_help() -> Iterator[None]:
    """Show a class's own fields before those of its bases, each wrapped to the terminal's width.

    tyro 1.0.17 keeps the line breaks of an indented docstring.
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
        bases = getattr(info.type, "__mro__", ())
        order = [*chain(*map(inspect.get_annotations, bases)), *(field.name for field in fields)]
        fields.sort(key=lambda field: order.index(field.name))
        return replace(spec, fields=tuple(fields))

    with registry:
        yield


def one_line(rendered: str, program: str) -> str:
    """An error box of tyro in one line: the problem, the nearest flags, what to type."""
    blocks = re.split(r"\n *-{5,} *\n", rendered)  # title, problem, more on it, how to get help
    text = " ".join((blocks[1] if len(blocks) > 1 else rendered).split()).rstrip(".")
    for technical, plain in _PLAIN_WORDS.items():
        text = re.sub(technical, plain, text)
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
