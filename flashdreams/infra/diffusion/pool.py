"""Storage that successive rollouts reuse, so that captured graphs stay valid."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

logger = logging.getLogger(__name__)

Storage = tuple[Any, ...]
"""The transformer's state under the prompt and under the negative one; None for a half that is not
evaluated here."""


class StoragePool:
    """Transformer state for a fixed number of rollouts at a time.

    A new rollout leases a storage and returns it when it is released or garbage-collected; its
    tensors never move. Rollouts beyond the pool have their own storage and run without graphs.
    """

    def __init__(self, storages: Sequence[Storage]) -> None:
        """Prepare.

        Args:
            storages: the state that graphs were captured for.
        """
        self.size = len(storages)
        self._free = list(storages)
        self._told: set[str] = set()

    def lease(self, begin: Callable[[Storage], bool]) -> Storage | None:
        """Start a rollout in a free storage.

        Args:
            begin: copies the rollout's context into a storage; False if it does not fit there.

        Returns:
            The storage, to be returned once; None if none is free or the context does not fit.
        """
        if not self._free:
            self._warn_once(
                f"all {self.size} storages with CUDA graphs are in use (max_rollouts={self.size}). "
                "Call cache.release() on finished rollouts, or raise max_rollouts"
            )
            return None
        storage = self._free.pop()
        fits = False
        try:
            fits = begin(storage)
        finally:
            if not fits:
                self.give_back(storage)
        if not fits:
            self._warn_once("its context has another shape than the graphs were captured for")
        return storage if fits else None

    def give_back(self, storage: Storage) -> None:
        """Make a storage free for the next rollout."""
        self._free.append(storage)

    def _warn_once(self, reason: str) -> None:
        if reason not in self._told:
            logger.warning("A rollout runs without CUDA graphs: %s. Reported once.", reason)
        self._told.add(reason)
