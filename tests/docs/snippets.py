"""Commands and Python blocks of the README and the documentation, as data."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SITE = REPOSITORY / "docs/source"
LANGUAGES = ("bash", "python")
MARKS = ("", "weights", "gpu", "cluster", "install")
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OPERATORS = {"&&", "||", "|", ";", "&"}


@dataclass(frozen=True)
class Snippet:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    mark: str
    """What it needs, from the second word of the info string; empty: nothing."""
    code: str

    @property
    def place(self) -> str:
        """File and line, for messages."""
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def pages() -> list[Path]:
    """The README and every page of the site."""
    return [REPOSITORY / "README.md", *sorted(SITE.rglob("*.md"))]


def markdown_files() -> list[Path]:
    """Every Markdown file whose links should lead somewhere."""
    folders = ("flashdreams", "kernels", "launch", "benchmarks")
    found = [file for folder in folders for file in (REPOSITORY / folder).rglob("*.md")]
    return [*REPOSITORY.glob("*.md"), *found]


def snippets_of(page: Path) -> list[Snippet]:
    """The blocks of a page that can be checked, in their order.

    Raises:
        ValueError: a mark that does not exist.
    """
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language, _, mark = match[1].strip().partition(" ")
        if language not in LANGUAGES:
            continue
        line = text.count("\n", 0, match.start()) + 1
        mark = mark.strip()
        if mark not in MARKS:
            raise ValueError(f"{page}:{line}: unknown mark {mark!r}; allowed: {', '.join(MARKS)}.")
        if not mark and language == "bash" and installs(match[2]):
            mark = "install"
        found.append(Snippet(page, line, language, mark, match[2]))
    return found


def installs(code: str) -> bool:
    """Whether a block changes the environment."""
    return any(c.words[:2] in (["pip", "install"], ["python3", "-m"]) for c in commands(code))


@dataclass(frozen=True)
class Command:
    """One simple command."""

    words: list[str]
    """Without the assignments before it."""
    output: str | None
    """The file that ``>`` sends its output to."""


def commands(code: str) -> list[Command]:
    """The simple commands of a shell block."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        groups: list[list[str]] = [[]]
        for word in lexer:
            if word in _OPERATORS:
                groups.append([])
            else:
                groups[-1].append(word)
        found += [_command(words) for words in groups if words]
    return found


def _command(words: list[str]) -> Command:
    at = words.index(">") if ">" in words else len(words)
    output = words[at + 1] if at < len(words) else None
    return Command(without_variables(words[:at]), output)


def without_variables(words: list[str]) -> list[str]:
    """A command without the assignments before it."""
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    return words


def engine_arguments(words: list[str]) -> list[str] | None:
    """What a command hands to the engine's command line; None if it does not call it."""
    if words[:1] == ["flashdreams-run"]:
        return words[1:]
    for launcher in (["torchrun"], ["python", "-m"]):
        if words[: len(launcher)] == launcher and "flashdreams.run" in words:
            return words[words.index("flashdreams.run") + 1 :]
    if words and words[0].endswith("torchrun.sh") and not words[1].endswith(".py"):
        return words[1:]
    return None


def is_plain(code: str) -> bool:
    """Whether a block only calls the engine, torchrun or Python, so that it needs no shell."""
    code = re.sub(r"^ *#.*$", "", code, flags=re.MULTILINE)
    code = re.sub(r"^OMP_NUM_THREADS=1 (?=torchrun )", "", code, flags=re.MULTILINE)
    if any(sign in code for sign in "$|<;*`") or re.search(r"^\w+=", code, re.MULTILINE):
        return False
    calls = [c.words for c in commands(code)]
    return all(
        words[:1] == ["flashdreams-run"]
        or (words[:1] == ["python"] and words[1:2] != ["-m"])
        or (words[:2] == ["torchrun", "--standalone"] and engine_arguments(words) is not None)
        for words in calls
    )
