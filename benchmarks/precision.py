"""Error and cost of lower precision, compared with float32.

``python benchmarks/precision.py --json out.json``. Every variant generates the same rollouts from
the same noise. For the toy world: PSNR against the rendered truth and the float32 frames. For
every case: error of the latents over all steps, bytes of weights and KV cache, and the time of a
step as a ratio in pairs: all variants make step i before any makes step i + 1. With
FLASHDREAMS_GOLDENS_DIR set, the weights, noise and latents of the official code are another case;
its errors are then relative to the official latents. A CPU dequantizes what precision="fp8" stores
in e4m3: its error is exact except for the softmax weights, which a GPU's kernel also rounds
("softmax too"); its time says nothing about a GPU.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import command
import report
import rollout
import torch
from flashdreams_kernels import reference
from safetensors.torch import load_file
from torch import Tensor

from flashdreams.attention.fp8 import why_no_fp8
from flashdreams.infra.config import derive_config
from flashdreams.integrations.self_forcing.config import PIPELINE
from flashdreams.integrations.toy_world.metrics import psnr_db
from flashdreams.models.wan.transformer import WanTransformerConfig
from flashdreams.parallel.environment import Environment, init
from flashdreams.parallel.mesh import Mesh
from flashdreams.runtime.checkpoint import CheckpointConfig
from flashdreams.runtime.stats import sha256_of

sys.path.append(str(Path(__file__).parents[1]))  # the checkout: training/ is not installed
from training.toy_world.evaluate import FPS, HeldOut, draw_held_out, self_rollout

EXACT = "float32"
VARIANTS: dict[str, dict[str, Any]] = {
    EXACT: {},
    "bfloat16": {"dtype": "bfloat16"},
    "fp8": {"precision": "fp8"},
    "fp8, softmax too": {"precision": "fp8"},
    "bfloat16, fp8": {"dtype": "bfloat16", "precision": "fp8"},
    "fp8_gemm": {"precision": "fp8_gemm", "fp8_gemm_min_width": 16},
    "bfloat16, fp8_gemm": {"dtype": "bfloat16", "precision": "fp8_gemm", "fp8_gemm_min_width": 16},
    "KV int8": {"kv_cache_dtype": "int8"},
    "bfloat16, KV int8": {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
}
"""Name -> changed fields of the transformer. The networks are narrower than the default minimum, so
``fp8_gemm`` quantizes all widths here."""
SOFTMAX_TOO = ("fp8, softmax too",)
"""Variants whose attention also rounds the softmax weights to e4m3, as a GPU's kernel does."""
TOY_WORLD = "toy-world"
GOLDEN = "wan-golden"
GOLDEN_STEPS = 4
"""AR steps of the official rollout."""
COLUMNS = (
    "case", "variant", "psnr_truth_db", "psnr_float32_db", "latent_error_max", "latent_error_first",
    "latent_error_last", "kv_cache_mib", "p50_ms", "ratio",
)  # fmt: skip
FIELDS = (
    *("latent_error_max", "latent_error_first", "latent_error_last"),
    *("weights_mib", "kv_cache_mib", "ratio", "steps"),
)


def build_subject(case: str, changes: Mapping[str, Any], device: torch.device) -> rollout.Subject:
    """The pipeline of a slug or of the golden numbers, with a changed transformer.

    Raises:
        ValueError: a method without a KV cache.
    """
    if case == GOLDEN:
        return _golden_subject(changes, device)
    place = Environment(0, 0, 1, device)
    subject = rollout.load_subject(case, place, transformer={"dtype": "float32", **changes})
    if not subject.streaming:
        raise ValueError(f"{case} makes one chunk; the variants need a streaming method.")
    return subject


def _golden_folder() -> Path:
    return Path(os.environ["FLASHDREAMS_GOLDENS_DIR"]) / "b2_self_forcing_tiny"


def _golden_subject(changes: Mapping[str, Any], device: torch.device) -> rollout.Subject:
    """Self-Forcing at the size of the golden data, with its weights and noise."""
    folder = _golden_folder()
    inputs = load_file(folder / "inputs.safetensors")
    sizes = dict(dim=64, ffn_dim=144, num_heads=2, num_layers=3, freq_dim=32, text_dim=64)
    transformer = WanTransformerConfig(
        **{**sizes, "text_len": 16, "len_t": 3, "latent_height": 8, "latent_width": 8, **changes},
        checkpoint=CheckpointConfig(source=str(folder / "weights.safetensors")),
    )
    model = dict(transformer=transformer)
    config = derive_config(PIPELINE, text_encoder=None, decoder=None, diffusion_model=model)

    def noise(index: int, step: int, shape: Sequence[int]) -> Tensor:
        chunk = index % GOLDEN_STEPS
        if step == 0:
            return inputs["noise"][:, 3 * chunk : 3 * chunk + 3].transpose(1, 2)
        return inputs[f"renoise/chunk{chunk}/after_step{step - 1}"][None].transpose(1, 2)

    context = {"text": inputs["prompt_embeds"], "noise": noise}
    pipeline = config.setup(device=device)
    return rollout.Subject(GOLDEN, pipeline, Mesh(), context, lambda index: None, ())


def round_softmax(transformer: torch.nn.Module) -> None:
    """Make self-attention on a CPU round its softmax weights to e4m3."""
    for name, core in transformer.named_modules():
        if name.endswith("self_attn.core"):
            core.backend = reference.fp8_weights_attention


