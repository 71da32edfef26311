"""Encoders: user input to conditioning of the diffusion model."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from flashdreams.infra.component import Component, ComponentConfig


@dataclass(kw_only=True)
class EncoderConfig(ComponentConfig):
    """Config of a stateless encoder."""

    _target: type["Encoder"] = field(default_factory=lambda: Encoder)

    takes_whole_image: ClassVar[bool] = False
    """Of an ``image_encoder``: its input may also be ``{"frame": ..., "whole": ...}``, the image at
    the size of the video and as it was before it was resized."""


class Encoder(Component):
    """A stateless encoder: the same input always gives the same output.

    As ``pipeline.encoder`` it is called once per AR step with that step's ``input``; as
    ``text_encoder`` or ``image_encoder`` once per rollout.
    """

    config: EncoderConfig

    def forward(self, input: Any) -> Any:
        """Encode ``input``; the default returns it unchanged."""
        return input

    def check_input(self, input: Any) -> None:
        """Refuse what ``forward`` would refuse, without weights.

        A runner checks its prompts with the ``text_encoder`` before weights are downloaded or read.

        Raises:
            ValueError: says what is wrong with the input.
        """

    def example_input(self) -> Any:
        """A small dummy input for one call at warm-up, whose result is dropped.

        With it a ``text_encoder`` or ``image_encoder`` reads files, imports packages and builds
        kernels before the first rollout. None for an encoder without such first-call work.
        """
        return None

    def example_step(self, frames: int) -> Any:
        """A control input over so many pixel frames, with which the planner times an AR step.

        None: this encoder is not timed.
        """
        return None


@dataclass(kw_only=True)
class StreamingEncoderConfig(EncoderConfig):
    """Config of an encoder that carries state from one AR step to the next."""

    _target: type["StreamingEncoder"] = field(default_factory=lambda: StreamingEncoder)


class StreamingEncoder(Encoder):
    """An encoder whose state is in a cache owned by the rollout, never on the module.

    ``initialize_cache`` may declare parameters; the pipeline passes the context of those names.
    """

    config: StreamingEncoderConfig

    def initialize_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Fresh state for one rollout; subclasses declare the context that they need."""
        return None

    def forward(self, input: Any, autoregressive_index: int = 0, cache: Any = None) -> Any:
        """Encode the input of one AR step.

        Args:
            input: the ``input`` of ``pipeline.generate``.
            autoregressive_index: number of the AR step, from 0.
            cache: this rollout's state, updated in place.
        """
        return input
