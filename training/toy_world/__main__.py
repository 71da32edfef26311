"""Command line of the toy world's training: ``python -m training.toy_world STAGE``.

Stages, in order: ``codec`` (fit encoder and decoder), ``render`` (fill the pool of clips; may run
beside the next two), ``frames``, ``video``, ``polish`` (the decoder, on rollouts), ``export``. With
``--device cuda`` clips are drawn on the GPU while it trains, and no pool is needed.
"""

import argparse
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flashdreams.integrations.toy_world.codec import PatchDecoder, PatchEncoder
from flashdreams.models.wan.transformer import WanTransformer

from .fit_codec import fit_decoder, fit_encoder, start_from_linear
from .fit_transformer import Trainer
from .polish import polish_decoder
from .pool import ClipPool, Clips, LiveClips, fill
from .worlds import WORLDS, World

STAGES = ("codec", "render", "frames", "video", "polish", "export")


@dataclass(frozen=True)
class Batches:
    """Batch sizes of a step, by type of device."""

    frames: int
    clips: int
    pairs: int
    walks: int


BATCHES = {
    "cpu": Batches(frames=192, clips=12, pairs=24, walks=16),
    "cuda": Batches(frames=512, clips=48, pairs=96, walks=64),
}


@dataclass(frozen=True)
class Job:
    """Shared settings of all stages of one training."""

    world: World
    folder: Path
    device: torch.device
    seed: int

    @property
    def batches(self) -> Batches:
        """Batch sizes for this device."""
        return BATCHES[self.device.type]

    def build_transformer(self) -> WanTransformer:
        """The network as it is trained: without a cache."""
        config = replace(self.world.transformer, streaming=False, attention_backend="sdpa")
        model = WanTransformer(config)
        for block in model.blocks:
            for last in (block.self_attn.o, block.cross_attn.o, list(block.ffn.children())[-1]):
                torch.nn.init.zeros_(next(last.parameters()))
        return model.to(self.device)

    def load_encoder(self) -> PatchEncoder:
        """The linear encoder of an earlier ``codec`` stage."""
        encoder = PatchEncoder(self.world.new_encoder_config())
        encoder.load_state_dict(load_file(self.folder / "encoder.safetensors"))
        return encoder.to(self.device)

    def load_decoder(self) -> PatchDecoder:
        """The decoder of an earlier ``codec`` stage."""
        decoder = PatchDecoder(self.world.new_decoder_config())
        decoder.load_state_dict(load_file(self.folder / "decoder.safetensors"))
        return decoder.to(self.device)

    def save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write a file to the work folder."""
        here = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(here, self.folder / f"{name}.safetensors")

    def clips(self, encoder: PatchEncoder) -> Clips:
        """The pool on disk, or one on the GPU."""
        if self.device.type == "cuda":
            return LiveClips(self.world, encoder, self.seed + 1)
        pool = ClipPool(self.folder / "pool", self.world)
        while pool.filled() < min(2000, len(pool.scene)):
            time.sleep(5)
        return pool

    def fit_codec(self, decoder_steps: int) -> None:
        """Fit the encoder, then the decoder."""
        encoder = fit_encoder(self.world, self.seed, device=self.device)
        self.save("encoder", encoder.state_dict())
        decoder = PatchDecoder(self.world.new_decoder_config()).to(self.device)
        start_from_linear(decoder, encoder)
        if decoder_steps:
            fit_decoder(self.world, decoder, encoder, self.seed, decoder_steps, self.batches.pairs)
        self.save("decoder", decoder.state_dict())

    def train(self, stage: str, seconds: float, peak: float) -> None:
        """Run ``frames`` or ``video`` and save the averaged weights; ``video`` may be repeated."""
        model = self.build_transformer()
        if stage == "video":
            earlier = self.folder / "video.safetensors"
            start = earlier if earlier.exists() else self.folder / "frames.safetensors"
            model.load_state_dict(load_file(start))
        encoder = self.load_encoder()
        trainer = Trainer(model, self.world, self.clips(encoder), encoder.std, self.seed)
        batch = {"frames": self.batches.frames, "video": self.batches.clips}[stage]
        trainer.run(stage, seconds, batch, peak)
        self.save(stage, trainer.average)

    def polish(self, seconds: float) -> None:
        """Train the decoder on rollouts of the transformer."""
        decoder = self.load_decoder()
        weights = self.folder / "video.safetensors"
        polish_decoder(self.world, decoder, weights, self.seed, seconds, self.batches.walks)
        self.save("decoder", decoder.state_dict())

    def export(self) -> None:
        """Write the weights that the package ships, in half precision."""
        target = self.world.weights
        target.mkdir(exist_ok=True)
        sources = {"transformer": "video", "encoder": "encoder", "decoder": "decoder"}
        for name, source in sources.items():
            tensors = load_file(self.folder / f"{source}.safetensors")
            keep = torch.float32 if name == "encoder" else torch.float16
            save_file({k: v.to(keep) for k, v in tensors.items()}, target / f"{name}.safetensors")


def main() -> None:
    """Parse the command line and run one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--world", choices=WORLDS, default="toy-world")
    parser.add_argument("--device", choices=sorted(BATCHES), default="cpu")
    parser.add_argument("--work-dir", type=Path, default=Path("outputs/toy-world-training"))
    parser.add_argument("--seconds", type=float, default=3600, help="length of a stage")
    parser.add_argument("--peak", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument("--clips", type=int, default=60000, help="clips in the pool")
    parser.add_argument("--decoder-steps", type=int, default=2500, help="0: linear")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    world = WORLDS[args.world]
    job = Job(world, args.work_dir, torch.device(args.device), args.seed)
    if args.stage == "codec":
        job.fit_codec(args.decoder_steps)
    elif args.stage == "render":
        pool = ClipPool(job.folder / "pool", world, args.clips)
        fill(pool, world, job.load_encoder(), args.seed + 1)
    elif args.stage == "polish":
        job.polish(args.seconds)
    elif args.stage == "export":
        job.export()
    else:
        job.train(args.stage, args.seconds, args.peak)


if __name__ == "__main__":
    main()
