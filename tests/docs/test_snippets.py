"""Every command and Python block of the README and the documentation, run or at least parsed."""

import contextlib
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashdreams import run, serve
from flashdreams.registry import discover
from tests.docs.snippets import (
    REPOSITORY,
    Snippet,
    commands,
    engine_arguments,
    is_plain,
    markdown_files,
    pages,
    snippets_of,
)
from tests.harness import run_like_torchrun

SHARED = ("benchmarks", "training", "docs", "launch", "kernels", "tests", "flashdreams")
"""Folders of the checkout that commands may name."""
OWN_METHOD = "customized-method"
WITH_SNIPPETS = [page for page in pages() if snippets_of(page)]


_ALREADY_RUN: set[str] = set()
"""Shell blocks that passed on another page; starting a shell twice would prove no more."""


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY)).removeprefix("docs/source/")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that looks like the checkout, in which commands may leave files."""
    for name in SHARED:
        (tmp_path / name).symlink_to(REPOSITORY / name)
    shutil.copy(REPOSITORY / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHON", sys.executable)
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(paths))
    sources = [str(REPOSITORY), str(REPOSITORY / "kernels")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sources))
    monkeypatch.syspath_prepend("")  # the working folder, as for a Python that is typed into
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("customized_method")]:
        del sys.modules[name]


def engine(arguments: list[str]) -> tuple[int, str]:
    """Exit code of the engine's command line, run in this process, and what it said."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = run.main(arguments)
    return code, out.getvalue()


def start(words: list[str]) -> tuple[int, str]:
    """Exit code and output of a call of the engine or of Python, in this process.

    Importing torch again for every command would take most of the time.
    """
    if words[0] == "flashdreams-run":
        return engine(words[1:])
    if words[0] == "torchrun":
        return start_ranks(words), ""
    out = io.StringIO()
    arguments, path = sys.argv, list(sys.path)
    try:
        with contextlib.redirect_stdout(out):
            if words[1] == "-c":
                exec(compile(words[2], "-c", "exec"), {"__name__": "__main__"})
            else:
                sys.argv = words[1:]
                sys.path.insert(0, str((REPOSITORY / words[1]).parent))
                runpy.run_path(words[1], run_name="__main__")
    except SystemExit as exit:
        return int(exit.code or 0), out.getvalue()
    finally:
        sys.argv, sys.path[:] = arguments, path
    return 0, out.getvalue()


def start_ranks(words: list[str]) -> int:
    """The exit code of the ranks of a torchrun command on one node; 0 if all ended well."""
    count = int(words[words.index("--nproc-per-node") + 1])
    return run_like_torchrun(count, run_and_exit, engine_arguments(words))


def run_and_exit(arguments: list[str]) -> None:
    sys.exit(run.main(arguments))


def run_shell(snippet: Snippet, folder: Path) -> None:
    """Run a block; the next one of its page begins in the folder in which it ends."""
    end = folder / ".pwd"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'{snippet.code}\npwd > "{end}"'],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, f"{snippet.place}\n{done.stdout}\n{done.stderr}"
    os.chdir(end.read_text().strip())


