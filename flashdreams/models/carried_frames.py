"""State that causal video networks carry from one chunk to the next."""

from collections.abc import Mapping

import torch
from torch import Tensor

POSITION = "position"
CHUNKS = "chunks"


class CarriedFrames:
    """Trailing input frames of every causal layer of one network, for one rollout.

    A slot belongs to one layer and is named after it. It is allocated with zeros at the first call
    and written in place ever after, so the memory of a rollout is constant. Modules hold none of
    this: two rollouts use two objects.
    """

    position: int
    """Latent frames that the network has consumed; 0 marks the first call."""

    chunks: int
    """Chunks (AR steps) that were finished."""

    def __init__(self) -> None:
        self.position = 0
        self.chunks = 0
        self._slots: dict[str, Tensor] = {}

    def slot(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The frames that the layer ``name`` carries; zeros before its first call.

        Args:
            name: the layer's slot name, unique in its network.
            shape: shape of the slot; the same in every call of one rollout.
            like: activation that gives device, dtype and memory format.

        Returns:
            The stored tensor itself: what is copied into it is what the next call sees.

        Raises:
            ValueError: the rollout was begun with another shape or another network.
        """
        stored = self._slots.get(name)
        if stored is None:
            if self.position > 0:
                raise ValueError(
                    f"this cache has consumed {self.position} latent frames but holds nothing for "
                    f"{name}: it belongs to another network. Its layers: "
                    f"{', '.join(sorted(self._slots)[:5])}, ..."
                )
            with torch.inference_mode(False):  # else the slot could be written in that mode only
                stored = torch.empty(
                    shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like)
                ).zero_()
            self._slots[name] = stored
        if stored.shape != shape:
            raise ValueError(
                f"{name} carries frames of shape {list(stored.shape)} from the last chunk, but "
                f"this chunk needs {list(shape)}. Batch, height and width are fixed for a rollout: "
                "begin a new one with initialize_cache()."
            )
        if stored.device != like.device or stored.dtype != like.dtype:
            with torch.inference_mode(False):
                stored = stored.to(device=like.device, dtype=like.dtype)
            self._slots[name] = stored
        return stored

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all slots by layer name, and the two counters as 0-dim int64 tensors."""
        state = {name: tensor.clone() for name, tensor in self._slots.items()}
        state[POSITION] = torch.tensor(self.position)
        state[CHUNKS] = torch.tensor(self.chunks)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace everything by copies of what ``state_dict`` gave.

        Raises:
            ValueError: a counter is missing.
        """
        missing = [name for name in (POSITION, CHUNKS) if name not in state]
        if missing:
            raise ValueError(
                f"no carried frames: {', '.join(missing)} missing among {len(state)} tensors. "
                "Give what state_dict() of such a cache returned."
            )
        self.position = int(state[POSITION])
        self.chunks = int(state[CHUNKS])
        self._slots = {
            name: tensor.clone() for name, tensor in state.items() if name not in (POSITION, CHUNKS)
        }

    def num_bytes(self) -> int:
        """Bytes that the slots occupy."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._slots.values())

    def begin_chunk(self, autoregressive_index: int) -> None:
        """Check that a chunk comes in its turn.

        Raises:
            ValueError: ``autoregressive_index`` is not the number of finished chunks.
        """
        if autoregressive_index != self.chunks:
            raise ValueError(
                f"autoregressive_index={autoregressive_index}, but this cache has seen "
                f"{self.chunks} chunks and expects {self.chunks}. Chunks go in order; a new "
                "rollout begins with initialize_cache()."
            )


def memory_format(like: Tensor) -> torch.memory_format:
    """Channels last if the channels (dim 1) of ``like`` are innermost in memory."""
    if like.stride(1) != 1:
        return torch.contiguous_format
    return torch.channels_last if like.dim() == 4 else torch.channels_last_3d
