"""What devices can do: peak figures of data sheets, and what was reached."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from flashdreams.models.wan.transformer import WanTransformerConfig
from flashdreams.planning.counts import count

GB, TERA, GIB = 1e9, 1e12, 2**30

COLD_WEIGHTS = 28
"""Matrices of 0.6 MB whose reading is timed: together more than a core's own caches hold."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device, and how several are joined."""

    name: str
    memory_gib: float
    """Memory of one, in GiB."""
    peak_tflops: float
    """Dense bfloat16 matmuls with float32 accumulation, 10^12 operations per second."""
    gemm_tflops: float
    """The same, reached by the matmuls of a network."""
    attention_tflops: float
    """Reached by attention within a run."""
    convolution_tflops: float
    """Reached by the convolutions of decoders."""
    narrow_tflops: float = 0.0
    """The same where there are few channels; 0 makes no difference between them."""
    bandwidth_gb_s: float
    """Bytes to and from memory per second, in 10^9, reached by a copy."""
    fused_share: float = 1.0
    """Of the bytes that the operations between matmuls read and write one by one, the share that
    still moves where fused kernels run."""
    call_us: float = 0.0
    """Least time of a kernel that the host has to launch; hidden on a GPU with enough work."""
    weights_gb_s: float = 0.0
    """Bytes of weights that a matmul of few rows reads per second, in 10^9, where weights come
    from memory and take time of their own, as on a CPU; 0 does not count them."""
    link_gb_s: float = 0.0
    """Bytes that one device sends to others of its node per second, in 10^9."""
    internode_gb_s: float = 40.0
    """The same between nodes."""
    latency_us: float = 20.0
    """Fixed time of one collective."""
    ranks_per_node: int = 8
    source: str = ""
    """Where the figures are from, and which of them are assumed."""


