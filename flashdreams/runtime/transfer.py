"""Asynchronous copies between the host and a device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor, of any shape and dtype, to a device without making the host wait.

    For CUDA it goes through pinned memory, and the current stream copies it from there: the host
    may queue the next AR step while the last one is computed. An expanded tensor has no pinned
    form and is written out first. Elsewhere it is a plain move.
    """
    device = torch.device(device)
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def start_host_copy(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """Queue a copy of a CUDA tensor to the host on the current stream.

    Returns:
        The copy, which nobody changes, in pinned memory of PyTorch's pool, and the event after
        which it is complete; another thread may wait for it without holding up the device.
    """
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True, device="cpu")
    copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)
    arrived.record(torch.cuda.current_stream(tensor.device))
    return copy, arrived


def copy_to_host(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Copy a tensor to the host; from a GPU as `start_host_copy` does, else at once.

    Returns:
        The copy, which nobody changes, and the event after which it is complete; None: it is.
    """
    return start_host_copy(tensor) if tensor.is_cuda else (tensor.detach().clone(), None)
