"""Command line of the toy world's training: ``python -m training.toy_world STAGE``.

Stages, in order: ``codec`` (fit encoder and decoder), ``render`` (fill the pool of clips; may run
beside the next two), ``frames``, ``video``, ``polish`` (the decoder, on rollouts), ``export``.
"""

import argparse
import logging
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flashdreams.integrations.toy_world.codec import (
    PatchDecoder,
    PatchDecoderConfig,
    PatchEncoder,
    PatchEncoderConfig,
)
from flashdreams.integrations.toy_world.config import TRANSFORMER
from flashdreams.models.wan.transformer import WanTransformer

from .fit_codec import fit_decoder, fit_encoder, start_from_linear
from .fit_transformer import Trainer
from .polish import polish_decoder
from .pool import ClipPool, fill

STAGES = ("codec", "render", "frames", "video", "polish", "export")


def build_transformer() -> WanTransformer:
    """The network as it is trained: without a cache."""
    model = WanTransformer(replace(TRANSFORMER, streaming=False))
    for block in model.blocks:
        for last in (block.self_attn.o, block.cross_attn.o, list(block.ffn.children())[-1]):
            torch.nn.init.zeros_(next(last.parameters()))
    return model


def load_encoder(folder: Path) -> PatchEncoder:
    """The linear encoder of an earlier ``codec`` stage."""
    encoder = PatchEncoder(PatchEncoderConfig())
    encoder.load_state_dict(load_file(folder / "encoder.safetensors"))
    return encoder


def train(stage: str, folder: Path, seconds: float, seed: int, peak: float) -> None:
    """Run ``frames`` or ``video`` and save the averaged weights; ``video`` may be repeated."""
    model = build_transformer()
    if stage == "video":
        earlier = folder / "video.safetensors"
        start = earlier if earlier.exists() else folder / "frames.safetensors"
        model.load_state_dict(load_file(start))
    pool = ClipPool(folder / "pool")
    while pool.filled() < 2000:
        time.sleep(5)
    trainer = Trainer(model, pool, load_encoder(folder).std, seed)
    trainer.run(stage, seconds, {"frames": 192, "video": 12}[stage], peak)
    save_file(trainer.average, folder / f"{stage}.safetensors")


def export(folder: Path) -> None:
    """Write the weights that the package ships, in half precision."""
    target = Path(__file__).parents[2] / "flashdreams/integrations/toy_world/weights"
    target.mkdir(exist_ok=True)
    for source, name in (("video", "transformer"), ("encoder", "encoder"), ("decoder", "decoder")):
        tensors = load_file(folder / f"{source}.safetensors")
        keep = torch.float32 if name == "encoder" else torch.float16
        save_file({k: v.to(keep) for k, v in tensors.items()}, target / f"{name}.safetensors")


def main() -> None:
    """Parse the command line and run one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work-dir", type=Path, default=Path("outputs/toy-world-training"))
    parser.add_argument("--seconds", type=float, default=3600, help="length of frames and video")
    parser.add_argument("--peak", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument("--clips", type=int, default=60000, help="clips in the pool")
    parser.add_argument("--decoder-steps", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    folder = args.work_dir
    folder.mkdir(parents=True, exist_ok=True)
    if args.stage == "codec":
        encoder = fit_encoder(args.seed)
        save_file(encoder.state_dict(), folder / "encoder.safetensors")
        decoder = PatchDecoder(PatchDecoderConfig())
        start_from_linear(decoder, encoder)
        fit_decoder(decoder, encoder, args.seed, args.decoder_steps)
        save_file(decoder.state_dict(), folder / "decoder.safetensors")
    elif args.stage == "render":
        fill(ClipPool(folder / "pool", args.clips), load_encoder(folder), args.seed + 1)
    elif args.stage == "polish":
        decoder = PatchDecoder(PatchDecoderConfig())
        decoder.load_state_dict(load_file(folder / "decoder.safetensors"))
        polish_decoder(decoder, folder / "video.safetensors", args.seed, args.seconds)
        save_file(decoder.state_dict(), folder / "decoder.safetensors")
    elif args.stage == "export":
        export(folder)
    else:
        train(args.stage, folder, args.seconds, args.seed, args.peak)


if __name__ == "__main__":
    main()
