"""The UMT5 text encoder against numbers of the official code (float32, atol 5e-5)."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from flashdreams.infra.component import load_component
from flashdreams.models.umt5 import (
    OFFICIAL_KEYS,
    UMT5TextEncoder,
    UMT5TextEncoderConfig,
    load_tokenizer,
)
from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError, load_checkpoint
from flashdreams.runtime.checkpoint.keys import map_names
from tests.goldens import golden_path, load_golden
from tests.manifests import load_keymap, load_manifest, write_sparse_safetensors, zero_state_dict
from tests.tiny_umt5 import NO_TOKENIZER, tiny_config, write_tokenizer

ATOL = 5e-5
GOLDEN = "b7_umt5_tiny"

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")


def golden_encoder() -> UMT5TextEncoder:
    with torch.device("meta"):
        encoder = UMT5TextEncoder(tiny_config())
    weights = golden_path(GOLDEN, "weights_wan.safetensors")
    load_checkpoint(encoder, CheckpointConfig(source=str(weights)))
    return encoder


@pytest.mark.parametrize("case", ["short", "long"])
def test_embeddings_match_official(case: str) -> None:
    io = load_golden(GOLDEN, "io.safetensors")
    ids, lengths, expected = (io[f"{case}/{n}"] for n in ("ids", "seq_lens", "prompt_embeds"))
    rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    encoder = golden_encoder()
    embeds = encoder.embed(rows)
    torch.testing.assert_close(embeds[:, : ids.shape[1]], expected, atol=ATOL, rtol=0)
    assert not embeds[:, ids.shape[1] :].any()
    attended = encoder.embed([row.tolist() for row in ids])  # padding read as text
    assert (attended[:, : ids.shape[1]] - expected).abs().max() > 10 * ATOL


def test_embeddings_match_the_formula_of_the_official_names(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = {name: shape for name, (shape, _) in tiny_official_manifest().items()}
    weights = {n: 0.3 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    save_file(weights, tmp_path / "t5.safetensors")
    with torch.device("meta"):
        encoder = UMT5TextEncoder(tiny_config(text_len=40))
    load_checkpoint(encoder, CheckpointConfig(source=str(tmp_path / "t5.safetensors")))
    ids = torch.randint(2, 128, (40,), generator=generator)
    expected = umt5_formula(weights, ids)
    torch.testing.assert_close(encoder.embed([ids.tolist()])[0], expected, atol=ATOL, rtol=0)
    swapped = {
        n.replace("gate.0", "x").replace("fc1", "gate.0").replace("x", "fc1"): t
        for n, t in weights.items()
    }
    assert (umt5_formula(swapped, ids) - expected).abs().max() > 10 * ATOL


def tiny_official_manifest() -> dict:
    """The official checkpoint's tensors at the sizes of `tiny_config`."""
    sizes = {4096: 64, 10240: 144, 256384: 128}
    return {
        name: (tuple(4 if size == 64 else sizes.get(size, size) for size in shape), dtype)
        for name, (shape, dtype) in load_manifest("umt5_xxl_encoder_wan").items()
        if not re.match(r"blocks\.(\d\d|[3-9])\.", name)
    }


