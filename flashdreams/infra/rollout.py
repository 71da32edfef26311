"""The state of one rollout."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flashdreams.infra.checks import check_order
from flashdreams.infra.diffusion.model import DiffusionCache
from flashdreams.infra.state import RolloutState, export_rollout
from flashdreams.parallel.environment import LOAD_TIMEOUT_S
from flashdreams.runtime.grad_mode import without_grad
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

    @property
    def pending(self) -> bool:
        """A chunk is generated and its clean pass is yet to come."""
        return self.diffusion.pending

    @property
    def fuses(self) -> bool:
        """Whether a pending clean pass may wait for the next ``generate``."""
        return self.pipeline.config.diffusion_model.transformer.fuse_clean_pass

    @property
    def records(self) -> list[dict[str, Any]]:
        """Stage times and sizes, one record per AR step; the last 1024 steps are kept."""
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

    def flush(self) -> None:
        """Make up the clean pass that has been left to the next ``generate``, if one has."""
        if self.fuses and self.pending:
            self.pipeline.finalize(self.next_index - 1, self)

    def check_order(self, call: str, autoregressive_index: int) -> None:
        """Refuse a call out of turn.

        Args:
            call: ``"generate"``, ``"finalize"`` or ``"end_step"``.
            autoregressive_index: the AR step asked for.

        Raises:
            ValueError: says what was expected; or the rollout was released.
        """
        self.require_live()
        pending = self.pending
        if self.fuses:  # a clean pass may be made up later, and may be made up already
            pending = call != "generate" and self.next_index > 0
        check_order(call, autoregressive_index, self.next_index, pending)

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

    @without_grad
    def state_dict(self) -> RolloutState | None:
        """The rollout in a form that does not know the number of ranks; a collective call.

        Gathered one tensor at a time; `StreamInferencePipeline.load_cache` takes it back, on any
        number of ranks. See `flashdreams.infra.state` for the form.

        Returns:
            The form on rank zero, None elsewhere.

        Raises:
            ValueError: after ``release``, or between ``generate`` and ``finalize``; with
                ``fuse_clean_pass`` the clean pass is made up instead.
        """
        self.require_live()
        with self.pipeline.guard("export", self.next_index, LOAD_TIMEOUT_S):
            return export_rollout(self.pipeline, self)
