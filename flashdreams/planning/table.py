"""Plans as text."""

from collections.abc import Sequence

from flashdreams.planning.devices import GIB
from flashdreams.planning.plans import Plan

HEADINGS = (
    "cfg", "ring", "ulys", "tp", "weights", "KV", "state", "activ", "graphs", "total GiB",
    "MiB sent", "ms/step", "frames/s", "real time", "sessions", "window", "limit",
)  # fmt: skip

LONG_MS = 10_000
"""Time of an AR step that is given in seconds from here on."""


def table(plans: Sequence[Plan]) -> str:
    """One line per plan, in their order; sizes in GiB per rank."""
    rows = [HEADINGS, *(_row(plan) for plan in plans)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _row(plan: Plan) -> tuple[str, ...]:
    d, m = plan.degrees, plan.memory
    sizes = (m.transformer + m.others, m.kv_cache, m.state, m.activations, m.graphs, m.total)
    window = plan.longest_window_t
    return (
        *(str(n) for n in (d.cfg, d.ring, d.ulysses, d.tp)),
        *(f"{size / GIB:.2f}" for size in sizes),
        f"{plan.work.sent_bytes / 2**20:.0f}",
        f"{plan.ms.total:.1f}" if plan.fits else "-",
        f"{plan.frames_per_second:.1f}" if plan.fits else "-",
        ("yes" if plan.is_real_time else "no") if plan.fits else "does not fit",
        str(plan.sessions),
        "-" if window is None else str(window),
        plan.limit,
    )


def summary(plans: Sequence[Plan]) -> str:
    """The best plan in words."""
    best = plans[0]
    memory, room = best.memory.total / GIB, best.device.memory_gib
    if not best.fits:
        return (
            f"No plan fits: the smallest takes {memory:.1f} GiB per rank of {room:.1f} GiB, most "
            f"of it {best.limit}."
        )
    plural = "" if best.frames == 1 else "s"
    fps = best.frames_per_second
    rate = f"{fps:{'.1f' if fps >= 0.1 else '.2g'}} frames/s for {best.fps:g} shown"
    ms = best.ms.total
    time = f"{ms:.1f} ms" if ms < LONG_MS else f"{ms / 1e3:.0f} s"
    return (
        f"Best: {time} per AR step of {best.frames} frame{plural}, {rate}: "
        f"{'real time' if best.is_real_time else 'not real time'}; {memory:.1f} of {room:.1f} GiB "
        f"per rank; most of the time is {best.ms.largest}."
    )
