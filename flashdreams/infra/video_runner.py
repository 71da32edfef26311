"""Text and images to video on the command line, for all integrations that take a prompt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from flashdreams.infra.config import derive_config
from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.infra.prompt import (
    load_prompt_embeds,
    plan_shots,
    read_prompt,
    read_shot_file,
)
from flashdreams.infra.runner import Runner, RunnerConfig
from flashdreams.infra.session import Command
from flashdreams.infra.weights import with_downloads
from flashdreams.parallel.environment import process_rank
from flashdreams.runtime.checkpoint import CheckpointError
from flashdreams.runtime.image_file import (
    drawn_image,
    has_shape,
    image_size,
    load_image,
    open_image,
    to_pixels,
)
from flashdreams.runtime.text import tell

SPATIAL_FACTOR = 8
"""Pixels per latent row or column if the decoder's config has no ``spatial_factor``."""


TIME_FACTOR = 4
"""Pixel frames per latent frame after the first."""

MAX_PIXELS = 2**14
"""Largest height and width; larger ones are mistakes that would take minutes to fail."""


VIDEO_FIELDS = (
    *("len_t", "latent_height", "latent_width", "patch_size"),
    *("text_dim", "text_len", "streaming"),
)
"""Fields of a transformer's config that the runners read; `WanTransformerConfig` has all."""


