"""Devices: peak figures of data sheets, and achieved rates."""

import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F

from flashdreams.infra.config import config_fields, conforms, field_annotation
from flashdreams.infra.diffusion.model import DiffusionModelConfig
from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
from flashdreams.infra.pipeline import StreamInferencePipelineConfig
from flashdreams.models.wan.transformer import WanTransformerConfig
from flashdreams.planning.counts import count
from flashdreams.planning.operators import OperatorTimes, median_s
from flashdreams.runtime.text import quoted, read_text, reason_of

MAX_DEVICES_BYTES = 2**17
"""Largest file of devices."""

GB, TERA, GIB = 1e9, 1e12, 2**30

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files that hold the limit of a container in bytes, of both versions of control groups."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device, and its interconnect."""

    name: str
    memory_gib: float
    """Memory of one device, in GiB."""
    peak_tflops: float
    """Dense bfloat16 matmuls with float32 accumulation, 10^12 operations per second."""
    gemm_tflops: float
    """The same, achieved by the matmuls of a network."""
    attention_tflops: float
    """Achieved by attention in a run."""
    fp8_tflops: float = 0.0
    """Reached by attention to an FP8 KV cache; 0 where the engine has no kernel for it."""
    fp8_gemm_tflops: float = 0.0
    """Reached by matmuls of e4m3; 0 where the engine has no FP8."""
    convolution_tflops: float
    """Achieved by the convolutions of decoders."""
    bandwidth_gb_s: float
    """Bytes to and from memory per second, in 10^9, achieved by a copy."""
    fused_share: float = 1.0
    """Fraction of the memory traffic of the operations between matmuls that
    remains when fused kernels run."""
    call_us: float = 0.0
    """Time that the program around an operator takes; hidden on a GPU with enough work."""
    step_us: float = 0.0
    """Time that the streaming loop takes per AR step around the network, likewise."""
    times: OperatorTimes | None = field(default=None, repr=False, compare=False)
    """Times small operators at their own shapes, on this CPU; None: rates apply to all."""
    link_gb_s: float = 0.0
    """Bytes that one device sends to others in its node per second, in 10^9."""
    internode_gb_s: float = 40.0
    """The same between nodes."""
    latency_us: float = 20.0
    """Fixed time of one collective."""
    ranks_per_node: int = 8
    is_host: bool = False
    """A CPU: ranks share its memory, and nothing is captured or fused."""
    source: str = ""
    """Source of the figures, and which are assumed."""


H200_REACHED = (
    "achieved rates: measured on one H200 on 2026-11-26 (of a Self-Forcing step matmuls take 85 to "
    "87 ms, attention 210 to 216 ms, small operations 21 ms; convolutions of TAEHV alone 4.0 ms; "
    "copies 4.26 TB/s)"
)
FUSED_SHARE = 0.25
"""Measured with Self-Forcing 1.3B; LingBot-World 14B had 0.47, because its camera branch and the
sum after cross-attention were not fused."""
HOPPER_FP8_TFLOPS = 815
"""Achieved by FlashAttention-3 with an FP8 cache, merge of KV splits included: 140.4 TFLOP of a
Self-Forcing step on one H200 took 169 and 175 ms. An H100 has the same multiprocessors."""
HOPPER_FP8_GEMM_TFLOPS = 1437 * 690 / 784
"""ASSUMED, not measured: of the 1437 that an e4m3 matmul of 8192^3 reached on an H200, the share
that a network reaches of the 784 that one in bf16 did."""
ASSUMED = (
    "achieved rates: ASSUMED, the fraction of the data sheet that an H200 achieves (70 % of the "
    "matmuls, 66 % of attention, 39 % of convolutions, 89 % of the bandwidth); not measured"
)


