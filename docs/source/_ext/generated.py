"""Parts of the site that are made from the code at build time.

A line ``<!-- generated: NAME ARGUMENT -->`` in a page is replaced by what the function of that name
in ``PARTS`` returns for the argument.
"""

import ast
import contextlib
import importlib
import importlib.util
import io
import os
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import table as figures
import torch

import flashdreams
from flashdreams import run
from flashdreams.attention.backends import BACKENDS
from flashdreams.infra.weights import named_checkpoints
from flashdreams.parallel.mesh import ParallelConfig, resolve_degrees
from flashdreams.registry import GROUP, discover

MARK = re.compile(r"^<!-- generated: (\S+) ?(.*?) -->$", re.MULTILINE)
PACKAGE = Path(flashdreams.__file__).parent
RANKS = (1, 2, 4, 8)
HELP_COLUMNS = "96"
SHORT_COMMIT = 7


def shipped(family: str = "") -> dict[str, Any]:
    """Runner configs that this package itself registers, by slug; only those of one family."""
    registry = discover()
    found = {}
    for slug, config in registry.items():
        source = registry.origin(slug)
        module = source.reference.partition(":")[0]
        if module.startswith(f"flashdreams.integrations.{family}"):
            found[slug] = config
    if not found:
        raise ValueError(f"No slug of the group {GROUP} comes from the integration {family!r}.")
    return found


def family_lines(_: str) -> str:
    """One row per family of published models: its files with their lines, docstrings included."""
    lines = ["| family | files and their lines | in all |", "|---|---|--:|"]
    for folder in sorted((PACKAGE / "integrations").iterdir()):
        found = sorted(folder.glob("[!_]*.py"))
        if not found or folder.name == "toy_world":  # a world of its own, with its pictures
            continue
        counts = {path.stem: len(path.read_text("utf-8").splitlines()) for path in found}
        listed = ", ".join(f"`{name}` {count}" for name, count in counts.items())
        lines.append(f"| [{folder.name}]({folder.name}.md) | {listed} | {sum(counts.values())} |")
    return "\n".join(lines)


def family_of(slug: str) -> str:
    """Page of the family that a slug belongs to."""
    return discover().origin(slug).reference.split(".")[2]


def gallery(_: str) -> str:
    """One row per shipped slug: packaged weights first, then trained ones, then random ones."""
    lines = ["| slug | what it does | frames | needs |", "|---|---|---|---|"]
    for slug, config in sorted(shipped().items(), key=_rank_in_gallery):
        page = f"../models/{family_of(slug)}.md"
        cells = (config.description, frame_size(config), needs(config))
        lines.append(f"| [`{slug}`]({page}) | {' | '.join(cells)} |")
    return ":::{container} gallery\n" + "\n".join(lines) + "\n:::"


def _rank_in_gallery(item: tuple[str, Any]) -> int:
    slug, config = item
    return 2 if "random" in slug else int(bool(to_fetch(config)))


def frame_size(config: Any) -> str:
    """Frames of an AR step and their size in pixels, from a small latent on the meta device."""
    t = config.pipeline.diffusion_model.transformer
    with torch.device("meta"):
        decoder = config.pipeline.decoder.setup()
        latent = torch.zeros(1, t.in_channels, 1, 8, 8, dtype=decoder.dtype)
        scale = decoder(latent, 0, decoder.initialize_cache()).shape[-1] // 8
    first = decoder.frame_count(t.len_t)
    later = decoder.frame_count(2 * t.len_t) - first
    once = first == later or not t.streaming
    frames = first if once else f"{first}, then {later}"
    return f"{frames} per step, {scale * t.latent_height}x{scale * t.latent_width}"


def needs(config: Any) -> str:
    """What has to be downloaded before a slug runs."""
    if not _distinct_checkpoints(config):
        return "nothing: random weights"
    if not to_fetch(config):
        return "nothing: weights in the package"
    return f"{sum(c.size_bytes or 0 for c in to_fetch(config)) / 1e9:.1f} GB of weights"


