"""What torch.compile needs, and what it has cost in this process."""

import os
import shutil
import sys
from dataclasses import dataclass

COMPILER_VARIABLE = "CXX"
"""Environment variable that names the C++ compiler."""


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


def why_no_compiler() -> str | None:
    """Why torch.compile cannot build code here; None if it can."""
    name = os.environ.get(COMPILER_VARIABLE) or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is not None:
        return None
    return (
        f"it needs a C++ compiler, and {name} is not found. Install one (apt-get install g++), or "
        f"name it in {COMPILER_VARIABLE}"
    )