def _assumed(
    name: str,
    memory_gib: float,
    peak_tflops: float,
    memory_gb_s: float,
    link_gb_s: float,
    sheet: str,
) -> Device:
    return Device(
        name=name,
        memory_gib=memory_gib,
        peak_tflops=peak_tflops,
        gemm_tflops=0.70 * peak_tflops,
        attention_tflops=0.66 * peak_tflops,
        convolution_tflops=0.39 * peak_tflops,
        bandwidth_gb_s=0.89 * memory_gb_s,
        fused_share=FUSED_SHARE,
        link_gb_s=0.7 * link_gb_s,
        source=f"{sheet}; {ASSUMED}",
    )


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            name="H200-141GB",
            memory_gib=139.8,
            peak_tflops=989,
            gemm_tflops=690,
            attention_tflops=655,
            fp8_tflops=HOPPER_FP8_TFLOPS,
            fp8_gemm_tflops=HOPPER_FP8_GEMM_TFLOPS,
            convolution_tflops=390,
            bandwidth_gb_s=4260,
            fused_share=FUSED_SHARE,
            link_gb_s=315,
            source=f"NVIDIA H200 data sheet (SXM); {H200_REACHED}; links assumed: 70 % of 450 GB/s",
        ),
        replace(
            _assumed("H100-80GB", 79.6, 989, 3350, 450, "NVIDIA H100 data sheet (SXM5)"),
            fp8_tflops=HOPPER_FP8_TFLOPS,
            fp8_gemm_tflops=HOPPER_FP8_GEMM_TFLOPS,
        ),
        _assumed("A100-80GB", 79.3, 312, 2039, 300, "NVIDIA A100 data sheet (SXM4)"),
        _assumed("A100-40GB", 39.6, 312, 1555, 300, "NVIDIA A100 data sheet (SXM4)"),
        _assumed("B200-180GB", 178.4, 2250, 7700, 900, "NVIDIA HGX B200 data sheet"),
        _assumed("L40S-48GB", 44.7, 362, 864, 32, "NVIDIA L40S data sheet, PCIe 4.0 x16"),
        _assumed("RTX-4090-24GB", 23.6, 165, 1008, 32, "NVIDIA Ada whitepaper, PCIe 4.0 x16"),
        _assumed("RTX-5090-32GB", 31.4, 209, 1792, 64, "NVIDIA Blackwell whitepaper, PCIe 5.0 x16"),
    )
}  # fmt: skip
"""By name. Every figure may be overridden with a file; see `read_devices`."""


