"""Every mesh for a method: memory, traffic and time of an AR step."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from flashdreams.infra.assembly import count_heads, degrees_of
from flashdreams.infra.component import select_context
from flashdreams.infra.decoder.base import Decoder, StreamingDecoder
from flashdreams.infra.diffusion.causal import CausalTransformer
from flashdreams.infra.diffusion.experts import NoiseExperts
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.infra.weights import encoder_nbytes, weight_nbytes
from flashdreams.parallel.dry import DryMesh, dry_mesh
from flashdreams.parallel.mesh import ParallelConfig, ParallelDegrees, legal_degrees
from flashdreams.parallel.parallelize import parallelize
from flashdreams.planning.counts import Work, count, storages
from flashdreams.planning.devices import GB, GIB, TERA, Device
from flashdreams.planning.operators import control_ms

MOST_RANKS = 64
"""Ranks that are tried for real time."""

STEADY_CHUNKS = 64
"""AR steps after which every window is full."""

RESERVE_GIB = 1.5
"""GiB of a GPU that the CUDA context, libraries and allocator fragmentation take; assumed."""

HOST_RESERVE_GIB = 0.75
"""GiB of address space that Python, torch and this package take; measured on Linux."""


@dataclass(frozen=True)
class Memory:
    """Bytes on rank zero, which holds most."""

    transformer: int
    """Weights of the transformer."""
    others: int
    """Weights of the other networks; the text encoder is on rank zero alone."""
    kv_cache: int
    """KV caches of one rollout, of the branches of guidance that this rank evaluates."""
    state: int
    """Other state of a rollout: prompt keys and values, step inputs, decoder state."""
    activations: int
    """Peak bytes of the tensors of a network call or a decode."""
    graphs: int
    """Private memory of CUDA graphs: as much as activations, if graphs are on."""
    reserve: int
    """Context, libraries and fragmentation; assumed."""

    @property
    def session(self) -> int:
        """Bytes of one more rollout."""
        return self.kv_cache + self.state

    @property
    def total(self) -> int:
        """Bytes of one rollout on this rank."""
        return (
            self.transformer + self.others + self.session + self.activations + self.graphs
            + self.reserve
        )  # fmt: skip


@dataclass(frozen=True)
class Milliseconds:
    """Predicted time of an AR step on one rank, in parts."""

    gemm: float
    attention: float
    convolution: float
    memory: float
    """Everything bound by memory bandwidth."""
    calls: float
    """The program around operators and AR steps, where nothing hides it."""
    collectives: float

    @property
    def total(self) -> float:
        """The sum: nothing is assumed to overlap."""
        return sum(vars(self).values())

    @property
    def largest(self) -> str:
        """The largest part."""
        return max(vars(self), key=lambda name: vars(self)[name])


@dataclass(frozen=True)
class Plan:
    """One mesh and its predictions."""

    degrees: ParallelDegrees
    device: Device
    memory: Memory
    work: Work
    """Of an AR step with a full window, on one rank."""
    ms: Milliseconds
    frames: int
    """Frames of an AR step."""
    fps: float
    """Frames per second to display."""
    window_t: int
    """Latent frames of sink and window."""

    @property
    def fits(self) -> bool:
        """Whether one rollout fits."""
        return self.memory.total <= self.device.memory_gib * GIB

    @property
    def frames_per_second(self) -> float:
        """Predicted."""
        return 1e3 * self.frames / self.ms.total

    @property
    def is_real_time(self) -> bool:
        """Whether frames are generated as fast as they are shown."""
        return self.fits and self.frames_per_second >= self.fps

    @property
    def sessions(self) -> int:
        """Number of rollouts whose state fits at the same time."""
        room = self.device.memory_gib * GIB - (self.memory.total - self.memory.session)
        return max(0, int(room // max(self.memory.session, 1)))

    @property
    def longest_window_t(self) -> int | None:
        """Latent frames of sink and window that fit; None without a KV cache."""
        if not self.memory.kv_cache:
            return None
        room = self.device.memory_gib * GIB - (self.memory.total - self.memory.kv_cache)
        return max(0, int(room // (self.memory.kv_cache / self.window_t)))

    @property
    def limit(self) -> str:
        """The bottleneck: memory, or the largest part of the time."""
        if not self.fits:
            parts = {n: v for n, v in vars(self.memory).items() if n != "reserve"}
            return f"memory ({max(parts, key=lambda n: parts[n])})"
        return self.ms.largest


def predict_ms(
    work: Work, degrees: ParallelDegrees, device: Device, fused: bool = False
) -> Milliseconds:
    """Time of some work on one rank.

    Args:
        work: of the rank.
        degrees: determine which collectives cross nodes: those of the outer axes.
        device: its rates.
        fused: whether fused kernels run, which `count` sees as single operations.
    """
    collectives = 0.0
    for name, traffic in work.traffic.items():
        outer = name.split(".")[0] in ("ring", "sequence", "cfg", "decode")
        far = degrees.world_size > device.ranks_per_node and outer
        rate = (device.internode_gb_s if far else device.link_gb_s) or device.internode_gb_s
        collectives += traffic.bytes_sent / (rate * GB) + traffic.calls * device.latency_us * 1e-6
    timed = device.times.seconds(work.operators) if device.times is not None else {}
    seconds = dict.fromkeys(("gemm", "attention", "convolution", "memory"), 0.0)
    flops = {kind: getattr(work, f"{kind}_flops") for kind in ("gemm", "attention", "convolution")}
    moved_bytes = float(work.other_bytes)
    if work.fp8_flops:
        flops["attention"] -= work.fp8_flops
        seconds["attention"] += work.fp8_flops / (device.fp8_tflops * TERA)
    if work.fp8_gemm_flops:
        flops["gemm"] -= work.fp8_gemm_flops
        seconds["gemm"] += work.fp8_gemm_flops / (device.fp8_gemm_tflops * TERA)
    for operator, one_s in timed.items():
        calls = work.operators[operator]
        seconds[operator.kind] += calls * one_s
        if operator.kind == "memory":
            moved_bytes -= calls * operator.nbytes
        else:
            flops[operator.kind] -= calls * operator.flops
    for kind, amount in flops.items():
        seconds[kind] += amount / (getattr(device, f"{kind}_tflops") * TERA)
    moved_bytes *= device.fused_share if fused else 1.0
    seconds["memory"] += moved_bytes / (device.bandwidth_gb_s * GB)
    return Milliseconds(
        **{kind: 1e3 * s for kind, s in seconds.items()},
        calls=1e-3 * (work.calls * device.call_us + device.step_us),
        collectives=1e3 * collectives,
    )


@dataclass(frozen=True)
class Network:
    """Cost of a transformer on one rank and branch of guidance."""

    call: Work
    """A denoising step."""
    clean: Work
    """The clean pass."""
    begin: Work
    """Work once per AR step: control inputs."""
    weights: int
    """Bytes."""
    caches: int
    """Bytes of KV caches."""
    state: int
    """Bytes of all state of a rollout."""
    activations: int
    """Peak bytes of a call's tensors."""

    def extrapolate(self, two: "Network", layers: int) -> "Network":
        """The cost of many equal layers, from one layer (this) and two (the other)."""
        both = {
            name: one * (2 - layers) + getattr(two, name) * (layers - 1)
            for name, one in vars(self).items()
        }
        return Network(**{**both, "activations": two.activations})


