"""The shipped literals of the Wan family against the models' facts and manifests."""

import hashlib
import math
import re
from pathlib import PurePosixPath

import pytest
import torch

from flashdreams.infra.component import Component, nested_components
from flashdreams.infra.weights import named_checkpoints, require_weights, with_downloads
from flashdreams.integrations.causal_forcing.config import RUNNER_CONFIGS as CAUSAL_FORCING
from flashdreams.integrations.lingbot_world.config import RUNNER_CONFIGS as LINGBOT
from flashdreams.integrations.longlive.config import RUNNER_CONFIGS as LONGLIVE
from flashdreams.integrations.self_forcing.config import RUNNER_CONFIGS as SELF_FORCING
from flashdreams.integrations.wan21.config import RUNNER_CONFIGS as WAN21
from flashdreams.integrations.wan22.config import RUNNER_CONFIGS as WAN22
from flashdreams.models.wan.config import WAN_TRANSFORMER_TI2V_5B
from flashdreams.runtime.checkpoint import CheckpointConfig, CheckpointError, load_checkpoint
from tests.manifests import load_manifest, write_sparse_safetensors

LITERALS = {**WAN21, **WAN22, **SELF_FORCING, **CAUSAL_FORCING}
FULL_SIZE = sorted(slug for slug in LITERALS if not slug.endswith("tiny-random"))
FEW_STEPS = [slug for slug in FULL_SIZE if "forcing" in slug]

MANIFESTS = {
    "diffusion_pytorch_model.safetensors": "wan21_t2v_1.3B",
    "checkpoints/self_forcing_dmd.pt": "self_forcing_dmd",
    "chunkwise/causal_forcing.pt": "causal_forcing_chunkwise",
    "framewise/causal_forcing.pt": "causal_forcing_framewise",
    "causal-forcing++/framewise-2step.pt": "causal_forcing_pp_framewise_2step",
    "causal-forcing++/framewise-1step.pt": "causal_forcing_pp_framewise_1step",
    "models/longlive_base.pt": "wan21_t2v_1.3B",
    "model_bf16.pt": "wan22_ti2v_5B",
    "Wan2.1_VAE.pth": "wan21_vae",
    "Wan2.2_VAE.pth": "wan22_vae",
    "taew2_1.pth": "taew2_1",
    "taew2_2.pth": "taew2_2",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth": "clip_xlm_roberta_vit_h14",
    "models_t5_umt5-xxl-enc-bf16.pth": "umt5_xxl_encoder_wan",
    "Wan-AI/Wan2.1-T2V-14B": "wan21_t2v_14B",
    "Wan-AI/Wan2.1-I2V-14B-480P": "wan21_i2v_14B_480P",
    "Wan-AI/Wan2.2-TI2V-5B": "wan22_ti2v_5B",
    "robbyant/lingbot-world-base-cam": "lingbot_world_base_cam",
    "robbyant/lingbot-world-fast": "lingbot_world_fast",
}


def published_name(checkpoint: CheckpointConfig) -> str:
    """The file, or the repository of a sharded one."""
    file = checkpoint.file or PurePosixPath(checkpoint.source).name
    return file if file in MANIFESTS else checkpoint.source


def manifest_of(checkpoint: CheckpointConfig) -> str:
    return MANIFESTS[published_name(checkpoint)]


def on_meta(config) -> Component:
    with torch.device("meta"):
        return config.setup()


def loadable(component: Component):
    """The component itself or, where it has no file of its own, those that it is made of."""
    if not component.loads_parts:
        return [component]
    parts = nested_components(component).values()
    return [part for nested in parts for part in loadable(nested)]


def load_sparse(component: Component, folder) -> int:
    """Compare a component with a file of its manifest's names, shapes and types; strict."""
    checkpoint = component.config.checkpoint
    manifest = load_manifest(manifest_of(checkpoint))
    path = folder / "zeros.safetensors"
    write_sparse_safetensors(path, manifest)
    rules = {k: getattr(checkpoint, k) for k in ("strip_prefixes", "drop", "rename", "ignore")}
    return load_checkpoint(
        component, CheckpointConfig(source=str(path), **rules), device="meta"
    ).tensors


def test_every_slug_of_the_issue_is_there():
    assert FULL_SIZE == [
        "causal-forcing-wan2.1-i2v-1.3b-framewise",
        "causal-forcing-wan2.1-i2v-1.3b-framewise-1step",
        "causal-forcing-wan2.1-i2v-1.3b-framewise-2step",
        "causal-forcing-wan2.1-t2v-1.3b-chunkwise",
        "causal-forcing-wan2.1-t2v-1.3b-framewise",
        "causal-forcing-wan2.1-t2v-1.3b-framewise-1step",
        "causal-forcing-wan2.1-t2v-1.3b-framewise-2step",
        "self-forcing-wan2.1-t2v-1.3b",
        "self-forcing-wan2.1-t2v-1.3b-sink5-window7-rerope",
        "self-forcing-wan2.1-t2v-1.3b-taehv",
        "wan21-i2v-14b-480p",
        "wan21-t2v-1.3b-480p",
        "wan21-t2v-14b-720p",
        "wan22-ti2v-5b-704p",
        "wan22-ti2v-5b-704p-taehv",
    ]
    assert all(slug == c.runner_name == c.pipeline.name for slug, c in LITERALS.items())


