"""Launching of Triton programs: descriptions, checks and the target GPU."""

import importlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_TYPES = (torch.int32, torch.int64)
MAX_OFFSET = 2**31 - 1
"""Largest offset in elements that fits the programs' 32-bit arithmetic."""


@dataclass(frozen=True)
class Target:
    """The GPU or interpreter that runs a program."""

    capability: int
    """Compute capability times ten: 80, 90, 100; 0 for the interpreter."""
    num_processors: int
    """Streaming multiprocessors."""

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter is used instead of a GPU."""
        return self.capability == 0


INTERPRETER = Target(capability=0, num_processors=1)

CONSUMER = 86
"""Table key for GPUs with less shared memory: 8.6, 8.9, 12.x."""


def generation_of(target: Target, table: Iterable[tuple[int, Any]]) -> int:
    """The table entry for a GPU: the newest generation that is not newer than it.

    Args:
        target: a GPU.
        table: keys that start with a capability or :data:`CONSUMER`.
    """
    if target.capability in (86, 89) or target.capability >= 120 or target.capability < 80:
        return CONSUMER
    return max(c for c, _ in table if c <= target.capability and c != CONSUMER)


ALIGNMENT_BYTES = 16
"""Alignment in bytes that a tensor descriptor requires of the address and outer strides."""


def is_aligned(x: Tensor) -> bool:
    """Whether a tensor's address and strides are aligned as a tensor descriptor requires."""
    steps = [step * x.element_size() for step in x.stride()[:-1]]
    address = 0 if x.is_meta else x.data_ptr()
    return not any(number % ALIGNMENT_BYTES for number in (address, *steps))


@dataclass(frozen=True)
class Block:
    """A tensor that a program accesses in blocks, through a tensor descriptor."""

    tensor: Tensor
    """Contiguous along its last dim, aligned: see `is_aligned`."""
    shape: tuple[int, ...]
    """Shape of a block."""

    def descriptor(self) -> Any:
        """Triton's descriptor; made on the host, so that kernels need no allocator."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor.from_tensor(self.tensor, list(self.shape))


@dataclass(frozen=True)
class Launch:
    """One launch of one program as data: run it, or compile it ahead of time."""

    module: str
    """Module under ``flashdreams_kernels.programs``."""
    program: str
    """Function of that module."""
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """Tensors, blocks, integers and floats, by parameter name; None for unused ones."""
    constants: dict[str, Any]
    """Compile-time values, by parameter name."""
    num_warps: int = 4
    num_stages: int = 2
    device: torch.device = field(default=torch.device("cpu"))
    max_registers: int | None = None
    """Per thread, so that more programs fit on a multiprocessor; None: the compiler's choice."""

    def run(self) -> None:
        """Launch on the device of the tensors.

        Raises:
            ValueError: as for :func:`target_of`.
            ImportError: triton is not installed.
        """
        target_of(self.device)
        program = getattr(load_programs(self.module), self.program)[self.grid]
        arguments = {
            name: value.descriptor() if isinstance(value, Block) else value
            for name, value in self.arguments.items()
        }
        if self.device.type != "cuda":
            program(**arguments, **self.constants, **self.options)
            return
        with torch.cuda.device(self.device):
            program(**arguments, **self.constants, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler.

        Fused multiply-add is enabled explicitly, because triton 3.10 disables it by default.
        """
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
            **limit,
        }


def load_programs(module: str) -> ModuleType:
    """Import a module of Triton programs.

    Raises:
        ImportError: triton is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(f"flashdreams_kernels.programs.{module}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        raise ImportError(
            "This kernel needs triton, which is not installed. Type: pip install 'triton>=3.6', "
            "or choose another attention backend, e.g. sdpa."
        ) from error


def target_of(device: torch.device) -> Target:
    """The target of a device.

    Raises:
        ValueError: not a CUDA device, and Triton's interpreter is not enabled.
    """
    if device.type == "cuda":
        return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return INTERPRETER
    raise ValueError(
        f"Triton kernels take CUDA tensors, got tensors on {str(device)!r}. On a CPU use the "
        "functions of flashdreams_kernels.reference or the attention backend 'sdpa'; for tests "
        "set TRITON_INTERPRET=1 before triton is imported."
    )


@cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(properties.major * 10 + properties.minor, properties.multi_processor_count)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << max(0, size - 1).bit_length()


def ceil_div(numerator: int, denominator: int) -> int:
    """Division rounded up."""
    return -(-numerator // denominator)


def warps_of(block: int) -> int:
    """Warps for a program of ``block`` elements: 512 elements per warp, 1 to 16 warps."""
    return min(16, max(1, next_power_of_2(ceil_div(block, 512))))


def named_strides(name: str, letters: str, strides: Sequence[int]) -> dict[str, int]:
    """Arguments ``{name}_stride_{letter}`` of a program."""
    return {f"{name}_stride_{x}": step for x, step in zip(letters, strides, strict=True)}


def strided(name: str, letters: str, x: Tensor) -> dict[str, Any]:
    """Arguments of a program for a tensor: itself, and its strides over the first dims."""
    return {name: x, **named_strides(name, letters, x.stride()[: len(letters)])}


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    like: Tensor,
    dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    """Check a kernel's argument before its pointer is passed to the kernel.

    Args:
        name: name of the argument, for the message.
        tensor: the argument.
        shape: required sizes, None for any.
        like: tensor whose device, and dtype unless ``dtypes`` is given, is required.
        dtypes: allowed dtypes.

    Raises:
        ValueError: shape, stride of the last dim, reach or device do not fit.
        TypeError: the dtype does not fit.
    """
    allowed = (like.dtype,) if dtypes is None else tuple(dtypes)
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype) for dtype in allowed)
        raise TypeError(f"{name} is {tensor.dtype}; allowed here: {names}.")
    fits = tensor.ndim == len(shape) and all(
        wanted is None or wanted == size for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted_text = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be [{wanted_text}], got {list(tensor.shape)}.")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the others are on {like.device}.")
    if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {tensor.stride(-1)} along its last dim, which must be contiguous; "
            f"call {name}.contiguous()."
        )
    layout = zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    reach = sum((size - 1) * step for size, step in layout)
    if tensor.numel() and reach > MAX_OFFSET:
        raise ValueError(
            f"{name} reaches over {reach} elements in one batch entry; at most {MAX_OFFSET} are "
            "possible. Use a shorter window or more ranks."
        )
