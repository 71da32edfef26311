"""The command line: ``flashdreams-run <slug>``, also ``python -m flashdreams.run <slug>``."""

if __name__ == "__main__":  # before the imports below, which take time
    from flashdreams.runtime.first_signals import begin_command

    begin_command("flashdreams-run")

import contextlib
import io
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import flashdreams
from flashdreams.infra.config import (
    annotated_types,
    check_slug,
    expand_home,
    field_annotation,
    walk,
)
from flashdreams.parallel.siblings import watch_siblings
from flashdreams.parallel.stopping import run_command, stopped
from flashdreams.registry import VARIABLE, PluginError, Registry, discover, is_runner_config
from flashdreams.runtime.checkpoint import CheckpointError, MissingWeightsError
from flashdreams.runtime.command_text import (
    is_of_output,
    lost_output,
    read_options,
    readable_help,
    table,
)
from flashdreams.runtime.standard_error import prepare_streams
from flashdreams.runtime.termination import (
    IMPORT_DEADLINE_S,
    ends_after,
)
from flashdreams.runtime.text import printable, quoted, read_text, reason_of, say

PROGRAM = "flashdreams-run"
DONE, RUN_FAILED, WRONG_USAGE = 0, 1, 2
"""Exit codes: 2 means that nothing was started, 1 that what was started failed."""

_OWN_OPTIONS = {
    "--config FILE": "read the slug and all fields from a file; further flags override it",
    "--replay FILE": "reproduce the frames of a log (log_<slug>.jsonl) and compare the hashes",
    "--print-config": "print the config as such a file and exit",
    "--no-instantiate": "print the resolved config and exit",
    "--debug": "show the traceback of an error",
    "--version": "print the versions of flashdreams, Python and PyTorch and exit",
}

_FILES = {"--config": "FILE", "--replay": "outputs/log_<slug>.jsonl"}

_PAUSE_S = 3.0
"""Seconds that a rank waits for another rank to report the cause."""

_HINT = " (run again with --debug for the traceback)"


class UsageError(ValueError):
    """An invalid command line."""


@dataclass(kw_only=True)
class CommandLine:
    """A command line, split into the words that this module reads and those that tyro reads."""

    slug: str | None = None
    overrides: list[str]
    """Flags for the fields of the slug's config, ``--help`` included."""
    config_file: Path | None = None
    replay_file: Path | None = None
    replay: Any = None
    """The `Replay` of that file."""
    print_config: bool = False
    program: str = PROGRAM
    """Whose command line it is."""
    version: bool = False
    no_instantiate: bool = False
    debug: bool = False

    @property
    def wants_help(self) -> bool:
        """Whether ``--help`` or ``-h`` was given."""
        return bool({"-h", "--help"} & set(self.overrides))


def entry_point() -> None:
    """Run the process's own command line and exit with its code."""
    watch_siblings()
    prepare_streams()
    run_command(PROGRAM, main)


def main(argv: Sequence[str]) -> int:
    """Run one command line.

    Args:
        argv: the words after the program's name.

    Returns:
        The exit code: 0 done, 1 the run failed, 2 the command line or a config is wrong and nothing
        was started, 130 interrupted, 143 terminated (by a signal that `entry_point` listens to).
        Usage errors are one line on stderr of rank zero, a failing run is one line on the rank that
        fails; with ``--debug`` it shows its traceback.
    """
    debug = "--debug" in argv
    try:
        with ends_after(IMPORT_DEADLINE_S, _say_import_hangs):
            line = _split(argv)
            config = _resolve(line)
    except KeyboardInterrupt as stop:
        return stopped(stop, PROGRAM)
    except Exception as error:
        if is_of_output(error):
            return lost_output(error, PROGRAM)
        return report(error, WRONG_USAGE, debug)
    return DONE if config is None else _run(config, debug, line.replay)


def read_config(argv: Sequence[str], program: str = PROGRAM) -> Any:
    """The config that a command line names; None if it only asked for something to be printed.

    Args:
        argv: the words after the program's name, as for `main`.
        program: its name.

    Raises:
        ValueError: it is invalid; also other errors of configs and plug-ins.
    """
    return _resolve(replace(_split(argv), program=program))


