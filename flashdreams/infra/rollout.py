"""The state of one rollout: saved, loaded and cloned by the styles of its fields."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, get_type_hints

import torch
from torch import Tensor

from flashdreams.infra.config import quoted
from flashdreams.infra.controller import Controller
from flashdreams.infra.diffusion.model import DiffusionCache
from flashdreams.infra.finite import FiniteCheck
from flashdreams.infra.state import (
    RolloutState,
    StateDecoder,
    StateEncoder,
    check_plan_styles,
    check_styles,
    plan_styles,
)
from flashdreams.parallel.environment import (
    gather_to_rank_zero,
    group_rank,
    largest_of_all_ranks,
)
from flashdreams.parallel.plan import ParallelPlan, StateStyle
from flashdreams.parallel.state_layout import BRANCHES, StateLayout
from flashdreams.runtime.noise import NoiseFunction, NoiseSource
from flashdreams.runtime.profiler import StageTimer
from flashdreams.runtime.region import Region, TensorPart, select_region

Parts = dict[str, TensorPart]
"""This rank's parts of the tensors of a state, by path."""


@dataclass
class StreamInferencePipelineCache:
    """All state of one rollout; the pipeline itself has none."""

    diffusion: DiffusionCache
    pipeline: Any = field(repr=False)
    """The `StreamInferencePipeline` that the rollout runs on."""
    context: dict[str, Any] = field(repr=False)
    """The encoded conditions of the rollout, by name."""
    encoder: Any
    decoder: Any
    timer: StageTimer
    negative_text: Any = field(default=None, repr=False)
    """Embeddings of the negative prompt; None without guidance."""
    next_index: int = 0
    """The AR step that ``generate`` expects."""
    controller: Any = None
    """State of the controller that steers the rollout; None without one."""
    forks: int | None = None
    """Forks that continue as one batch here, see ``fork_batch``; ``encoder`` and ``controller`` are
    then lists, one entry for each. None: not a batch."""
    finite: FiniteCheck = field(default_factory=FiniteCheck, repr=False)
    """Checks the values of the last AR step."""
    cut_off: bool = False
    """A call has failed after it had begun to change the state; the rollout cannot go on."""

    @property
    def pending(self) -> bool:
        """A chunk is generated but not finalized."""
        return self.diffusion.pending

    @property
    def records(self) -> list[dict[str, Any]]:
        """Stage times and sizes, one record per AR step; the last 1024 steps are kept."""
        return self.timer.records

    @property
    def latent(self) -> Tensor | None:
        """``[B, C, T, H, W]`` float32, the clean latent of the last chunk."""
        return self.diffusion.latent

    def release(self) -> None:
        """End the rollout and free its memory for another one. Records and last latent remain.

        A rollout is also released when it is garbage-collected.
        """
        self.pipeline.diffusion_model.side.join()
        self.diffusion.release()
        self.encoder = self.decoder = None

    @contextmanager
    def changing(self, *harmless: type[BaseException]) -> Iterator[None]:
        """Part of a call: after any but a ``harmless`` error the rollout cannot go on."""
        self.cut_off = True
        try:
            yield
        except harmless:
            self.cut_off = False
            raise
        self.cut_off = False

    def check_order(self, call: str, autoregressive_index: int) -> None:
        """Refuse a call out of order.

        Args:
            call: ``"generate"`` or ``"finalize"``.
            autoregressive_index: the AR step asked for.

        Raises:
            ValueError: states what was expected; or the rollout was released.
        """
        self.require_live()
        index, following = autoregressive_index, self.next_index
        if call == "generate" and index > 0 and not self.pipeline.diffusion_model.streams:
            one = "with streaming=False the whole video is one AR step, number 0."
            raise ValueError(f"autoregressive_index={index}: {one}")
        if self.pending == (call == "generate"):
            wanted, at = ("finalize", following - 1) if self.pending else ("generate", following)
            raise ValueError(
                f"{call}(autoregressive_index={index}): expected "
                f"{wanted}(autoregressive_index={at}) first."
            )
        expected = following - 1 if self.pending else following
        if index != expected:
            raise ValueError(
                f"{call}: expected autoregressive_index={expected}, got {index}. "
                "AR steps of a rollout come in order."
            )

    def require_live(self) -> None:
        """Refuse a rollout that was released, or that a failed call has left incomplete.

        Raises:
            ValueError: states which.
        """
        if self.diffusion.released:
            raise ValueError(
                f"This rollout was released after {self.next_index} AR steps, and another one may "
                "use its storage. Start a new one with pipeline.initialize_cache(...)."
            )
        if self.cut_off:
            raise ValueError(
                f"A call after {self.next_index} AR steps of this rollout has failed midway, so "
                "its state is incomplete. Continue from a fork or a snapshot, or start a new one."
            )

    def state_dict(self) -> RolloutState | None:
        """The rollout in a form independent of the number of ranks; a collective call.

        Gathered one tensor at a time; `StreamInferencePipeline.load_cache` takes it back, on any
        number of ranks. See `flashdreams.infra.state` for the form.

        Returns:
            The form on rank zero, None elsewhere.

        Raises:
            ValueError: after ``release``, or between ``generate`` and ``finalize``.
            StateError: a component's state does not declare how ranks hold it.
        """
        self.require_finalized("state_dict")
        return self.pipeline.save_cache(self)

    def clone(self, noise: NoiseFunction | None = None) -> "StreamInferencePipelineCache":
        """Another rollout with the same history, copied on the device; both continue independently.

        What a rollout writes in place is copied: KV caches, cross-attention keys and values,
        encoder and decoder state. Encoded prompts and images are shared.

        Args:
            noise: of the clone; None continues with the noise of this rollout.

        Raises:
            ValueError: after ``release``, or between ``generate`` and ``finalize``.
            StateError: a component's state does not declare how ranks hold it.
        """
        self.require_finalized("clone")
        return self.pipeline.clone_cache(self, noise)

    def fork(self, n: int) -> list["StreamInferencePipelineCache"]:
        """``n`` clones on the device, to try continuations one after the other.

        Their bytes are computed first. Milliseconds and bytes are logged. A collective call.

        Args:
            n: at least 1.

        Raises:
            ValueError: not enough memory, with the number that fits; or as for ``clone``.
            StateError: a component's state does not declare how ranks hold it.
        """
        self._require_forks("fork", n)
        return self.pipeline.fork_cache(self, n)

    def fork_batch(self, n: int) -> "StreamInferencePipelineCache":
        """``n`` forks as one rollout, whose AR steps make the chunks of all: faster than in turn.

        Batch entries of the first fork come first. ``generate`` takes a list of ``n`` control
        inputs, and ``controller`` is a list of ``n`` states, with which these are made. Frames are
        those of forks run in turn, within the tolerance of parallel runs. A batch runs without
        CUDA graphs. A collective call.

        Args:
            n: at least 1.

        Raises:
            ValueError: not enough memory, or the method cannot be batched; or as for ``clone``.
            StateError: a component's state does not declare how ranks hold it.
        """
        self._require_forks("fork_batch", n)
        return self.pipeline.fork_batch(self, n)

    def pick(self, index: int) -> "StreamInferencePipelineCache":
        """One fork of a batch as an independent rollout; the batch is unchanged.

        Args:
            index: of the fork, from 0.

        Raises:
            ValueError: not a batch of forks, or no such fork; or as for ``clone``.
        """
        self._require_between_steps("pick")
        return self.pipeline.pick_fork(self, index)

    def require_finalized(self, call: str) -> None:
        """Refuse calls that are only possible between AR steps, and not for a batch of forks.

        Args:
            call: what it is, for the message.

        Raises:
            ValueError: after ``release``, between ``generate`` and ``finalize``, or for a batch.
        """
        self._require_between_steps(call)
        if self.forks is not None:
            raise ValueError(
                f"A batch of {self.forks} forks has no {call}. Take one out first: cache.pick(i)."
            )

    def _require_forks(self, call: str, n: int) -> None:
        self.require_finalized("fork")
        if n < 1:
            raise ValueError(f"{call}({n}): a rollout forks into 1 or more.")

    def _require_between_steps(self, call: str) -> None:
        self.require_live()
        if self.pending:
            raise ValueError(
                f"A rollout has no {call} between generate and finalize. Call "
                f"pipeline.finalize(autoregressive_index={self.next_index - 1}, cache=cache) first."
            )


