"""The HTML page of a run: its settings, figures, plots, and first and last frames."""

import base64
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashdreams.runtime.files import readable_write_errors, write_whole
from flashdreams.runtime.profiler import STAGES

MAX_POINTS = 2000
"""AR steps that a plot shows; of longer runs, every n-th."""

COLOURS = ("#8a6fd1", "#2f7fd6", "#1f9d8a", "#c98a1b")

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ header.runner_name }}: run report</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p.sub { color: var(--soft); margin: .2rem 0 1.2rem; }
dl.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
  gap: .75rem; margin: 0; }
dl.figures div { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
dl.figures dt { color: var(--soft); font-size: .85rem; }
dl.figures dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.frames { display: flex; gap: 1rem; flex-wrap: wrap; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .85rem; }
.frames img { max-width: 100%; height: auto; border-radius: 6px; }
.plot { background: #fff; border-radius: 8px; padding: .25rem; border: 1px solid var(--line); }
.plot svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .2rem .9rem .2rem 0;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
td.n, th.n { text-align: right; }
details { margin-top: 2rem; } summary { font-weight: 600; cursor: pointer; }
pre { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; padding: .8rem;
  font-size: .82rem; line-height: 1.4; }
</style></head><body>
<h1>{{ header.runner_name }}</h1>
<p class="sub">flashdreams {{ header.flashdreams }}, torch {{ header.torch }},
{{ header.world_size }} rank{{ "" if header.world_size == 1 else "s" }} on {{ header.device }},
seed {{ header.seed }}, config {{ header.config_hash }}</p>
<dl class="figures">{% for name, value in figures %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}
</dl>
{% if frames %}<h2>First and last frame</h2>
<div class="frames">{% for name, data in frames %}
<figure><img alt="{{ name }} of the video" src="data:image/png;base64,{{ data }}">
<figcaption>{{ name }}</figcaption></figure>{% endfor %}
</div>{% endif %}
{% for name, svg in plots %}<h2>{{ name }}</h2><div class="plot">{{ svg | safe }}</div>
{% endfor %}
{% if stages %}<h2>Stages, milliseconds per AR step</h2><div class="wide"><table>
<tr><th>stage</th><th class="n">median</th><th class="n">largest</th><th class="n">share</th></tr>
{% for row in stages %}<tr><td>{{ row[0] }}</td>{% for x in row[1:] %}<td class="n">{{ x }}</td>
{% endfor %}</tr>{% endfor %}</table></div>{% endif %}
{% if ranks %}<h2>Ranks, median milliseconds of their own work</h2><div class="wide"><table>
<tr><th>rank</th><th class="n">ms</th></tr>
{% for ms in ranks %}<tr><td>{{ loop.index0 }}{% if loop.index0 == header.slowest_rank %}
(slowest){% endif %}</td><td class="n">{{ "%.1f" | format(ms) }}</td></tr>{% endfor %}
</table></div>{% endif %}
{% if header.collectives %}<h2>Collectives of rank 0</h2><div class="wide"><table>
<tr><th>collective</th><th class="n">calls</th><th class="n">MB sent</th></tr>
{% for name, sent in header.collectives.items() %}<tr><td>{{ name }}</td>
<td class="n">{{ sent.calls }}</td>
<td class="n">{{ "%.2f" | format(sent.bytes_sent / 1e6) }}</td></tr>
{% endfor %}</table></div>{% endif %}
<details><summary>Settings</summary><pre>{{ config }}</pre></details>
</body></html>
"""


def write_report(path: Path, stats: Path, config: str, video: Path | None) -> None:
    """Write the page, whole or not at all; it needs no other file and no network.

    Args:
        path: the page, ``.html``.
        stats: the stats of the run, as `StatsWriter` finishes them.
        config: the settings as text.
        video: the video of the run, from which the pictures are taken; None shows none.

    Raises:
        OSError: a file cannot be read or written.
    """
    import jinja2

    found = json.loads(stats.read_text())
    header, records = found["header"], found["records"]
    page = jinja2.Environment(autoescape=True).from_string(PAGE)
    ranks = header.get("p50_ms_by_rank", [])
    text = page.render(
        header=header,
        figures=_figures(header, records),
        frames=_frames(video) if video is not None else [],
        plots=_plots(records) if records else [],
        stages=_stages(records),
        ranks=ranks if len(ranks) > 1 else [],
        config=config,
    )
    with readable_write_errors(path), write_whole(path) as file:
        file.write(text.encode())


def _figures(header: Mapping[str, Any], records: Sequence[Any]) -> list[tuple[str, str]]:
    """The headline: name and value as text."""
    steady = records[1:] or records
    found = []
    if steady:
        ms = statistics.median(row["total_ms"] for row in steady)
        frames = statistics.median(row["frames"] for row in steady)
        found.append(("frames per second", f"{1e3 * frames / ms:.1f}"))
        found.append(("median AR step", f"{ms:.1f} ms"))
        found.append(("AR steps", str(len(records))))
        found.append(("frames", str(sum(row["frames"] for row in records))))
        peak = max(row.get("mem_peak_gib") or 0 for row in records)
        found.append(("peak memory", f"{peak:.2f} GiB"))
    first = header.get("first_frame_latency_ms")
    if first is not None:
        found.append(("first chunk after", f"{first / 1e3:.2f} s"))
    if header.get("attention_backend"):
        found.append(("attention", header["attention_backend"]))
    return found


def _stages(records: Sequence[Any]) -> list[tuple[str, str, str, str]]:
    """Median, largest and share of every stage that was timed."""
    total = sum(row["total_ms"] for row in records)
    rows = []
    for stage in STAGES:
        times = [row[f"{stage}_ms"] for row in records if f"{stage}_ms" in row]
        if times:
            share = f"{sum(times) / total:.0%}"
            rows.append((stage, f"{statistics.median(times):.2f}", f"{max(times):.2f}", share))
    return rows


def _frames(video: Path) -> list[tuple[str, str]]:
    """The first and the last picture of a video, as PNG in base64."""
    ends = {"first frame": ((), 1), "last frame": (("-sseof", "-1"), None)}
    return [(name, _png(_read_last(video, *end))) for name, end in ends.items()]


def _read_last(video: Path, seek: Sequence[str], count: int | None) -> Any:
    """The last picture ``[height, width, 3]`` uint8 of the first ``count`` after a place."""
    import imageio_ffmpeg
    import numpy as np

    pictures = imageio_ffmpeg.read_frames(str(video), input_params=list(seek))
    width, height = next(pictures)["size"]
    for number, picture in enumerate(pictures, start=1):
        last = picture
        if number == count:
            break
    pictures.close()
    return np.frombuffer(last, dtype=np.uint8).reshape(height, width, 3)


def _png(picture: Any) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def _plots(records: Sequence[Any]) -> list[tuple[str, str]]:
    """Title and SVG of each plot."""
    shown = records[:: -(-len(records) // MAX_POINTS)]
    return [
        ("Time of each AR step", _svg(_draw_times, shown)),
        ("Memory", _svg(_draw_memory, shown)),
    ]


def _svg(draw: Any, records: Sequence[Any]) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    draw(axes, records)
    axes.set_xlabel("AR step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _draw_times(axes: Any, records: Sequence[Any]) -> None:
    steps = range(len(records))
    stages = [s for s in STAGES if any(f"{s}_ms" in row for row in records)]
    heights = [[row.get(f"{stage}_ms", 0.0) for row in records] for stage in stages]
    if heights:
        axes.stackplot(steps, heights, labels=stages, colors=COLOURS, linewidth=0)
    axes.plot(steps, [row["total_ms"] for row in records], color="#222", lw=0.8, label="total")
    steady = sorted(row["total_ms"] for row in records)
    axes.set_ylim(0, 1.3 * steady[int(0.98 * (len(steady) - 1))])  # a slow first step is cut off
    axes.set_ylabel("ms")
    axes.legend(loc="upper right", ncols=5, frameon=False, fontsize=9)


def _draw_memory(axes: Any, records: Sequence[Any]) -> None:
    axes.plot([row.get("mem_peak_gib") or 0.0 for row in records], color="#2f7fd6")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("peak GiB so far")
