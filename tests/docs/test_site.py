"""The site: it builds without a warning, forgets no family, and its links lead somewhere."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashdreams.registry import discover
from tests.docs.snippets import REPOSITORY, SITE, markdown_files, pages
from tests.docs.test_words import NAMED

LINK = re.compile(r"(?:\]\(|\bsrc=\")([^)\"\s#]+)")


@pytest.mark.slow
def test_site_builds_with_warnings_as_errors(tmp_path: Path) -> None:
    for package in ("sphinx", "furo", "myst_parser"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"building the site needs {package}: pip install -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(SITE), str(tmp_path)],
        capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "api").glob("*.html"):
        assert ">Type<" not in page.read_text(encoding="utf-8"), (
            f"{page.name}: a field lost its text"
        )
    gallery = (tmp_path / "models/index.html").read_text(encoding="utf-8")
    for slug in discover():
        if discover().origin(slug).reference.startswith("flashdreams."):
            assert slug in gallery, f"{slug} is missing from the gallery"
    index = (tmp_path / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(index.removeprefix("Search.setIndex(").removesuffix(")"))
    for term, guide in NAMED.items():
        first = first_results(index, term)
        assert f"developer_guides/{guide}" in first and len(first) <= 2, f"{term}: {first}"
    assert first_results(index, "NVFP4") == set(), "negative control: named in text alone"


def first_results(index: dict[str, Any], query: str) -> set[str]:
    """Pages that Sphinx's search lists first: a heading or a main index entry is the query."""
    titles = [t for t in index["alltitles"] if t.lower() == query.lower()]
    pages = [page for title in titles for page, _ in index["alltitles"][title]]
    pages += [page for page, _, main in index["indexentries"].get(query.lower(), []) if main]
    return {index["docnames"][page] for page in pages}


@pytest.mark.parametrize("what", ["attribute", "data", "property"])
def test_a_colon_in_the_text_of_a_field_does_not_cost_what_is_before_it(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    napoleon = pytest.importorskip("sphinx.ext.napoleon.docstring", reason="comes with extra docs")
    for folder in ("docs/source/_ext", "benchmarks"):
        monkeypatch.syspath_prepend(REPOSITORY / folder)
    generated = importlib.import_module("generated")
    text = "Frames in the cache: sink and window."

    def shown(lines: list[str]) -> str:
        return str(napoleon.GoogleDocstring(lines, what=what, name="x"))

    lines = [text]
    generated._on_docstring(None, what, "x", None, None, lines)
    assert text in shown(lines) and ":type:" not in shown(lines)
    assert ":type: Frames" in shown([text]), "which napoleon does without it"


def test_every_shipped_family_has_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = discover()
    references = {registry.origin(slug).reference for slug in registry}
    own = {reference.split(".")[2] for reference in references if "integrations." in reference}
    for folder in ("docs/source/_ext", "benchmarks"):
        monkeypatch.syspath_prepend(REPOSITORY / folder)
    sizes = importlib.import_module("generated").family_lines("")
    assert own - {"toy_world"} == set(re.findall(r"\]\((\w+)\.md\)", sizes))
    template = [
        "What it is", "Slugs", "Checkpoint", "Weights and KV cache", "Commands", "Measured",
        "Licence of the weights",
    ]  # fmt: skip
    for family in own:
        page = SITE / f"models/{family}.md"
        assert page.is_file(), f"the family {family} has no page docs/source/models/{family}.md"
        headings = re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert headings == template, f"{page.name} does not follow the template"


@pytest.mark.parametrize("file", markdown_files(), ids=lambda f: str(f.relative_to(REPOSITORY)))
def test_links_between_files_lead_somewhere(file: Path) -> None:
    """Links of pages of the site are checked by its build."""
    for target in LINK.findall(file.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (file.parent / target).exists(), f"{file.name} links to {target}"


def test_figures_are_drawn_and_used() -> None:
    used = " ".join(page.read_text(encoding="utf-8") for page in SITE.rglob("*.md"))
    for figure in (SITE / "_static").glob("*.svg"):
        assert figure.name in used, f"{figure.name} is on no page"
        assert "<title>" in figure.read_text(encoding="utf-8")


def test_every_guide_has_its_drawing_and_every_picture_says_what_it_shows() -> None:
    for guide in (SITE / "developer_guides").glob("*.md"):
        assert re.search(r"\]\(\.\./_static/[\w-]+\.svg\)", guide.read_text("utf-8")), guide.name
    for page in pages():
        text = page.read_text(encoding="utf-8")
        assert "![](" not in text, f"{page.name} has a picture without a description"
        for tag in re.findall(r"<img[^>]*>", text):
            assert re.search(r'alt="[^"]{10,}"', tag), f"{page.name}: {tag}"