def _split(argv: Sequence[str]) -> CommandLine:
    """Take out this module's own options and the slug."""
    line = CommandLine(overrides=[])
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in _FILES:
            value = value if equals else next(words, "")
            if not value or value.startswith("--"):
                raise UsageError(f"{name} needs a file: {name} {_FILES[name]}.")
            setattr(line, f"{name[2:]}_file", Path(os.path.expanduser(value)))
        elif word in ("--debug", "--no-instantiate", "--print-config", "--version"):
            setattr(line, word[2:].replace("-", "_"), True)
        else:
            line.overrides.append(word)
    rest = line.overrides
    at = 1 if rest[:1] in (["-h"], ["--help"]) else 0
    if len(rest) > at and not rest[at].startswith("-"):
        line.slug = rest.pop(at)
    return line


def _resolve(line: CommandLine) -> Any:
    """The config to run, or None if the command line only asked for something to be printed."""
    if line.version:
        _print_on_rank_zero(_versions())
        return None
    registry = discover()
    if line.replay_file is not None:
        config = _apply_overrides(_read_replay(line, registry), line)
        if config is None or not (line.print_config or line.no_instantiate):
            return config
        return _show(config, line)
    if line.slug is None and line.config_file is None:
        return _answer_without_slug(line, registry)
    config = registry.resolve(line.slug) if line.slug is not None else None
    for message in registry.collisions.get(line.slug or "", []):
        _print_on_rank_zero(f"{PROGRAM}: note: {message}", sys.stderr)
    if line.config_file is not None:
        config = _read_config_file(line.config_file, registry, config)
    config = _apply_overrides(config, line)
    if config is None:
        return None
    check_slug(config.runner_name)  # also for configs that are not a RunnerConfig
    return _show(config, line)


def _show(config: Any, line: CommandLine) -> Any:
    """The config, or None if it was only to be printed."""
    if line.print_config:
        from flashdreams.infra.config_file import dump_config

        _print_on_rank_zero(
            f"# Take this back with: {PROGRAM} --config FILE\n{dump_config(config)}".rstrip()
        )
        return None
    if line.no_instantiate:
        _print_on_rank_zero(str(config))
        return None
    return expand_home(config)


def _answer_without_slug(line: CommandLine, registry: Registry) -> None:
    if line.wants_help:
        _print_on_rank_zero(_listing(registry))
        return
    given = f", got {line.overrides[0]!r}" if line.overrides else ""
    raise UsageError(
        f"the first word must name what to run{given}. Type {PROGRAM} --help for the list, "
        f"e.g. {line.program} {_example(registry)}."
    )


def _versions() -> str:
    import platform
    from importlib.metadata import version

    own, python = flashdreams.__version__, platform.python_version()
    return f"flashdreams {own}, Python {python}, torch {version('torch')}"


def _ready(registry: Registry) -> list[str]:
    """The slugs that run without a download, those with packaged weights first."""
    from flashdreams.infra.weights import named_checkpoints

    packaged = {}
    for slug, config in registry.items():
        with contextlib.suppress(Exception):  # a run of it says what is wrong
            files = [checkpoint for _, checkpoint in named_checkpoints(config)]
            packaged[slug] = [file.source.startswith("package:") for file in files]
    return sorted((s for s, own in packaged.items() if all(own)), key=lambda s: not packaged[s])


def _example(registry: Registry) -> str:
    """A slug for the example: one that runs, if there is one."""
    return next(iter([*_ready(registry), *registry]), "<slug>")


def _listing(registry: Registry) -> str:
    """Every slug with its description, broken plug-ins with a mark, and further help."""
    about = {slug: getattr(config, "description", "") for slug, config in registry.items()}
    parts: dict[str, list[tuple[str, object]]] = {
        "slugs that run as they are": [(slug, about.pop(slug)) for slug in _ready(registry)],
        "slugs that need weights; a run without them lists the files": list(about.items()),
        "slugs that cannot be used": [
            (bad.slug, f"[broken] {type(bad.error).__name__}: {bad.error} ({bad.source})")
            for bad in registry.broken
        ],
    }
    if not any(parts.values()):
        parts = {"slugs": [("(none)", f"install a package that registers some, or set {VARIABLE}")]}
    lines = [
        f"usage: {PROGRAM} <slug> [--field VALUE ...]",
        f"       {PROGRAM} <slug> --help     every field of a slug",
        "",
        *(line for part, rows in parts.items() if rows for line in (f"{part}:", *table(rows), "")),
        "options:",
        *table(list(_OWN_OPTIONS.items())),
    ]
    notes = [message for messages in registry.collisions.values() for message in messages]
    return "\n".join(lines + [f"note: {message}" for message in notes])


