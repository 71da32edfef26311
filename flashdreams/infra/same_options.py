"""Whether all ranks were started with the same options, and read the same weights."""

import enum
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from flashdreams.infra.config import config_fields, walk
from flashdreams.infra.identity import hash_weights
from flashdreams.parallel.environment import from_rank_zero, gather_to_rank_zero, together
from flashdreams.runtime.checkpoint import CheckpointConfig

OF_A_NODE = frozenset({"description", "device", "download", "log_json", "threads"})
"""Fields that may differ; paths may too, since each node has its own files, if of one content."""

OF_RANK_ZERO = frozenset({"output_dir", "trace", "numerics_from"})
"""Paths that rank zero alone reads or writes."""

MAX_NAMED = 3
PLAIN = (bool, int, float, str, enum.Enum)


def refuse_other_options(config: Any) -> None:
    """Refuse ranks of other options than rank zero, before they compute; a collective call.

    Noise, text and control inputs are computed by every rank. With another seed on one of them the
    frames would be wrong without an error; with other components it would wait in a collective.

    Args:
        config: of the runner of this rank.

    Raises:
        ValueError: on rank zero, names options and ranks.
        RankZeroError: the same on the other ranks.
    """
    found = gather_to_rank_zero(dict(_options(config)))
    wrong = "The ranks were started with different options: {}. Type the same command on all nodes."
    from_rank_zero(lambda: _compare(found, wrong))


def refuse_other_weights(pipeline: Any) -> None:
    """Refuse ranks whose files of weights differ from those of rank zero; a collective call.

    Args:
        pipeline: config whose files are on this machine, compared by size and samples as in
            `hash_weights`; those of the text encoder, which rank zero alone reads, do not count.

    Raises:
        ValueError: on rank zero, names fields and ranks.
        RankZeroError: the same on the other ranks.
        OSError: a file of this rank cannot be read.
        OtherRankError: one of another rank cannot.
    """
    hashes = together(lambda: hash_weights(pipeline), "could not read its weights")
    found = gather_to_rank_zero({f"pipeline.{n}": f"of SHA-256 {x}" for n, x in hashes.items()})
    wrong = "The ranks have different weights: {}. Use the same files on all nodes."
    from_rank_zero(lambda: _compare(found, wrong))


def _compare(found: Sequence[dict[str, str]], wrong: str) -> None:
    ours = found[0]
    for rank, theirs in enumerate(found):
        names = [n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)]
        if names:
            listed = "; ".join(
                f"--{name.replace('_', '-')} is {theirs.get(name, 'absent')[:200]} on rank {rank}, "
                f"{ours.get(name, 'absent')[:200]} on rank 0"
                for name in names[:MAX_NAMED]
            )
            more = f"; and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            raise ValueError(wrong.format(f"{listed}{more}"))


def _options(config: Any) -> Iterator[tuple[str, str]]:
    """Dotted names and values of what has the same form in every process."""
    for path, owner, value in walk(config):
        name = path.rpartition(".")[2]
        differs = name in OF_A_NODE or isinstance(owner, CheckpointConfig)
        computed = config_fields(owner)[name].default_factory is not MISSING
        if isinstance(value, Path) and not differs:
            yield path, "a path" if name in OF_RANK_ZERO else _content(value)
        elif not (differs or computed) and _is_plain(value):
            yield path, repr(value)


def _content(path: Path) -> str:
    with suppress(OSError):  # what reads it names the error
        if path.is_file():
            return f"a file of SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    return "a path"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, PLAIN)
