"""The state of one rollout."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashdreams.infra.diffusion.model import DiffusionCache
from flashdreams.infra.state import RolloutState, export_rollout
from flashdreams.runtime.profiler import StageTimer

if TYPE_CHECKING:
    from flashdreams.infra.pipeline import StreamInferencePipeline


@dataclass
class StreamInferencePipelineCache:
    """ALL state of one rollout; the pipeline itself has none."""

    diffusion: DiffusionCache
    encoder: Any
    decoder: Any
    timer: StageTimer
    pipeline: "StreamInferencePipeline" = field(repr=False)
    """The pipeline that the rollout runs on."""
    context: dict[str, Any] = field(repr=False)
    """What the rollout is conditioned on, encoded, by name."""
    negative_text: Any = field(default=None, repr=False)
    """Embeddings of the negative prompt; None without guidance."""
    next_index: int = 0
    """The AR step that ``generate`` expects."""
    pending: bool = False
    """A chunk is generated and not yet finalized."""

    @property
    def records(self) -> list[dict[str, Any]]:
        """Stage times and sizes, one record per AR step."""
        return self.timer.records

    @property
    def latent(self) -> Tensor | None:
        """``[B, C, T, H, W]`` float32, the clean latent of the last chunk."""
        return self.diffusion.latent

    def release(self) -> None:
        """End the rollout: its memory is free for another one. Records and last latent stay.

        A rollout that nobody refers to any more is released as well.
        """
        self.pipeline.diffusion_model.side.join()
        self.diffusion.release()
        self.encoder = self.decoder = None

    def require_live(self) -> None:
        """Refuse a rollout that is over.

        Raises:
            ValueError: it was released.
        """
        if self.diffusion.released:
            raise ValueError(
                f"This rollout was released after {self.next_index} AR steps, and another one may "
                "live in its storage. Begin a new one with pipeline.initialize_cache(...)."
            )

    @torch.no_grad()
    def state_dict(self) -> RolloutState | None:
        """The rollout in a form that does not know the number of ranks; a collective call.

        Gathered one tensor at a time; `StreamInferencePipeline.load_cache` takes it back, on any
        number of ranks. See `flashdreams.infra.state` for the form.

        Returns:
            The form on rank zero, None elsewhere.

        Raises:
            ValueError: between ``generate`` and ``finalize``, or after ``release``.
        """
        self.require_live()
        return export_rollout(self.pipeline, self)