def _read_config_file(path: Path, registry: Registry, named: Any) -> Any:
    from flashdreams.infra.config_file import MAX_CONFIG_BYTES, load_config

    try:
        text = read_text(path, MAX_CONFIG_BYTES)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read --config {path}: {reason_of(error)}. "
            f"Write one with: {PROGRAM} <slug> --print-config > {path}"
        ) from error
    registered = list(registry.values()) if named is None else [*registry.values(), named]
    config = load_config(
        text,
        registered,
        str(path),
        lambda note: _print_on_rank_zero(f"{PROGRAM}: note: {note}", sys.stderr),
    )
    if not is_runner_config(config):
        raise UsageError(f"{path} holds a {type(config).__name__}, which is not a runner's config.")
    if named is not None and config.runner_name != named.runner_name:
        raise UsageError(
            f"{path} is a config of {quoted(config.runner_name)}, not of {named.runner_name!r}: "
            f"omit the slug, or use that of the file."
        )
    return config


def _read_replay(line: CommandLine, registry: Registry) -> Any:
    """The config of a log; its files go to a folder of their own unless a flag names another."""
    from flashdreams.infra.config_file import load_config
    from flashdreams.infra.run_log import read_log

    path = line.replay_file
    assert path is not None
    if line.slug is not None or line.config_file is not None:
        raise UsageError(f"--replay {path} has its own config; omit the slug and --config.")
    line.replay = read_log(path)
    text = line.replay.header["config"]
    if text is None:
        raise UsageError(f"--replay {path}: its config cannot be written to a file.")
    config = load_config(text, list(registry.values()), str(path))
    folder = config.output_dir / "replay"
    config = replace(config, output_dir=folder, resume=False, numerics_from=path)
    if line.replay.header.get("served") and hasattr(config, "total_blocks"):
        config = replace(config, total_blocks=max(line.replay.steps, default=0) + 1)
    return config


def _apply_overrides(config: Any, line: CommandLine) -> Any:
    """The config with the flags applied; None if tyro answered ``--help``."""
    from tyro.conf import AvoidSubcommands, FlagConversionOff, SuppressFixed

    program = f"{PROGRAM} {line.slug or config.runner_name}"
    for name in _absent_components(config):
        flag = f"--{name.replace('_', '-')}."
        if any(word.replace("_", "-").startswith(flag) for word in line.overrides):
            raise UsageError(
                f"{flag[:-1]} is None, so it has no flags. Set it in the config's literal or in a "
                f"file: {program} --print-config > run.yaml, then {PROGRAM} --config run.yaml."
            )
    form: Any = AvoidSubcommands[SuppressFixed[FlagConversionOff[type(config)]]]  # type: ignore[misc]
    stdout = sys.stdout if _rank() == 0 else io.StringIO()
    given = {"default": config, "description": _about(config)}
    try:
        with (
            readable_help() if line.wants_help else contextlib.nullcontext(),
            contextlib.redirect_stdout(stdout),
        ):
            return read_options(form, line.overrides, program, **given)
    except SystemExit:
        stdout.flush()
        return None


def _about(config: Any) -> str:
    """The text above the flags in the help of a slug."""
    lines = [getattr(config, "description", "")]
    lines += [f"{name}: {text}." for name, text in _OWN_OPTIONS.items()]
    absent = list(_absent_components(config))
    if absent:
        names = ", ".join(absent)
        lines += ["", f"Components that are None have no flags, set them with --config: {names}."]
    return "\n".join(lines)


def _absent_components(config: Any) -> Iterator[str]:
    """Dotted names of the components that are None, which have no flags."""
    for path, owner, value in walk(config):
        annotation = field_annotation(type(owner), path.rpartition(".")[2])
        if value is None and any(map(is_dataclass, annotated_types(annotation))):
            yield path


