"""State that causal video networks carry from one chunk to the next."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdreams.parallel.plan import state


@dataclass
class CarriedFrames:
    """Trailing input frames of every causal layer of one network, for one rollout.

    A slot belongs to one layer and has its name. It is allocated with zeros at the first call
    and written in place afterwards, so the memory of a rollout is constant. Modules hold none of
    this: two rollouts use two objects.
    """

    position: int = state("host", default=0)
    """Latent frames that the network has consumed; 0 marks the first call."""

    chunks: int = state("host", default=0)
    """Chunks (AR steps) that were finished."""

    slots: dict[str, Tensor] = state("columns", default_factory=dict)
    """``[..., W]`` of each layer, by its slot name."""

    def slot(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The frames that the layer ``name`` carries; zeros before its first call.

        Args:
            name: the layer's slot name, unique in its network.
            shape: shape of the slot; the same in every call of one rollout.
            like: activation that gives device, dtype and memory format.

        Returns:
            The stored tensor itself: the next call reads what is copied into it.

        Raises:
            ValueError: the rollout was started with another shape or another network.
        """
        stored = self.slots.get(name)
        if stored is None:
            if self.position > 0:
                raise ValueError(
                    f"this cache has consumed {self.position} latent frames but holds nothing for "
                    f"{name}: it belongs to another network. Its layers: "
                    f"{', '.join(sorted(self.slots)[:5])}, ..."
                )
            with torch.inference_mode(False):  # else the slot could be written in that mode only
                stored = torch.empty(
                    shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like)
                ).zero_()
            self.slots[name] = stored
        if stored.shape != shape:
            raise ValueError(
                f"{name} carries frames of shape {list(stored.shape)} from the last chunk, but "
                f"this chunk needs {list(shape)}. Batch, height and width are fixed for a rollout: "
                "start a new one with initialize_cache()."
            )
        if stored.device != like.device or stored.dtype != like.dtype:
            with torch.inference_mode(False):
                stored = stored.to(device=like.device, dtype=like.dtype)
            self.slots[name] = stored
        return stored

    def num_bytes(self) -> int:
        """Bytes that the slots occupy."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.slots.values())

    def begin_chunk(self, autoregressive_index: int) -> None:
        """Check that a chunk comes in order.

        Raises:
            ValueError: ``autoregressive_index`` is not the number of finished chunks.
        """
        if autoregressive_index != self.chunks:
            raise ValueError(
                f"autoregressive_index={autoregressive_index}, but this cache has seen "
                f"{self.chunks} chunks and expects {self.chunks}. Chunks go in order; a new "
                "rollout starts with initialize_cache()."
            )


def memory_format(like: Tensor) -> torch.memory_format:
    """Channels last if the channels (dim 1) of ``like`` are innermost in memory."""
    if like.stride(1) != 1:
        return torch.contiguous_format
    return torch.channels_last if like.dim() == 4 else torch.channels_last_3d
