"""Several prompts for one video: the chunks at which they begin."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashdreams.infra.prompt import MAX_PROMPT_CHARACTERS
from flashdreams.runtime.text import read_text, unreadable

MAX_SHOTS = 4096
"""Most prompts of one video."""

_COUNTED = re.compile(r"(\d{1,9})\s*:\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Shot:
    """A prompt and the AR step at which it begins."""

    first_block: int
    """AR step of its first chunk."""
    text: str
    """The prompt."""


def read_shot_file(path: Path) -> list[str]:
    """The shots of a text file, one per line; empty lines and lines that begin with # are skipped.

    Raises:
        ValueError: the file cannot be read, or has no shot.
    """
    with unreadable(f"--shot-path {path}", "Name a text file with one prompt a line."):
        text = read_text(path, 4 * MAX_PROMPT_CHARACTERS * 16, "utf-8-sig")
    lines = [line.strip() for line in text.splitlines()]
    shots = [line for line in lines if line and not line.startswith("#")]
    if not shots:
        raise ValueError(f"--shot-path {path} contains no prompt; write one per line.")
    return shots


def plan_shots(texts: Sequence[str], total_blocks: int) -> list[Shot]:
    """The AR step at which each shot begins.

    Args:
        texts: prompts, each ``TEXT`` or ``CHUNKS:TEXT``. Without numbers the chunks are spread
            evenly, the first shots taking the rest; with numbers the last shot continues to the
            end.
        total_blocks: AR steps of the video.

    Raises:
        ValueError: an empty prompt, some numbers but not all, or shots longer than the video.
    """
    if not texts:
        return []
    if len(texts) > MAX_SHOTS:
        raise ValueError(f"{len(texts)} shots; at most {MAX_SHOTS} are allowed.")
    matches = [_COUNTED.fullmatch(text.strip()) for text in texts]
    counted = [match for match in matches if match is not None]
    if counted and len(counted) != len(texts):
        raise ValueError(
            f"{len(counted)} of {len(texts)} shots have a number of chunks: give CHUNKS:TEXT "
            "for all of them, or only TEXT."
        )
    prompts = [match[2].strip() for match in counted] or [text.strip() for text in texts]
    for number, prompt in enumerate(prompts, start=1):
        if not 0 < len(prompt) <= MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"shot {number} has {len(prompt)} characters; 1 to {MAX_PROMPT_CHARACTERS} are "
                "taken."
            )
    counts = [int(match[1]) for match in counted] or _spread(total_blocks, len(texts))
    if 0 in counts or sum(counts) > total_blocks:
        raise ValueError(
            f"{len(texts)} shots of {sum(counts) if counted else len(texts)} chunks do not fit "
            f"--total-blocks {total_blocks}: each has at least one chunk. Use more blocks or fewer "
            "shots."
        )
    return [Shot(sum(counts[:number]), prompt) for number, prompt in enumerate(prompts)]


def cut_once(shots: Sequence[Shot], total_blocks: int, prefix: str | None) -> list[Shot]:
    """Shots of which only the first chunk has the prefix of a scene cut in its prompt.

    Args:
        shots: as from ``plan_shots``.
        total_blocks: AR steps of the video.
        prefix: of prompts that cut to another scene; None for models without shots.

    Returns:
        The shots; after one with the prefix, another without, from its second chunk on.

    Source: NVlabs/LongLive, utils/dataset.py, MultiTextConcatDataset.
    """
    found = []
    ends = [*(shot.first_block for shot in shots[1:]), total_blocks]
    for shot, end in zip(shots, ends, strict=False):  # without shots there still is an end
        found.append(shot)
        if prefix and shot.text.startswith(prefix) and shot.first_block + 1 < end:
            found.append(Shot(shot.first_block + 1, shot.text.removeprefix(prefix)))
    return found


def _spread(total: int, parts: int) -> list[int]:
    each, rest = divmod(total, parts)
    return [each + (number < rest) for number in range(parts)]