@pytest.mark.parametrize("slug", FULL_SIZE)
def test_transformer_takes_exactly_the_published_tensors(slug, tmp_path):
    transformer = on_meta(LITERALS[slug].pipeline.diffusion_model.transformer)
    expected = load_manifest(manifest_of(transformer.config.checkpoint))
    assert load_sparse(transformer, tmp_path) == len(expected)
    assert transformer.config.dtype == "bfloat16"


@pytest.mark.parametrize("field", ["decoder", "image_encoder"])
@pytest.mark.parametrize("slug", FULL_SIZE)
def test_other_networks_take_the_published_tensors(slug, field, tmp_path):
    config = getattr(LITERALS[slug].pipeline, field)
    if config is None:
        assert field == "image_encoder" and "i2v" not in slug
        return
    parts = loadable(on_meta(config))
    assert len(parts) == (2 if slug == "wan21-i2v-14b-480p" and field == "image_encoder" else 1)
    assert all(load_sparse(part, tmp_path) > 0 for part in parts)


@pytest.mark.slow
def test_text_encoder_takes_exactly_the_published_tensors(tmp_path):
    encoder = on_meta(LITERALS["self-forcing-wan2.1-t2v-1.3b"].pipeline.text_encoder)
    assert load_sparse(encoder, tmp_path) == len(load_manifest("umt5_xxl_encoder_wan"))


def test_another_model_is_not_taken_for_the_right_one(tmp_path):
    """Negative control: strict loading sees a wrong literal."""
    transformer = on_meta(LITERALS["wan21-t2v-14b-720p"].pipeline.diffusion_model.transformer)
    path = tmp_path / "zeros.safetensors"
    write_sparse_safetensors(path, load_manifest("wan21_i2v_14B_480P"))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint(transformer, CheckpointConfig(source=str(path)), device="meta")


def test_diffusers_names_are_taken_too(tmp_path):
    transformer = on_meta(LITERALS["wan21-t2v-1.3b-480p"].pipeline.diffusion_model.transformer)
    path = tmp_path / "zeros.safetensors"
    write_sparse_safetensors(path, load_manifest("diffusers_wan21_t2v_1.3B"))
    report = load_checkpoint(transformer, CheckpointConfig(source=str(path)), device="meta")
    assert report.key_map == "diffusers"


def test_wan22_ti2v_5b_builds():
    transformer = on_meta(WAN_TRANSFORMER_TI2V_5B)
    assert sum(p.numel() for p in transformer.parameters()) == 4_999_787_712
    assert transformer.patch_embedding.weight.shape == (3072, 48, 1, 2, 2)


@pytest.mark.parametrize("slug", FEW_STEPS)
def test_few_step_schedules_are_the_published_ones(slug):
    model = LITERALS[slug].pipeline.diffusion_model
    expected = torch.tensor([1000.0, 937.5, 833.3333, 625.0])
    first = (model.first_chunk_scheduler or model.scheduler).setup()
    torch.testing.assert_close(first.timesteps, expected, rtol=1e-6, atol=0)
    later = {"2step": [1000.0, 833.3333], "1step": [1000.0]}.get(slug[-5:], expected.tolist())
    found = model.scheduler.setup().timesteps
    torch.testing.assert_close(found, torch.tensor(later), rtol=1e-6, atol=0)
    assert model.guidance_scale is None and model.context_noise == 0
    transformer = model.transformer
    assert transformer.len_t == (1 if "framewise" in slug else 3)
    window = (7, 5, True) if "rerope" in slug else (21, 0, False)
    assert window == (transformer.window_size_t, transformer.sink_size_t, transformer.relative_rope)
    assert model.first_latent_from_image == ("i2v" in slug)
    assert (transformer.latent_height, transformer.latent_width) == (60, 104)


@pytest.mark.parametrize(
    ("slug", "steps", "shift", "scale", "size"),
    [
        ("wan21-t2v-1.3b-480p", 50, 8.0, 6.0, (60, 104)),
        ("wan21-t2v-14b-720p", 50, 5.0, 5.0, (90, 160)),
        ("wan21-i2v-14b-480p", 40, 3.0, 5.0, (60, 104)),
        ("wan22-ti2v-5b-704p", 50, 5.0, 5.0, (44, 80)),
        ("wan22-ti2v-5b-704p-taehv", 50, 5.0, 5.0, (44, 80)),
    ],
)
def test_bidirectional_schedules_are_the_published_ones(slug, steps, shift, scale, size):
    is_22 = slug.startswith("wan22")
    model, runner = LITERALS[slug].pipeline.diffusion_model, LITERALS[slug]
    assert (model.scheduler.num_inference_steps, model.scheduler.shift) == (steps, shift)
    assert model.guidance_scale == scale and runner.negative_prompt
    transformer = model.transformer
    frames = 31 if is_22 else 21
    assert (transformer.len_t, transformer.streaming, runner.total_blocks) == (frames, False, 1)
    assert (transformer.latent_height, transformer.latent_width) == size
    assert runner.fps == (24 if is_22 else 16)
    assert runner.frame_size == ((704, 1280) if is_22 else (8 * size[0], 8 * size[1]))
    assert model.first_frames_from_image == is_22