@dataclass(kw_only=True)
class TextToVideoRunnerConfig(RunnerConfig):
    """Text to video, streamed chunk by chunk."""

    _target: type["TextToVideoRunner"] = field(default_factory=lambda: TextToVideoRunner)

    prompt: str = (
        "A red fox trots along a snowy forest path at sunrise, mist between the pines, "
        "the camera follows close behind."
    )
    """What the video shows."""
    prompt_path: Path | None = None
    """A text file to read the prompt from."""
    shot: tuple[str, ...] = ()
    """Several prompts in order, instead of --prompt: TEXT for each, spread evenly over the
    chunks, or CHUNKS:TEXT."""
    shot_path: Path | None = None
    """A text file of such prompts, one per line; lines that begin with # are skipped."""
    prompt_embeds: Path | None = None
    """A safetensors file with the prompt's embeddings; the text encoder is then not loaded."""
    negative_prompt: str | None = None
    """What the video should not look like, for guided models."""
    negative_prompt_embeds: Path | None = None
    """A safetensors file with the negative prompt's embeddings, to go with --prompt-embeds."""
    total_blocks: int = 60
    """AR steps; each is one chunk of the video."""
    frames: int | None = None
    """Frames of the video, of methods that make all of it in one AR step: 4 n + 1; None: the
    method's default."""
    height: int | None = None
    """Height of the video in pixels; None: the method's default."""
    width: int | None = None
    """Width of the video in pixels; None: the method's default."""
    download: bool = False
    """Download all weights that are not on this machine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("height", "width"):
            check_size(name, getattr(self, name), self.transformer, self.spatial_factor)
        if self.prompt_embeds is None and self.prompt_path is None and not self.prompt.strip():
            raise ValueError("--prompt is empty; describe what the video shows.")
        if not self.transformer.streaming and self.total_blocks != 1:
            raise ValueError(
                f"--total-blocks {self.total_blocks}: {self.runner_name} makes the whole video in "
                "one AR step; it must be 1."
            )
        self._check_frames()
        self._check_negative()
        self._check_shots()

    def _check_frames(self) -> None:
        if self.frames is None:
            return
        if self.transformer.streaming:
            raise ValueError(
                f"--frames {self.frames}: {self.runner_name} streams; type --total-blocks instead."
            )
        if self.frames < 1 or self.frames % TIME_FACTOR != 1:
            below = max(0, self.frames - 1) // TIME_FACTOR * TIME_FACTOR + 1
            raise ValueError(
                f"--frames {self.frames}: must be {TIME_FACTOR} n + 1. Nearest: {below} and "
                f"{below + TIME_FACTOR}."
            )

    def _check_shots(self) -> None:
        if not self.shot and self.shot_path is None:
            return
        others = {
            "--shot": bool(self.shot),
            "--shot-path": self.shot_path is not None,
            "--prompt-path": self.prompt_path is not None,
            "--prompt-embeds": self.prompt_embeds is not None,
        }
        given = [name for name, there in others.items() if there]
        if given[1:]:
            raise ValueError(f"{' and '.join(given)}: give only one of them.")
        if self.pipeline.release_text_encoder:
            raise ValueError("Shots need the text encoder; set release_text_encoder to False.")
        if self.shot:
            plan_shots(self.shot, self.total_blocks)

    def _check_negative(self) -> None:
        if not self.guided and (self.negative_prompt or self.negative_prompt_embeds):
            raise ValueError(
                f"{self.runner_name} runs without guidance, so it takes no --negative-prompt. "
                "--pipeline.diffusion-model.guidance-scale enables guidance."
            )
        given = (self.prompt_embeds is not None, self.negative_prompt_embeds is not None)
        if self.guided and given[0] != given[1]:
            raise ValueError(
                "A guided model takes --prompt-embeds and --negative-prompt-embeds together: "
                "without the text encoder neither prompt can be encoded."
            )

    @property
    def guided(self) -> bool:
        """Whether the method takes a negative prompt."""
        return self.pipeline.diffusion_model.guidance_scale is not None

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent row or column, from the decoder's config."""
        return getattr(self.pipeline.decoder, "spatial_factor", SPATIAL_FACTOR)

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of the video in pixels."""
        sizes = (self.transformer.latent_height, self.transformer.latent_width)
        height, width = (self.spatial_factor * size for size in sizes)
        return self.height or height, self.width or width

    @property
    def transformer(self) -> Any:
        """Config of the transformer, with `VIDEO_FIELDS`.

        Raises:
            TypeError: it lacks a field that this runner reads.
        """
        found: Any = self.pipeline.diffusion_model.transformer
        lacking = [name for name in VIDEO_FIELDS if not hasattr(found, name)]
        if lacking:
            raise TypeError(
                f"{self.runner_name} needs a transformer config with {', '.join(lacking)}, which "
                f"{type(found).__name__} lacks."
            )
        return found


@dataclass(kw_only=True)
class ImageToVideoRunnerConfig(TextToVideoRunnerConfig):
    """Image and text to video."""

    _target: type["ImageToVideoRunner"] = field(default_factory=lambda: ImageToVideoRunner)

    image_path: Path | None = None
    """The first frame. Transparent pixels are white."""
    fit_image: bool = False
    """Scale and crop an image of another size to that of the video."""
    max_pixels: int | None = None
    """Most pixels of a frame of a video that takes the aspect ratio of its image: it does unless
    --height, --width or --fit-image is given. None: its size is --height and --width."""
    test_image: bool = False
    """Start from a drawn colour gradient if no image is given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        len_t = self.transformer.len_t
        if self.pipeline.diffusion_model.first_latent_from_image and len_t != 1:
            raise ValueError(
                f"{self.runner_name} starts from an image, which is one latent frame: len_t must "
                f"be 1, got {len_t}."
            )
        if self.max_pixels is not None and self.max_pixels < self.size_unit**2:
            raise ValueError(
                f"--max-pixels {self.max_pixels}: must be at least {self.size_unit**2}, a frame of "
                f"{self.size_unit}x{self.size_unit}."
            )

    @property
    def size_unit(self) -> int:
        """Pixels that height and width are multiples of."""
        return self.spatial_factor * max(self.transformer.patch_size[1:])

    def size_of(self, rows: int, columns: int) -> tuple[int, int]:
        """Height and width of a video with about an image's aspect ratio; 0 if a side vanishes.

        Args:
            rows: height of the image in pixels.
            columns: its width.

        Source: Wan-Video/Wan2.1 and Robbyant/lingbot-world, wan/image2video.py.
        """
        aspect, most = rows / columns, self.max_pixels or 0
        sides = (math.sqrt(most * aspect), math.sqrt(most / aspect))
        height, width = (int(side // self.size_unit) * self.size_unit for side in sides)
        return height, width


ConfigT = TypeVar("ConfigT", bound=TextToVideoRunnerConfig)
ImageConfigT = TypeVar("ImageConfigT", bound=ImageToVideoRunnerConfig)


class TextToVideoRunner(Runner[TextToVideoRunnerConfig, StreamInferencePipeline]):
    """Streams one video into a file."""

    fetch_all = "--download True"

    def __init__(self, config: TextToVideoRunnerConfig) -> None:
        config = take_length(config)
        texts = config.shot if config.shot_path is None else read_shot_file(config.shot_path)
        self.shots = plan_shots(texts, config.total_blocks)
        self.prompt = read_prompt(config.prompt, config.prompt_path)
        if self.shots:
            self.prompt = self.shots[0].text
        self.negative_prompt = (config.negative_prompt or "").strip()
        self.prompt_embeds = read_embeds(config.prompt_embeds, config.transformer)
        self.negative_prompt_embeds = read_embeds(
            config.negative_prompt_embeds, config.transformer, "--negative-prompt-embeds"
        )
        config = resolve_config(config)
        self.image = self.first_image(config)
        super().__init__(config)

    def first_image(self, config: TextToVideoRunnerConfig) -> Any:
        """The first frame of the video, ``[1, 3, height, width]`` in [-1, 1].

        None for text-to-video.
        """
        return None

    def prompt_options(self) -> dict[str, str]:
        """The prompt and, with guidance, the negative one, unless given as embeddings."""
        if self.prompt_embeds is not None:
            return {}
        path = self.config.prompt_path
        found = {f"shot {n}": shot.text for n, shot in enumerate(self.shots, start=1)}
        found = found or {"--prompt" if path is None else f"--prompt-path {path}": self.prompt}
        if self.config.guided:
            found["--negative-prompt"] = self.negative_prompt
        return found

    def commands(self) -> Sequence[Command]:
        """A prompt change at the first frame of every shot but the first."""
        return [
            Command(
                kind="prompt",
                at_frame=self.pipeline.pixel_frames(shot.first_block).start,
                values={"text": shot.text},
            )
            for shot in self.shots[1:]
        ]

    def conditions(self) -> dict[str, Any]:
        """The conditions of the rollout, for ``initialize_cache``."""
        embeds, negative = self.prompt_embeds, self.negative_prompt_embeds
        conditions: dict[str, Any] = {"text": [self.prompt] if embeds is None else embeds}
        if self.image is not None:
            conditions["image"] = tree_map_only(Tensor, lambda x: x.to(self.device), self.image)
        if self.config.guided:
            conditions["negative_text"] = [self.negative_prompt] if negative is None else negative
        return conditions


class ImageToVideoRunner(TextToVideoRunner):
    """Streams one video that starts from an image into a file."""

    config: ImageToVideoRunnerConfig

    def __init__(self, config: ImageToVideoRunnerConfig) -> None:
        super().__init__(take_shape(config))

    def first_image(self, config: TextToVideoRunnerConfig) -> Any:
        """The image of the config; see `read_image`."""
        return read_image(cast(ImageToVideoRunnerConfig, config))


def take_length(config: ConfigT) -> ConfigT:
    """The config with ``frames`` applied to the transformer and an encoder of the whole clip."""
    if config.frames is None:
        return config
    len_t = (config.frames - 1) // TIME_FACTOR + 1
    changes: dict[str, Any] = {
        "diffusion_model": {"transformer": {"len_t": len_t, "window_size_t": len_t}}
    }
    if getattr(config.pipeline.image_encoder, "latent_frames", None) == config.transformer.len_t:
        changes["image_encoder"] = {"latent_frames": len_t}
    return replace(config, frames=None, pipeline=derive_config(config.pipeline, **changes))


def resolve_config(config: ConfigT) -> ConfigT:
    """The config with its shorthand fields applied to the pipeline."""
    sizes = {
        f"latent_{name}": getattr(config, name) // config.spatial_factor
        for name in ("height", "width")
        if getattr(config, name) is not None
    }
    pipeline = config.pipeline
    if sizes:
        pipeline = derive_config(pipeline, diffusion_model={"transformer": sizes})
    if config.prompt_embeds is not None:
        pipeline = derive_config(pipeline, text_encoder=None)
    if config.download:
        pipeline = with_downloads(pipeline)
    return replace(config, pipeline=pipeline)


def read_embeds(
    path: Path | None, transformer: Any, option: str = "--prompt-embeds"
) -> Tensor | None:
    """The embeddings ``[1, text_len, text_dim]`` in a file; None if no file is named.

    Raises:
        ValueError: the file is missing or damaged, has other content, or several prompts.
    """
    if path is None:
        return None
    text_dim = transformer.text_dim
    try:
        embeds = load_prompt_embeds(path, text_len=transformer.text_len, text_dim=text_dim)
    except (CheckpointError, ValueError) as error:
        raise ValueError(f"{option}: {error}") from error
    if len(embeds) != 1:
        raise ValueError(
            f"{option}: {path} holds {len(embeds)} prompts, and a run makes one video: save one of "
            f"them, as [rows, {text_dim}]."
        )
    return embeds


def check_size(
    name: str,
    pixels: int | None,
    transformer: Any,
    spatial_factor: int = SPATIAL_FACTOR,
) -> None:
    """Refuse a height or width that is not a multiple of the latent and patch size.

    Args:
        name: ``"height"`` or ``"width"``.
        pixels: the size; None passes.
        transformer: gives the patch size.
        spatial_factor: pixels per latent row or column.

    Raises:
        ValueError: the message names the nearest valid sizes.
    """
    if pixels is None:
        return
    unit = spatial_factor * transformer.patch_size[1 if name == "height" else 2]
    if pixels > MAX_PIXELS:
        raise ValueError(f"--{name} {pixels}: at most {MAX_PIXELS} pixels are allowed.")
    if pixels < unit or pixels % unit:
        below = max(unit, pixels // unit * unit)
        raise ValueError(
            f"--{name} {pixels}: must be a multiple of {unit} pixels (latents of "
            f"{spatial_factor}, patches of {unit // spatial_factor}). Nearest: {below} and "
            f"{below + unit}."
        )


def take_shape(config: ImageConfigT) -> ImageConfigT:
    """Derive the size of the video from its image, unless a size is given, and print it.

    Raises:
        ValueError: the file is not an image, is too large, or has an extreme aspect ratio.
    """
    given = config.height is not None or config.width is not None or config.fit_image
    if config.max_pixels is None or config.image_path is None or given:
        return config
    columns, rows = image_size(config.image_path)
    height, width = config.size_of(rows, columns)
    if not min(height, width):
        raise ValueError(
            f"--image-path {config.image_path}: the image is {columns}x{rows} (width x height): no "
            f"video of that shape has sides of at least {config.size_unit} and at most "
            f"{config.max_pixels:,} pixels. Crop the image, or type --fit-image True."
        )
    if process_rank() == 0:
        tell(
            f"size: {width}x{height} (width x height), after the image of {columns}x{rows}; "
            "--height and --width set another one."
        )
    return replace(config, height=height, width=width)


def read_image(config: ImageToVideoRunnerConfig) -> Tensor | dict[str, Tensor]:
    """The first frame ``[1, 3, height, width]`` in [-1, 1].

    Where the video may take the shape of its image, an image of nearly the video's shape is
    stretched to it by bicubic interpolation, as in the official code. An image encoder with
    ``takes_whole_image`` also gets the image as it was before.

    Raises:
        ValueError: there is none, or it does not fit.
    """
    height, width = config.frame_size
    if config.image_path is None:
        return drawn_image(config.runner_name, height, width, drawn=config.test_image)
    if config.max_pixels is None or config.fit_image or not shape_fits(config):
        return load_image(config.image_path, height, width, fit=config.fit_image)
    whole = to_pixels(open_image(config.image_path))
    if whole.shape[2:] == (height, width):
        return whole
    frame = F.interpolate(whole, (height, width), mode="bicubic")
    encoder = config.pipeline.image_encoder
    takes_both = encoder is not None and encoder.takes_whole_image
    return {"frame": frame, "whole": whole} if takes_both else frame


def shape_fits(config: ImageToVideoRunnerConfig) -> bool:
    """Whether the video has the shape of its image: its size was derived from it, or is close."""
    assert config.image_path is not None
    columns, rows = size = image_size(config.image_path)
    return has_shape(size, *config.frame_size) or config.size_of(rows, columns) == config.frame_size
