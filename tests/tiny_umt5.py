"""A UMT5 text encoder of toy size and its tokenizer; needs transformers and tokenizers."""

from pathlib import Path

from flashdreams.models.umt5 import UMT5TextEncoderConfig
from flashdreams.runtime.checkpoint import CheckpointConfig

WORDS = ("a", "street", "at", "night", "&", "day", "😀")
NO_TOKENIZER = CheckpointConfig(source="nowhere")


def tiny_config(**overrides) -> UMT5TextEncoderConfig:
    sizes = {
        "vocab_size": 128,
        "text_dim": 64,
        "head_dim": 16,
        "ffn_dim": 144,
        "num_heads": 4,
        "num_layers": 3,
        "text_len": 200,
        "tokenizer": NO_TOKENIZER,
    }
    return UMT5TextEncoderConfig(**{**sizes, **overrides})


def write_tokenizer(folder: Path, *, adds_end: bool = True) -> CheckpointConfig:
    """A tokenizer of seven words whose file asks for truncation and padding, as some do."""
    import tokenizers

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    vocabulary.update((word, number) for number, word in enumerate(WORDS, start=3))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=5)
    if adds_end:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return CheckpointConfig(source=str(folder), file="google/umt5-xxl/tokenizer.json")
