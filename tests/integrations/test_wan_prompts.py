"""Prompts are refused before any weights are fetched or read."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from flashdreams import run
from flashdreams.infra import component, weights
from flashdreams.infra.config import derive_config
from flashdreams.infra.prompt import save_prompt_embeds
from flashdreams.integrations.self_forcing.config import TINY_RUNNER as SELF_FORCING
from flashdreams.integrations.wan21.config import T2V_TINY_RUNNER
from flashdreams.models import umt5
from flashdreams.models.umt5 import UMT5TextEncoder
from flashdreams.runtime.checkpoint import CheckpointConfig
from tests.tiny_umt5 import tiny_config, write_tokenizer

for package in ("transformers", "tokenizers", "ftfy"):
    pytest.importorskip(package)

FITS = " ".join(["street"] * 31)
LONG = f"{FITS} at night"
REFUSED = (
    "prompt 0 has 34 tokens, 32 are allowed: shorten it by 2, or cut off 'at night' with "
    "--pipeline.text-encoder.truncate True"
)


@pytest.fixture
def encoder(tmp_path):
    """Config of a tiny UMT5 with its files in a folder of their own."""
    folder = tmp_path / "files"
    folder.mkdir()
    sizes = {"text_dim": 32, "text_len": 32, "num_layers": 1}
    torch.manual_seed(0)
    save_file(dict(UMT5TextEncoder(tiny_config(**sizes)).encoder.state_dict(prefix="encoder.")),
              folder / "t5.safetensors")  # fmt: skip
    return tiny_config(
        **sizes,
        tokenizer=write_tokenizer(folder),
        checkpoint=CheckpointConfig(source=str(folder / "t5.safetensors")),
    )


@pytest.fixture
def seen(monkeypatch):
    """What was fetched and read, in order; the tokenizer among it."""
    found = []

    def watch(module, name, what):
        function = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *args, **options: (found.append(what), function(*args, **options))[1],
        )

    watch(umt5, "load_tokenizer", "tokenizer")
    watch(weights, "ensure_local", "fetch")
    watch(component, "load_checkpoint", "weights")
    return found


@pytest.fixture
def start(encoder, tmp_path, capsys):
    """Run a runner's config with this encoder: exit code and what it said on stderr."""

    def start(runner, pipeline=None, **fields):
        pipeline = {"text_encoder": encoder} if pipeline is None else pipeline
        folder = tmp_path / "out"
        blocks = 1 if runner is T2V_TINY_RUNNER else 2
        config = derive_config(
            runner,
            pipeline=pipeline,
            output_dir=folder,
            device="cpu",
            total_blocks=blocks,
            **fields,
        )
        capsys.readouterr()
        code = run._run(config, debug=False)
        return code, capsys.readouterr().err, sorted(path.name for path in folder.iterdir())

    return start


def test_a_long_prompt_is_refused_before_weights_are_read(start, seen, tmp_path):
    code, said, files = start(SELF_FORCING, prompt=LONG)
    assert (code, said) == (2, f"flashdreams-run: error: --prompt: {REFUSED}\n")
    assert seen == ["tokenizer"] and files == []
    (tmp_path / "prompt.txt").write_text(LONG)
    path = tmp_path / "prompt.txt"
    code, said, files = start(SELF_FORCING, prompt_path=path)
    assert (code, said) == (2, f"flashdreams-run: error: --prompt-path {path}: {REFUSED}\n")
    assert seen == ["tokenizer"] * 2 and files == []


def test_a_long_negative_prompt_is_refused_as_early(start, seen):
    code, said, files = start(T2V_TINY_RUNNER, prompt=FITS, negative_prompt=LONG)
    assert (code, said) == (2, f"flashdreams-run: error: --negative-prompt: {REFUSED}\n")
    assert seen == ["tokenizer"] and files == []


@pytest.mark.parametrize("runner", [SELF_FORCING, T2V_TINY_RUNNER])
def test_a_prompt_that_just_fits_is_run_with_one_tokenizer(runner, start, seen):
    code, _, files = start(runner, prompt=FITS)
    assert code == 0 and seen == ["tokenizer", "weights", "weights"], "headers, then all"
    assert f"stats_{runner.runner_name}.json" in files