def read_devices(path: Path) -> dict[str, Device]:
    """The table with the entries of a YAML file: name -> fields; unnamed fields stay.

    A name that is not in the table needs all fields without a default.

    Raises:
        ValueError: the file is not such a mapping, or has an unknown field.
    """
    import yaml

    try:
        entries = yaml.safe_load(read_text(path, MAX_DEVICES_BYTES, "utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(reason_of(error).split())
        raise ValueError(f"--devices {path} cannot be read: {reason}") from error
    if not isinstance(entries, Mapping):
        raise ValueError(f"--devices {path} must hold a mapping: name -> fields of a device.")
    table = dict(DEVICES)
    for name, values in entries.items():
        if not isinstance(name, str) or not isinstance(values, Mapping):
            raise ValueError(
                f"--devices {path}: {quoted(name)} must be a name with fields below it."
            )
        known = asdict(table[name]) if name in table else {"name": name}
        note = {"source": f"{known.get('source', '')} changed by {path}".strip()}
        try:
            table[name] = Device(**{**known, **note, **values})
        except TypeError as error:
            reason = str(error).removeprefix("Device.__init__() ")
            raise ValueError(f"--devices {path}: {name}: {reason}") from error
        _check_figures(table[name], f"--devices {path}: {name}")
    return table


def _check_figures(device: Device, title: str) -> None:
    """Refuse an invalid figure of a device.

    Raises:
        ValueError: a field of another type, or a number that is negative, not finite, or 0 where
            the default is not.
    """
    for name, known in config_fields(device).items():
        value = getattr(device, name)
        fits = conforms(value, field_annotation(Device, name))
        if fits and isinstance(value, int | float):
            fits = 0 < value < float("inf") or (value == 0 and known.default == 0)
        if not fits:
            raise ValueError(f"{title}: {name} cannot be {quoted(value)}.")


def resolve_gpus(text: str, table: Mapping[str, Device]) -> tuple[int, Device]:
    """Count and kind of devices from a text such as ``"8xH100-80GB"``.

    Raises:
        ValueError: unknown; the message lists all kinds.
    """
    count, x, name = text.partition("x")
    if not x or not count.isdigit():
        count, name = "1", text
    found = [d for n, d in table.items() if n.lower() == name.lower()]
    found = found or [d for n, d in table.items() if n.lower().startswith(f"{name.lower()}-")]
    if len(found) != 1 or not 1 <= int(count) <= 4096:
        raise ValueError(
            f"--gpus {text}: give a count and a kind, such as 8xH100-80GB. Kinds: "
            f"{', '.join(table)}; add others with --devices FILE."
        )
    return int(count), found[0]


def this_machine(table: Mapping[str, Device]) -> tuple[int, Device]:
    """Count and kind of the devices of this machine; a CPU is measured, within seconds."""
    if not torch.cuda.is_available():
        return 1, measure_cpu()
    name = torch.cuda.get_device_name().upper()
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    kinds = [d for n, d in table.items() if n.split("-")[0] in name or n.rpartition("-")[0] in name]
    if not kinds:
        raise ValueError(
            f"This machine has a {name}, which is not in the table. Describe it in a file: "
            "--devices FILE."
        )
    nearest = min(kinds, key=lambda d: abs(d.memory_gib - total))
    return torch.cuda.device_count(), replace(nearest, memory_gib=total)


def measure_cpu(rows: int = 64, dim: int = 192) -> Device:
    """Achieved rates of the CPU, with torch's threads, in float32.

    The rates are for operators that are too large to be timed individually.

    Args:
        rows: tokens of the matmuls that are timed.
        dim: their width.
    """
    new = partial(torch.rand, dtype=torch.float32, device="cpu")
    x, w, b = new(rows, dim), new(dim, 4 * dim), new(4 * dim)
    q, k = new(1, 6, rows, 32), new(1, 6, 9 * rows, 32)
    image, kernel = new(1, 32, 32, 48), new(32, 32, 3, 3)
    big, one = new(rows, 4 * dim), new(16)
    call_s = median_s(lambda: one.add(one))

    def rate(amount: float, unit: float, call: Callable[[], Any]) -> float:
        return amount / max(median_s(call) - call_s, 1e-9) / unit

    attended, convolved = 4 * q.numel() * 9 * rows, 2 * image.numel() * 32 * 9
    times = OperatorTimes()
    call_us, step_us = _engine_us(times, dim)
    return Device(
        name=f"this CPU, {torch.get_num_threads()} threads",
        memory_gib=host_memory_bytes() / GIB,
        peak_tflops=0.0,
        gemm_tflops=rate(8 * rows * dim * dim, TERA, lambda: torch.addmm(b, x, w)),
        attention_tflops=rate(attended, TERA, lambda: F.scaled_dot_product_attention(q, k, k)),
        convolution_tflops=rate(convolved, TERA, lambda: F.conv2d(image, kernel, padding=1)),
        bandwidth_gb_s=rate(8 * big.numel(), GB, lambda: big + 1.0),
        call_us=call_us,
        step_us=step_us,
        times=times,
        link_gb_s=1.0,
        ranks_per_node=64,
        is_host=True,
        source="measured now",
    )


def _engine_us(times: OperatorTimes, dim: int) -> tuple[float, float]:
    """Microseconds that the engine takes per operator and per AR step, beside operators.

    Args:
        times: of operators.
        dim: width of the network that is run; its weights are larger than the caches that a core
            has for itself.
    """
    config = StreamInferencePipelineConfig(
        name="calibration",
        diffusion_model=DiffusionModelConfig(
            transformer=WanTransformerConfig(
                dim=dim, ffn_dim=4 * dim, num_heads=dim // 12, num_layers=4, freq_dim=16,
                text_dim=8, text_len=2, in_channels=2, out_channels=2, len_t=1, latent_height=2,
                latent_width=2, window_size_t=2,
            ),
            scheduler=FlowMatchSchedulerConfig(denoising_timesteps=(1000.0,)),
        ),
    )  # fmt: skip
    new = partial(torch.zeros, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        pipeline: Any = config.setup(device=torch.device("cpu"))
        cache = pipeline.initialize_cache(text=new(1, 2, 8, device="cpu"))

        def step() -> None:
            index = cache.next_index
            pipeline.generate(autoregressive_index=index, cache=cache)
            pipeline.finalize(autoregressive_index=index, cache=cache)

        step_s = median_s(step, 0.3)
        network, state = pipeline.diffusion_model.transformer, cache.diffusion.conditional
        network.begin_step(cache.next_index, state)
        latent, timestep = new(1, 2, 1, 2, 2, device="cpu"), new((), device="cpu") + 500.0
        call_s = median_s(lambda: network.predict_flow(latent, timestep, state), 0.3)
    with torch.device("meta"):
        network = config.diffusion_model.transformer.setup()
    state = network.initialize_cache(text=new(1, 2, 8, device="meta"))
    network.begin_step(0, state)
    with torch.no_grad():
        network.modulation_of(timestep, state)
    on_meta = latent.to("meta")
    call, _ = count(network, lambda: network.predict_flow(on_meta, timestep, state), state)
    clean, _ = count(network, lambda: network.update_cache(on_meta, timestep, state), state)
    one_s = times.seconds(call.operators)
    own_s = sum(calls * one_s[operator] for operator, calls in call.operators.items())
    per_call_s = max(0.0, call_s - own_s) / call.calls
    clean_s = call_s * clean.calls / call.calls
    return 1e6 * per_call_s, 1e6 * max(0.0, step_s - call_s - clean_s)


def host_memory_bytes() -> int:
    """Host memory that this process may use: the limit of machine, container or process."""
    limits = [psutil.virtual_memory().total]
    if sys.platform != "win32":
        import resource

        own, _ = resource.getrlimit(resource.RLIMIT_AS)
        if own != resource.RLIM_INFINITY:
            limits.append(own)
    for file in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
            limits.append(int(Path(file).read_text("ascii")))
    return min(limits)