H200_REACHED = (
    "reached rates: measured on one H200 on 2026-11-26 (of a Self-Forcing step matmuls take 85 to "
    "87 ms, attention 210 to 216 ms, small operations 21 ms; convolutions of TAEHV alone 4.0 ms; "
    "copies 4.26 TB/s)"
)
FUSED_SHARE = 0.25
"""Measured with Self-Forcing 1.3B; LingBot-World 14B had 0.47, because its camera branch and the
sum after cross-attention were not fused."""
ASSUMED = (
    "reached rates: ASSUMED, the share of the data sheet that an H200 reaches (70 % of the "
    "products, 66 % of attention, 39 % of convolutions, 89 % of the bandwidth); not measured"
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
            convolution_tflops=390,
            bandwidth_gb_s=4260,
            fused_share=FUSED_SHARE,
            link_gb_s=315,
            source=f"NVIDIA H200 data sheet (SXM); {H200_REACHED}; links assumed: 70 % of 450 GB/s",
        ),
        _assumed("H100-80GB", 79.6, 989, 3350, 450, "NVIDIA H100 data sheet (SXM5)"),
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
        ValueError: the file is no such mapping, or names an unknown field.
    """
    import yaml

    try:
        entries = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--devices {path} cannot be read: {error}") from error
    if not isinstance(entries, Mapping):
        raise ValueError(f"--devices {path} must hold a mapping: name -> fields of a device.")
    table = dict(DEVICES)
    for name, values in entries.items():
        known = asdict(table[name]) if name in table else {"name": name}
        note = {"source": f"{known.get('source', '')} changed by {path}".strip()}
        try:
            table[name] = Device(**{**known, **note, **values})
        except TypeError as error:
            raise ValueError(f"--devices {path}: {name}: {error}") from error
    return table


def resolve_gpus(text: str, table: Mapping[str, Device]) -> tuple[int, Device]:
    """Count and kind of devices of a text such as ``"8xH100-80GB"``.

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
            f"--gpus {text}: write a count and a kind, such as 8xH100-80GB. Kinds: "
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
    """What a CPU reaches, with the threads that torch has, in float32.

    Args:
        rows: tokens of the matmuls that are timed.
        dim: their width.
    """
    new = partial(torch.rand, dtype=torch.float32, device="cpu")
    x, w, b = new(rows, dim), new(dim, 4 * dim), new(4 * dim)
    q, k = new(1, 6, rows, 32), new(1, 6, 9 * rows, 32)
    image, kernel = new(1, 32, 32, 48), new(32, 32, 3, 3)
    narrow, small = new(1, 4, 3, 34, 34), new(4, 4, 3, 3, 3)
    few, cold = x[:16], [new(dim, 4 * dim) for _ in range(COLD_WEIGHTS)]
    big, one = new(rows, 4 * dim), new(16)
    call_s = _seconds(lambda: one.add(one))
    engine_s = _engine_call_s()

    def rate(flops: float, call: Callable[[], Any]) -> float:
        return flops / max(_seconds(call) - call_s, 1e-9) / TERA

    cold_s = _seconds(lambda: [torch.addmm(b, few, weights) for weights in cold], 0.2) / len(cold)
    gemm_tflops = rate(8 * rows * dim * dim, lambda: torch.addmm(b, x, w))
    warm_s = call_s + 8 * len(few) * dim * dim / (gemm_tflops * TERA)
    convolution = 2 * image.numel() * 32 * 9
    return Device(
        name=f"this CPU, {torch.get_num_threads()} threads",
        memory_gib=_memory_bytes() / GIB,
        peak_tflops=0.0,
        gemm_tflops=gemm_tflops,
        attention_tflops=rate(
            4 * q.numel() * 9 * rows, lambda: F.scaled_dot_product_attention(q, k, k)
        ),
        convolution_tflops=rate(convolution, lambda: F.conv2d(image, kernel, padding=1)),
        narrow_tflops=rate(2 * 27 * 4 * 4 * 32 * 32, lambda: F.conv3d(narrow, small)),
        weights_gb_s=cold[0].nbytes / max(cold_s - warm_s, 1e-9) / GB,
        bandwidth_gb_s=8 * big.numel() / max(_seconds(lambda: big + 1.0) - call_s, 1e-9) / GB,
        call_us=1e6 * engine_s,
        link_gb_s=1.0,
        ranks_per_node=64,
        source="measured now",
    )


def _seconds(call: Callable[[], Any], budget_s: float = 0.08) -> float:
    """Median time of a call, of this thread alone: others may use the CPU too."""
    call()
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while time.perf_counter() < end or not times:
        start = time.thread_time()
        for _ in range(5):
            call()
        times.append((time.thread_time() - start) / 5)
    return statistics.median(times)


def _engine_call_s() -> float:
    """Seconds of a kernel on almost nothing, the engine's own share of it included."""
    config = WanTransformerConfig(
        dim=24, ffn_dim=24, num_heads=2, num_layers=4, freq_dim=16, text_dim=8, text_len=2,
        in_channels=2, out_channels=2, len_t=1, latent_height=2, latent_width=2, window_size_t=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        network = config.setup()
        new = partial(torch.zeros, dtype=torch.float32)
        cache = network.initialize_cache(text=new(1, 2, 8, device="cpu"))
        network.begin_step(0, cache)
        latent, timestep = new(1, 2, 1, 2, 2, device="cpu"), new((), device="cpu") + 500.0
        seconds = _seconds(lambda: network.predict_flow(latent, timestep, cache), 0.3)
    with torch.device("meta"):
        network = config.setup()
    cache = network.initialize_cache(text=new(1, 2, 8, device="meta"))
    network.begin_step(0, cache)
    with torch.no_grad():
        network.modulation_of(timestep, cache)
    work, _ = count(network, lambda: network.predict_flow(latent.to("meta"), timestep, cache))
    return seconds / work.calls


def _memory_bytes() -> int:
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
