"""The UMT5 text encoder that Wan conditions on."""

# Shapes: B prompts, L = text_len token rows per prompt, C = text_dim.

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashdreams.infra.config import quoted
from flashdreams.infra.encoder.base import Encoder, EncoderConfig
from flashdreams.infra.ranges import check_range
from flashdreams.models.prompts import INSTALL_HINT, TEXT_PACKAGES, clean_prompts
from flashdreams.runtime.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    KeyMap,
    concerning,
    ensure_local,
)
from flashdreams.runtime.text import printable

logger = logging.getLogger(__name__)

OFFICIAL_KEYS = KeyMap(
    name="wan",
    marker=r"token_embedding\.",
    rename=(
        (r"^token_embedding\.", "shared."),
        (r"^norm\.", "encoder.final_layer_norm."),
        (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
        (r"^blocks\.(\d+)\.attn\.([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
        (
            r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
            r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
        ),
        (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
        (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
        (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
        (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
    ),
)
"""Names in ``models_t5_umt5-xxl-enc-bf16.pth`` to those of ``transformers``.

Source: the state dicts of both beside each other; Wan-Video/Wan2.1, wan/modules/t5.py.
"""

COMFYUI_KEYS = KeyMap(
    name="comfyui", marker=r"spiece_model$", rename=(), ignore=(r"spiece_model$",)
)
"""ComfyUI's files use the names of ``transformers`` and, as bytes, the tokenizer's model, which is
not read: ``tokenizer.json`` is the same tokenizer."""


@dataclass(kw_only=True)
class UMT5TextEncoderConfig(EncoderConfig):
    """UMT5 encoder; the defaults are those of UMT5-XXL, which Wan uses."""

    _target: type["UMT5TextEncoder"] = field(default_factory=lambda: UMT5TextEncoder)

    packages: ClassVar[Mapping[str, str]] = TEXT_PACKAGES
    """What the tokenizer and the clean-up of prompts import."""

    text_len: int = 512
    """Rows per prompt; a prompt may have no more tokens, its end mark included."""

    truncate: bool = False
    """Cut longer prompts off, as the official programs do; a warning says where. False refuses
    them."""

    offload: bool = False
    """Keep the weights in host memory, and copy each layer to the GPU while it runs: slower
    prompts with the same embeddings. A CPU ignores it."""

    text_dim: int = 4096
    """Channels of an embedding."""

    vocab_size: int = 256384
    """Tokens in the vocabulary."""

    num_layers: int = 24
    """Transformer blocks."""

    num_heads: int = 64
    """Attention heads."""

    head_dim: int = 64
    """Channels of a head."""

    ffn_dim: int = 10240
    """Channels inside the feed-forward layers."""

    num_buckets: int = 32
    """Buckets of the relative position bias."""

    max_distance: int = 128
    """Distance in tokens from which all positions share a bucket."""

    eos_id: int = 1
    """Token that ends every prompt."""

    tokenizer: CheckpointConfig
    """Place of ``tokenizer.json``; fetched also where the checkpoint may be."""

    def __post_init__(self) -> None:
        check_range(self, "text_len", "text_dim", "vocab_size", "num_layers", "num_heads")
        check_range(self, "head_dim", "ffn_dim", "num_buckets", "max_distance")


class UMT5TextEncoder(Encoder):
    """Prompts to token embeddings, as Wan conditions on them.

    The network is that of the ``transformers`` package under its own names; official Wan files are
    recognised. Prompts are encoded one by one without padding, so that an embedding does not depend
    on the other prompts of a batch; the rows beyond a prompt are zero.
    """

    config: UMT5TextEncoderConfig
    checkpoint_key_maps = (OFFICIAL_KEYS, COMFYUI_KEYS)

    def __init__(self, config: UMT5TextEncoderConfig) -> None:
        super().__init__(config)
        network = _build_network(config)
        self.shared: nn.Embedding = network.shared
        self.encoder: nn.Module = network.encoder
        self.to(self.dtype)
        self.eval().requires_grad_(False)
        self._tokenizer: Any = None

    def forward(self, input: Sequence[str]) -> Tensor:
        """Encode prompts.

        Args:
            input: one text per prompt, in any language; ``""`` is the empty prompt of guidance.

        Returns:
            ``[B, L, C]`` in the encoder's dtype; zero rows beyond each prompt's tokens.

        Raises:
            TypeError: not a list of texts.
            ValueError: white space for a prompt, or more than ``text_len`` tokens.
            CheckpointError: the tokenizer's file is not on this machine.
            ImportError: ``ftfy`` is not installed.
        """
        split = self._split(input)
        for number, (_, rest) in enumerate(split):
            if rest:
                allowed = self.config.text_len
                logger.warning(
                    "prompt %d is cut off at %d tokens: %s", number, allowed, quoted(rest)
                )
        return self.embed([ids for ids, _ in split])

    def check_input(self, input: Sequence[str]) -> None:
        """Refuse prompts that `forward` would refuse; needs the tokenizer, but no weights.

        Raises:
            As `forward`.
        """
        self._split(input)

    def example_input(self) -> list[str]:
        """One short prompt, with which warm-up loads the tokenizer and the packages for text."""
        return ["a street at night"]

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Clean prompts and turn each into token ids, the end mark last.

        Raises:
            As `forward`.
        """
        return [ids for ids, _ in self._split(prompts)]

    def _split(self, prompts: Sequence[str]) -> list[tuple[list[int], str]]:
        """The token ids of prompts, and the text that they leave out."""
        texts = clean_prompts(prompts)
        if self._tokenizer is None:
            checkpoint, source = self.config.checkpoint, self.config.tokenizer
            allowed = source.download or (checkpoint is not None and checkpoint.download)
            self._tokenizer = load_tokenizer(source, allow_download=allowed)
        return [self._split_one(number, text) for number, text in enumerate(texts)]

    def _split_one(self, number: int, text: str) -> tuple[list[int], str]:
        c, encoding = self.config, self._tokenizer.encode(text)
        ids = encoding.ids if encoding.ids[-1:] == [c.eos_id] else [*encoding.ids, c.eos_id]
        if len(ids) <= c.text_len:
            return ids, ""
        rest = text[encoding.offsets[c.text_len - 1][0] :]
        if not c.truncate:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens, {c.text_len} are allowed: shorten it by "
                f"{len(ids) - c.text_len}, or cut off {quoted(rest)} with "
                "--pipeline.text-encoder.truncate True"
            )
        return [*ids[: c.text_len - 1], c.eos_id], rest

    @torch.no_grad()
    def embed(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Encode prompts that are already tokens.

        Args:
            tokens: ids of each prompt, the end mark last, no padding.

        Returns:
            ``[B, L, C]`` in the encoder's dtype; zero rows beyond each prompt's tokens.

        Raises:
            ValueError: more than ``text_len`` tokens.
        """
        text_len = self.config.text_len
        if (longest := max(map(len, tokens), default=0)) > text_len:
            raise ValueError(f"a prompt has {longest} tokens, {text_len} are allowed")
        shape = (len(tokens), self.config.text_len, self.config.text_dim)
        embeds = torch.zeros(shape, dtype=self.dtype, device=self.device)
        for row, ids in zip(embeds, tokens, strict=True):
            batch = torch.tensor([list(ids)], dtype=torch.int64, device=self.shared.weight.device)
            row[: len(ids)] = self.encoder(input_ids=batch).last_hidden_state[0]
        return embeds


def load_tokenizer(config: CheckpointConfig, *, allow_download: bool | None = None) -> Any:
    """Load a tokenizer from its ``tokenizer.json``, as it is written there.

    Args:
        config: names the file.
        allow_download: whether it may be downloaded; ``None``: as ``config.download`` says.

    Raises:
        CheckpointError: the file is missing or is not a tokenizer.
        ImportError: ``tokenizers``, which comes with ``transformers``, is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(f"Prompts need the package tokenizers. {INSTALL_HINT}") from error
    with concerning(config):
        path = ensure_local(config, allow_download=allow_download).files[0]
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            reason = printable(str(error), 300)
            text = f"{path} is not a tokenizer: {reason}. Download it again"
            raise CheckpointError(text) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _build_network(config: UMT5TextEncoderConfig) -> Any:
    try:
        from transformers import UMT5Config, UMT5EncoderModel
    except ImportError as error:
        raise ImportError(f"UMT5 needs the package transformers. {INSTALL_HINT}") from error
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.text_dim,
            d_kv=config.head_dim,
            d_ff=config.ffn_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=config.max_distance,
        )
    )
