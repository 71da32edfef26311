"""LoRAs merged into a Wan transformer while it is loaded, in every form that people publish."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashdreams.infra.component import build_component, check_weights, load_component
from flashdreams.infra.config import derive_config
from flashdreams.infra.identity import hash_weights
from flashdreams.infra.weights import named_checkpoints, require_weights, with_downloads
from flashdreams.integrations.self_forcing.config import TINY_PIPELINE
from flashdreams.models.wan.config import TINY_TRANSFORMER
from flashdreams.runtime.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    LoRA,
    load_checkpoint,
    parse_lora,
)

RANK = 3
LINEARS = [
    f"blocks.{block}.{name}"
    for block in range(2)
    for name in (
        *(f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"),
        *("ffn.0", "ffn.2"),
    )
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> CheckpointConfig:
    torch.manual_seed(0)
    weights = TINY_TRANSFORMER.setup().state_dict()
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file({name: torch.randn_like(x) for name, x in weights.items()}, path)
    return CheckpointConfig(source=str(path))


def matrices(base: CheckpointConfig, seed: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    """down ``[r, in]`` and up ``[out, r]`` of every linear layer of the blocks."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {n: load_file(base.source)[f"{n}.weight"].shape for n in LINEARS}
    return {
        name: (
            torch.randn(RANK, columns, generator=draw),
            torch.randn(rows, RANK, generator=draw),
        )
        for name, (rows, columns) in shapes.items()
    }


def peft(pairs: dict, alpha: float) -> dict[str, Tensor]:
    named = {}
    for name, (down, up) in pairs.items():
        named[f"base_model.model.{name}.lora_A.default.weight"] = down
        named[f"base_model.model.{name}.lora_B.default.weight"] = up * alpha / RANK
    return named


def kohya(pairs: dict, alpha: float) -> dict[str, Tensor]:
    named = {}
    for name, (down, up) in pairs.items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        named |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        named[f"{stem}.alpha"] = torch.tensor(alpha)
    return named


def comfyui(pairs: dict, alpha: float) -> dict[str, Tensor]:
    named = {}
    for name, (down, up) in pairs.items():
        stem = f"diffusion_model.{name}"
        named |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        named[f"{stem}.alpha"] = torch.tensor(alpha)
    return named


def diffusers(pairs: dict, alpha: float) -> dict[str, Tensor]:
    parts = {"self_attn": "attn1", "cross_attn": "attn2", "ffn.0": "ffn.net.0.proj"}
    parts |= {"ffn.2": "ffn.net.2", ".o": ".to_out.0", ".q": ".to_q", ".k": ".to_k", ".v": ".to_v"}
    named = {}
    for name, (down, up) in pairs.items():
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        named[f"transformer.{name}.lora_A.weight"] = down
        named[f"transformer.{name}.lora_B.weight"] = up * alpha / RANK
    return named


DIALECTS = [peft, kohya, comfyui, diffusers]


def load(base: CheckpointConfig, *loras: str, dtype: str = "float32") -> dict[str, Tensor]:
    config = derive_config(TINY_TRANSFORMER, checkpoint=base, loras=loras, dtype=dtype)
    component = build_component(config)
    load_component(component, CPU)
    return component.state_dict()


def merged(base: CheckpointConfig, *updates: tuple[dict, float]) -> dict[str, Tensor]:
    """The formula, written out: W + sum of weight * up @ down."""
    weights = load_file(base.source)
    for pairs, scale in updates:
        for name, (down, up) in pairs.items():
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + scale * (up @ down)
    return weights


def assert_same(found: dict, expected: dict, atol: float = 5e-6) -> None:
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.__name__)
def test_every_dialect_gives_the_formula(dialect, base, tmp_path: Path) -> None:
    pairs = matrices(base)
    save_file(dialect(pairs, alpha=6.0), tmp_path / "lora.safetensors")
    found = load(base, f"{tmp_path}/lora.safetensors:0.5")
    assert_same(found, merged(base, (pairs, 0.5 * 6.0 / RANK)))
    with pytest.raises(AssertionError):  # negative control: alpha forgotten
        assert_same(found, merged(base, (pairs, 0.5)))


