"""Launching of Triton programs: descriptions, checks and the machine that they run on."""

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
"""Largest distance in elements that a program reaches with 32-bit arithmetic."""


@dataclass(frozen=True)
class Target:
    """What a program runs on."""

    capability: int
    """Compute capability times ten: 80, 90, 100; 0 for the interpreter."""
    num_processors: int
    """Streaming multiprocessors."""

    @property
    def interpreted(self) -> bool:
        """True where Triton's interpreter stands in for a GPU."""
        return self.capability == 0


INTERPRETER = Target(capability=0, num_processors=1)

CONSUMER = 86
"""Key in a table for the chips with less shared memory: 8.6, 8.9, 12.x."""


def generation_of(target: Target, table: Iterable[tuple[int, Any]]) -> int:
    """The entry of a table that serves a GPU: the newest one that is not newer than it.

    Args:
        target: a GPU.
        table: keys that begin with a capability, :data:`CONSUMER` among them.
    """
    if target.capability in (86, 89) or target.capability >= 120 or target.capability < 80:
        return CONSUMER
    return max(c for c, _ in table if c <= target.capability and c != CONSUMER)


ALIGNMENT_BYTES = 16
"""What a tensor descriptor asks of an address and of all strides but the last."""


def is_aligned(x: Tensor) -> bool:
    """Whether a tensor's address and strides are such that a tensor descriptor can be made."""
    steps = [step * x.element_size() for step in x.stride()[:-1]]
    address = 0 if x.is_meta else x.data_ptr()
    return not any(number % ALIGNMENT_BYTES for number in (address, *steps))


@dataclass(frozen=True)
class Block:
    """A tensor that a program reads or writes in blocks, by a tensor descriptor."""

    tensor: Tensor
    """Contiguous along its last dim, aligned: see `is_aligned`."""
    shape: tuple[int, ...]
    """Of a block."""

    def descriptor(self) -> Any:
        """What Triton takes; made on the host, so that kernels need no memory of their own."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor.from_tensor(self.tensor, list(self.shape))


@dataclass(frozen=True)
class Launch:
    """One launch of one program, said as data: run it, or compile it ahead of time."""

    module: str
    """Module under ``flashdreams_kernels.programs``."""
    program: str
    """Function of that module."""
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """Tensors, blocks, integers and floats, by parameter name; None where nothing is read."""
    constants: dict[str, Any]
    """Compile-time values, by parameter name."""
    num_warps: int = 4
    num_stages: int = 2
    device: torch.device = field(default=torch.device("cpu"))
    max_registers: int | None = None
    """Per thread, so that more programs fit on a multiprocessor; None leaves it to the compiler."""

    def run(self) -> None:
        """Launch on the device of the tensors.

        Raises:
            ImportError: triton is not installed.
        """
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

        Fused multiply-add is asked for by name: triton 3.10 switches it off by default.
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
        ImportError: triton is not installed; the text says how to get it.
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
    """The machine behind a device.

    Raises:
        ValueError: not a CUDA device, and Triton's interpreter is not switched on.
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
    """Warps for a program that holds ``block`` elements: 512 to a warp, 1 to 16 warps."""
    return min(16, max(1, next_power_of_2(ceil_div(block, 512))))


def named_strides(name: str, letters: str, strides: Sequence[int]) -> dict[str, int]:
    """Arguments ``{name}_stride_{letter}`` of a program."""
    return {f"{name}_stride_{x}": step for x, step in zip(letters, strides, strict=True)}


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    like: Tensor,
    dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    """Check a kernel's argument before a pointer to it leaves Python.

    Args:
        name: of the argument, for the message.
        tensor: the argument.
        shape: sizes wanted, None for any.
        like: its device is wanted, and its dtype unless ``dtypes`` is given.
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
