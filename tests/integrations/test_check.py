"""A method of every family and both examples pass ``flashdreams-check``.

The command without a slug checks all; at its toy size a family's other slugs run the same code.
Two ranks are checked of a method of each kind; ``tests/parallel`` has the others on 2 to 4.
"""

import re
import sys

import pytest

from flashdreams import check
from flashdreams.checking.checks import NAMES, check_method
from flashdreams.registry import VARIABLE, discover
from tests.architecture.sources import EXAMPLES

METHODS = {
    "customized-method": "customized_method",
    "streaming-method": "streaming_method",
}
RANKS_ELSEWHERE = {
    "causal-forcing-tiny-random", "lingbot-world-tiny-random", "longlive-tiny-random", "toy-world",
    "wan22-ti2v-tiny-random",
}  # fmt: skip
"""Methods whose network and splits another one here has, too."""
SHIPPED = sorted(slug for slug in discover() if slug.endswith(("-tiny-random", "toy-world")))


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    references = []
    for slug, package in METHODS.items():
        folder = str(EXAMPLES / package)
        if folder not in sys.path:
            monkeypatch.syspath_prepend(folder)
        references.append(f"{slug}={package}.config:RUNNER_CONFIGS")
    monkeypatch.setenv(VARIABLE, ",".join(references))


@pytest.mark.slow
@pytest.mark.parametrize("slug", [*METHODS, *SHIPPED])
def test_a_method_passes(slug):
    names = [name for name in NAMES if name != "two ranks" or slug not in RANKS_ELSEWHERE]
    report = check_method(discover().resolve(slug), tuple(names))
    assert report.passed and len(report.results) == len(names), str(report)


def test_the_guide_names_every_check():
    guide = (EXAMPLES.parent / "developer_guides/checking.md").read_text("utf-8")
    rows = re.findall(r"^\| ([a-z0-9 ]+) \|", guide, re.MULTILINE)
    assert [row for row in rows if row != "check"] == list(NAMES)
    drawn = (EXAMPLES.parent / "_static/check-flow.svg").read_text("utf-8")
    assert f">{len(NAMES)} lines<" in drawn


def test_the_command_prints_a_report(capsys):
    assert check.main(["customized-method", "--only", "determinism", "state styles"]) == 0
    printed = capsys.readouterr().out
    assert "customized-method: as registered, in float32 on the CPU" in printed
    assert "pass  determinism" in printed and "note  state styles" in printed


def test_the_command_refuses_an_unknown_slug(capsys):
    assert check.main(["toy-wrld"]) == 2
    assert "Did you mean 'toy-world'" in capsys.readouterr().err
