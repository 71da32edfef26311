"""Public text uses the words of the field, so that a search for them finds the right page."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.sources import PACKAGES, python_files
from tests.architecture.texts import texts_of
from tests.docs.snippets import REPOSITORY, SITE, markdown_files, pages

BETTER = {
    r"eight[- ]bits?": "8-bit, FP8, INT8",
    r"(the|same|its) past(?! (chunks|frames|latents|steps))": "KV cache, past chunks",
    r"travel(s|led|ling)?": "is communicated, is sent, all-gather",
    r"exchange(s|d)?|exchanging": "collective, all-to-all, communication, swap",
    r"matrix products?": "matmul, GEMM",
    r"(un)?conditional half": "conditional branch, unconditional branch",
    r"under way": "current",
    r"for a while": "temporarily",
    r"by then": "later, before that",
    r"anew": "again, re-",
    r"goes on(?! the)|(go|going|went) on (with|from)": "continues",
    r"wish(es|ed)?": "request, option",
    r"settle[sd]?": "select, resolve",
    r"impatient": "say what happens",
    r"stands? (above|beside|behind|on torch|still while)": "is",
    r"(lie|lies|lying) (in|on|beside|within|between)": "is in",
    r"leave [\w ]{1,20} away|leave away": "omit",
    r"at hand": "available",
    r"but for": "except for",
    r"of itself": "name the thing",
    r"twins?": "variant",
    r"let go": "dropped, released",
    r"ranks' meeting": "rendezvous",
    r"rounds? to (e4m3|8 bits|INT8|FP8)": "quantize",
}
"""Regular expression of what reads as translated -> what to write."""

NAMED = {
    "quantization": "low_precision", "INT8": "low_precision", "throughput": "benchmarking",
    "latency": "benchmarking", "tensor parallelism": "parallelism", "ring attention": "parallelism",
    "Ulysses": "parallelism", "KV cache": "kv_cache", "memory": "planning",
    "CUDA graph": "kernels_and_cuda_graphs",
}  # fmt: skip
"""Search term -> its guide, which has it in the first lines and, by test_site, in the index."""


def public_text() -> Iterator[tuple[str, str]]:
    """Place and text of pages, pictures, docstrings and messages; releases keep their words."""
    hidden = {REPOSITORY / "CHANGELOG.md"}
    measured = REPOSITORY / "benchmarks/results"
    files = [f for f in (*pages(), *markdown_files()) if not f.is_relative_to(measured)]
    files += (SITE / "_static").glob("*.svg")
    for file in [f for f in files if f not in hidden]:
        yield str(file.relative_to(REPOSITORY)), file.read_text("utf-8")
    for file in python_files(*PACKAGES):
        for text in texts_of(file.read_text("utf-8")):
            yield str(file.relative_to(REPOSITORY)), text


def translated(text: str) -> Iterator[str]:
    text = " ".join(text.split())
    for pattern, better in BETTER.items():
        for found in re.finditer(rf"(?<![\w-])(?:{pattern})(?![\w-])", text, re.IGNORECASE):
            around = text[max(0, found.start() - 40) : found.end() + 40]
            yield f"{found[0]!r} (write: {better}) in: {around}"


def test_text_uses_the_words_of_the_field() -> None:
    assert not [f"{place}: {line}" for place, text in public_text() for line in translated(text)]


def test_words_that_read_as_translated_are_noticed() -> None:
    """Negative control."""
    assert (
        len(list(translated("Eight bits travel; leave it away. It goes\non with the past."))) == 5
    )
    assert not list(translated("See `exchange_edges`: past chunks, the value goes on the track."))


@pytest.mark.parametrize(("term", "guide"), NAMED.items())
def test_a_search_for_a_term_finds_its_guide(term: str, guide: str) -> None:
    text = Path(SITE, f"developer_guides/{guide}.md").read_text("utf-8")
    opening = " ".join(text.split("\n\n![")[0].split())
    assert term.lower() in opening.lower()
