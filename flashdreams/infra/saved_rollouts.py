"""Saving, moving and copying rollouts."""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from flashdreams.infra.assembly import Assembly
from flashdreams.infra.component import Component, select_context
from flashdreams.infra.controller import Controller
from flashdreams.infra.decoder.base import StreamingDecoder
from flashdreams.infra.diffusion.recompute import numerics_difference
from flashdreams.infra.encoder.base import StreamingEncoder
from flashdreams.infra.fingerprint import differences
from flashdreams.infra.fork import (
    Change,
    ForkNoise,
    changed_context,
    copied_bytes,
    fill_batch,
    fill_pick,
    live_state,
    repeated,
    require_room,
    rows_of,
    timed_forks,
)
from flashdreams.infra.identity import describe_config, hash_weights
from flashdreams.infra.parked import ParkedRollout, park_parts
from flashdreams.infra.rollout import (
    Parts,
    StreamInferencePipelineCache,
    check_values,
    collect_parts,
    fill_rollout,
    gather_parts,
    restore_context,
)
from flashdreams.infra.sent_state import SentTensors, values_of
from flashdreams.infra.snapshot import (
    SnapshotReport,
    fill_together,
    open_snapshot,
    read_from,
    readable_damage,
    save_snapshot,
)
from flashdreams.infra.snapshot_header import SnapshotHeader
from flashdreams.infra.state import FORMAT, RolloutState, StateDecoder
from flashdreams.parallel.environment import (
    LOAD_TIMEOUT_S,
    all_ranks_agree,
    from_rank_zero,
    group_rank,
    together,
)
from flashdreams.runtime.grad_mode import without_grad
from flashdreams.runtime.noise import NoiseFunction, NoiseSource

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NO_STATE = "cannot copy its state"


