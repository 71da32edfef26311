"""The compact text of the checkpoint manifests."""

import math

import pytest

from tests.manifests import fold_keymap, fold_manifest, load_keymap, load_manifest, manifest_names

PARAMETERS = {
    "clip_xlm_roberta_vit_h14": 1_193_014_785,
    "diffusers_wan21_i2v_14B_480P": 16_394_878_784,
    "lingbot_world_fast": 18_544_332_864,
    "matrix_game_2_gta_drive": 1_619_238_464,
    "matrix_game_2_temple_run": 1_508_715_584,
    "matrix_game_2_universal": 1_619_242_304,
    "self_forcing_dmd": 1_418_996_800,
    "taew2_1": 11_315_539,
    "umt5_xxl_encoder_wan": 5_680_910_336,
    "wan21_i2v_14B_480P": 16_394_878_784,
    "wan21_t2v_1.3B": 1_418_996_800,
    "wan21_t2v_14B": 14_288_491_584,
    "wan21_vae": 126_892_531,
    "wan22_ti2v_5B": 4_999_787_712,
    "wan22_vae": 704_688_668,
}


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_manifest_has_all_parameters(name: str, parameters: int) -> None:
    shapes = [shape for shape, _ in load_manifest(name).values()]
    assert sum(math.prod(shape) for shape in shapes) == parameters


@pytest.mark.parametrize("name", manifest_names())
def test_manifest_survives_folding(name: str) -> None:
    text = fold_manifest(load_manifest(name))
    assert "{" in text and len(text) < 10_000


def test_folding_joins_only_what_is_equal() -> None:
    manifest = {
        "blocks.0.weight": ((2, 3), "float32"),
        "blocks.1.weight": ((2, 3), "float32"),
        "blocks.3.weight": ((2, 3), "float32"),
        "blocks.2.weight": ((2, 4), "float32"),
        "scale": ((), "float16"),
    }
    assert fold_manifest(manifest).splitlines() == [
        "blocks.{0-1,3}.weight float32 2x3",
        "blocks.2.weight float32 2x4",
        "scale float16",
    ]


def test_keymap_survives_folding() -> None:
    keymap = load_keymap("umt5_wan_to_hf")
    assert keymap["blocks.23.attn.q.weight"] == "encoder.block.23.layer.0.SelfAttention.q.weight"
    assert len(keymap) == 242 and len(fold_keymap(keymap).splitlines()) < 20