def roll_latents(subject: rollout.Subject, steps: int) -> Tensor:
    """``[B, C, steps * T, H, W]``, the clean latents of a rollout from its start."""
    cache, latents = subject.new_rollout(), []
    for _ in range(steps):
        subject.step(cache)
        latents.append(cache.latent.float().cpu())
    return torch.cat(latents, dim=2)


def relative_rms(error: Tensor, exact: Tensor, steps: int, step: int) -> float:
    """Root mean square of the error of one AR step's latents over that of the latents."""
    parts = (x.chunk(steps, dim=2)[step].square().mean().sqrt() for x in (error, exact))
    return float(torch.div(*parts))


def measure(
    case: str,
    names: Sequence[str],
    device: torch.device,
    repeats: int,
    walks: HeldOut,
    steps: int,
) -> list[dict[str, Any]]:
    """One row per usable variant; for the others the reason is printed.

    Args:
        case: a slug or `GOLDEN`.
        names: names of the variants, float32 first.
        device: device to run on.
        repeats: timed AR steps of each variant.
        walks: walks of the toy world.
        steps: AR steps of a rollout; the golden data has its own number.
    """
    subjects = {EXACT: build_subject(case, VARIANTS[EXACT], device)}
    steps = GOLDEN_STEPS if case == GOLDEN else steps
    latents = {EXACT: roll_latents(subjects[EXACT], steps)}
    for name in names[1:]:
        try:
            subject = build_subject(case, VARIANTS[name], device)
            if name in SOFTMAX_TOO:
                round_softmax(subject.pipeline.diffusion_model.transformer)
            latents[name] = roll_latents(subject, steps)
            subjects[name] = subject
        except Exception as refused:
            sys.stderr.write(f"{case}: {name} cannot be used here: {refused}\n")
    exact = latents[EXACT]
    if case == GOLDEN:
        calls = load_file(_golden_folder() / "rollout_full.safetensors")
        exact = calls["output"].transpose(1, 2)
    frames: dict[str, Tensor] = {}
    if case == TOY_WORLD:
        for name, subject in subjects.items():
            frames[name] = self_rollout(subject.pipeline, walks, walks.scene.to(device)).cpu()
    steps_of = {
        name: partial(subject.step, subject.new_steady_rollout(1))
        for name, subject in subjects.items()
    }
    times = rollout.time_in_turn(steps_of, device, repeats)
    rows = []
    for name, subject in subjects.items():
        error, network = latents[name] - exact, subject.pipeline.diffusion_model.transformer
        row = {
            "case": case,
            "variant": name,
            **report.timing_fields(sorted(times[name])),
            "output_sha256": sha256_of(latents[name]),
            "steps": steps,
            "latent_error_max": float(error.abs().max() / exact.abs().max()),
            "latent_error_first": relative_rms(error, exact, steps, 0),
            "latent_error_last": relative_rms(error, exact, steps, steps - 1),
            "weights_mib": sum(t.nbytes for t in network.state_dict().values()) / 2**20,
            "kv_cache_mib": network.cache_nbytes(1) / 2**20,
            **report.ratio_fields(times[name], times[EXACT]),
        }
        if frames:
            row["psnr_truth_db"] = float(psnr_db(frames[name], walks.truth).mean())
            row["psnr_float32_db"] = float(psnr_db(frames[name], frames[EXACT]).mean())
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "cases", nargs="*", default=[TOY_WORLD, "self-forcing-tiny-random"],
        help="streaming Wan methods",
    )  # fmt: skip
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument(
        "--walks", type=command.count, default=4, help="held-out walks of the toy world"
    )
    parser.add_argument("--seconds", type=command.count, default=10, help="length of a walk")
    parser.add_argument("--steps", type=command.count, default=50, help="AR steps of a rollout")
    parser.add_argument("--threads", type=command.count, default=1, help="CPU threads")
    options = command.parse(parser, arguments)
    torch.set_num_threads(options.threads)
    device, repeats = init(options.device).device, options.repeats or 50
    walks = draw_held_out(options.walks, options.seconds * FPS)
    names = list(dict.fromkeys([EXACT, *options.variants]))
    if device.type == "cuda":  # not a separate variant there
        names = [name for name in names if name not in SOFTMAX_TOO]
    if (reason := why_no_fp8(device, head_dim=128)) is not None:
        sys.stderr.write(f"precision: without fp8, which is not measured here: {reason}.\n")
        names = [name for name in names if "precision" not in VARIANTS[name]]
    cases = list(options.cases)
    if os.environ.get("FLASHDREAMS_GOLDENS_DIR"):
        cases.append(GOLDEN)
    config = {
        "cases": cases,
        "variants": {name: VARIANTS[name] for name in names},
        "repeats": repeats,
        "walks": options.walks,
        "seconds": options.seconds,
        "steps": options.steps,
    }
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    with torch.no_grad():
        for case in cases:
            rows += measure(case, names, device, repeats, walks, options.steps)
            commit = options.git_commit
            found = report.new_report("precision", device, config, rows, commit, FIELDS)
            if options.json is not None:  # in case another case is interrupted
                report.write(found, options.json)
    report.finish(found, options, COLUMNS)


if __name__ == "__main__":
    command.run(main)
