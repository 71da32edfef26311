"""The command line of the benchmarks."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import report
import torch

from flashdreams.parallel.environment import init, process_count, process_rank


def parse(
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    *,
    ranks: bool = False,
    draws: bool = False,
) -> argparse.Namespace:
    """Parse a command line; errors that would spoil the report are found before any measurement.

    Args:
        parser: has the script's own options; the common ones are added.
        arguments: command line; None: that of the process.
        ranks: whether the script runs on several ranks of torchrun.
        draws: whether the script draws a picture of its report.

    Raises:
        ValueError: the commit of the code is unknown.
    """
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--repeats", type=count, default=None, help="timed calls of each variant")
    parser.add_argument("--json", type=new_file, default=None, help="write the report here")
    if draws:
        parser.add_argument("--plot", type=new_picture, help="write a picture here (.svg, .png)")
    parser.add_argument("--git-commit", default=None, help="where the tree has no .git: its commit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    if not ranks and process_count() > 1:
        parser.error("it measures one process; start it with python instead of torchrun")
    if options.git_commit is None:
        report.git_state()
    return options


def run_over_sizes(
    benchmark: str,
    description: str | None,
    arguments: list[str] | None,
    *,
    presets: Mapping[str, Any],
    gpu_repeats: int,
    measure: Callable[..., Iterable[dict[str, Any]]],
    columns: Sequence[str],
    switch: tuple[str, str] | None = None,
) -> None:
    """The complete script of a benchmark that measures one of several model sizes.

    Args:
        benchmark: name of the benchmark.
        description: docstring of the script; its first paragraph is the help text.
        arguments: command line; None: that of the process.
        presets: sizes by name; the default is ``tiny`` on a CPU and ``wan-1.3b`` on a GPU.
        gpu_repeats: timed calls of each variant on a GPU; it is 20 on a CPU.
        measure: yields rows for sizes, dtype, device, repeats and, if there is a switch, whether
            it is on; rows are written as they come, so that an interrupted run leaves its results.
        columns: row fields to print in the table.
        switch: name and help of the script's own switch.
    """
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("--preset", choices=presets, default=None, help="default: by device")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default=None)
    if switch is not None:
        parser.add_argument(f"--{switch[0]}", action="store_true", help=switch[1])
    options = parse(parser, arguments)
    device = init(options.device).device
    on_gpu = device.type == "cuda"
    preset = options.preset or ("wan-1.3b" if on_gpu else "tiny")
    dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    repeats = options.repeats or (gpu_repeats if on_gpu else 20)
    sizes, switched = presets[preset], () if switch is None else (getattr(options, switch[0]),)
    config = {"preset": preset, "dtype": dtype, "repeats": repeats, **vars(sizes)}
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    with torch.no_grad():
        for row in measure(sizes, getattr(torch, dtype), device, repeats, *switched):
            rows.append(row)
            found = report.new_report(benchmark, device, config, rows, options.git_commit)
            if options.json is not None:
                report.write(found, options.json)
    report.finish(found, options, columns)


def run(main: Callable[[], int | None]) -> None:
    """Run a script; a refusal ends with a one-line message and exit code 2."""
    try:
        sys.exit(main())
    except (ValueError, OSError, ImportError) as error:
        if "--debug" in sys.argv:
            raise
        rank = f" on rank {process_rank()}" if process_count() > 1 else ""
        text = " ".join(str(error).split())
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error{rank}: {text}\n")
        sys.exit(2)


def count(text: str) -> int:
    """Type of an option: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def new_file(text: str) -> Path:
    """Type of an option: a writable file; its folder is created."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {reason}") from error
    return path


def new_picture(text: str) -> Path:
    """Type of an option: a writable file with the suffix of a picture format."""
    path = new_file(text)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise argparse.ArgumentTypeError(
            "a picture needs matplotlib; type pip install matplotlib"
        ) from error
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} must end in one of .{', .'.join(known)}")
    return path
