"""Copies from the host to a device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Bring a tensor to a device without making the host wait.

    For CUDA it goes through pinned memory, and the current stream copies it from there: the host
    may queue the next AR step while the last one is computed. An expanded tensor has no pinned
    form and is written out first. Elsewhere it is a plain move.
    """
    device = torch.device(device)
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