def umt5_formula(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """UMT5's encoder for one prompt, written out: ``[L]`` to ``[L, C]``."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weights[name]

    distance = torch.arange(len(ids))[None] - torch.arange(len(ids))[:, None]  # key - query
    far = 8 + (torch.log(distance.abs().clamp(min=1) / 8) / math.log(128 / 8) * 8).long()
    bucket = torch.where(distance.abs() < 8, distance.abs(), far.clamp(max=15))
    bucket = bucket + 16 * (distance > 0)
    x = weights["token_embedding.weight"][ids]
    for block in (f"blocks.{number}." for number in range(3)):
        h = norm(x, block + "norm1.weight")
        q, k, v = (
            (h @ weights[f"{block}attn.{n}.weight"].T).view(-1, 4, 16).transpose(0, 1)
            for n in "qkv"
        )
        bias = weights[block + "pos_embedding.embedding.weight"][bucket].permute(2, 0, 1)
        mixed = torch.softmax(q @ k.transpose(1, 2) + bias, dim=-1) @ v
        x = x + mixed.transpose(0, 1).flatten(1) @ weights[block + "attn.o.weight"].T
        h = norm(x, block + "norm2.weight")
        gate = F.gelu(h @ weights[block + "ffn.gate.0.weight"].T, approximate="tanh")
        x = (
            x
            + (gate * (h @ weights[block + "ffn.fc1.weight"].T))
            @ weights[block + "ffn.fc2.weight"].T
        )
    return norm(x, "norm.weight")


def test_relative_positions_fall_into_official_buckets() -> None:
    table = load_golden(GOLDEN, "relative_buckets.safetensors")
    attention = golden_encoder().encoder.block[0].layer[0].SelfAttention
    buckets = attention._relative_position_bucket(table["key_minus_query"])
    assert torch.equal(buckets, table["bucket"])


def test_official_names_become_those_of_transformers() -> None:
    official = load_manifest("umt5_xxl_encoder_wan")
    match = map_names(official, CheckpointConfig(source="unused"), (OFFICIAL_KEYS,))
    assert {theirs: ours for ours, theirs in match.file_names.items()} == load_keymap(
        "umt5_wan_to_hf"
    )
    peer = load_manifest("umt5_xxl_encoder_hf")
    assert all(official[theirs] == peer[ours] for ours, theirs in match.file_names.items())


@pytest.mark.parametrize("name", ["umt5_xxl_encoder_wan", "umt5_xxl_encoder_hf"])
def test_full_size_loads_the_public_checkpoints_strictly(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files of zeros repeat one number, which no real file does.
    monkeypatch.setattr("flashdreams.runtime.checkpoint.read._refuse_inflated", lambda *_: None)
    with torch.device("meta"):
        encoder = UMT5TextEncoder(UMT5TextEncoderConfig(dtype="bfloat16", tokenizer=NO_TOKENIZER))
    manifest = load_manifest(name)
    if name.endswith("wan"):
        path = tmp_path / "t5.pth"
        torch.save(zero_state_dict(manifest), path)
    else:
        path = tmp_path / "t5.safetensors"
        write_sparse_safetensors(path, manifest)
    report = load_checkpoint(encoder, CheckpointConfig(source=str(path)), device="meta")
    assert report.tensors == 242
    assert report.key_map == ("wan" if name.endswith("wan") else None)
    assert sum(p.numel() for p in encoder.parameters()) == 5_680_910_336
    del manifest[next(n for n in manifest if "ffn" in n or "DenseReluDense" in n)]
    short = tmp_path / "short.safetensors"
    write_sparse_safetensors(short, manifest)
    with pytest.raises(CheckpointError, match="1 missing in the file"):
        load_checkpoint(encoder, CheckpointConfig(source=str(short)), device="meta")


def encoder_with_words(folder: Path, **overrides) -> UMT5TextEncoder:
    torch.manual_seed(0)
    return UMT5TextEncoder(tiny_config(tokenizer=write_tokenizer(folder), **overrides))


def test_forward_gives_zero_rows_beyond_each_prompt(tmp_path: Path) -> None:
    encoder = encoder_with_words(tmp_path, text_len=8)
    embeds = encoder(["a street at night", "day"])
    assert embeds.shape == (2, 8, 64) and embeds.dtype == torch.float32
    used = embeds.abs().sum(dim=-1) > 0
    assert used.sum(dim=1).tolist() == [5, 2]  # the end mark is a token
    assert not embeds.requires_grad


def test_an_embedding_does_not_depend_on_the_other_prompts(tmp_path: Path) -> None:
    encoder = encoder_with_words(tmp_path, text_len=8)
    alone: Tensor = encoder(["day at night"])
    assert torch.equal(encoder(["a street at night", "day at night"])[1:], alone)
    assert not torch.equal(encoder(["night at day"]), alone)


def test_tokenize_cleans_prompts_and_ends_them_once(tmp_path: Path) -> None:
    encoder = encoder_with_words(tmp_path)
    assert encoder.tokenize([""]) == [[1]]  # guidance without a prompt
    expected = [[3, 4, 5, 6, 7, 8, 1]]
    assert encoder.tokenize(["a street at night & day"]) == expected
    assert encoder.tokenize(["  a\tstreet \n at night &amp;amp; day "]) == expected
    assert encoder.tokenize(["\u00f0\u0178\u02dc\u20ac at night"]) == [
        [9, 5, 6, 1]
    ]  # wrongly decoded UTF-8
    write_tokenizer(tmp_path, adds_end=False)
    encoder._tokenizer = None
    assert encoder.tokenize(["a street at night & day"]) == expected


def test_bad_prompts_are_refused(tmp_path: Path) -> None:
    encoder = encoder_with_words(tmp_path, text_len=4)
    encoder(["a street at"])
    said = "prompt 1 has 6 tokens, 4 are allowed: shorten it by 2, or cut off 'night day' with --pi"
    with pytest.raises(ValueError, match=said):
        encoder(["day", "a street at night day"])
    for empty in (" \n", "&nbsp;"):
        with pytest.raises(ValueError, match="prompt 1 is empty"):
            encoder(["day", empty])
    with pytest.raises(ValueError, match="text holds no prompt"):
        encoder([])
    for wrong in ("a street", [3], None):
        with pytest.raises(TypeError, match="must be a list of prompts"):
            encoder(wrong)


@pytest.mark.parametrize("adds_end", [True, False])
def test_prompts_are_cut_where_the_tokenizer_would(adds_end, tmp_path: Path, caplog) -> None:
    """As the official code lets the tokenizer truncate, the end mark included."""
    encoder = encoder_with_words(tmp_path, text_len=4, truncate=True)
    write_tokenizer(tmp_path, adds_end=True)
    oracle = load_tokenizer(encoder.config.tokenizer)
    oracle.enable_truncation(4)
    write_tokenizer(tmp_path, adds_end=adds_end)
    for text in ("a street at", "a street at night", "day & \U0001f600 at a street"):
        assert encoder.tokenize([text]) == [oracle.encode(text).ids]
    embeds = encoder(["day", "a street   at night day"])
    assert torch.equal(embeds[1:], encoder(["a street at"]))
    assert [r.message for r in caplog.records] == ["prompt 1 is cut off at 4 tokens: 'night day'"]


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    config = CheckpointConfig(source=str(tmp_path), file="tokenizer.json", download=True)
    encoder = UMT5TextEncoder(tiny_config(tokenizer=config))
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json; it has: nothing"):
        encoder(["day"])
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        encoder(["day"])


def test_missing_packages_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_with_words(tmp_path)
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match=r"ftfy.*pip install 'transformers"):
        encoder(["day"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers.*pip install 'transformers"):
        UMT5TextEncoder(tiny_config())


def test_its_example_brings_the_tokenizer_along(tmp_path: Path) -> None:
    encoder = UMT5TextEncoder(tiny_config(tokenizer=write_tokenizer(tmp_path)))
    assert encoder._tokenizer is None
    assert encoder(encoder.example_input()).shape == (1, 200, 64)
    assert encoder._tokenizer is not None


def test_an_offloaded_encoder_runs_without_its_weights_on_the_device(tmp_path: Path) -> None:
    """The device is ``meta``, where no operator takes a tensor of the CPU."""
    encoder = encoder_with_words(tmp_path, text_len=8, offload=True)
    weights = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    load_component(encoder, torch.device("cpu"))
    on_cpu = encoder(["a street"])
    load_component(encoder, torch.device("meta"))
    assert encoder.device == torch.device("meta") and encoder(["a street"]).is_meta
    assert on_cpu.device == torch.device("cpu")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    moved = encoder_with_words(tmp_path, text_len=8)  # negative control
    load_component(moved, torch.device("meta"))
    assert moved.shared.weight.is_meta


def test_files_of_comfyui_are_read_scaled_or_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    truth = UMT5TextEncoder(tiny_config()).state_dict()
    truth = {name: torch.randn(x.shape) for name, x in truth.items()}
    truth["encoder.embed_tokens.weight"] = truth["shared.weight"]
    stored = {k: v for k, v in truth.items() if k != "encoder.embed_tokens.weight"}
    stored["spiece_model"] = torch.zeros(1000, dtype=torch.uint8)
    for name in [n for n in stored if re.search(r"Attention\.[qkvo]\.weight$", n)]:
        scale = stored[name].abs().max().reshape(()) / 448
        stored[name] = (stored[name] / scale).to(torch.float8_e4m3fn)
        stored[name.removesuffix("weight") + "scale_weight"] = scale
    stored["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(stored, tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    with torch.device("meta"):
        encoder = UMT5TextEncoder(tiny_config())
    report = load_checkpoint(encoder, CheckpointConfig(source=str(tmp_path)))
    assert (report.key_map, report.scaled) == ("comfyui", 12)
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(value, truth[name], rtol=2**-4, atol=2e-2)
    del stored["spiece_model"]  # negative control: an unknown tensor is still refused
    save_file({**stored, "logit_scale": torch.ones(1)}, next(tmp_path.iterdir()))
    with pytest.raises(CheckpointError, match="1 unexpected in the file:\n    logit_scale"):
        load_checkpoint(encoder, CheckpointConfig(source=str(tmp_path)))
