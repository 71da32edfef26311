"""The engine's overhead: a streamed rollout against a bare loop over the same modules.

The bare loop calls control encoder, network and decoder directly, with noise drawn beforehand; it
has no pipeline, no scheduler, no checks and no timers. Both sides take turns step by step, with the
same rollout state, and must return the same frames. On a CPU, times are CPU time, so that other
processes do not count.

``python benchmarks/overhead.py toy-world --json out.json``
"""

from collections.abc import Callable
from typing import Any

import command
import report
import rollout
import torch
from torch import Tensor

from flashdreams.infra.decoder.base import StreamingDecoder
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchScheduler
from flashdreams.infra.encoder.base import StreamingEncoder
from flashdreams.models.wan.transformer import WanTransformer
from flashdreams.runtime.noise import NoiseSource
from flashdreams.runtime.stats import sha256_of

BARS = {"cpu": 1.05, "cuda": 1.02}
"""Largest allowed ratio of the engine's time to the bare loop's."""
COLUMNS = ("case", "variant", "p50_ms", "p95_ms", "p99_ms", "ratio", "bar", "max_difference")
FIELDS = ("ratio", "ratio_quartiles", "bar", "within_bar", "max_difference")
TOLERANCE = 1e-3
"""For frames in [-1, 1]; the two sides round the sampler's arithmetic differently."""


def bare_loop(subject: rollout.Subject, seed: int) -> Callable[[], Tensor]:
    """A function that generates the next chunk of its own rollout.

    Raises:
        ValueError: a method whose loop is not implemented here.
    """
    pipeline = subject.pipeline
    model, decoder, encoder = pipeline.diffusion_model, pipeline.decoder, pipeline.encoder
    network, scheduler = model.transformer, model.scheduler
    guided = model.config.guidance_scale is not None
    if not isinstance(scheduler, FlowMatchScheduler) or not isinstance(network, WanTransformer):
        raise ValueError(f"{subject.slug}: the bare loop knows Wan with few-step sampling only.")
    if guided or model.config.context_noise or not subject.streaming:
        raise ValueError(f"{subject.slug}: the bare loop knows streaming without guidance only.")
    state = subject.new_rollout(seed)
    cache = state.diffusion.conditional
    shape, source = network.latent_shape(1), NoiseSource(seed)
    modulations = [network.modulation_of(t, cache) for t in scheduler.timesteps]
    sigmas, renoise = scheduler.sigmas.tolist(), scheduler.renoise_sigmas.tolist()
    clean = network.modulation_of(torch.tensor(0.0), cache)
    gives_x0 = network.config.prediction == "x0"
    layers = list(cache.layers())
    image, index = state.diffusion.image, 0

    def draw() -> tuple[Any, list[Tensor]]:
        drawn = [source(index, k, shape).to(network.device) for k in range(len(modulations))]
        return subject.input(index), drawn

    def step(control: Any, noise: list[Tensor]) -> Tensor:
        nonlocal index
        if isinstance(encoder, StreamingEncoder):
            control = encoder(control, autoregressive_index=index, cache=state.encoder)
        elif encoder is not None:
            control = encoder(control)
        network.begin_step(index, cache, control)
        given = image if index == 0 else None
        x0 = noise[0] if given is None else given
        for k, modulation in enumerate(modulations if given is None else []):
            latent = noise[0] if k == 0 else (1 - renoise[k]) * x0 + renoise[k] * noise[k]
            out = network(latent, modulation, cache.inputs, cache)
            x0 = out if gives_x0 else latent - sigmas[k] * out
        if isinstance(decoder, StreamingDecoder):
            chunk = decoder(x0, autoregressive_index=index, cache=state.decoder)
        else:
            chunk = x0 if decoder is None else decoder(x0)
        network(x0, clean, cache.inputs, cache, write_only=True)
        for layer in layers:
            layer.keep_sink()
        cache.cursor.advance()
        index += 1
        return chunk

    return lambda: _timed_apart(draw, step)


def _timed_apart(draw: Callable[[], Any], step: Callable[..., Tensor]) -> Any:
    """Draw now; the returned function runs the step."""
    given = draw()
    return lambda: step(*given)


def measure(subject: rollout.Subject, device: torch.device, steps: int) -> list[dict[str, Any]]:
    """One row per side.

    Raises:
        RuntimeError: the two sides return different frames.
    """
    engine_cache, prepare = subject.new_rollout(1), bare_loop(subject, 1)
    times: dict[str, list[float]] = {"engine": [], "bare loop": []}
    chunks: dict[str, Tensor] = {}
    difference = 0.0
    for number in range(subject.steps_to_fill + steps):
        bare: Any = prepare()
        sides = [("engine", lambda: subject.step(engine_cache)), ("bare loop", bare)]
        for name, call in sides if number % 2 else sides[::-1]:
            start = rollout.clock_s(device)
            chunks[name] = call()
            times[name].append(1e3 * (rollout.clock_s(device) - start))
        apart = (chunks["engine"] - chunks["bare loop"]).abs().max().item()
        difference = max(difference, apart)
    report.refuse_difference("engine and bare loop", difference, TOLERANCE)
    steady = {name: found[subject.steps_to_fill :] for name, found in times.items()}
    ratios = {name: report.ratio_fields(steady[name], steady["bare loop"]) for name in steady}
    bar = BARS[device.type]
    return [
        {
            "case": subject.slug,
            "variant": name,
            **report.timing_fields(sorted(steady[name])),
            "output_sha256": sha256_of(chunks[name]),
            **ratios[name],
            "bar": bar,
            "within_bar": ratios["engine"]["ratio"] <= bar,
            "max_difference": difference,
        }
        for name in steady
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure and report."""
    rollout.run_streaming(
        "overhead", __doc__, arguments, repeats=100, measure=measure, columns=COLUMNS, fields=FIELDS
    )


if __name__ == "__main__":
    command.run(main)
