"""Prompts: checked, cleaned, or hashed word by word for tests."""

# Shapes: B prompts, L = text_len rows per prompt, C = text_dim.

import hashlib
import html
import re
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashdreams.infra import prompt
from flashdreams.infra.config import quoted
from flashdreams.infra.encoder.base import Encoder, EncoderConfig
from flashdreams.infra.ranges import check_range

TEXT_PACKAGES = {"transformers": "transformers>=5,<6", "ftfy": "ftfy>=6"}
"""Packages that real prompts need, by module: what pip takes, as in the extra ``text``."""

INSTALL_HINT = (
    f"Install what prompts need with: pip install {' '.join(map(repr, TEXT_PACKAGES.values()))}; "
    "or use pre-computed embeddings"
)
"""Remedy for missing optional packages for text."""

_EMPTY = "prompt {} is empty; describe what the video shows"


def __getattr__(name: str) -> Any:
    """Old location of names in `flashdreams.infra.prompt`; will be removed in 0.3."""
    if name not in ("load_prompt_embeds", "save_prompt_embeds"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"{name} moved from {__name__} to flashdreams.infra.prompt; the old name will go in 0.3.",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(prompt, name)


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Return the prompts as a list, or refuse unusable text.

    ``""`` is usable: guidance uses it as the empty prompt. Callers that need a description
    refuse it themselves.

    Raises:
        TypeError: not a list of texts.
        ValueError: no prompt, one of white space only, or one that is far too long.
    """
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) for p in prompts):
        raise TypeError(
            f"text must be a list of prompts such as ['a street at night'], got {quoted(prompts)}"
        )
    if not prompts:
        raise ValueError("text holds no prompt; give one per video, such as ['a street at night']")
    for number, text in enumerate(prompts):
        if len(text) > prompt.MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"prompt {number} has {len(text)} characters; at most "
                f"{prompt.MAX_PROMPT_CHARACTERS} are allowed"
            )
        if text and not text.strip():
            raise ValueError(_EMPTY.format(number))
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(
                f"prompt {number} {quoted(text)} is not Unicode text; give it as UTF-8"
            )
    return list(prompts)


def clean_prompts(prompts: Sequence[str]) -> list[str]:
    """Check prompts and clean each with `clean_prompt`.

    Raises:
        TypeError: not a list of texts.
        ValueError: no prompt, or one that is empty after cleaning.
        ImportError: ``ftfy`` is not installed.
    """
    checked = check_prompts(prompts)
    cleaned = [clean_prompt(text) for text in checked]
    for number, (before, after) in enumerate(zip(checked, cleaned, strict=True)):
        if before and not after:
            raise ValueError(_EMPTY.format(number))
    return cleaned


def clean_prompt(text: str) -> str:
    """Repair a prompt's encoding, undo HTML escapes and join its white space to single blanks.

    Raises:
        ImportError: ``ftfy`` is not installed.

    Source: Wan-Video/Wan2.1, wan/modules/tokenizers.py, the mode ``whitespace``.
    """
    try:
        import ftfy
    except ImportError as error:
        raise ImportError(f"Cleaning prompts needs the package ftfy. {INSTALL_HINT}") from error
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


@dataclass(kw_only=True)
class HashTextEncoderConfig(EncoderConfig):
    """Text encoder for tests and tiny models: no weights, no tokenizer, no meaning."""

    _target: type["HashTextEncoder"] = field(default_factory=lambda: HashTextEncoder)

    text_len: int = 16
    """Rows per prompt; a prompt may have no more words."""

    text_dim: int = 64
    """Channels of an embedding."""

    seed: int = 0
    """Another seed gives every word another embedding."""

    def __post_init__(self) -> None:
        check_range(self, "text_len", "text_dim")


class HashTextEncoder(Encoder):
    """Words to rows of unit variance that depend only on the word and the seed.

    The values come from a hash (SHAKE-256), so they are the same on every machine and version.
    """

    config: HashTextEncoderConfig

    def __init__(self, config: HashTextEncoderConfig) -> None:
        super().__init__(config)
        self.register_buffer("_place", torch.zeros((), dtype=self.dtype), persistent=False)

    def init_buffers(self) -> None:
        """Leave the meta device: the buffer only marks the device of results."""
        if self.device.type == "meta":
            self._place = torch.zeros((), dtype=self.dtype, device="cpu")

    def forward(self, input: Sequence[str]) -> Tensor:
        """Embed prompts, one row per word.

        Returns:
            ``[B, L, C]`` in the encoder's dtype; zero rows beyond each prompt's words.

        Raises:
            TypeError: not a list of texts.
            ValueError: white space for a prompt, or more than ``text_len`` words.
        """
        prompts = self._words(input)
        size = (len(prompts), self.config.text_len, self.config.text_dim)
        embeds = torch.zeros(size, dtype=torch.float32, device="cpu")
        for number, words in enumerate(prompts):
            for row, word in enumerate(words):
                embeds[number, row] = self._embed(word)
        return embeds.to(self.device, self.dtype)

    def check_input(self, input: Sequence[str]) -> None:
        """Refuse prompts that `forward` would refuse.

        Raises:
            As `forward`.
        """
        self._words(input)

    def _words(self, prompts: Sequence[str]) -> list[list[str]]:
        text_len = self.config.text_len
        split = [text.split() for text in check_prompts(prompts)]
        for number, words in enumerate(split):
            if len(words) > text_len:
                raise ValueError(
                    f"prompt {number} has {len(words)} words, {text_len} are allowed: "
                    f"shorten it by {len(words) - text_len}"
                )
        return split

    def _embed(self, word: str) -> Tensor:
        dim = self.config.text_dim
        digest = hashlib.shake_256(f"{self.config.seed} {word}".encode()).digest(4 * dim)
        uniform = (
            torch.tensor(struct.unpack(f"<{dim}I", digest), dtype=torch.float64, device="cpu")
            / 2**32
        )
        return ((2 * uniform - 1) * 3**0.5).float()