def check_state(cache: StreamInferencePipelineCache, plan: ParallelPlan | None) -> None:
    """Check that declared styles fit their fields; done once per pipeline.

    Args:
        cache: fresh.
        plan: of the transformer.

    Raises:
        StateError: names class and field.
        ValueError: the plan's deprecated ``rollout`` names no field.
    """
    styles = plan_styles(plan)
    for branch in cache.diffusion.branches:
        check_styles(branch, "transformer")
        if styles is not None:
            check_plan_styles(branch, styles)
    if styles is not None:
        warnings.warn(
            "ParallelPlan.rollout will be removed in 0.3: declare each state field's style where "
            "it is defined, with flashdreams.parallel.plan.state.",
            DeprecationWarning,
            stacklevel=3,
        )
    check_styles(cache.encoder, "encoder")
    check_styles(cache.decoder, "decoder")


def collect_parts(
    cache: StreamInferencePipelineCache,
    layout: StateLayout,
    name: str,
    fingerprint: dict[str, Any],
    *,
    light: bool = False,
) -> tuple[dict[str, Any], Parts]:
    """The canonical form of a rollout: its values, and this rank's parts of its tensors.

    Nothing is read or gathered yet.

    Args:
        cache: between AR steps.
        layout: how ranks hold it.
        name: of the pipeline.
        fingerprint: of the numerics, kept beside the state.
        light: omit the KV caches.

    Raises:
        StateError: state of a component that does not declare how it is held.
    """
    parts: Parts = {}
    encoder = StateEncoder(layout, parts.__setitem__, without_caches=light)
    noise = cache.diffusion.noise
    values = encode_rollout(cache, encoder) | {
        "name": name,
        "fingerprint": fingerprint,
        "seed": noise.seed if isinstance(noise, NoiseSource) else None,
        "context": encoder.encode(cache.context, "context", "whole"),
        "negative_text": encoder.encode(cache.negative_text, "negative_text", "whole"),
    }
    return values, parts


