"""What messages and pages tell people to type exists: options, packages, commands, variables."""

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from flashdreams.registry import discover
from flashdreams.run import _OWN_OPTIONS
from tests.architecture.sources import PACKAGES, ROOT, python_files
from tests.architecture.texts import texts_of

FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*")

OF_OTHER_PROGRAMS = {
    "--nproc-per-node", "--nnodes", "--max-restarts", "--rdzv-id", "--standalone",  # torchrun
    "--no-build-isolation",  # pip
    "--help",  # tyro
}  # fmt: skip


def flags_in_errors(source: str) -> Iterator[str]:
    """Options in the texts of ``raise`` statements; one that a value completes ends with . or -."""
    for statement in ast.walk(ast.parse(source)):
        if not isinstance(statement, ast.Raise) or statement.exc is None:
            continue
        for node in ast.walk(statement.exc):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from FLAG.findall(node.value)


def flags_of(config: Any, prefix: str = "--") -> Iterator[str]:
    """Options of a config on the command line."""
    for item in fields(config):
        name = prefix + item.name.replace("_", "-")
        yield name
        value = getattr(config, item.name)
        if is_dataclass(value) and not isinstance(value, type):
            yield from flags_of(value, f"{name}.")


def flags_of_commands(source: str) -> Iterator[str]:
    """Options that the fields of a command's settings, such as flashdreams-plan's, become."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    yield "--" + item.target.id.replace("_", "-")


@pytest.fixture(scope="module")
def known() -> set[str]:
    own = {text.split()[0] for text in _OWN_OPTIONS}
    of_slugs = {flag for config in discover().values() for flag in flags_of(config)}
    commands = [*(ROOT / "flashdreams").glob("*.py"), *python_files(ROOT / "flashdreams/serving")]
    of_commands = {flag for file in commands for flag in flags_of_commands(file.read_text("utf-8"))}
    return own | of_slugs | of_commands | OF_OTHER_PROGRAMS


def is_known(flag: str, known: set[str]) -> bool:
    plain = flag.rstrip(".-")
    if plain != flag and any(name.startswith(flag) for name in known):
        return True  # a value completes it, or a sentence ends here
    return plain in known


def test_every_option_in_an_error_exists(known: set[str]) -> None:
    unknown = [
        f"{file.relative_to(ROOT)}: {flag}"
        for file in python_files(ROOT / "flashdreams", ROOT / "kernels")
        for flag in flags_in_errors(file.read_text("utf-8"))
        if not is_known(flag, known)
    ]
    assert not unknown


def test_an_option_that_nobody_has_is_noticed(known: set[str]) -> None:
    """Negative control."""
    source = 'raise ValueError(f"{x}: type --output-dir {y} or --output-folder {y}.")'
    found = list(flags_in_errors(source))
    assert found == ["--output-dir", "--output-folder"]
    assert [is_known(flag, known) for flag in found] == [True, False]
    assert list(flags_of_commands("class A:\n    http_port: int = 1")) == ["--http-port"]
    assert is_known("--parallel.", known) and not is_known("--parallels.", known)


INSTALL = re.compile(
    r"pip install ((?:(?:--?[\w-]+|'[^'\n]+'|\"[^\"\n]+\"|\.(?!\w)) ?)+|[a-z][\w-]+)"
)
COMMAND = re.compile(r"(?<![\w./-])flashdreams-[a-z]+(?![\w-])")
SETTING = re.compile(
    r"(?:\b[Ss]et|\b[Uu]nset|\bexport|\bvariable) `{0,2}((?:[A-Z][A-Z0-9_]+`{0,2}(?:,| and)? ?)+)"
    r"|\b([A-Z][A-Z0-9]*_[A-Z0-9_]+)(?:=[^=]| is set)"
)

FROM_SOURCE = {"flash-attn"}
"""Packages that no extra holds: it builds for half an hour."""

MISSING = {
    "flashdreams/attention/flash_attention_3.py": ["fa3-fwd"],
    "flashdreams/parallel/xfuser.py": ["xfuser", "yunchang"],
    "flashdreams/serve.py": ["fastapi", "uvicorn", "websockets", "pydantic", "av"],
    "flashdreams/serving/client.py": ["websockets", "av"],
    "flashdreams/serving/web/rtc.py": ["aiortc"],
    "launch/ray_serve.py": ["ray", "fastapi", "httpx"],
}
"""What is missing where a file tells to install extras of this package."""

READ_BY_OTHERS = {
    "HF_HUB_OFFLINE", "HF_HOME", "TORCH_HOME", "PYTHONPATH", "OMP_NUM_THREADS", "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA", "CUDA_VISIBLE_DEVICES",
    "MPLCONFIGDIR",
}  # fmt: skip
"""Variables that libraries read."""


@dataclass
class Remedies:
    """What texts tell a reader to type, beside options."""

    extras: set[str]
    packages: set[str]
    commands: set[str]
    variables: set[str]


def remedies_in(texts: Iterable[str]) -> Remedies:
    found = Remedies(set(), set(), set(), set())
    for text in texts:
        for words in INSTALL.findall(text):
            for word in shlex.split(words):
                if own := re.fullmatch(r"(?:flashdreams|\.)\[([\w,]+)\]", word):
                    found.extras |= set(own[1].split(","))
                elif not word.startswith("-") and word != ".":
                    found.packages.add(word)
        found.commands |= {name for name in COMMAND.findall(text) if name != text}
        for names in SETTING.findall(text):
            found.variables |= set(re.findall(r"[A-Z][A-Z0-9_]{2,}", " ".join(names)))
    return found


@cache
def sources() -> dict[str, list[str]]:
    """Texts by file: of sources and pages."""
    names = ("flashdreams", "kernels", "benchmarks", "launch", "docs/source")
    files = [*ROOT.glob("*.md"), *(f for name in names for f in (ROOT / name).rglob("*"))]
    found = {}
    for file in files:
        name, kind = file.relative_to(ROOT).as_posix(), file.suffix
        if kind == ".py":
            found[name] = list(texts_of(file.read_text("utf-8")))
        elif kind == ".md":
            found[name] = [file.read_text("utf-8")]
    return found


def requirements_of_extras() -> dict[str, list[Requirement]]:
    """What each extra brings; what every install brings under the empty name."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    extras = text[text.index("[project.optional-") : text.index("[project.scripts]")]
    base = text[text.index("\ndependencies = ") : text.index("[project.optional-")]
    lists = re.findall(r"(?ms)^(\w+) = \[(.*?)\]$(?=\n\w|\n*\Z)", extras)
    return {
        name: [Requirement(line) for line in re.findall(r'"((?:[^"])+)"', body)]
        for name, body in [("", base), *lists]
    }


def why_wrong(remedies: Remedies) -> list[str]:
    """What of it cannot be typed."""
    extras = requirements_of_extras()
    scripts = re.findall(r"(?m)^(flashdreams-\w+) = ", (ROOT / "pyproject.toml").read_text("utf-8"))
    offered = {(r.name, str(r.specifier)) for several in extras.values() for r in several}
    names = {name for name, _ in offered} | FROM_SOURCE
    wrong = [f"extra {name}" for name in remedies.extras if name not in extras]
    for text in remedies.packages:
        package = Requirement(text)
        pair = (package.name, str(package.specifier))
        if package.name not in names or (package.specifier and pair not in offered):
            wrong.append(f"package {text}")
    wrong += [f"command {name}" for name in remedies.commands if name not in scripts]
    code = [*python_files(*PACKAGES), ROOT / "tests/conftest.py"]
    scripts_text = "".join(file.read_text("utf-8") for file in (ROOT / "benchmarks").glob("*.sh"))
    tests = "".join(file.read_text("utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    ours = {
        *re.findall(r'"([A-Z][A-Z0-9_]{2,})"', "".join(file.read_text("utf-8") for file in code)),
        *re.findall(r"\$\{([A-Z_]+)", scripts_text),
        *re.findall(r'environ\.get\("([A-Z_]+)"', tests),
    }
    return wrong + [f"variable {n}" for n in remedies.variables - ours - READ_BY_OTHERS]


def test_what_to_install_type_and_set_exists() -> None:
    found = remedies_in(text for texts in sources().values() for text in texts)
    assert {"gpu", "serve", "webrtc"} <= found.extras and "triton>=3.6" in found.packages
    assert "flashdreams-run" in found.commands and "HF_HUB_OFFLINE" in found.variables
    assert not why_wrong(found)
    others = {script.name for script in entry_points(group="console_scripts")}
    assert {"hf", "torchrun"} <= others, "hf download, torchrun --nproc-per-node"


def test_remedies_that_do_not_exist_are_noticed() -> None:
    """Negative control."""
    found = remedies_in([
        "no x; pip install 'flashdreams[gpus]' or", "pip install -e '.[serve,rya]'",
        "pip install trition",
        "type flashdreams-walk SLUG", "Set FLASHDREAMS_SPEED=1, or unset RANKS and WORLD_SIZE.",
        "pip install 'triton>=9'",
    ])  # fmt: skip
    assert sorted(why_wrong(found)) == [
        "command flashdreams-walk", "extra gpus", "extra rya", "package trition",
        "package triton>=9", "variable FLASHDREAMS_SPEED", "variable RANKS",
    ]  # fmt: skip


def test_an_extra_brings_what_its_message_misses() -> None:
    extras = requirements_of_extras()
    named = {}
    for name, texts in sources().items():
        if name.endswith(".py") and (found := remedies_in(texts).extras):
            named[name] = {r.name for extra in ("", *found) for r in extras[extra]}
    assert sorted(named) == sorted(MISSING)
    for name, packages in MISSING.items():
        assert set(packages) <= named[name], name
    assert "aiortc" not in {r.name for r in extras["serve"]}, "negative control"


def test_libraries_read_the_variables_that_messages_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "t"))
    assert torch.hub.get_dir() == str(tmp_path / "t" / "hub")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "h"))
    spec = importlib.util.find_spec("huggingface_hub.constants")
    assert spec is not None and spec.loader is not None
    for offline in (True, False):
        monkeypatch.setenv("HF_HUB_OFFLINE", str(int(offline)))
        constants = importlib.util.module_from_spec(spec)  # read once, at the import
        spec.loader.exec_module(constants)
        assert str(tmp_path / "h" / "hub") == constants.HF_HUB_CACHE
        assert constants.HF_HUB_OFFLINE is offline