def test_several_are_summed_each_with_its_weight(base, tmp_path) -> None:
    first, second = matrices(base, 1), matrices(base, 2)
    save_file(kohya(first, 3.0), tmp_path / "a.safetensors")
    torch.save({"generator_lora": peft(second, 3.0), "step": 7}, tmp_path / "b.pt")
    found = load(base, f"{tmp_path}/a.safetensors:-0.25", f"{tmp_path}/b.pt")
    assert_same(found, merged(base, (first, -0.25), (second, 1.0)))


def test_the_sum_is_rounded_once(base, tmp_path) -> None:
    pairs = matrices(base)
    save_file(kohya(pairs, 3.0), tmp_path / "a.safetensors")
    found = load(base, f"{tmp_path}/a.safetensors", dtype="bfloat16")
    wanted = merged(base, (pairs, 1.0))
    twice = load_file(base.source)
    differing = 0
    for name in LINEARS:
        weight = found[f"{name}.weight"]
        assert torch.equal(weight, wanted[f"{name}.weight"].bfloat16())
        down, up = pairs[name]
        rounded = twice[f"{name}.weight"].bfloat16() + (up @ down).bfloat16()
        differing += int((rounded != weight).sum())
    assert differing > 100  # negative control: a merge in bfloat16


def test_differences_of_weights_biases_and_modulations_are_added(base, tmp_path) -> None:
    given = load_file(base.source)
    changed = {
        "blocks.0.self_attn.norm_q.weight": "diffusion_model.blocks.0.self_attn.norm_q.diff",
        "blocks.1.ffn.0.bias": "diffusion_model.blocks.1.ffn.0.diff_b",
        "blocks.1.modulation": "diffusion_model.blocks.1.diff_m",
        "patch_embedding.weight": "diffusion_model.patch_embedding.diff",
    }
    save_file({new: given[old] for old, new in changed.items()}, tmp_path / "d.safetensors")
    found = load(base, f"{tmp_path}/d.safetensors:0.5")
    assert_same(found, {n: 1.5 * x if n in changed else x for n, x in given.items()})


