"""The measured choice of an attention backend."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashdreams.attention.backends import (
    BACKENDS,
    CHOOSES_SPLITS,
    PREFERENCE,
    SPLIT_BACKENDS,
    AttentionBackend,
    bind_kv_splits,
    why_unusable,
)
from flashdreams.attention.cache import KVCache, KVCacheSpec
from flashdreams.attention.core import AttentionCore
from flashdreams.attention.cursor import Cursor
from flashdreams.attention.quantized import KVStorage
from flashdreams.attention.splits import choose_kv_splits, count_processors

ERROR_BOUNDS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest accepted difference to float32 attention over the same values, as a fraction of the
reference's largest value: about four rounding errors of the dtype, with headroom for TF32."""

COMPARED_QUERIES = 64
"""Queries that are compared with the reference, which needs a score for every key."""

CLEARLY_FASTER = 1.03
"""How much faster a backend must be to be preferred to one earlier in `PREFERENCE`; smaller
differences may be noise, and two runs should make the same choice."""

WRITES_SCORES = "sdpa_math"
"""Backend that materializes all scores, gigabytes at full size; not measured on a GPU."""

AUTO = "auto"
"""Config value for a measured choice."""


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Shape of one attention call of this rank."""

    batch_size: int
    queries: int
    """Tokens of a chunk."""
    keys: int
    """Tokens that are visible once the window is full."""
    num_heads: int
    """Heads on this rank."""
    head_dim: int
    storage: KVStorage = "native"
    """How keys beside the chunk's own are stored. For 8-bit caches the call of a whole core is
    measured, including the write and the dequantized copy."""


KVSplitsOf = Callable[[str, AttentionShape], int | None]
"""KV splits of a backend, by name, for a call of the whole model; None where it has none."""


@dataclass(frozen=True)
class MeasuredBackend:
    """The measurement of one candidate."""

    name: str
    ms: float | None
    """Median milliseconds of a call; None if it was not timed."""
    error: float | None
    """Largest difference to the reference, as a share of the reference's largest value."""
    verdict: str
    """"chosen", "slower", or why it was left out."""


@dataclass(frozen=True)
class BackendChoice:
    """The chosen backend, and why; plain data, so that one rank can send it to the others."""

    name: str
    rows: tuple[MeasuredBackend, ...]
    kv_splits: int | None = None
    """KV splits of self-attention over the full window; None where the backend has no choice."""
    tiled: bool = False
    """Under strict: it is called in tiles, since its bits depend on the number of heads or rows."""

    def __str__(self) -> str:
        splits = "" if self.kv_splits is None else f", KV splits {self.kv_splits}"
        return f"{self.name}{splits}{', in tiles' if self.tiled else ''}"

    def table(self) -> str:
        """The candidates as aligned lines of text."""
        lines = [f"{'attention':16}{'ms':>10}{'error':>10}  verdict"]
        for row in self.rows:
            ms = "-" if row.ms is None else f"{row.ms:.3f}"
            error = "-" if row.error is None else f"{row.error:.1e}"
            lines.append(f"{row.name:16}{ms:>10}{error:>10}  {row.verdict}")
        return "\n".join(lines)

    def stats(self) -> dict[str, Any]:
        """The choice as JSON values."""
        splits = {} if self.kv_splits is None else {"attention_kv_splits": self.kv_splits}
        return {
            "attention_backend": self.name,
            **splits,
            "attention_backends": [asdict(row) for row in self.rows],
            **({"attention_tiled": True} if self.tiled else {}),
        }


def kv_splits_of(
    name: str,
    shape: AttentionShape,
    device: torch.device,
    *,
    strict: bool = False,
    processors: int | None = None,
) -> int | None:
    """KV splits of a backend for a call; None for one that has no choice or chooses by itself.

    Args:
        name: of the backend.
        shape: the call; under strict that of the whole model.
        device: where it is made.
        strict: whether a backend that would choose by itself, at every call, must not.
        processors: multiprocessors of the device; None asks it.
    """
    if name not in SPLIT_BACKENDS or (name in CHOOSES_SPLITS and not strict):
        return None
    sizes = (shape.queries, shape.keys, shape.num_heads, shape.batch_size)
    return choose_kv_splits(*sizes, processors or count_processors(device))