def gather_parts(parts: Parts) -> dict[str, Tensor]:
    """The whole tensors on rank zero, on the CPU; a collective call, one tensor at a time.

    Args:
        parts: of this rank, from `collect_parts`.

    Returns:
        By path; empty on the other ranks.
    """
    found: dict[str, Tensor] = {}

    def put(path: str, shape: tuple[int, ...], region: Region, x: Tensor) -> None:
        if path not in found:
            found[path] = torch.empty(shape, dtype=x.dtype, device="cpu")
        select_region(found[path], region).copy_(x)

    sent = []
    for path, part in parts.items():
        if part.written is not None and group_rank() == 0:
            put(path, part.shape, part.written, part.read_written())
        elif part.written is not None:
            sent.append((path, part))
    for index in range(int(largest_of_all_ranks(len(sent)))):
        piece: Any = None
        if index < len(sent):
            path, part = sent[index]
            piece = (path, part.shape, part.written, part.read_written().to("cpu", copy=True))
        for arrived in filter(None, gather_to_rank_zero(piece)):
            put(*arrived)
    return found


def encode_rollout(cache: StreamInferencePipelineCache, encoder: StateEncoder) -> dict[str, Any]:
    """The values of all state but the conditions of the rollout.

    Args:
        cache: between AR steps.
        encoder: takes the tensors.

    Raises:
        StateError: state of a component that does not declare how it is held.
    """
    diffusion, layout = cache.diffusion, encoder.layout
    # Plain state of a decoder that is not cut is the same on all ranks; else it must declare.
    decoder_style: StateStyle | None = None if layout.splits_width else "whole"
    values = {
        "next_index": cache.next_index,
        "prompt_is_newer": diffusion.prompt_is_newer,
        "latent": encoder.encode(diffusion.latent, "latent", "whole"),
        "history": encoder.encode(diffusion.history, "history", "whole"),
        "carried": encoder.encode(diffusion.carried, "carried", "whole"),
        "encoder": encoder.encode(cache.encoder, "encoder", "whole"),
        "decoder": encoder.encode(cache.decoder, "decoder", decoder_style),
        "controller": encoder.encode(cache.controller, "controller", None),
    }
    in_branch = replace(encoder, in_branch=True, styles=plan_styles(layout.plan))
    for name in BRANCHES:
        values[name] = in_branch.encode(getattr(diffusion, name), name, None)
    if layout.branches_apart and not encoder.in_process:
        # Each rank knows the form of its own branch, and both are the same.
        values |= dict.fromkeys(BRANCHES, values["conditional"] or values["unconditional"])
    return values