def test_the_patch_embedding_has_a_product_too(base, tmp_path) -> None:
    weight = load_file(base.source)["patch_embedding.weight"]
    down, up = torch.randn(2, *weight.shape[1:]), torch.randn(len(weight), 2, 1, 1, 1)
    stem = "diffusion_model.patch_embedding"
    content = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    save_file(content, tmp_path / "p.safetensors")
    found = load(base, f"{tmp_path}/p.safetensors")["patch_embedding.weight"]
    expected = weight + (up.flatten(1) @ down.flatten(1)).view_as(weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


def test_settings_of_peft_beside_the_file_give_alpha(base, tmp_path) -> None:
    pairs = matrices(base)
    save_file(peft(pairs, float(RANK)), tmp_path / "adapter_model.safetensors")
    settings = {"r": RANK, "lora_alpha": 12}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert_same(load(base, str(tmp_path)), merged(base, (pairs, 12 / RANK)))
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora, which is not supported"):
        load(base, str(tmp_path))


@pytest.mark.parametrize("alpha", ["8", True, None, float("nan"), 10**400])
def test_an_alpha_of_peft_that_is_no_number_is_refused(alpha, base, tmp_path) -> None:
    save_file(peft(matrices(base), float(RANK)), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
    with pytest.raises(CheckpointError, match=r"lora_alpha of adapter_config\.json. cannot be"):
        load(base, str(tmp_path))


def test_parts_of_an_update_that_make_no_numbers_are_refused(base, tmp_path) -> None:
    named, path = kohya(matrices(base), 3.0), tmp_path / "a.safetensors"
    alpha = next(name for name in named if name.endswith(".alpha"))
    stem = alpha.removesuffix(".alpha")
    down, up = f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"
    for changed, message in (
        ({alpha: torch.ones(3)}, r"alpha \[3\] must be a single number"),
        ({down: named[down][:0], up: named[up][:, :0]}, "have rank 0"),
        ({down: named[down].to(torch.int8)}, "torch.int8, not a float"),
    ):
        save_file({name: x.contiguous() for name, x in (named | changed).items()}, path)
        with pytest.raises(CheckpointError, match=message):
            load(base, str(path))


def test_a_slice_takes_its_part_of_the_same_bits(base, tmp_path) -> None:
    save_file(kohya(matrices(base), 3.0), tmp_path / "a.safetensors")
    lora = LoRA(checkpoint=CheckpointConfig(source=f"{tmp_path}/a.safetensors"))
    whole = load(base, f"{tmp_path}/a.safetensors")
    module = TINY_TRANSFORMER.setup()
    rows, columns = "blocks.0.self_attn.q.weight", "blocks.1.ffn.2.weight"
    packed = "blocks.1.self_attn.q.weight"
    module.blocks[0].self_attn.q.weight = torch.nn.Parameter(torch.zeros(16, 48))
    module.blocks[1].self_attn.q.weight = torch.nn.Parameter(torch.zeros(24, 48))
    module.blocks[1].ffn[2].weight = torch.nn.Parameter(torch.zeros(48, 32))
    slices = {rows: (0, 16, 16, 48), columns: (1, 64, 32, 96), packed: (0, 8, 8, 48, 3)}
    report = load_checkpoint(module, base, slices=slices, loras=[lora])
    assert report.updated == len(LINEARS)
    found = module.state_dict()
    assert torch.equal(found[rows], whole[rows][16:32])
    assert torch.equal(found[columns], whole[columns][:, 64:])
    assert torch.equal(found[packed], whole[packed].view(3, 16, 48)[:, 8:].flatten(0, 1))


def test_weights_without_a_file_are_merged_in_place(base, tmp_path) -> None:
    pairs = matrices(base)
    save_file(comfyui(pairs, 3.0), tmp_path / "a.safetensors")
    config = derive_config(TINY_TRANSFORMER, loras=(f"{tmp_path}/a.safetensors:2",))
    component = build_component(config)
    before = {name: x.clone() for name, x in component.state_dict().items()}
    load_component(component, CPU)
    for name, (down, up) in pairs.items():
        expected = before[f"{name}.weight"] + 2 * (up @ down)
        torch.testing.assert_close(component.get_parameter(f"{name}.weight").data, expected)


def one_pair(**changes) -> dict[str, Tensor]:
    stem = "blocks.0.ffn.0"
    down, up = torch.ones(RANK, 48), torch.ones(96, RANK)
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up} | changes


REFUSED = {
    "another rank": (
        one_pair(**{"blocks.0.ffn.0.lora_up.weight": torch.ones(96, 4)}),
        r"blocks.0.ffn.0.weight rank 4 in up \[96, 4\], rank 3 in down \[3, 48\]",
    ),
    "another model": (
        one_pair(**{"blocks.0.ffn.0.lora_down.weight": torch.ones(RANK, 64)}),
        r"\[96, 3\] by down \[3, 64\] in the file, \[96, 48\] in the model",
    ),
    "no such target": (
        {k.replace("blocks.0", "blocks.7"): x for k, x in one_pair().items()},
        "1 without a target in the model:\n    blocks.7.ffn.0.weight",
    ),
    "an incomplete pair": (
        {"blocks.0.ffn.0.lora_down.weight": torch.ones(RANK, 48)},
        "no tensor for up",
    ),
    "DoRA": (one_pair(**{"blocks.0.ffn.0.dora_scale": torch.ones(96, 1)}), "of no known kind"),
    "a difference of another shape": (
        {"blocks.0.ffn.0.diff_b": torch.ones(7)},
        r"\[7\] in the file, \[96\] in the model",
    ),
    "no LoRA at all": ({"blocks.0.ffn.0.weight": torch.ones(96, 48)}, "of no known kind"),
    "twice": (
        one_pair(**{f"diffusion_model.{k}": x for k, x in one_pair().items()}),
        "changed twice",
    ),
    "an alpha alone": ({"blocks.0.ffn.0.alpha": torch.ones(())}, "no update"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(case, base, tmp_path) -> None:
    content, said = REFUSED[case]
    save_file(content, tmp_path / "x.safetensors")
    config = derive_config(TINY_TRANSFORMER, checkpoint=base, loras=(f"{tmp_path}/x.safetensors",))
    component = build_component(config)
    for refuse in (check_weights, lambda c: load_component(c, CPU)):
        with pytest.raises(CheckpointError, match=said) as caught:
            refuse(component)
        assert "x.safetensors" in str(caught.value)
    assert all(x.is_meta for x in component.parameters())


def test_a_lora_is_refused_before_the_text_encoder_is_read(base, tmp_path, monkeypatch) -> None:
    content, _ = REFUSED["no such target"]
    save_file(content, tmp_path / "x.safetensors")
    monkeypatch.setattr("flashdreams.infra.assembly.load_component", lambda *_: pytest.fail("read"))
    transformer = dict(
        **{k: getattr(TINY_TRANSFORMER, k) for k in ("window_size_t", "sink_size_t", "num_layers")},
        checkpoint=base,
        loras=(f"{tmp_path}/x.safetensors",),
    )
    config = derive_config(TINY_PIPELINE, diffusion_model=dict(transformer=transformer))
    with pytest.raises(CheckpointError, match="without a target"):
        config.setup(device="cpu")


@pytest.mark.parametrize(
    ("text", "source", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:-0.5", "a.safetensors", -0.5),
        ("hf://org/repo/a.pt", "hf://org/repo/a.pt", 1.0),
        ("hf://org/repo/a.pt:2", "hf://org/repo/a.pt", 2.0),
        ("package:some.package/a.safetensors", "package:some.package/a.safetensors", 1.0),
    ],
)
def test_sources_and_weights_are_told_apart(text, source, weight) -> None:
    lora = parse_lora(text)
    assert (lora.checkpoint.source, lora.weight) == (source, weight)


@pytest.mark.parametrize("text", ["", "a.safetensors:", "a:heavy", "a:nan", "hf://org/repo:1"])
def test_texts_that_name_no_lora_are_refused_with_the_config(text) -> None:
    with pytest.raises(ValueError, match="LoRA"):
        derive_config(TINY_TRANSFORMER, loras=(text,))


def test_a_missing_file_is_said_with_all_other_weights(base) -> None:
    lora = "hf://Efficient-Large-Model/LongLive-1.3B/models/lora.pt"
    config = derive_config(
        TINY_PIPELINE, diffusion_model=dict(transformer=dict(checkpoint=base, loras=(lora,)))
    )
    found = [checkpoint.source for _, checkpoint in named_checkpoints(config)]
    assert found == [base.source, lora]
    with pytest.raises(CheckpointError) as caught:
        require_weights(config)
    text = str(caught.value)
    assert "LoRA of --pipeline.diffusion-model.transformer.loras:" in text
    assert "hf download Efficient-Large-Model/LongLive-1.3B models/lora.pt" in text
    assert "--pipeline.diffusion-model.transformer.checkpoint.download True" in text
    require_weights(with_downloads(config))


def test_a_missing_file_on_this_machine_is_not_advised_to_be_downloaded(base, tmp_path) -> None:
    """Nor is it taken for one that will be fetched, once downloads are allowed."""
    here, web = tmp_path / "style.safetensors", "hf://org/name/models/lora.pt"

    def said(*loras: str, download: bool = False) -> str:
        transformer = dict(checkpoint=base, loras=loras)
        config = derive_config(TINY_PIPELINE, diffusion_model=dict(transformer=transformer))
        with pytest.raises(CheckpointError) as caught:
            require_weights(
                with_downloads(config) if download else config, fetch_all="--download True"
            )
        return str(caught.value)

    for text in (said(str(here)), said(str(here), web, download=True)):
        assert "needs 1 checkpoint that is not on this machine" in text
        assert f"Not on this machine: {here}." in text and "--download" not in text
        assert text.endswith("with --pipeline.diffusion-model.transformer.loras.")
    both = said(str(here), web)
    assert both.endswith("To let this program download those with a command: --download True.")
    assert both.count("Download it with: hf download org/name models/lora.pt") == 1
    assert "download all of them: --download True" in said(web)
    here.touch()
    assert str(here) not in said(str(here), web), "the advice helps: a file of that name"


def test_each_of_several_loras_is_part_of_the_hash_of_the_weights(base, tmp_path):
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    transformer = dict(checkpoint=base, loras=tuple(map(str, paths)))
    config = derive_config(TINY_PIPELINE, diffusion_model=dict(transformer=transformer))
    hashes = []
    for first, second in (("x", "y"), ("z", "y"), ("x", "z"), ("x", "y")):
        paths[0].write_text(first)
        paths[1].write_text(second)
        hashes.append(hash_weights(config)["diffusion_model.transformer.loras"])
    assert len(set(hashes)) == 3 and hashes[0] == hashes[3]