@torch.no_grad()
def choose_backend(
    shape: AttentionShape,
    device: torch.device,
    dtype: torch.dtype,
    candidates: Mapping[str, AttentionBackend] = BACKENDS,
    *,
    repeats: int = 10,
) -> BackendChoice:
    """Measure the candidates on the real shape and choose the fastest accurate one.

    A candidate is accurate if it stays within :data:`ERROR_BOUNDS` of float32 attention. Of those
    that are nearly as fast as the fastest, the first in `PREFERENCE` is chosen. With several
    ranks, rank zero chooses and broadcasts the name, so that all run the same one.

    Args:
        shape: the call that is made once the window is full.
        device: where it is made.
        dtype: of queries, keys and values.
        candidates: backends by name; those that cannot run here are listed with the reason.
        repeats: timed calls of each; the candidates take turns.

    Raises:
        ValueError: the dtype has no bound, or no candidate is accurate; the message has the table.
    """
    if dtype not in ERROR_BOUNDS:
        allowed = ", ".join(str(t).removeprefix("torch.") for t in ERROR_BOUNDS)
        raise ValueError(f"Attention in {dtype} has no error bound. Allowed: {allowed}.")
    q, k, v = draw_inputs(shape, device, dtype)
    call_of, seen = _prepare(shape, q, k, v)
    places = compared_places(shape.queries)
    expected = reference_attention(q[:, places], *seen, shape.head_dim**-0.5)
    del seen
    bound = ERROR_BOUNDS[dtype]
    errors: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for name, backend in candidates.items():
        errors[name] = None
        known = name in BACKENDS and backend is BACKENDS[name]
        reason = why_unusable(name, device, dtype, shape.head_dim) if known else None
        if known and name == WRITES_SCORES and device.type == "cuda":
            reason = "not measured: it materializes all scores; select it by name to use it"
        splits = kv_splits_of(name, shape, device) if known else None
        if splits is not None:
            backend = bind_kv_splits(name, splits)
        call = call_of(backend)
        if reason is None:
            errors[name], reason = _judge(call, q, places, expected, bound)
        if reason is None:
            calls[name] = call
        else:
            reasons[name] = reason
    times = _time_in_turns(calls, device, repeats)
    chosen = preferred(times) if times else ""
    rows = tuple(
        MeasuredBackend(
            name,
            times.get(name),
            errors[name],
            reasons.get(name, "chosen" if name == chosen else "slower"),
        )
        for name in candidates
    )
    choice = BackendChoice(chosen, rows, kv_splits_of(chosen, shape, device))
    if not chosen:
        raise ValueError(f"No attention backend is accurate for {shape} here.\n{choice.table()}")
    return choice


def preferred(times: Mapping[str, float]) -> str:
    """The first in `PREFERENCE` that no other clearly beats; names not in it come last.

    Args:
        times: milliseconds by name, at least one.
    """
    ranks = {name: rank for rank, name in enumerate(PREFERENCE)}
    limit = CLEARLY_FASTER * min(times.values())
    near = [name for name, ms in times.items() if ms <= limit]
    return min(near, key=lambda name: (ranks.get(name, len(ranks)), times[name]))


def _prepare(
    shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Callable[[AttentionBackend], Callable[[], Tensor]], tuple[Tensor, Tensor]]:
    """What to call for a backend, and the keys and values that it sees."""
    scale = shape.head_dim**-0.5
    if shape.storage == "native":
        return lambda backend: partial(backend, q, k, v, scale=scale), (k, v)
    spec = KVCacheSpec(
        batch_size=shape.batch_size,
        sink_size_t=0,
        window_size_t=shape.keys,
        tokens_per_frame=1,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        dtype=q.dtype,
        device=q.device,
        storage=shape.storage,
    )
    cache = KVCache(spec, Cursor(0, shape.keys, 1))
    cache.cursor.begin_step(shape.keys, q.device)
    cache.write(k, v)
    cache.cursor.advance()
    own = min(shape.queries, shape.keys)
    cache.cursor.begin_step(own, q.device)
    k, v = k[:, :own], v[:, :own]
    seen = cache.update(k, v)
    return lambda backend: partial(AttentionCore(shape.head_dim, backend), q, k, v, cache), seen


