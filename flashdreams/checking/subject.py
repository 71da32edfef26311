"""The object of the checks: a registered method, scaled down, and its rollouts."""

import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashdreams.checking.small import small_pipeline
from flashdreams.infra.config import config_fields, derive_config
from flashdreams.infra.decoder.base import Decoder
from flashdreams.infra.runner import Runner, RunnerConfig
from flashdreams.infra.session import Session
from flashdreams.parallel.mesh import ParallelConfig
from flashdreams.runtime.checkpoint import CheckpointConfig

PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Of tensors that a method is given."""

MAX_STEPS = 9
"""Most AR steps of a checked rollout; fewer if they fill the window and evict once."""

EXAMPLE_INPUT: dict[str, Any] = {"test_image": True, "actions": "w9 l5 wj8 d24 wl24"}
"""Values for fields of a runner's config that a user has to fill in."""

STREAMED = {"pose_mode": "streaming"}
"""Values of fields that choose between a path known in advance and a streamed one."""


@dataclass(frozen=True)
class Subject:
    """A method at full size, and the variant of it that the checks run."""

    full: RunnerConfig
    """As it is registered."""
    config: RunnerConfig
    """Small, on the CPU, in float32."""
    size: str
    """What the variant is, for the report."""
    text_size: tuple[int, int] | None = None
    """Rows and channels of embeddings that replace prompts; None: the method encodes them."""
    plan_changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the transformer's plan that are tried out, by name."""

    @property
    def transformer(self) -> Any:
        """Config of the small transformer."""
        return self.config.pipeline.diffusion_model.transformer

    @property
    def streaming(self) -> bool:
        """Whether a rollout has several AR steps."""
        return bool(getattr(self.transformer, "streaming", True))

    def resized(self, height: int, width: int) -> "Subject":
        """The same at another latent size."""
        sizes = {"latent_height": height, "latent_width": width}
        pipeline = derive_config(self.config.pipeline, diffusion_model={"transformer": sizes})
        return dataclasses.replace(self, config=derive_config(self.config, pipeline=pipeline))

    def in_dtype(self, dtype: str) -> "Subject":
        """The same with a transformer of another type."""
        pipeline = derive_config(
            self.config.pipeline, diffusion_model={"transformer": {"dtype": dtype}}
        )
        return dataclasses.replace(self, config=derive_config(self.config, pipeline=pipeline))

    def open(self, **degrees: Any) -> "Bench":
        """Build the method on the ranks that there are.

        Args:
            degrees: fields of `ParallelConfig`.
        """
        own = Path(tempfile.mkdtemp(dir=self.config.output_dir))  # two runs share no folder
        config = derive_config(self.config, parallel=ParallelConfig(**degrees), output_dir=own)
        with contextlib.redirect_stdout(io.StringIO()), _changed_plan(config, self.plan_changes):
            runner = config.setup()
        runner.pipeline.observers.clear()  # nothing of a check is recorded
        return Bench(self, runner)


@contextlib.contextmanager
def _changed_plan(config: RunnerConfig, changes: Mapping[str, Any]) -> Iterator[None]:
    """Change fields of the transformer's plan while a pipeline is built."""
    kind = config.pipeline.diffusion_model.transformer._target
    if not changes:
        yield
        return
    own = kind.__dict__.get("parallel_plan")
    original = kind.parallel_plan

    def changed(self: Any) -> Any:
        plan: Any = original(self)
        merged = {name: _merged(getattr(plan, name), more) for name, more in changes.items()}
        return dataclasses.replace(plan, **merged)

    kind.parallel_plan = changed  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del kind.parallel_plan
        else:
            kind.parallel_plan = own  # type: ignore[method-assign]


def _merged(value: Any, more: Any) -> Any:
    return {**value, **more} if isinstance(value, Mapping) else (*value, *more)


