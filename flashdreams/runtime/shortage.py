"""Errors that say that memory ran out, on a device or on the host."""

import re

import torch

_HOST_SHORTAGE = re.compile(r"DefaultCPUAllocator: can't allocate memory|bad_alloc|out of memory")


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has no type of its own for the host's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_HOST_SHORTAGE.search(str(error)))
