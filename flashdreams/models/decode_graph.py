"""Steady-state decoding, replayed as a CUDA graph."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashdreams.models.carried_frames import CarriedFrames
from flashdreams.runtime.cuda_graph import GraphedCallable

Decode = Callable[[Tensor, CarriedFrames], Tensor]
"""Latents of a chunk and the carried frames, which it updates in place, to frames."""


class DecodeGraph:
    """A decoder's calls for chunks of one shape after the first, as one graph.

    The graph reads and writes carried frames at fixed addresses. They are those of the rollout that
    was decoded last: the slots of its `CarriedFrames` are the graph's own memory. When another
    rollout is decoded, the former one's frames move to separate memory. So a single rollout
    costs no copies, any number of rollouts may interleave, and code that reads or copies the state
    of a rollout (saves, forks, clones) finds it in its slots as without a graph.

    Life: ``capture`` once, at warm-up -> calls -> ``drop``.
    """

    def __init__(self, decode: Decode, device: torch.device, backend: Any = None) -> None:
        """Prepare.

        Args:
            decode: the eager call.
            device: anything but CUDA captures nothing.
            backend: what captures; None means CUDA's own on CUDA.
        """
        self.decode = decode
        self.call = GraphedCallable(decode, device, backend=backend)
        self._own: CarriedFrames | None = None
        self._latent: tuple[torch.Size, torch.dtype] | None = None
        self._resident: weakref.ref[CarriedFrames] | None = None

    def capture(self, latent: Tensor) -> bool:
        """Capture the call for latents like this one; decodes two chunks of it.

        Args:
            latent: on the device, in the type in which latents will come.

        Returns:
            Whether there is a graph now. Where the capture fails, calls stay eager, and a warning
            says why.
        """
        if not self.call.can_capture:
            return False
        own = CarriedFrames()
        self.decode(latent, own)
        self.call(latent, own)
        if self.call.failure is not None:
            return False
        self.call.seal([own])
        self._own, self._latent = own, (latent.shape, latent.dtype)
        return True

    def __call__(self, latent: Tensor, carried: CarriedFrames) -> Tensor:
        """Decode a chunk: by replay where it is of the captured shape, else eagerly."""
        own = self._own
        if own is None or not self._fits(latent, carried, own):
            if self.call.can_capture:
                self.call.eager_calls += 1
            return self.decode(latent, carried)
        self._move_in(carried, own)
        video = self.call(latent, own)
        carried.position += latent.shape[2]
        return video

    def drop(self) -> None:
        """Free the graph; a rollout keeps the frames that it carries."""
        self.call.drop()
        self._own, self._resident = None, None

    def _fits(self, latent: Tensor, carried: CarriedFrames, own: CarriedFrames) -> bool:
        if carried.position == 0 or (latent.shape, latent.dtype) != self._latent:
            return False
        shapes = {name: x.shape for name, x in carried.slots.items()}
        return shapes == {name: x.shape for name, x in own.slots.items()}

    def _move_in(self, carried: CarriedFrames, own: CarriedFrames) -> None:
        """Let the slots of a rollout be the graph's memory."""
        names = [name for name, x in own.slots.items() if carried.slots[name] is not x]
        if not names:
            return
        former = self._resident() if self._resident is not None else None
        if former is not None and former is not carried:
            with torch.inference_mode(False):
                for name, x in own.slots.items():
                    if former.slots.get(name) is x:
                        former.slots[name] = x.clone()
        for name in names:
            own.slots[name].copy_(carried.slots[name])
            carried.slots[name] = own.slots[name]
        self._resident = weakref.ref(carried)
