"""The planner: ``flashdreams-plan <slug>``, also ``python -m flashdreams.plan <slug>``."""

if __name__ == "__main__":  # before the imports below, which take time
    from flashdreams.runtime.first_signals import begin_command

    begin_command("flashdreams-plan")

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from flashdreams.parallel.stopping import run_command
from flashdreams.runtime.command_text import lost_output_in_one_line, read_options
from flashdreams.runtime.text import printable, say

PROGRAM = "flashdreams-plan"
DONE, DOES_NOT_FIT, WRONG_USAGE = 0, 1, 2
"""Exit codes."""
SHORT_MS = 5.0
"""Predicted time of an AR step on a GPU below which the time between kernels matters."""


@dataclass(kw_only=True)
class PlanOptions:
    """Predict memory, communication and time per AR step of a method, for every parallel mesh.

    Nothing is loaded or downloaded: the network runs on the meta device, where tensors have shapes
    but no data. Times are operation and byte counts divided by the throughput that a device
    reaches; the output says where that was measured.
    """

    slug: Annotated[Positional[str], arg(metavar="SLUG")]
    """Slug of the method."""
    gpus: str | None = None
    """Number and type of GPUs, such as 8xH100-80GB; None: this machine (a CPU is measured)."""
    devices: Path | None = None
    """YAML file with further devices: name -> fields."""
    height: int | None = None
    """Height of the video in pixels; None: the method's default."""
    width: int | None = None
    """Width of the video in pixels; None: the method's default."""
    fps: float | None = None
    """Frames per second that count as real time; None: the method's default."""
    precision: Literal["native", "fp8", "fp8_gemm"] | None = None
    """Precision of attention over the KV cache, and of wide matmuls; None: the method's default."""
    window: int | None = None
    """Latent frames of the sliding window; None: the method's default."""
    offload: bool | None = None
    """Weights of the text encoder in host memory, one layer on the GPU; None: the method's
    default."""


def entry_point() -> None:
    """Run the process's own command line and exit with its code."""
    run_command(PROGRAM, main)


@lost_output_in_one_line(PROGRAM)
def main(argv: Sequence[str]) -> int:
    """Run one command line.

    Args:
        argv: the words after the program's name.

    Returns:
        0 a plan fits, 1 none does, 2 the command line is wrong.
    """
    try:
        options = read_options(PlanOptions, argv, PROGRAM)
    except ValueError as error:
        say(printable(f"{PROGRAM}: error: {error}"))
        return WRONG_USAGE
    from flashdreams.planning.devices import DEVICES, read_devices, resolve_gpus, this_machine
    from flashdreams.planning.plans import Planner
    from flashdreams.planning.table import summary, table
    from flashdreams.registry import PluginError, discover

    try:
        runner: Any = discover().resolve(options.slug)
        if options.fps is not None and not 0 < options.fps < float("inf"):
            raise ValueError(f"--fps {options.fps}: must be positive and finite.")
        devices = DEVICES if options.devices is None else read_devices(options.devices)
        config = _changed(runner, options)
        given = options.gpus
        count, device = this_machine(devices) if given is None else resolve_gpus(given, devices)
        fps = options.fps or runner.fps
        planner = Planner(config, device, fps=fps, parallel=runner.parallel)
        plans = planner.plans(count)
        enough = _real_time(planner, plans[0])
    except (ValueError, TypeError, ImportError, PluginError) as error:
        say(printable(f"{PROGRAM}: error: {error}"))
        return WRONG_USAGE
    c: Any = config.diffusion_model.transformer
    print(f"{options.slug} on {count} x {device.name}, latents {c.latent_height}x{c.latent_width}")
    print(f"{table(plans)}\n{summary(plans)}")
    if plans[0].fits:
        print(f"Type: {_command(options, runner, plans[0])}")
    if enough is not None:
        print(enough)
    print(f"Predicted, not measured. {device.name}: {device.source}.")
    if not device.call_us and plans[0].ms.total < SHORT_MS:
        print("Launching kernels is not counted: expect more time for a step this short.")
    return DONE if plans[0].fits else DOES_NOT_FIT


def _real_time(planner: Any, best: Any) -> str | None:
    """How many GPUs reach real time, where those that were asked for do not."""
    from flashdreams.planning.plans import MOST_RANKS

    transformer = planner.config.diffusion_model.transformer
    if best.is_real_time or best.device.is_host or not getattr(transformer, "streaming", False):
        return None
    found = planner.fewest_for_real_time(best.degrees.world_size)
    if found is None:
        return f"Not real time on up to {MOST_RANKS} x {best.device.name} either."
    on = f"{found.degrees.world_size} x {found.device.name}"
    rate = f"{found.frames_per_second:.1f} frames/s"
    return f"Real time: on {on}, {found.ms.total:.1f} ms per AR step, {rate}."


def _command(options: PlanOptions, runner: Any, plan: Any) -> str:
    """The command line that runs a plan."""
    from flashdreams.infra.video_runner import SPATIAL_FACTOR

    transformer = "--pipeline.diffusion-model.transformer"
    flags: dict[str, Any] = {f"{transformer}.precision": options.precision}
    flags[f"{transformer}.window-size-t"] = options.window
    flags["--pipeline.text-encoder.offload"] = options.offload
    for name in ("height", "width"):
        pixels = getattr(options, name)
        if hasattr(runner, name) or pixels is None:
            flags[f"--{name}"] = pixels
        else:
            flags[f"{transformer}.latent-{name}"] = pixels // SPATIAL_FACTOR
    ranks, node = plan.degrees.world_size, plan.device.ranks_per_node
    words = ["flashdreams-run", options.slug]
    if ranks > 1:
        nodes = "--standalone" if ranks <= node else f"--nnodes {-(-ranks // node)}"
        launch = f"torchrun {nodes} --nproc-per-node {min(ranks, node)} -m flashdreams.run"
        words = [launch, options.slug, plan.degrees.flags]
    words += [f"{flag} {value}" for flag, value in flags.items() if value is not None]
    return " ".join(words)


def _changed(runner: Any, options: PlanOptions) -> Any:
    """The pipeline with what was requested."""
    from flashdreams.infra.config import derive_config
    from flashdreams.infra.video_runner import SPATIAL_FACTOR, check_size

    changes: dict[str, Any] = {}
    for name in ("height", "width"):
        pixels = getattr(options, name)
        if pixels is not None:
            check_size(name, pixels, runner.pipeline.diffusion_model.transformer)
            changes[f"latent_{name}"] = pixels // SPATIAL_FACTOR
    if options.precision is not None:
        changes["precision"] = options.precision
    if options.window is not None:
        changes["window_size_t"] = options.window
    pipeline = derive_config(runner.pipeline, diffusion_model={"transformer": changes})
    if options.offload is None:
        return pipeline
    if not hasattr(pipeline.text_encoder, "offload"):
        raise ValueError(f"--offload: {pipeline.name} has no text encoder that can be offloaded.")
    return derive_config(pipeline, text_encoder={"offload": options.offload})


if __name__ == "__main__":
    entry_point()