@pytest.mark.parametrize(
    ("slug", "length", "digest"),
    [
        ("wan21-t2v-1.3b-480p", 137, "ce96e0324e4b54ce"),
        ("wan21-t2v-14b-720p", 137, "ce96e0324e4b54ce"),
        ("wan21-i2v-14b-480p", 142, "412753d092bcf370"),
        ("wan22-ti2v-5b-704p", 137, "ce96e0324e4b54ce"),
        ("lingbot-world-base", 252, "35d64b590ae347df"),
    ],
)
def test_negative_prompts_are_the_published_ones(slug, length, digest):
    prompt = {**LITERALS, **LINGBOT}[slug].negative_prompt
    assert (len(prompt), hashlib.sha256(prompt.encode()).hexdigest()[:16]) == (length, digest)


def test_causal_forcing_takes_the_tensors_that_its_release_names():
    runs = CAUSAL_FORCING.values()
    chosen = {c.runner_name: c.pipeline.diffusion_model.transformer.checkpoint for c in runs}
    assert chosen["causal-forcing-wan2.1-t2v-1.3b-chunkwise"].select[0] == "generator"
    assert chosen["causal-forcing-wan2.1-t2v-1.3b-framewise"].select[0] == "generator_ema"
    assert chosen["causal-forcing-wan2.1-i2v-1.3b-framewise"].select[0] == "generator_ema"


def test_wan22_timesteps_are_the_published_ones():
    timesteps = LITERALS["wan22-ti2v-5b-704p"].pipeline.diffusion_model.scheduler.setup().timesteps
    assert timesteps[:4].tolist() == [999, 995, 991, 987] and len(timesteps) == 50


UNPINNED = {
    "Efficient-Large-Model/LongLive-1.3B",
    "Efficient-Large-Model/LongLive-2.0-5B",
    "Wan-AI/Wan2.2-TI2V-5B",
    "robbyant/lingbot-world-base-cam",
    "robbyant/lingbot-world-fast",
}
"""Repositories that are read at their branch: no commit of theirs is known."""


def shipped_checkpoints() -> dict[str, CheckpointConfig]:
    """Every public weights file that a slug names, by its place; LoRAs state no size."""
    return {
        f"{slug}: {path}": checkpoint
        for slug, config in {**LITERALS, **LINGBOT, **LONGLIVE}.items()
        for path, checkpoint in named_checkpoints(config.pipeline)
        if not path.endswith("loras")
    }


def test_every_file_states_its_commit_and_size():
    commits: dict[str, set[str]] = {}
    for place, checkpoint in shipped_checkpoints().items():
        assert checkpoint.size_bytes > 1e7, place
        pin = (checkpoint.sha256 or checkpoint.commit) if checkpoint.is_address else None
        pin = pin or checkpoint.revision
        commits.setdefault(checkpoint.source, set()).add(pin)
    assert UNPINNED | {"Wan-AI/Wan2.1-T2V-1.3B", "zhuhz22/Causal-Forcing"} < set(commits)
    unpinned = set()
    for source, revisions in commits.items():
        assert len(revisions) == 1, f"{source} is read at several commits"
        if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", revisions.pop() or "main"):
            unpinned.add(source)
    assert unpinned == UNPINNED


STORED_ITEMSIZE = {
    "model_bf16.pt": 2,
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth": 4,
    "taew2_1.pth": 2,
    "taew2_2.pth": 2,
}
"""Bytes per value where a file is published in another type than the manifest counts."""


@pytest.mark.parametrize("name", sorted(MANIFESTS))
def test_sizes_on_disk_are_those_of_the_tensors(name):
    stated = {c.size_bytes for c in shipped_checkpoints().values() if published_name(c) == name}
    tensors = load_manifest(MANIFESTS[name]).values()
    expected = sum(
        math.prod(shape) * STORED_ITEMSIZE.get(name, getattr(torch, dtype).itemsize)
        for shape, dtype in tensors
    )
    assert len(stated) == 1
    # The archive around the tensors weighs most in a small file.
    assert 0 <= stated.pop() / expected - 1 < 3e-3


def test_missing_weights_are_listed_with_disk_memory_and_what_to_type(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    pipeline = LITERALS["self-forcing-wan2.1-t2v-1.3b"].pipeline
    with pytest.raises(CheckpointError) as caught:
        require_weights(pipeline, fetch_all="--download True")
    text = str(caught.value)
    assert "needs 4 checkpoints that are not on this machine, 17.6 GB on disk" in text
    assert "transformer 2.8 GB in bfloat16, KV cache 6.0 GB" in text
    assert "hf download gdhe17/Self-Forcing checkpoints/self_forcing_dmd.pt" in text
    assert text.count("--download True") == 1
    require_weights(with_downloads(pipeline))
    assert not pipeline.decoder.checkpoint.download  # the literal stays as it is
