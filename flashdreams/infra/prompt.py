"""Sources of a runner's prompts: the command line, text files, a file of embeddings."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashdreams.infra.config import quoted
from flashdreams.runtime.checkpoint import CheckpointError
from flashdreams.runtime.checkpoint.read import open_tensors
from flashdreams.runtime.checkpoint.source import LocalCheckpoint
from flashdreams.runtime.files import write_whole
from flashdreams.runtime.text import check_regular, read_text, reason_of, shown, unreadable

MAX_PROMPT_CHARACTERS = 20_000
"""Most characters of a prompt: several times what any text encoder takes."""

MAX_PROMPTS = 256
"""Most prompts of a file of embeddings."""

MAX_SHOTS = 4096
"""Most prompts of one video."""

_COUNTED = re.compile(r"(\d{1,9})\s*:\s*(.*)", re.DOTALL)


def read_prompt(prompt: str, prompt_path: Path | None) -> str:
    """The prompt as typed, or the text of its file if one is named.

    Raises:
        ValueError: the file cannot be read or is empty.
    """
    if prompt_path is None:
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"--prompt has {len(prompt)} characters; at most {MAX_PROMPT_CHARACTERS} are taken."
            )
        return prompt
    remedy = "Name a text file, or give the words with --prompt."
    with unreadable(f"--prompt-path {prompt_path}", remedy):
        text = read_text(prompt_path, 4 * MAX_PROMPT_CHARACTERS, "utf-8-sig").strip()
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise ValueError(f"it has more than {MAX_PROMPT_CHARACTERS} characters")
    if not text:
        raise ValueError(f"--prompt-path {prompt_path} is empty; describe the video in it.")
    return text


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


def _spread(total: int, parts: int) -> list[int]:
    each, rest = divmod(total, parts)
    return [each + (number < rest) for number in range(parts)]


def load_prompt_embeds(path: str | Path, *, text_len: int = 512, text_dim: int = 4096) -> Tensor:
    """Load pre-computed text embeddings, in place of a text encoder.

    Args:
        path: safetensors file with one tensor, or one called ``prompt_embeds``: ``[rows, C]`` for
            one prompt or ``[B, rows, C]``, floating point, at most ``text_len`` rows.
        text_len: rows that the model takes.
        text_dim: channels that the model takes.

    Returns:
        ``[B, text_len, text_dim]`` in the file's dtype; missing rows are zero.

    Raises:
        CheckpointError: the file cannot be read or is damaged.
        ValueError: the tensor is not of this form.
    """
    path = Path(path)
    try:
        check_regular(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}") from error
    store = open_tensors(LocalCheckpoint(files=(path,)))
    names = list(store.infos)
    if len(names) != 1 and "prompt_embeds" not in names:
        raise ValueError(
            f"{path} holds {len(names)} tensors ({', '.join(map(shown, names[:10]))}); one of them "
            "should be called prompt_embeds"
        )
    name = names[0] if len(names) == 1 else "prompt_embeds"
    shape, dtype = list(store.infos[name].shape), store.infos[name].dtype
    size = quoted(shape)
    wanted = f"[rows, {text_dim}] or [prompts, rows, {text_dim}], 1 to {text_len} rows"
    fits = len(shape) in (2, 3) and shape[-1] == text_dim and 1 <= shape[-2] <= text_len
    if not fits or shape[0] == 0:
        raise ValueError(f"{path}: prompt embeddings of shape {size}; this model takes {wanted}")
    if len(shape) == 3 and shape[0] > MAX_PROMPTS:
        raise ValueError(f"{path} holds {shape[0]} prompts; at most {MAX_PROMPTS} are read")
    if store.infos[name].refused or not dtype.is_floating_point:
        raise ValueError(f"{path}: prompt embeddings are {dtype} {size}; use floating point")
    found = next(tensor for _, tensor in store.read({name: None}))
    found = found if len(shape) == 3 else found[None]
    if not torch.isfinite(found.float()).all():
        raise ValueError(f"{path}: prompt embeddings contain values that are not finite")
    embeds = torch.zeros(found.shape[0], text_len, text_dim, dtype=dtype, device="cpu")
    embeds[:, : found.shape[1]] = found
    return embeds


def save_prompt_embeds(path: str | Path, embeds: Tensor) -> None:
    """Save the output of a text encoder, for `load_prompt_embeds`.

    Args:
        path: the safetensors file to write; it gets its name when it is whole.
        embeds: ``[B, L, C]``.
    """
    from safetensors.torch import save

    content = save({"prompt_embeds": embeds.detach().cpu().contiguous()})
    with write_whole(Path(path)) as file:
        file.write(content)