def check_values(
    values: Mapping[str, Any],
    name: str,
    noise: NoiseFunction | None,
    controller: Controller | None,
) -> None:
    """Check that the values of a canonical form can be continued; to be called on rank zero.

    Args:
        values: from `collect_parts`.
        name: of the pipeline that will continue it.
        noise: that the caller gives.
        controller: that the caller gives.

    Raises:
        ValueError: another pipeline, damage, or missing noise or controller.
    """
    index = values["next_index"]
    if type(index) is not int or index < 0:
        raise ValueError(f"The state is damaged: its next AR step is {quoted(index)}.")
    if values["name"] != name:
        raise ValueError(
            f"The state is of a rollout of {values['name']!r}; this pipeline is {name!r}."
        )
    if noise is None and values["seed"] is None:
        raise ValueError(
            "The rollout was started with a noise callable, which is not part of its state. "
            "Give it again: pipeline.load_cache(state, noise=...)."
        )
    if controller is None and values["controller"] is not None:
        raise ValueError(
            "The rollout has a controller; pass one of the same kind: "
            "pipeline.load_cache(state, controller=...)."
        )


def restore_context(
    values: Mapping[str, Any], decoder: StateDecoder, parts: Sequence[Any]
) -> tuple[dict[str, Any], Any]:
    """The conditions of a saved rollout; a collective call.

    Args:
        values: of the canonical form, the same on all ranks.
        decoder: gives the tensors.
        parts: components whose ``initialize_cache`` annotates its context with dataclasses.

    Returns:
        The context by name, and the embeddings of the negative prompt.
    """
    hints: dict[str, Any] = {}
    for part in parts:
        if hasattr(part, "initialize_cache"):
            hints |= get_type_hints(part.initialize_cache)
    context = {
        name: decoder.restore(x, f"context/{name}", None, hints.get(name))
        for name, x in values["context"]["parts"].items()
    }
    return context, decoder.restore(values["negative_text"], "negative_text")


def fill_rollout(
    cache: StreamInferencePipelineCache, values: Mapping[str, Any], decoder: StateDecoder
) -> None:
    """Load a saved rollout into fresh state, in place; a collective call.

    Tensors of the same shape keep their storage, so graphs that were captured for it stay valid.

    Args:
        cache: fresh, under the context of the saved rollout.
        values: of the canonical form, the same on all ranks.
        decoder: gives the tensors.

    Raises:
        ValueError: another sink, window or model.
    """
    cache.next_index, diffusion = values["next_index"], cache.diffusion
    hints = get_type_hints(DiffusionCache)
    diffusion.prompt_is_newer = bool(values.get("prompt_is_newer", False))
    diffusion.latent = decoder.restore(values["latent"], "latent")
    diffusion.history = decoder.restore(values["history"], "history", None, hints["history"])
    diffusion.carried = decoder.restore(values.get("carried"), "carried")
    for name in BRANCHES:
        branch = getattr(diffusion, name)
        if branch is None:
            decoder.skip(values[name], name)
        else:
            restored = decoder.restore(values[name], name, branch)
            setattr(diffusion, name, restored)
    cache.encoder = decoder.restore(values["encoder"], "encoder", cache.encoder)
    if cache.pipeline.decodes_here:
        cache.decoder = decoder.restore(values["decoder"], "decoder", cache.decoder)
    else:
        decoder.skip(values["decoder"], "decoder")
    cache.controller = decoder.restore(values["controller"], "controller", cache.controller)
