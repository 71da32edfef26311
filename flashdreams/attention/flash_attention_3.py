"""FlashAttention-3 from any package that provides it, with a fixed number of KV splits."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MODULES = ("fa3_fwd_interface", "flash_attn_interface")
"""Modules with the kernels, the preferred one first: the package ``fa3-fwd`` (forward passes only,
prebuilt), and FlashAttention's own, which is compiled from source."""

HINT = "pip install 'flashdreams[gpu]'"


def flash_attn_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    return_lse: bool = False,
    num_splits: int = 1,
) -> Any:
    """FlashAttention-3 of the package ``fa3-fwd`` or ``flash_attn_interface``, for Hopper.

    Args:
        q: ``[B, L, N, D]``, bf16; any strides with contiguous D, as for ``k`` and ``v``.
        k: ``[B, S, N, D]``.
        v: ``[B, S, N, D]``.
        scale: factor on the scores.
        return_lse: also return the logarithm of each query's sum of exponentials.
        num_splits: KV splits, computed in parallel and merged, at least 1; the
            kernels' own choice (0) would depend on the call.

    Raises:
        ImportError: it is not installed, or not for this CUDA.
        ValueError: ``num_splits`` is below 1.
    """
    if num_splits < 1:
        raise ValueError(f"num_splits={num_splits} must be at least 1.")
    function = load_flash_attn_3().flash_attn_func
    known = parameters_of(function)
    options: dict[str, Any] = {}
    if "num_splits" in known:
        options["num_splits"] = num_splits
    # Early releases always return the sums of exponentials and have no option for them.
    if return_lse and "return_attn_probs" in known:
        options["return_attn_probs"] = True
    found = function(q, k, v, softmax_scale=scale, **options)
    if return_lse:
        return found[0], found[1]
    return found[0] if isinstance(found, tuple) else found


def installed_modules() -> Iterator[str]:
    """Those of `MODULES` that are installed, without importing them."""
    return (name for name in MODULES if importlib.util.find_spec(name) is not None)


def load_flash_attn_3() -> ModuleType:
    """Import the first module that can be loaded.

    Raises:
        ImportError: there is none; says what is missing or why it cannot be loaded.
    """
    failures = []
    for name in installed_modules():
        try:
            return importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            failures.append(f"{name} cannot be loaded: {reason[:200]}")
    if failures:
        raise ImportError(
            f"{'; '.join(failures)}. It may be built for another CUDA or PyTorch than "
            f"{torch.version.cuda or 'none'} and {torch.__version__}"
        )
    raise ImportError(f"FlashAttention-3 is not installed; {HINT}")


def why_flash_attn_3_is_unusable(
    device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Why FlashAttention-3 cannot run here; None if it can. Imports it."""
    names = list(installed_modules())
    if not names:
        return f"FlashAttention-3 is not installed; {HINT}"
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    forward_only = names[0] == MODULES[0]
    if dtype != torch.bfloat16 and (forward_only or dtype != torch.float16):
        types = "bfloat16" if forward_only else "bfloat16 and float16"
        return f"takes {types}, not {str(dtype).removeprefix('torch.')}"
    least = 64 if forward_only else 8
    if not least <= head_dim <= 256 or head_dim % 8:
        return f"takes head sizes that are multiples of 8 from {least} to 256, not {head_dim}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return f"needs compute capability 9.x, found {'.'.join(map(str, capability))}"
    try:
        load_flash_attn_3()
    except ImportError as error:
        return str(error)
    return None


@cache
def parameters_of(function: Callable[..., Any]) -> frozenset[str]:
    """Names of a function's parameters; releases differ in theirs."""
    return frozenset(inspect.signature(function).parameters)