def to_fetch(config: Any) -> list[Any]:
    """The checkpoint files that are not part of the package."""
    return [c for c in _distinct_checkpoints(config) if not c.source.startswith("package:")]


def _distinct_checkpoints(config: Any) -> list[Any]:
    found = {(c.source, c.file): c for _, c in named_checkpoints(config.pipeline)}
    return list(found.values())


def slugs(family: str) -> str:
    """Table of a family's slugs and their main sizes."""
    lines = [
        "| slug | latent frames per step | window + sink | denoising | guidance "
        "| AR steps by default |",
        "|---|--:|--:|---|--:|--:|",
    ]
    for slug, config in shipped(family).items():
        model = config.pipeline.diffusion_model
        t = model.transformer
        window = f"{t.window_size_t} + {t.sink_size_t}" if t.streaming else "whole clip"
        scale = "off" if model.guidance_scale is None else f"{model.guidance_scale:g}"
        lines.append(
            f"| `{slug}` | {t.len_t} | {window} | {_denoising(model)} | {scale} | "
            f"{config.total_blocks} |"
        )
    return "\n".join(lines)


def _denoising(model: Any) -> str:
    scheduler = model.scheduler
    kind = type(scheduler).__name__.removesuffix("SchedulerConfig")
    count = _steps(scheduler)
    text = f"{count} step{'s' * (count > 1)}, {kind}, shift {scheduler.shift:g}"
    if model.first_chunk_scheduler is None:
        return text
    return f"{text}; {_steps(model.first_chunk_scheduler)} for the first chunk"


def _steps(scheduler: Any) -> int:
    steps = getattr(scheduler, "denoising_timesteps", None)
    return len(steps) if steps is not None else scheduler.num_inference_steps


def checkpoints(family: str) -> str:
    """Table of every weight file that a family's slugs name."""
    users: dict[tuple[str, str | None], list[str]] = {}
    known: dict[tuple[str, str | None], Any] = {}
    for slug, config in shipped(family).items():
        for c in _distinct_checkpoints(config):
            known[c.source, c.file] = c
            users.setdefault((c.source, c.file), []).append(slug)
    trained = [slug for slug in shipped(family) if "random" not in slug]
    words = {tuple(trained): "all slugs with trained weights", tuple(shipped(family)): "all slugs"}
    lines = ["| file | on disk | licence | used by |", "|---|--:|---|---|"]
    for key, c in known.items():
        packaged = c.source.startswith("package:")
        absent = "in the package" if packaged else "not stated"
        size = f"{c.size_bytes / 1e9:.2f} GB" if c.size_bytes else absent
        owner = "Apache-2.0" if packaged else c.license or "not stated"
        by = words.get(tuple(users[key])) or ", ".join(f"`{slug}`" for slug in users[key])
        lines.append(f"| {_file(c)} | {size} | {owner} | {by} |")
    return "\n".join(lines)


def _file(checkpoint: Any) -> str:
    """Where a checkpoint file comes from, in short form."""
    source, name = checkpoint.source, checkpoint.file
    if source.startswith("package:"):
        return f"`{source.partition('/')[2]}`"
    if checkpoint.is_address:
        return f"[`{source.rpartition('/')[2]}`]({source})"
    whole = f"`{source}`" + (f" `{name}`" if name else "")
    return f"{whole} at `{(checkpoint.revision or 'main')[:SHORT_COMMIT]}`"


def memory(family: str) -> str:
    """Table of weights and KV cache per rank, on several numbers of ranks, from shapes."""
    ranks = ", ".join(map(str, RANKS[:-1])) + f" and {RANKS[-1]}"
    lines = [
        f"| slug | transformer | other networks, at most | KV cache per rank, {ranks} ranks |",
        "|---|--:|--:|--:|",
    ]
    for slug, config in shipped(family).items():
        cache = _sizes(list(_cache_per_rank(config)))
        transformer, others = _weights(config)
        lines.append(f"| `{slug}` | {_size(transformer)} | {_size(others)} | {cache} |")
    note = "Computed from shapes, in the config's dtype, for one rollout, without activations."
    return "\n".join([*lines, "", note])