def test_of_all_files_the_tokenizer_alone_is_fetched_for_a_long_prompt(
    start, seen, encoder, monkeypatch
):
    """Negative control: for one that fits the others follow."""
    source = CheckpointConfig(source="org/repo", file="tokenizer.json", download=True)
    fetched, local = [], encoder.tokenizer
    ensure = umt5.ensure_local

    def fetch(config, **options):
        fetched.append(config.source)
        return ensure(local if config == source else config)

    monkeypatch.setattr(umt5, "ensure_local", fetch)
    monkeypatch.setattr(weights, "ensure_local", fetch)
    online = derive_config(encoder, tokenizer=source, checkpoint={"download": True})
    assert start(SELF_FORCING, {"text_encoder": online}, prompt=LONG)[0] == 2
    assert fetched == ["org/repo"] and seen == ["tokenizer"]
    fetched.clear()
    assert start(SELF_FORCING, {"text_encoder": online}, prompt=FITS)[0] == 0
    assert sorted(fetched) == sorted(["org/repo", "org/repo", encoder.checkpoint.source])


def test_offline_an_absent_tokenizer_is_named_and_nothing_is_read(
    start, seen, encoder, monkeypatch, tmp_path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = CheckpointConfig(source="org/repo", file="tokenizer.json", download=True)
    absent = derive_config(encoder, tokenizer=source)
    code, said, files = start(SELF_FORCING, {"text_encoder": absent}, prompt=FITS)
    assert code == 1 and "tokenizer.json" in said and "HF_HUB_OFFLINE is set" in said
    assert seen == ["tokenizer"] and files == []


def test_a_missing_package_is_named_before_weights_are_read(start, seen, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    code, said, files = start(SELF_FORCING, prompt=FITS)
    assert code == 1 and "pip install 'ftfy" in said
    assert seen == [] and files == []


def test_embeddings_need_nothing_of_it(start, seen, monkeypatch, tmp_path):
    for package in ("transformers", "tokenizers", "ftfy"):
        monkeypatch.setitem(sys.modules, package, None)
    save_prompt_embeds(tmp_path / "prompt.safetensors", torch.zeros(1, 32, 32))
    code, _, _ = start(SELF_FORCING, prompt=LONG, prompt_embeds=tmp_path / "prompt.safetensors")
    assert code == 0 and seen == []
    code, said, _ = start(SELF_FORCING, prompt=FITS)
    assert code == 1 and "not installed: transformers" in said


def test_a_pipeline_still_refuses_a_long_prompt_at_once(encoder):
    pipeline = derive_config(SELF_FORCING.pipeline, text_encoder=encoder).setup(device="cpu")
    with pytest.raises(ValueError, match=REFUSED):
        pipeline.initialize_cache(text=[LONG])
    cache = pipeline.initialize_cache(text=["night"])
    before = cache.context["text"]
    pipeline.generate(autoregressive_index=0, cache=cache)
    with pytest.raises(ValueError, match=REFUSED):
        pipeline.update_prompt(cache, LONG)
    assert cache.context["text"] is before and cache.pending
    pipeline.update_prompt(cache, FITS)
    assert cache.context["text"] is not before


def test_a_prompt_encoded_beforehand_makes_the_same_frames(start, encoder, tmp_path):
    """Bit for bit: the encoder alone is the one of the pipeline."""
    alone = component.build_component(encoder)
    component.load_component(alone, torch.device("cpu"))
    save_prompt_embeds(tmp_path / "night.safetensors", alone(["a street at night"]))

    def frames(**fields):
        assert start(SELF_FORCING, hash_frames=True, **fields)[0] == 0
        stats = json.loads((tmp_path / "out" / "stats_self-forcing-tiny-random.json").read_text())
        return [record["frames_sha256"] for record in stats["records"]]

    made = frames(prompt_embeds=tmp_path / "night.safetensors")
    assert made == frames(prompt="a street at night")
    assert made != frames(prompt="a street at day")