class Bench:
    """A built method, and rollouts of it."""

    def __init__(self, subject: Subject, runner: Runner) -> None:
        self.subject = subject
        self.runner = runner
        self.pipeline = runner.pipeline
        self.transformer = runner.pipeline.diffusion_model.transformer
        most = MAX_STEPS if subject.streaming else 1
        self.steps = max(1, min(most, max(4, self.transformer.warm_up_steps + 1)))

    def conditions(self) -> dict[str, Any]:
        """Keywords of ``initialize_cache``: those of the runner, with embeddings for prompts."""
        found = dict(self.runner.conditions())
        if self.subject.text_size is None:
            return found
        for number, name in enumerate(("text", "negative_text")):
            if name in found:
                generator = torch.Generator().manual_seed(number)
                size = (1, *self.subject.text_size)
                found[name] = torch.randn(size, **PLAIN, generator=generator)
        return found

    def begin(self, seed: int = 0, steered: bool = True, **conditions: Any) -> Session:
        """A session with the commands of the runner.

        Args:
            seed: of the noise.
            steered: whether it gets those commands.
            conditions: replace those of the runner.
        """
        given = {**self.conditions(), **conditions}
        session = Session(self.pipeline, given, seed=seed, controller=self.runner.controller())
        if steered:
            self.submit(session, 0)
        return session

    def submit(self, session: Session, first_frame: int) -> None:
        """Submit commands to a session from a pixel frame on."""
        if self.runner.is_rank_zero and session.controller is not None:
            for command in self.runner.commands():
                if command.at_frame is None or command.at_frame >= first_frame:
                    session.submit(command)

    def roll(self, seed: int = 0, steps: int | None = None, **start: Any) -> list["Chunk"]:
        """A rollout from its beginning, as from ``begin``, whose values are all finite."""
        session = self.begin(seed, **start)
        chunks = [self.step(session) for _ in range(steps or self.steps)]
        self.pipeline.check_values(session.cache)
        return chunks

    def step(self, session: Session) -> "Chunk":
        """One AR step."""
        done = session.step()
        latent = session.cache.latent
        return Chunk(
            done.frames,
            None if latent is None else latent.clone(),
            None if done.chunk is None else done.chunk.clone(),
        )

    @property
    def has_decoder(self) -> bool:
        """Whether chunks are pixel frames."""
        return isinstance(self.pipeline.decoder, Decoder)


@dataclass(frozen=True)
class Chunk:
    """What an AR step made."""

    frames: range
    """Pixel frames that the pipeline announced."""
    latent: Tensor | None
    """``[B, C, T, H, W]`` float32."""
    pixels: Tensor | None
    """``[B, F, 3, height, width]``; without a decoder the latent."""


def same_bits(a: list[Chunk], b: list[Chunk]) -> bool:
    """Whether two rollouts have the same latents and frames."""
    pairs = [(x.latent, y.latent) for x, y in zip(a, b, strict=True)]
    pairs += [(x.pixels, y.pixels) for x, y in zip(a, b, strict=True)]
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def first_difference(a: list[Chunk], b: list[Chunk]) -> str:
    """Where two rollouts begin to differ, for a message."""
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        if not same_bits([x], [y]):
            return f"from AR step {index} on (largest difference {relative_error([x], [y]):.1e})"
    return "nowhere"


def relative_error(a: list[Chunk], b: list[Chunk]) -> float:
    """Largest difference of two rollouts' latents, as a share of the largest latent."""
    largest = max(float(y.latent.abs().max()) for y in b if y.latent is not None)
    differences = [
        float((x.latent.double() - y.latent.double()).abs().max())
        for x, y in zip(a, b, strict=True)
        if x.latent is not None and y.latent is not None
    ]
    return max(differences) / max(largest, 1e-30)


def new_subject(full: RunnerConfig, folder: Path) -> Subject:
    """Make a registered method small enough to be checked.

    Args:
        full: as registered.
        folder: for drawn weights and for what the runner writes.

    Raises:
        ValueError: a component stays large; the message says what to add.
    """
    names = config_fields(full)
    example = {n: v for n, v in EXAMPLE_INPUT.items() if n in names and not getattr(full, n)}
    small = small_pipeline(full.pipeline)
    pipeline = _with_drawn_weights(small.config, folder)
    changes = {"pipeline": pipeline, "device": "cpu", "output_dir": folder}
    changes |= {n: v for n, v in STREAMED.items() if n in names}
    changes |= {n: None for n in ("height", "width", "prompt_embeds") if n in names}
    try:
        config = derive_config(full, **changes, **example)
    except ValueError:  # a method with other keys, which takes the switches alone
        config = derive_config(full, **changes, **{n: v for n, v in example.items() if v is True})
    size = "as registered, in float32 on the CPU"
    if small.shrunk:
        size = f"at toy size ({', '.join(small.shrunk)}), in float32 on the CPU"
    return Subject(full, config, size, small.text_size)


def _with_drawn_weights(pipeline: Any, folder: Path) -> Any:
    """The pipeline with a file for the transformer's weights, where it has none.

    Zero-initialised parameters are random too: otherwise their inputs would not be checked.
    With a file, the checks follow the path of real weights: meta build, load, split over ranks.
    """
    config = pipeline.diffusion_model.transformer
    if config.checkpoint is not None:
        return pipeline
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = {n: x.clone() for n, x in config.setup().state_dict().items()}
        for x in weights.values():
            if x.is_floating_point() and not x.any():
                x.normal_(std=0.05)
    if not weights:
        return pipeline
    file = folder / "transformer.safetensors"
    save_file({name: x.contiguous() for name, x in weights.items()}, file)
    checkpoint = CheckpointConfig(source=str(file))
    return derive_config(pipeline, diffusion_model={"transformer": {"checkpoint": checkpoint}})