def _weights(config: Any) -> tuple[int, int]:
    """Bytes of the transformer's parameters, and of all other files of weights."""
    files = {
        (c.source, c.file): c.size_bytes or 0
        for path, c in named_checkpoints(config.pipeline)
        if not path.startswith("diffusion_model.")
    }
    return transformer_nbytes(config)[0], sum(files.values())


_TRANSFORMERS: dict[str, tuple[int, int]] = {}


def transformer_nbytes(config: Any) -> tuple[int, int]:
    """Bytes of a transformer's parameters and of one rollout's cache, from the meta device."""
    transformer = config.pipeline.diffusion_model.transformer
    key = repr(transformer)
    if key not in _TRANSFORMERS:
        with torch.device("meta"):
            built = transformer.setup()
        parameters = sum(p.numel() for p in built.parameters()) * built.dtype.itemsize
        _TRANSFORMERS[key] = parameters, built.cache_nbytes(1)
    return _TRANSFORMERS[key]


def _cache_per_rank(config: Any) -> Iterator[int]:
    """Bytes of one rollout's KV cache on one of 1, 2, 4, ... ranks under the automatic mesh."""
    model = config.pipeline.diffusion_model
    guided = model.guidance_scale is not None
    _, whole = transformer_nbytes(config)
    for ranks in RANKS:
        degrees = resolve_degrees(ParallelConfig(), ranks, model.transformer.num_heads, guided)
        branches = 2 if guided and degrees.cfg == 1 else 1
        yield whole * branches // (degrees.ulysses * degrees.tp)


def _sizes(counts: list[int]) -> str:
    """Several sizes, with their common unit written once."""
    if not any(counts):
        return "none"
    texts = [_size(count) for count in counts]
    units = {text.partition(" ")[2] for text in texts}
    if len(units) == 1:
        return ", ".join(text.partition(" ")[0] for text in texts) + f" {units.pop()}".rstrip()
    return ", ".join(texts)


def _size(count: int) -> str:
    if count >= 1e8:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.2f} MB" if count else "none"


def measured(family: str) -> str:
    """Table of the speed of a family's slugs, from the committed reports of the benchmarks."""
    trained = {s: c.description for s, c in shipped(family).items() if "random" not in s}
    return figures.speeds(figures.read_reports(), trained)