def execute(snippet: Snippet, folder: Path, names: dict[str, Any]) -> None:
    """Carry out one block; Python blocks of a page share their names."""
    if snippet.language == "python":
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(snippet.code, snippet.place, "exec"), names)
    elif is_plain(snippet.code):
        for command in commands(snippet.code):
            code, said = start(command.words)
            assert code == 0, f"{snippet.place}: {' '.join(command.words)}\n{said}"
            if command.output is not None:
                Path(command.output).write_text(said)
    elif snippet.code not in _ALREADY_RUN:
        run_shell(snippet, folder)
        _ALREADY_RUN.add(snippet.code)


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=name_of)
def test_page_does_what_it_says(page: Path, folder: Path) -> None:
    """Blocks run in their order, in one folder per page."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for snippet in snippets_of(page):
        if not snippet.mark:
            execute(snippet, folder, names)


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=name_of)
def test_marked_blocks_have_flags_that_exist(page: Path) -> None:
    for snippet in snippets_of(page):
        if snippet.mark:
            check_marked(snippet)


def check_marked(snippet: Snippet) -> None:
    """See that a block that cannot be run here is at least well formed."""
    if snippet.language == "python":
        compile(snippet.code, snippet.place, "exec")
        return
    subprocess.run(["bash", "-n", "-c", snippet.code], check=True)
    for words in [command.words for command in commands(snippet.code)]:
        arguments = engine_arguments(words)
        if arguments is None:
            check_files(snippet, words)
        elif OWN_METHOD not in arguments:
            what = arguments if "--help" in arguments else [*arguments, "--no-instantiate"]
            code, said = engine(what)
            assert code == 0, f"{snippet.place}: {' '.join(words)}\n{said}"


def check_files(snippet: Snippet, words: list[str]) -> None:
    """Files of the repository that a command names must exist, and flags of a script, too."""
    for at, word in enumerate(words):
        if word.startswith(("launch/", "benchmarks/", "docs/source", "tests/")):
            assert (REPOSITORY / word).exists(), f"{snippet.place}: {word} does not exist"
        if word.startswith("benchmarks/") and word.endswith(".py"):
            _, known = start(["python", str(REPOSITORY / word), "--help"])
            for flag in [w for w in words[at:] if w.startswith("--")]:
                assert flag in known, f"{snippet.place}: {word} has no {flag}"


OF_OTHER_PROGRAMS = {
    "--dist", "--kill-on-bad-exit", "--max-restarts", "--no-build-isolation", "--no-sync",
    "--nodes", "--nproc-per-node", "--pid", "--signal", "--standalone", "--torch-backend",
}  # fmt: skip


@pytest.mark.slow
def test_flags_in_the_text_exist() -> None:
    known = set(OF_OTHER_PROGRAMS)
    tiny = [slug for slug in discover() if slug.endswith(("-tiny-random", "toy-world"))]
    full = "wan21-t2v-1.3b-480p"  # with a text encoder
    for words in ([], [full], *([slug] for slug in tiny)):  # of every family
        known |= set(re.findall(r"--[\w.-]+", engine([*words, "--help"])[1]))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert serve.main(["--help"]) == 0
    known |= set(re.findall(r"--[\w-]+", said.getvalue()))
    client = "serving/client_command.py"
    for module in ("plan.py", "check.py", client):
        known |= set(
            re.findall(
                r"--[\w-]+",
                start(["python", str(REPOSITORY / "flashdreams" / module), "--help"])[1],
            )
        )
    scripts = [*REPOSITORY.glob("benchmarks/*.py"), *REPOSITORY.glob("launch/*.py")]
    for script in scripts:
        known |= set(re.findall(r'"(--[\w-]+)"', script.read_text(encoding="utf-8")))
    for page in [*pages(), *markdown_files()]:
        text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        if page.name == "official_programs.md":  # whose flags are in the first column
            text = re.sub(r"^\|[^|]*\|", "", text, flags=re.MULTILINE)
        for code in re.findall(r"`([^`]+)`", text):
            for flag in re.findall(r"(?:^|\s)(--\w[\w.-]*)", code):
                assert flag in known, f"{name_of(page)} speaks of {flag}, which does not exist"


def test_a_wrong_flag_is_found() -> None:
    page = REPOSITORY / "README.md"
    good = Snippet(page, 1, "bash", "gpu", "torchrun -m flashdreams.run toy-world --fps 8\n")
    check_marked(good)
    bad = Snippet(page, 1, "bash", "gpu", "torchrun -m flashdreams.run toy-world --fsp 8\n")
    with pytest.raises(AssertionError, match="fsp"):
        check_marked(bad)
    wrong = Snippet(page, 1, "bash", "gpu", "torchrun benchmarks/fps.py toy-world --repaets 1\n")
    with pytest.raises(AssertionError, match="repaets"):
        check_marked(wrong)
    missing = Snippet(page, 1, "bash", "cluster", "sbatch launch/absent.sbatch\n")
    with pytest.raises(AssertionError, match="does not exist"):
        check_marked(missing)


def test_unmarked_blocks_are_found_on_every_kind_of_page() -> None:
    runs = {name_of(page): [s for s in snippets_of(page) if not s.mark] for page in pages()}
    assert runs["README.md"] and runs["quickstart/first_video.md"] and runs["models/wan21.md"]
    assert sum(map(len, runs.values())) >= 30