class Planner:
    """Plans of one pipeline; builds it on the meta device, never with weights."""

    def __init__(
        self,
        config: StreamInferencePipelineConfig,
        device: Device,
        *,
        fps: float = 16.0,
        parallel: ParallelConfig | None = None,
    ) -> None:
        """Prepare.

        Args:
            config: the pipeline, at its final size.
            device: the device of every rank.
            fps: frames per second of the video.
            parallel: strategy; its degrees are not read.
        """
        self.config = config
        self._control_ms = cache(partial(control_ms, config.encoder))  # the same on all meshes
        self.device = device
        self.fps = fps
        self.parallel = parallel or ParallelConfig()
        self.guided = config.diffusion_model.guidance_scale is not None
        self._decoded: dict[int | ParallelDegrees, tuple[Any, Work, int, int]] = {}

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return not self.device.is_host

    def plans(self, ranks: int) -> list[Plan]:
        """All plans for a number of ranks: those that fit first, then by speed.

        Meshes on which a run would be refused are omitted.

        Raises:
            ValueError: all of them; or a transformer that the planner cannot run.
        """
        found, refused = [], []
        for degrees in self._degrees(ranks):
            try:
                found.append(self.plan(degrees))
            except ValueError as error:  # as a run of it would be
                refused.append(error)
        if not found:
            raise refused[0]
        return sorted(found, key=lambda p: (not p.fits, p.ms.total if p.fits else p.memory.total))

    def fewest_for_real_time(self, more_than: int) -> Plan | None:
        """The best plan for the fewest ranks that reach real time.

        Args:
            more_than: ranks that do not; they are doubled up to `MOST_RANKS`.
        """
        while (more_than := 2 * more_than) <= MOST_RANKS:
            with suppress(ValueError):  # a method that so many ranks cannot run
                best = self.plans(more_than)[0]
                if best.is_real_time:
                    return best
        return None

    def _degrees(self, ranks: int) -> Iterator[ParallelDegrees]:
        cut = self._transformer.parallel_plan()
        heads = count_heads(self._transformer) if cut is not None else None
        for degrees in legal_degrees(ranks, heads, self.guided):
            if degrees.tp > 1 and not (cut and cut.tensor):
                continue
            if degrees.sequence > 1 and cut is not None and not cut.split:
                continue
            yield degrees

    @cached_property
    def _transformer(self) -> Any:
        with torch.device("meta"):
            return self.config.diffusion_model.transformer.setup()

    def _layers_are_equal(self, layers: int) -> bool:
        """Whether all layers have the same parameters; Matrix-Game's first ones have more."""
        for module in self._transformer.modules():
            if isinstance(module, nn.ModuleList) and len(module) == layers:
                forms = {tuple((n, x.shape) for n, x in m.named_parameters()) for m in module}
                if len(forms) > 1:
                    return False
        return True

    def plan(self, degrees: ParallelDegrees) -> Plan:
        """One plan.

        Raises:
            ValueError: a mesh on which a run would be refused, or a transformer that the planner
                cannot run on the meta device.
        """
        asked = replace(
            self.parallel,
            cfg_parallel_degree=degrees.cfg,
            ring_degree=degrees.ring,
            ulysses_degree=degrees.ulysses,
            tensor_parallel_degree=degrees.tp,
        )
        degrees_of(self._transformer, asked, degrees.world_size, self.guided)
        mesh = dry_mesh(degrees, self.parallel)
        config: Any = self.config.diffusion_model.transformer
        network = self._network(config, mesh)
        decoder, decoded, decoder_state, decoding = self._decoder(config, mesh)
        branches = 2 if self.guided and degrees.cfg == 1 else 1
        steps = int(self.config.diffusion_model.scheduler.setup().num_inference_steps)
        call, rates = network.call, self.device
        unknown = call.fp8_flops and not rates.fp8_tflops
        if unknown or (call.fp8_gemm_flops and not rates.fp8_gemm_tflops):
            raise ValueError(
                f"precision={config.precision!r} cannot be planned for {rates.name}: FP8 attention "
                "needs a Hopper GPU. Plan for H100-80GB or H200-141GB, or with --precision native."
            )
        if self.device.times is not None:
            for part in (network.call, network.clean, network.begin, decoded):
                self.device.times.seconds(part.operators)  # each among those that it runs with
        once = network.clean + network.begin
        work = (network.call * steps + once) * branches + decoded
        caches = network.caches * branches
        everything = network.state * branches + decoder_state
        tokens = getattr(config, "window_size_t", 0)
        on_gpu = self.on_gpu
        captures = on_gpu and getattr(config, "use_cuda_graph", False)
        graphs = network.activations if captures else 0
        fused = on_gpu and getattr(config, "fused_kernels", False) is not False
        ms, frames = predict_ms(work, degrees, self.device, fused), self._frames(config, decoder)
        if not on_gpu:
            ms = replace(ms, calls=ms.calls + self._control_ms(self._transformer, frames))
        return Plan(
            degrees=degrees,
            device=self.device,
            memory=Memory(
                transformer=network.weights,
                others=self._other_weights + (weight_nbytes(decoder) if decoder is not None else 0),
                kv_cache=caches,
                state=everything - caches,
                activations=max(network.activations, decoding),
                graphs=graphs,
                reserve=int((RESERVE_GIB if on_gpu else HOST_RESERVE_GIB) * GIB),
            ),
            work=work,
            ms=ms,
            frames=frames,
            fps=self.fps,
            window_t=tokens + getattr(config, "sink_size_t", 0),
        )

    def _on_meta(self, config: Any, mesh: DryMesh) -> Any:
        changes = {n: False for n in ("use_cuda_graph", "fused_kernels") if hasattr(config, n)}
        with torch.device("meta"):
            component = replace(config, **changes).setup()
        parallelize(component, component.parallel_plan(), mesh)
        component.cast()
        component.config = config
        return component

    def _network(self, config: Any, mesh: DryMesh) -> "Network":
        """Cost of the transformer; of many equal layers, two are run."""
        layers = getattr(config, "num_layers", 0)
        timed = self.device.times is not None  # operator shapes are not linear in the layers
        if layers <= 2 or timed or not self._layers_are_equal(layers):
            return self._run_network(config, mesh)
        one, two = (self._run_network(replace(config, num_layers=n), mesh) for n in (1, 2))
        return one.extrapolate(two, layers)

    def _run_network(self, config: Any, mesh: DryMesh) -> "Network":
        """Run a denoising step and a clean pass with a full window on the meta device."""
        transformer = self._on_meta(config, mesh)
        transformer.quantize_weights()
        if not isinstance(transformer, CausalTransformer | NoiseExperts):
            raise ValueError(
                f"{type(transformer).__name__} is not a CausalTransformer: the planner cannot "
                "run it on the meta device. Measure it: python benchmarks/fps.py <slug>."
            )
        context = transformer.example_context(1)
        if context is None:
            raise ValueError(
                f"{type(transformer).__name__} has no example_context(batch_size), which the "
                "planner needs: zeros of the shapes that initialize_cache takes."
            )
        context = tree_map_only(Tensor, lambda x: x.to("meta"), context)
        transformer.config = replace(transformer.config, use_cuda_graph=False)
        make = transformer.initialize_cache
        cache: Any = make(**select_context(make, context))
        streaming = transformer.config.streaming
        index = STEADY_CHUNKS if streaming else 0
        for cursor in cache.cursors:
            cursor.reset(index * transformer.config.len_t)
        control = tree_map_only(Tensor, lambda x: x.to("meta"), transformer.example_control(1))
        begin, _ = _count(
            transformer, lambda: transformer.begin_step(index, cache, control), cache, mesh
        )
        latent = torch.empty(transformer.latent_shape(1), dtype=torch.float32, device="meta")
        timestep = torch.tensor(500.0, dtype=torch.float32, device="cpu")
        with torch.no_grad():  # with gradients, nothing is cached
            transformer.modulation_of(timestep, cache)
        predict, clean_up = transformer.predict_flow, transformer.update_cache
        call, activations = _count(
            transformer, lambda: predict(latent, timestep, cache), cache, mesh
        )
        clean, _ = _count(transformer, lambda: clean_up(latent, timestep, cache), cache, mesh)
        return Network(
            call=call,
            clean=clean,
            begin=begin,
            weights=weight_nbytes(transformer),
            caches=storages(getattr(cache, "caches", None)),
            state=storages(cache),
            activations=activations,
        )

    def _decoder(self, config: Any, mesh: DryMesh) -> tuple[Any, Work, int, int]:
        """Decoder, work of a later chunk, bytes of its state, and the peak of activations.

        A decoder that is divided by columns alone, or not at all, is run once per number of ranks.
        """
        if self.config.decoder is None:
            return None, Work(), 0, 0
        decoder = self._on_meta(self.config.decoder, mesh)
        plan = decoder.parallel_plan()
        by_columns = plan is None or not (plan.tensor or plan.split)
        key = mesh.degrees.world_size if by_columns else mesh.degrees
        if key not in self._decoded:
            self._decoded[key] = decoder, *self._run_decoder(decoder, config, mesh)
        return self._decoded[key]

    def _run_decoder(self, decoder: Any, config: Any, mesh: DryMesh) -> tuple[Work, int, int]:
        size = (config.in_channels, config.len_t, config.latent_height, config.latent_width)
        latent = torch.empty(1, *size, dtype=torch.float32, device="meta")
        if not isinstance(decoder, StreamingDecoder):
            work, peak = count(decoder, lambda: decoder(latent))
            return work, 0, peak
        cache = decoder.initialize_cache()
        index = 1 if config.streaming else 0
        if index:
            with torch.no_grad():
                decoder(latent, autoregressive_index=0, cache=cache)
        work, peak = _count(
            decoder, lambda: decoder(latent, autoregressive_index=index, cache=cache), cache, mesh
        )
        return work, storages(cache), peak

    def _frames(self, config: Any, decoder: Any) -> int:
        length = config.len_t
        index = STEADY_CHUNKS if config.streaming else 0
        counted = decoder.frame_count if isinstance(decoder, Decoder) else int
        return counted((index + 1) * length) - (counted(index * length) if index else 0)

    @cached_property
    def _other_weights(self) -> int:
        names = ("text_encoder", "image_encoder", "encoder")
        return sum(encoder_nbytes(getattr(self.config, name), self.on_gpu) for name in names)


def _count(
    module: nn.Module, call: Callable[[], Any], state: Any, mesh: DryMesh
) -> tuple[Work, int]:
    """The work of a call, its collectives included, and the peak bytes of its tensors."""
    sent = mesh.meter.snapshot()
    return count(module, call, state, lambda: mesh.meter.since(sent))
