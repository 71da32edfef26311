"""The numerics fingerprint of a run: what its bits depend on besides config, weights and seed."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from flashdreams.parallel.mesh import Mesh

CHOICES = ("fused_kernels", "precision", "kv_cache_dtype", "residual_dtype", "dtype")
"""Fields of a transformer's config that choose how it computes."""


def fingerprint(
    transformer: Any,
    resolved: Mapping[str, Any],
    attention_backend: str | None,
    mesh: Mesh,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that may change bits, as JSON values.

    Args:
        transformer: config of the transformer.
        resolved: choices that it leaves open and the device determines, by field.
        attention_backend: the one that was chosen; None before warm-up or without attention cores.
        mesh: the ranks.
        device: where it runs.
    """
    on_gpu = device.type == "cuda"
    return {
        "attention_backend": attention_backend,
        **{name: getattr(transformer, name) for name in CHOICES if hasattr(transformer, name)},
        **resolved,
        "strict": mesh.config.strict,
        "degrees": asdict(mesh.degrees),
        "decode": mesh.config.decode,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": None if on_gpu else torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
    }


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Where two fingerprints differ, one line each: ``threads: 1 there, 2 here``."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    return [
        f"{name}: {theirs.get(name)} there, {ours.get(name)} here"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
