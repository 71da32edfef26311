"""Degrees of parallelism: the request, the resolved degrees, and the groups of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flashdreams.attention.choose import AttentionShape
from flashdreams.parallel.collectives import Channel, TrafficMeter

Degree = int | Literal["auto"]
DEGREES = ("cfg_parallel_degree", "ring_degree", "ulysses_degree", "tensor_parallel_degree")
"""Fields of `ParallelConfig` whose product is the number of ranks."""

NO_STREAMING = (
    "context_backend='xfuser' cannot serve a streaming model: it has no cache of keys and values "
    "that the ranks share. Use --parallel.context-backend native."
)


@dataclass(kw_only=True)
class ParallelConfig:
    """How the ranks share the work; every degree is a number of ranks or ``"auto"``."""

    ulysses_degree: Degree = "auto"
    """Ranks of Ulysses attention (all-to-all of tokens and heads); must divide the heads. auto: the
    largest that fits."""

    ring_degree: Degree = "auto"
    """Ranks of ring attention, which split the sequence; any number. auto: the remaining ranks."""

    tensor_parallel_degree: Degree = "auto"
    """Ranks that split the weights of every block; must divide the heads. auto: 1."""

    cfg_parallel_degree: Degree = "auto"
    """2: the conditional and the unconditional branch of guidance run on different ranks. auto: 2
    for a guided model on an even number of ranks, else 1."""

    ring_method: Literal["gather", "rotate"] = "gather"
    """gather: every ring rank holds all keys, and only the new chunk is all-gathered. rotate: the
    KV cache stays split and is sent around the ring, for models whose cache does not fit
    otherwise."""

    context_backend: Literal["native", "xfuser"] = "native"
    """xfuser: long-context attention of xDiT or yunchang, for bidirectional models."""

    decode: Literal["auto", "replicated", "split", "rank0"] = "auto"
    """Ranks that decode latents: all of them every frame (replicated), each its columns (split), or
    rank zero alone. auto: split if the decoder has a spatial plan, else replicated."""

    strict: bool = False
    """Bit-identical results on any number of ranks, at lower speed: tiles of one fixed size."""


@dataclass(frozen=True)
class ParallelDegrees:
    """Resolved degrees, outermost axis first; their product is the world size."""

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        """The product of all degrees."""
        return self.cfg * self.ring * self.ulysses * self.tp

    @property
    def sequence(self) -> int:
        """Ranks that share the tokens of one sequence."""
        return self.ring * self.ulysses

    def __str__(self) -> str:
        parts = f"cfg {self.cfg} x ring {self.ring} x ulysses {self.ulysses} x tp {self.tp}"
        return f"{self.world_size} = {parts}"

    @property
    def flags(self) -> str:
        """The command-line flags that ask for these degrees."""
        return (
            f"--parallel.cfg-parallel-degree {self.cfg} --parallel.ring-degree {self.ring} "
            f"--parallel.ulysses-degree {self.ulysses} "
            f"--parallel.tensor-parallel-degree {self.tp}"
        )


def resolve_degrees(
    config: ParallelConfig,
    world_size: int,
    num_heads: int | None,
    guided: bool = False,
    cached_frame_tokens: int | None = None,
    any_degree: bool = False,
) -> ParallelDegrees:
    """Resolve every ``"auto"`` and refuse impossible requests, before any weight is read.

    Args:
        config: the request.
        world_size: number of ranks.
        num_heads: attention heads of the model; None for a model that cannot be split.
        guided: whether the model is evaluated twice per denoising step.
        cached_frame_tokens: tokens per latent frame of a streaming model, which keeps a cache; None
            for a bidirectional one.
        any_degree: accept requested degrees that do not divide the heads: the
            model then computes attention whole on every rank (`ParallelPlan.units`).

    Raises:
        ValueError: impossible degrees; the message suggests some that work.
    """
    _refuse_conflicts(config, guided)
    # Guidance over two ranks first, then as much Ulysses as the heads allow.
    best = max(
        legal_degrees(world_size, num_heads, guided),
        key=lambda d: (_requests_met(d, config), d.cfg, d.ulysses),
    )
    if _requests_met(best, config) < 4 and any_degree:
        best = max(legal_degrees(world_size, 0, guided), key=lambda d: _requests_met(d, config))
    if _requests_met(best, config) < 4:
        raise ValueError(_explain(config, world_size, num_heads, best))
    if world_size > 1 and cached_frame_tokens is not None:
        _refuse_cache(config, best, cached_frame_tokens)
    return best


def legal_degrees(
    world_size: int, num_heads: int | None, guided: bool
) -> Iterator[ParallelDegrees]:
    """Every mesh that a model allows.

    Args:
        world_size: number of ranks.
        num_heads: attention heads of the model; None for a model that cannot be split, 0 for one
            that every degree divides.
        guided: whether the model is evaluated twice per denoising step.
    """
    for cfg in (1, 2) if guided else (1,):
        for tp in _divisors(world_size):
            for ulysses in _divisors(world_size):
                shared, left = divmod(world_size, cfg * tp * ulysses)
                split_heads = tp * ulysses
                if left or (split_heads > 1 and (num_heads is None or num_heads % split_heads)):
                    continue
                yield ParallelDegrees(cfg=cfg, ring=shared, ulysses=ulysses, tp=tp)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _requests_met(degrees: ParallelDegrees, config: ParallelConfig) -> int:
    """How many of the four requests a mesh fulfils; ``"auto"`` for tensor parallelism means 1."""
    pairs = [
        (config.cfg_parallel_degree, degrees.cfg),
        (config.ring_degree, degrees.ring),
        (config.ulysses_degree, degrees.ulysses),
    ]
    tp = config.tensor_parallel_degree
    kept = sum(request in ("auto", degree) for request, degree in pairs)
    return kept + (degrees.tp == (1 if tp == "auto" else tp))


def _refuse_conflicts(config: ParallelConfig, guided: bool) -> None:
    for name in DEGREES:
        request = getattr(config, name)
        if request != "auto" and (not isinstance(request, int) or request < 1):
            raise ValueError(f'{name}={request!r} must be at least 1, or "auto".')
    if config.cfg_parallel_degree not in ("auto", 1, 2):
        raise ValueError(
            f"cfg_parallel_degree={config.cfg_parallel_degree}: guidance has two branches. "
            "Allowed: 1, 2, auto."
        )
    if config.cfg_parallel_degree == 2 and not guided:
        raise ValueError(
            "cfg_parallel_degree=2, but this model uses no guidance, so it has no second branch. "
            "Use --parallel.cfg-parallel-degree 1."
        )
    if config.context_backend == "xfuser" and config.tensor_parallel_degree not in ("auto", 1):
        raise ValueError(
            f"context_backend='xfuser' with tensor_parallel_degree="
            f"{config.tensor_parallel_degree}: its groups are runs of neighbouring ranks. "
            "Use --parallel.context-backend native."
        )
    if config.strict and config.tensor_parallel_degree not in ("auto", 1):
        raise ValueError(
            f"strict=True with tensor_parallel_degree={config.tensor_parallel_degree}: a sum over "
            "ranks changes bits. Use --parallel.tensor-parallel-degree 1."
        )
    if config.strict and config.ring_method == "rotate":
        raise ValueError(
            "strict=True with ring_method='rotate': merged partial sums change bits. "
            "Use --parallel.ring-method gather."
        )
    if config.strict and config.context_backend == "xfuser":
        raise ValueError(
            "strict=True with context_backend='xfuser': its kernels are not tiled. "
            "Use --parallel.context-backend native."
        )


def _refuse_cache(config: ParallelConfig, degrees: ParallelDegrees, frame_tokens: int) -> None:
    if config.context_backend == "xfuser" and degrees.sequence > 1:
        raise ValueError(NO_STREAMING)
    if config.ring_method == "rotate" and frame_tokens % degrees.ring:
        raise ValueError(
            f"ring_method='rotate' shares every latent frame evenly, but {frame_tokens} tokens are "
            f"not divisible by ring_degree={degrees.ring}. Use --parallel.ring-method gather."
        )


def _explain(
    config: ParallelConfig, world_size: int, num_heads: int | None, best: ParallelDegrees
) -> str:
    requests = {name: getattr(config, name) for name in DEGREES}
    asked = ", ".join(
        f"{name}={request}" for name, request in requests.items() if request != "auto"
    )
    reasons = []
    tp = config.tensor_parallel_degree if config.tensor_parallel_degree != "auto" else 1
    ulysses = config.ulysses_degree if config.ulysses_degree != "auto" else 1
    if num_heads is None and tp * ulysses > 1:
        reasons.append("the model ships no plan, so its heads cannot be split")
    elif num_heads is not None and num_heads % (tp * ulysses):
        allowed = [u for u in _divisors(world_size) if num_heads % (tp * u) == 0]
        listed = ", ".join(map(str, allowed)) or f"none with tensor_parallel_degree={tp}"
        reasons.append(
            f"num_heads={num_heads} is not divisible by tensor_parallel_degree * ulysses_degree "
            f"= {tp} * {ulysses} (allowed ulysses degrees here: {listed})"
        )
    product = 1
    for request in requests.values():
        product *= request if isinstance(request, int) else 1
    if product > world_size or world_size % product:
        reasons.append(f"their product {product} does not divide the world size {world_size}")
    elif "auto" not in requests.values() and product != world_size:
        reasons.append(f"their product is {product}, the world size {world_size}")
    reason = "; ".join(reasons) or "no value of the other degrees fits"
    return f"{asked or 'auto'} on {world_size} ranks: {reason}. Try {best.flags}."


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh, seen from this rank."""

    name: str
    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None
    """None where the size is 1; a test may give a group of one rank, to have all of the parallel
    path on one device."""

    @property
    def is_shared(self) -> bool:
        """Whether splits along the axis communicate: over several ranks, or a test's one."""
        return self.size > 1 or self.group is not None