def _run(config: Any, debug: bool, replay: Any = None) -> int:
    """Set up the runner and run it; its records are written whatever happens."""
    from flashdreams.parallel.agent import watch_agent

    try:
        watch_agent()
        runner = config.setup()
        if replay is not None:
            runner.recorder.replay = replay
    except KeyboardInterrupt as stop:
        return stopped(stop, PROGRAM)
    except Exception as error:
        return report(with_advice(error, config), code_before_run(error), debug)
    try:
        try:
            runner.run()
        except BaseException as error:
            runner.abort()
            explain = getattr(runner, "explain", None)  # a runner may have another base class
            found = explain(error) if explain is not None else error
            if found is error:
                raise
            raise found from error
        runner.close()
    except KeyboardInterrupt as stop:
        return stopped(stop, PROGRAM)
    except Exception as error:
        return report(with_advice(error, config), RUN_FAILED, debug)
    return DONE


def code_before_run(error: Exception) -> int:
    """Exit code of a failed set-up: 2 for errors in the config or in file headers."""
    damaged = isinstance(error, CheckpointError) and not isinstance(error, MissingWeightsError)
    return WRONG_USAGE if damaged or isinstance(error, ValueError | TypeError) else RUN_FAILED


def with_advice(error: Exception, config: Any) -> Exception:
    """If memory ran out, what was needed and what would fit."""
    if not isinstance(error, RuntimeError | MemoryError):
        return error
    from flashdreams.planning.shortage import with_advice as advised

    return advised(error, config)


def report(
    error: Exception,
    code: int,
    debug: bool,
    program: str = PROGRAM,
) -> int:
    """Report an error in one line, and return its exit code.

    Files that have to be fetched are a list, one to a line. Rank zero speaks first; another rank
    says what is wrong with its own command line, or that another one has failed, only if torchrun
    has not ended it before.
    On several ranks an error that is nobody's mistake shows its traceback at once: such a run is
    not easily repeated.
    """
    from flashdreams.parallel.environment import OtherRankError

    readable = [ValueError, OSError, ImportError, PluginError, CheckpointError, FloatingPointError]
    if code == WRONG_USAGE:
        readable.append(TypeError)
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    listed = isinstance(error, (CheckpointError, ImportError))
    text = ("\n  " if listed else " ").join(filter(None, lines))
    repeats = isinstance(error, OtherRankError)
    unexpected = not (repeats or isinstance(error, tuple(readable))) or not text
    debug = debug or (unexpected and code == RUN_FAILED and _ranks() > 1)
    if debug:
        trace = "".join(traceback.format_exception(error))
        say(printable(trace, 100_000).rstrip("\n"), beside=_shares_terminal())
    if unexpected:
        text = f"{type(error).__name__}: {text}".rstrip(": ") + _HINT * (not debug)
    elif isinstance(error, PluginError):
        text += _HINT * (not debug)
    text = printable(text)
    if _rank() == 0:
        say(f"{program}: error: {text}")
        return code
    if code == WRONG_USAGE or repeats:
        # Another rank reports the same or more, and torchrun then ends this one during the pause.
        try:
            time.sleep(_PAUSE_S)
        except KeyboardInterrupt:
            return code
    say(f"{program}: error on rank {_rank()}: {text}", beside=_shares_terminal())
    return code


def _say_import_hangs() -> None:
    say(f"{PROGRAM}: error: the imports have not ended after {IMPORT_DEADLINE_S:.0f} s.")


def _print_on_rank_zero(text: str, stream: Any = None) -> None:
    """Print on rank zero only."""
    if _rank() == 0:
        print(text, file=stream or sys.stdout, flush=True)


def _shares_terminal() -> bool:
    """Whether rank zero's progress bar may be where this rank prints."""
    from flashdreams.parallel.environment import started_by_torchrun

    return started_by_torchrun() and _rank() > 0


def _ranks() -> int:
    from flashdreams.parallel.environment import process_count

    return process_count()


def _rank() -> int:
    from flashdreams.parallel.environment import process_rank

    with contextlib.suppress(ValueError):  # RANK is not a number: reported at rendezvous
        return process_rank()
    return 0


if __name__ == "__main__":
    entry_point()