def _judge(
    call: Callable[[], Tensor], q: Tensor, places: Tensor, expected: Tensor, bound: float
) -> tuple[float | None, str | None]:
    """The error of a candidate, and the reason if it is rejected."""
    try:
        out = call()
    except Exception as caught:
        return None, f"failed: {type(caught).__name__}: {' '.join(str(caught).split())[:200]}"
    if out.shape != q.shape or out.dtype != q.dtype:
        return None, f"wrong: gives {list(out.shape)} {out.dtype} for {list(q.shape)} {q.dtype}"
    worst = (out[:, places].float() - expected).abs().max() / expected.abs().max()
    error = worst.item()
    if not (math.isfinite(error) and bool(out.isfinite().all())):
        return None, "wrong: gives values that are not finite"
    if error > bound:
        return error, f"wrong: differs by {error:.1e} from float32, at most {bound:.0e} is allowed"
    return error, None


@torch.no_grad()
def check_backend(
    name: str,
    backend: AttentionBackend,
    shape: AttentionShape,
    device: torch.device,
    dtype: torch.dtype,
) -> MeasuredBackend:
    """Whether a backend is accurate at a shape, without timing it; if so the verdict is "right".

    Args:
        name: for a name of the table, its usability is checked first.
        backend: what to call; it may have arguments bound.
        shape: the call.
        device: where it is made.
        dtype: of queries, keys and values.
    """
    reason = why_unusable(name, device, dtype, shape.head_dim) if name in BACKENDS else None
    if reason is not None:
        return MeasuredBackend(name, None, None, reason)
    q, k, v = draw_inputs(shape, device, dtype)
    scale = shape.head_dim**-0.5
    places = compared_places(shape.queries)
    expected = reference_attention(q[:, places], k, v, scale)
    call = partial(backend, q, k, v, scale=scale)
    error, reason = _judge(call, q, places, expected, ERROR_BOUNDS[dtype])
    return MeasuredBackend(name, None, error, reason or "right")


def draw_inputs(
    shape: AttentionShape, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values for which single keys matter.

    Attention over thousands of random keys is close to their mean, which hides a missing key.
    So some queries, spread over all of them, point at one key each, spread over all keys:
    their result is that key's value.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(tokens: int) -> Tensor:
        size = (shape.batch_size, tokens, shape.num_heads, shape.head_dim)
        return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")

    q, k, v = normal(shape.queries), normal(shape.keys), normal(shape.keys)
    count = min(shape.queries, shape.keys, COMPARED_QUERIES)
    asking = torch.linspace(0, shape.queries - 1, count, dtype=torch.float32, device="cpu").long()
    asked = torch.linspace(0, shape.keys - 1, count, dtype=torch.float32, device="cpu").long()
    q[:, asking] = 3 * k[:, asked]
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def compared_places(queries: int) -> Tensor:
    """The queries that are compared with the reference, spread over all of them."""
    count = min(queries, COMPARED_QUERIES)
    return torch.linspace(0, queries - 1, count, dtype=torch.float32, device="cpu").long()


def reference_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of ``[B, L, N, D]`` with every step in float32."""
    scores = torch.einsum("blnd,bsnd->bnls", q.float(), k.float()) * scale
    return torch.einsum("bnls,bsnd->blnd", scores.softmax(-1), v.float())


def _time_in_turns(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int
) -> dict[str, float]:
    """Median milliseconds of each call; they have been called once before.

    On CUDA an untimed call precedes the timed one: while the device is busy with it, the host
    launches the timed one, so the launch is not part of the measured time.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            if device.type == "cuda":
                begin = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                call()
                begin.record(torch.cuda.current_stream(device))
                call()
                end.record(torch.cuda.current_stream(device))
                end.synchronize()
                times[name].append(begin.elapsed_time(end))
            else:
                start = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}