@dataclass(frozen=True)
class Mesh:
    """The ranks, arranged along named axes; on one rank no process group is needed."""

    degrees: ParallelDegrees = ParallelDegrees()
    config: ParallelConfig = field(default_factory=ParallelConfig)
    device_type: str = "cpu"
    cfg: Axis = Axis("cfg")
    ring: Axis = Axis("ring")
    ulysses: Axis = Axis("ulysses")
    tp: Axis = Axis("tp")
    sequence: Axis = Axis("sequence")
    """Ring and Ulysses as one axis, in the order of the tokens."""
    decode: Axis = Axis("decode")
    """All ranks, in a separate group, because decoding runs concurrently with the clean pass."""
    meter: TrafficMeter = field(default_factory=TrafficMeter)
    """Counts what every collective of this rank sends."""

    def channel(self, axis: Axis) -> Channel:
        """The metered channel over an axis of more than one rank.

        Raises:
            ValueError: the axis has one rank.
        """
        if axis.group is None:
            raise ValueError(f"Axis {axis.name!r} has a single rank, so it has no channel.")
        return Channel(axis.name, axis.group, self.meter)


def local_attention(shape: AttentionShape, mesh: Mesh) -> AttentionShape:
    """One rank's attention call, as the native strategies leave it to the core.

    Args:
        shape: the call of the whole model.
        mesh: the ranks.
    """
    ring, heads = mesh.ring.size, shape.num_heads
    rotates = mesh.config.ring_method == "rotate" and ring > 1
    for axis in (mesh.tp, mesh.ulysses):  # degrees that do not divide the heads leave them whole
        heads = heads // axis.size if heads % axis.size == 0 else heads
    return replace(
        shape,
        queries=-(-shape.queries // ring),
        keys=-(-shape.keys // ring) if rotates else shape.keys,
        num_heads=heads,
        storage="native" if rotates else shape.storage,  # what rotates is dequantized
    )


def build_mesh(
    degrees: ParallelDegrees, device_type: str, config: ParallelConfig | None = None
) -> Mesh:
    """Arrange the ranks of the default process group.

    Args:
        degrees: from `resolve_degrees`.
        device_type: ``"cuda"`` or ``"cpu"``.
        config: strategy and strictness for `parallelize`; None: the defaults.

    Raises:
        ValueError: the process group has another number of ranks.
    """
    config = config or ParallelConfig()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if degrees.world_size != ranks:
        raise ValueError(f"The mesh {degrees} needs {degrees.world_size} ranks; there are {ranks}.")
    if ranks == 1:
        return Mesh(degrees=degrees, config=config, device_type=device_type)
    d = degrees
    names = ("cfg", "ring", "ulysses", "tp")
    sizes = (d.cfg, d.ring, d.ulysses, d.tp)
    fine = init_device_mesh(device_type, sizes, mesh_dim_names=names)
    cfg, ring, ulysses, tp = (_axis(fine, name) for name in names)
    coarse = init_device_mesh(
        device_type, (d.cfg, d.sequence, d.tp), mesh_dim_names=("cfg", "sequence", "tp")
    )
    return Mesh(
        degrees=degrees,
        config=config,
        device_type=device_type,
        cfg=cfg,
        ring=ring,
        ulysses=ulysses,
        tp=tp,
        sequence=_axis(coarse, "sequence"),
        decode=Axis("decode", ranks, dist.get_rank(), dist.new_group(list(range(ranks)))),
    )


def _axis(mesh: DeviceMesh, name: str) -> Axis:
    size = mesh[name].size()
    return Axis(name, size, mesh.get_local_rank(name), mesh.get_group(name) if size > 1 else None)