class SavedRollouts(Assembly, ABC):
    """The part of a pipeline that saves, loads, clones and forks its rollouts."""

    @abstractmethod
    def new_cache(
        self, context: dict[str, Any], negative_text: Any, noise: NoiseFunction
    ) -> StreamInferencePipelineCache:
        """Fresh state for an encoded context; implemented by the pipeline."""

    @abstractmethod
    def check_values(self, cache: StreamInferencePipelineCache | None = None) -> None:
        """Refuse to continue from NaN or infinite values; implemented by the pipeline."""

    @without_grad
    def save_cache(self, cache: StreamInferencePipelineCache) -> RolloutState | None:
        """See `StreamInferencePipelineCache.state_dict`, which calls this."""
        with self.guard("export", cache.next_index, LOAD_TIMEOUT_S):
            self.check_values(cache)
            self.diffusion_model.side.join()
            values, parts = self._collected(cache)
            tensors = gather_parts(parts)
            if group_rank() != 0:
                return None
            return {"format": FORMAT, "values": values, "tensors": tensors}

    @without_grad
    def load_cache(
        self,
        state: RolloutState | None,
        noise: NoiseFunction | None = None,
        controller: Controller | None = None,
    ) -> StreamInferencePipelineCache:
        """Continue a rollout that ``cache.state_dict()`` has exported; a collective call.

        If ranks and numerics fingerprint are those of the export, the following frames
        have the same bits as those of the run that was exported; else differences are logged, as in
        ``resume``.

        Args:
            state: on rank zero the canonical form; elsewhere it is ignored.
            noise: as in ``initialize_cache``; needed if the rollout was started with one.
            controller: the one that steered the rollout; needed if one did.

        Returns:
            The rollout's state: the next call is ``generate`` for its next AR step.

        Raises:
            ValueError: a state of another format, pipeline, sink or window, or missing ``noise`` or
                ``controller`` for a rollout that was started with one.
        """
        with self.guard("import", None, LOAD_TIMEOUT_S):
            with readable_damage("The state"):
                values = from_rank_zero(lambda: self._checked(values_of(state), noise, controller))
                sent = SentTensors(state, values)
                decoder = StateDecoder(self.layout, sent.take, drop_rest=sent.drop_rest)
                cache, differ = self._restore(values, decoder, noise, controller)
            self._measure_numerics(cache, differ)
            return cache

    @without_grad
    def save(
        self,
        cache: StreamInferencePipelineCache,
        path: str | Path,
        *,
        light: bool = False,
        log: Sequence[Any] = (),
        run: Mapping[str, Any] | None = None,
    ) -> SnapshotReport:
        """Write a rollout into a folder for ``resume``; a collective call.

        Each rank writes its own part, one tensor at a time. The folder is renamed when all of it
        is on disk.

        Args:
            cache: between AR steps.
            path: of the folder; it must not exist. Several nodes need a file system they share.
            light: omit the KV caches; ``resume`` recomputes them from the clean latents of
                the window, which is approximate once frames have been evicted.
            log: JSON values to store with it, such as the commands of a session.
            run: likewise, for use by the calling program.

        Returns:
            Bytes and seconds.

        Raises:
            ValueError: ``path`` exists, the rollout was released, or it is between ``generate`` and
                ``finalize``.
            StateError: a component's state does not declare how ranks hold it.
            NotFiniteError: the rollout has values that are NaN or infinite.
            OSError: a file cannot be written; no partial snapshot remains.
            OtherRankError: a file cannot be written on another rank.
        """
        cache.require_finalized("snapshot")
        with self.guard("save", cache.next_index, LOAD_TIMEOUT_S):
            self.check_values(cache)
            self.diffusion_model.side.join()
            values, parts = self._collected(cache, light=light)
            weights = together(lambda: hash_weights(self.config), "could not read its weights")
            header = SnapshotHeader(
                name=self.config.name,
                config=describe_config(self.config),
                weights=weights,
                fingerprint=values["fingerprint"],
                autoregressive_index=values["next_index"],
                seed=values["seed"],
                light=light,
                log=list(log),
                run=dict(run or {}),
                values=values,
            )
            return save_snapshot(Path(path), header, parts)

    @without_grad
    def resume(
        self,
        path: str | Path,
        noise: NoiseFunction | None = None,
        controller: Controller | None = None,
    ) -> StreamInferencePipelineCache:
        """Continue a rollout that ``save`` has written, on any number of ranks; collective.

        With an equal numerics fingerprint, and with ``strict``, the following frames have the same
        bits as those of an uninterrupted run. Otherwise each difference is logged, and the clean
        pass of the last chunk is run again, to compare its keys and values with those that
        were saved. Each rank maps the files and reads what it holds. Nothing but numbers is taken
        from them.

        Args:
            path: the folder.
            noise: as in ``initialize_cache``; needed if the rollout was begun with one.
            controller: the one that steered the rollout; needed if one did.

        Returns:
            The rollout's state: the next call is ``generate`` for its next AR step.

        Raises:
            SnapshotError: damaged files, a newer format, another config or other weights; it names
                which. No rollout was started.
            ValueError: no ``noise`` or ``controller`` for a rollout that was begun with one.
            OtherRankError: the same on another rank.
        """
        folder = Path(path)
        with self.guard("resume", None, LOAD_TIMEOUT_S):
            header = open_snapshot(
                folder, self.config, lambda values: self._checked(values, noise, controller)
            )
            decoder = StateDecoder(self.layout, read_from(folder, header))
            with readable_damage(folder):
                cache, differ = self._restore(header.values, decoder, noise, controller)
            if header.light:
                self.diffusion_model.rebuild_context(cache.diffusion)
            else:
                self._measure_numerics(cache, differ)
            return cache

    @without_grad
    def park(self, cache: StreamInferencePipelineCache) -> ParkedRollout:
        """Copy a rollout into host memory, each rank its own part; a collective call.

        Args:
            cache: between AR steps; it is unchanged; the caller releases it.

        Raises:
            ValueError: the rollout was released, or is between ``generate`` and ``finalize``.
            StateError: a component's state does not declare how ranks hold it.
        """
        cache.require_finalized("parking")
        with self.guard("park", cache.next_index, LOAD_TIMEOUT_S):
            self.diffusion_model.side.join()
            return park_parts(*self._collected(cache), self.target_device)

    @without_grad
    def unpark(
        self,
        parked: ParkedRollout,
        noise: NoiseFunction | None = None,
        controller: Controller | None = None,
    ) -> StreamInferencePipelineCache:
        """Bring a parked rollout back to the device, with the same bits; a collective call.

        Args:
            parked: from ``park``, by this process.
            noise: as for ``resume``.
            controller: likewise.

        Raises:
            ValueError: no ``noise`` or ``controller`` for a rollout that was begun with one.
        """
        with self.guard("unpark", None, LOAD_TIMEOUT_S):
            values = self._checked(parked.values, noise, controller)
            decoder = StateDecoder(self.layout, parked.take)
            return self._restore(values, decoder, noise, controller)[0]

    def _collected(
        self, cache: StreamInferencePipelineCache, light: bool = False
    ) -> tuple[dict[str, Any], Parts]:
        """See `collect_parts`; where one rank alone decodes, another may have no such state."""

        def collect() -> tuple[dict[str, Any], Parts]:
            fingerprint = self.fingerprint()  # reads files
            return collect_parts(cache, self.layout, self.config.name, fingerprint, light=light)

        return together(collect, _NO_STATE)

    def _checked(
        self,
        values: Mapping[str, Any],
        noise: NoiseFunction | None,
        controller: Controller | None,
    ) -> Mapping[str, Any]:
        check_values(values, self.config.name, noise, controller)
        return values

    def _restore(
        self,
        values: Mapping[str, Any],
        decoder: StateDecoder,
        noise: NoiseFunction | None,
        controller: Controller | None,
    ) -> tuple[StreamInferencePipelineCache, list[str]]:
        """A rollout from a canonical form, and where its numerics differ from ours; collective."""
        parts = [self.diffusion_model.transformer, self.encoder, self.decoder]
        context, negative_text = restore_context(values, decoder, parts)
        cache = self.new_cache(context, negative_text, noise or NoiseSource(values["seed"]))
        cache.controller = None if controller is None else controller.new_state()

        def fill() -> None:
            try:
                fill_rollout(cache, values, decoder)
            except Exception:  # a rank of the other branch of guidance may not have failed yet
                if decoder.drop_rest is not None:
                    decoder.drop_rest()
                raise

        fill_together(cache, fill)
        unused = self.apply_choices(values["fingerprint"])
        told = {line.split(" ")[0] for line in unused}
        differ = differences(values["fingerprint"], self.fingerprint())
        for line in [*unused, *(x for x in differ if x.split(":")[0] not in told)]:
            logger.info("The loaded rollout may continue with other bits: %s.", line)
        return cache, differ

    def _measure_numerics(self, cache: StreamInferencePipelineCache, differ: list[str]) -> None:
        """Say how much the numerics of a loaded rollout differ from ours, if they do; collective.

        Args:
            cache: loaded with its KV caches.
            differ: from `_restore`.
        """
        if all_ranks_agree(not differ):
            return
        found = numerics_difference(self.diffusion_model, cache.diffusion)
        if found is not None:
            logger.info(
                "Its last chunk was recomputed with the numerics of this process: the largest "
                "difference of keys and values is %.2g of the largest value.", found
            )  # fmt: skip

    @without_grad
    def clone_cache(
        self, cache: StreamInferencePipelineCache, noise: NoiseFunction | None = None
    ) -> StreamInferencePipelineCache:
        """See `StreamInferencePipelineCache.clone`, which calls this."""
        with self.guard("clone", cache.next_index, LOAD_TIMEOUT_S):
            self.diffusion_model.side.join()
            noise = _noise_of_clone(cache) if noise is None else noise
            other = self.new_cache(dict(cache.context), cache.negative_text, noise)
            other.controller = copy.deepcopy(cache.controller)
            fill_rollout(other, *live_state(cache, self.layout))
            return other

    @without_grad
    def fork_cache(
        self, cache: StreamInferencePipelineCache, count: int
    ) -> list[StreamInferencePipelineCache]:
        """See `StreamInferencePipelineCache.fork`, which calls this."""
        return self._forked(cache, count, lambda: [cache.clone() for _ in range(count)])

    @without_grad
    def fork_batch(
        self, cache: StreamInferencePipelineCache, count: int
    ) -> StreamInferencePipelineCache:
        """See `StreamInferencePipelineCache.fork_batch`, which calls this."""

        def make() -> StreamInferencePipelineCache:
            size = cache.diffusion.batch_size
            noise = ForkNoise(_noise_of_clone(cache), count)
            batch = self._resized(cache, count * size, repeated(size, count), noise)
            encoders = [new_state(self.encoder, cache.context) for _ in range(count)]
            fill_batch(cache, batch, encoders, self.layout)
            return batch

        with self.guard("fork", cache.next_index, LOAD_TIMEOUT_S):
            return self._forked(cache, count, make)

    @without_grad
    def pick_fork(
        self, batch: StreamInferencePipelineCache, index: int
    ) -> StreamInferencePipelineCache:
        """See `StreamInferencePipelineCache.pick`, which calls this."""
        rows = rows_of(batch, index)
        with self.guard("clone", batch.next_index, LOAD_TIMEOUT_S):
            self.diffusion_model.side.join()
            noise = _noise_of_clone(batch)
            size = rows.stop - rows.start
            fork = self._resized(batch, size, lambda _, x: x[rows], noise)
            fill_pick(batch, index, rows, fork, self.layout)
            return fork

    def _forked(self, cache: StreamInferencePipelineCache, count: int, make: Callable[[], T]) -> T:
        """The result of ``make``, if there is memory for so many forks; timed."""
        self.diffusion_model.side.join()
        each = together(lambda: copied_bytes(cache, self.layout), _NO_STATE)
        require_room(count, each, self.target_device)
        return timed_forks(make, count, each, self.target_device)

    def _resized(
        self,
        cache: StreamInferencePipelineCache,
        batch_size: int,
        change: Change,
        noise: NoiseFunction,
    ) -> StreamInferencePipelineCache:
        """Fresh state for the context of a rollout at another batch size."""
        context = dict(cache.context)
        del context["batch_size"]
        encoded = changed_context({**context, "negative_text": cache.negative_text}, change)
        negative_text = encoded.pop("negative_text")
        return self.new_cache({**encoded, "batch_size": batch_size}, negative_text, noise)


def new_state(part: Component | None, context: dict[str, Any]) -> Any:
    """Fresh state of an encoder or decoder for one rollout; None if it has none.

    Args:
        part: of a pipeline.
        context: the encoded conditions of the rollout, by name.
    """
    if not isinstance(part, StreamingEncoder | StreamingDecoder):
        return None
    return part.initialize_cache(**select_context(part.initialize_cache, context))


def _noise_of_clone(cache: StreamInferencePipelineCache) -> NoiseFunction:
    """The noise of a rollout, or of each fork of a batch, for another rollout."""
    source = cache.diffusion.noise
    if isinstance(source, ForkNoise):
        source = source.source
    return NoiseSource(source.seed) if isinstance(source, NoiseSource) else source