def mesh(family: str) -> str:
    """Table of the meshes that the automatic degrees give, by number of heads and guidance."""
    lines = ["| slug | " + " | ".join(f"{n} ranks" for n in RANKS[1:]) + " |", "|---|---|---|---|"]
    for slug, config in shipped(family).items():
        model = config.pipeline.diffusion_model
        guided = model.guidance_scale is not None
        cells = []
        for ranks in RANKS[1:]:
            d = resolve_degrees(ParallelConfig(), ranks, model.transformer.num_heads, guided)
            parts = {"cfg": d.cfg, "ring": d.ring, "ulysses": d.ulysses, "tp": d.tp}
            cells.append(" x ".join(f"{k} {v}" for k, v in parts.items() if v > 1))
        lines.append(f"| `{slug}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def listing(_: str) -> str:
    """What ``flashdreams-run --help`` prints."""
    return _text(_help([]))


def flags(_: str) -> str:
    """What ``flashdreams-run SLUG --help`` prints, once for all slugs of the same fields.

    Slugs with random weights are omitted.
    """
    helps: dict[frozenset[str], str] = {}
    users: dict[frozenset[str], list[str]] = {}
    for slug in shipped():
        if "random" in slug:
            continue
        text = _help([slug])
        fields = frozenset(re.findall(r"^\W*(--[\w.-]+)", text, re.MULTILINE))
        helps.setdefault(fields, text)
        users.setdefault(fields, []).append(slug)
    parts = []
    for fields, (first, *others) in users.items():
        also = ", ".join(f"`{slug}`" for slug in others)
        parts.append(f"### {first}\n")
        parts.append(f"With other defaults also for {also}.\n" if others else "")
        parts.append(f"<details><summary>{len(fields)} fields</summary>\n")
        parts.append(f"{_text(helps[fields])}\n\n</details>\n")
    return "\n".join(parts)


def _help(words: list[str]) -> str:
    """The help of the command line, laid out for one width."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = HELP_COLUMNS
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            code = run.main([*words, "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    if code:
        raise ValueError(f"flashdreams-run {' '.join(words)} --help ended with code {code}.")
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).rstrip()


def _text(content: str) -> str:
    return f"```text\n{content}\n```"


def backends(_: str) -> str:
    """Table of the attention backends by name."""
    lines = ["| name | what it calls |", "|---|---|"]
    for name, backend in BACKENDS.items():
        summary = (backend.__doc__ or "").strip().splitlines()[0]
        lines.append(f"| `{name}` | {summary.replace('``', '`')} |")
    return "\n".join(lines)


def toy_quality(_: str) -> str:
    """The table of figures in the README of the toy world."""
    text = (PACKAGE / "integrations/toy_world/README.md").read_text(encoding="utf-8")
    tables = []
    for title in ("## How good it is", "## The courtyard"):
        section = text.partition(title)[2].partition("\n## ")[0]
        tables.append("\n".join(line for line in section.splitlines() if line.startswith("|")))
    return "\n\n".join(tables).replace("| |", "| toy-world |", 1)


def modules(package: str) -> str:
    """A list of a package's public modules, and each documented from its docstrings."""
    names = list(walk(package))
    lines = ["| module | what it is |", "|---|---|"] if len(names) > 1 else []
    parts = []
    for name in names:
        short = name.removeprefix(f"{package}.")
        summary = (_docstring(name) or name).splitlines()[0]
        if len(names) > 1:
            lines.append(f"| {{py:mod}}`{short} <{name}>` | {summary.replace('``', '`')} |")
        parts.append(f"## {short}\n\n`{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n")
    return "\n".join([*lines, "", *parts])


def _docstring(module: str) -> str | None:
    """Of a module that may import what is not installed, and so is not imported itself."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))


def walk(package: str) -> Iterator[str]:
    """Names of a package's public modules that hold anything, in alphabetical order."""
    root = importlib.import_module(package)
    if not hasattr(root, "__path__"):
        yield package
        return
    for found in sorted(pkgutil.iter_modules(root.__path__), key=lambda module: module.name):
        name = f"{package}.{found.name}"
        if found.ispkg:
            yield from walk(name)
        elif not found.name.startswith("_"):
            yield name


PARTS: dict[str, Callable[[str], str]] = {
    part.__name__: part
    for part in (
        gallery,
        family_lines,
        slugs,
        checkpoints,
        memory,
        measured,
        mesh,
        listing,
        flags,
        backends,
        toy_quality,
        modules,
    )
}
PARTS |= {
    name: lambda _, make=make: make(figures.read_reports())
    for name, make in (
        ("precision", figures.precisions),
        ("steady_steps", figures.steady_steps),
        ("attention_rates", figures.attention_rates),
        ("ratios", figures.ratios),
    )
}


def replace_marks(text: str) -> str:
    """A page's source with every mark replaced.

    Raises:
        ValueError: a mark that names no part.
    """

    def part(match: re.Match[str]) -> str:
        name, argument = match.groups()
        if name not in PARTS:
            raise ValueError(f"Unknown generated part {name!r}. Allowed: {', '.join(PARTS)}.")
        return PARTS[name](argument)

    return MARK.sub(part, text)


def _on_source_read(app: Any, page: str, source: list[str]) -> None:
    source[0] = replace_marks(source[0])


def _on_docstring(
    app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Keep napoleon from taking what is before a colon for the type of a field.

    It reads the first line that is not empty: an empty comment, which shows nothing.
    """
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("autodoc-process-docstring", _on_docstring, priority=400)
    app.connect("source-read", _on_source_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
