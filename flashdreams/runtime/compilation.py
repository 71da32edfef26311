"""Cost of torch.compile in this process."""

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Compilation:
    """Code that was compiled."""

    graphs: int = 0
    """Pieces of code that were compiled, again for another shape included."""

    ms: float = 0.0
    """Milliseconds spent."""

    def __sub__(self, other: "Compilation") -> "Compilation":
        return Compilation(self.graphs - other.graphs, self.ms - other.ms)


def compiled_so_far() -> Compilation:
    """Totals of this process; differences give what was compiled in between."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return Compilation()
    seconds = dynamo.compilation_time_metrics.get("_compile.compile_inner", ())
    return Compilation(dynamo.counters["stats"]["unique_graphs"], 1e3 * sum(seconds))
