"""Tensor names of the Wan transformer's public checkpoints."""

import pytest
import torch

from flashdreams.models.wan.keys import VAE_DIFFUSERS_KEYS, WAN_KEY_MAPS
from flashdreams.runtime.checkpoint import CheckpointConfig
from flashdreams.runtime.checkpoint.keys import map_names
from tests.manifests import load_keymap, load_manifest

PLAIN = CheckpointConfig(source="unused")
WRAPPED = CheckpointConfig(source="unused", strip_prefixes=("model.", "net."))


@pytest.mark.parametrize("name", ["wan21_t2v_1.3B", "wan21_i2v_14B_480P"])
def test_diffusers_names_become_the_official_ones(name: str) -> None:
    official, theirs = load_manifest(name), load_manifest(f"diffusers_{name}")
    match = map_names(theirs, PLAIN, WAN_KEY_MAPS)
    assert match.key_map == "diffusers"
    assert match.file_names == load_keymap(f"diffusers_{name}")
    assert {ours: theirs[file_name] for ours, file_name in match.file_names.items()} == official
    assert map_names(theirs, PLAIN).file_names != match.file_names


def test_diffusers_names_of_the_14b_model_become_the_official_ones() -> None:
    match = map_names(load_manifest("diffusers_wan21_t2v_14B"), PLAIN, WAN_KEY_MAPS)
    assert set(match.file_names) == set(load_manifest("wan21_t2v_14B"))


@pytest.mark.parametrize(
    "name", ["wan21_t2v_14B", "wan21_flf2v_14B_720P", "wan22_i2v_A14B", "lingbot_world_fast"]
)
def test_official_names_stay_as_they_are(name: str) -> None:
    match = map_names(load_manifest(name), PLAIN, WAN_KEY_MAPS)
    assert match.key_map is None
    assert match.file_names == {n: n for n in load_manifest(name)}


@pytest.mark.parametrize(
    "name",
    [
        "self_forcing_dmd",
        "causal_forcing_chunkwise",
        "causal_forcing_framewise",
        "causal_forcing_pp_framewise_1step",
        "causal_forcing_pp_framewise_2step",
    ],
)
def test_wrapped_names_become_the_official_ones(name: str) -> None:
    match = map_names(load_manifest(name), WRAPPED, WAN_KEY_MAPS)
    assert set(match.file_names) == set(load_manifest("wan21_t2v_1.3B"))
    assert set(map_names(load_manifest(name), PLAIN).file_names) != set(match.file_names)


def test_diffusers_names_of_the_autoencoder_become_the_official_ones() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLWan().state_dict()
    official = {name: shape for name, (shape, _) in load_manifest("wan21_vae").items()}
    match = map_names(theirs, PLAIN, (VAE_DIFFUSERS_KEYS,))
    shapes = {ours: tuple(theirs[name].shape) for ours, name in match.file_names.items()}
    assert shapes == official
    assert map_names(official, PLAIN, (VAE_DIFFUSERS_KEYS,)).key_map is None
