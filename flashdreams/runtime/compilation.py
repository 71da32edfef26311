"""What torch.compile needs, and what it has cost in this process."""

import os
import shutil
import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Compilation:
    """Code that was compiled."""

    graphs: int = 0
    """Pieces of code that were compiled, again for another shape included."""

    ms: float = 0.0
    """Milliseconds that it took."""

    def __sub__(self, other: "Compilation") -> "Compilation":
        return Compilation(self.graphs - other.graphs, self.ms - other.ms)


def compiled_so_far() -> Compilation:
    """All that this process has compiled; asked before and after to know what was new."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return Compilation()
    seconds = dynamo.compilation_time_metrics.get("_compile.compile_inner", ())
    return Compilation(dynamo.counters["stats"]["unique_graphs"], 1e3 * sum(seconds))


def why_no_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot build code for a device; None if it can.

    For a CPU, inductor calls ``$CXX``, by default g++ (clang++ on macOS). For CUDA, Triton calls
    ``$CC``, by default gcc or clang, and nobody calls a C++ compiler.

    Source: ``cpp.cxx`` in torch/_inductor/config.py; triton/runtime/build.py.
    """
    on_gpu = device.type == "cuda"
    variable = "CC" if on_gpu else "CXX"
    usual = ["gcc", "clang"] if on_gpu else ["clang++" if sys.platform == "darwin" else "g++"]
    names = [os.environ[variable]] if os.environ.get(variable) else usual
    if any(map(shutil.which, names)):
        return None
    return (
        f"it needs a compiler, and {' or '.join(names)} is not found. Install {usual[0]}, or name "
        f"another one: export {variable}=clang{'' if on_gpu else '++'}"
    )
