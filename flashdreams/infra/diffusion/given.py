"""Latent frames that are given at the start of a rollout instead of generated."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flashdreams.infra.diffusion.scheduler.base import Scheduler
from flashdreams.runtime.text import check_regular, reason_of, shown

INITIAL_LATENT = "initial_latent"
"""Name of the context that holds whole chunks of clean latents."""


def check_image(image: Tensor, shape: Sequence[int], *, is_whole: bool) -> Tensor:
    """Latents of an image in the first AR step.

    Args:
        image: ``[B, C, n, H, W]``.
        shape: of an AR step's latents.
        is_whole: they are all of the AR step; else they may be its first frames.

    Raises:
        ValueError: another shape.
    """
    sizes = tuple(image.shape)
    if is_whole and sizes != tuple(shape):
        raise ValueError(
            f"The encoded image must be the latents of one AR step {list(shape)}; "
            f"got {list(sizes)}."
        )
    if _without_time(sizes) != _without_time(shape) or not 0 < sizes[2] <= shape[2]:
        raise ValueError(
            f"The encoded image must be the first latent frames of {list(shape)}, from 1 to "
            f"{shape[2]} of them; got {list(sizes)}."
        )
    return image


def check_initial_latent(latent: Any, shape: Sequence[int]) -> Tensor:
    """Clean latents of the first AR steps of a rollout.

    Args:
        latent: ``[B, C, n * T, H, W]``.
        shape: ``(B, C, T, H, W)`` of an AR step's latents.

    Raises:
        ValueError: not a tensor, another shape, or not whole chunks.
    """
    sizes = tuple(latent.shape) if isinstance(latent, Tensor) else ()
    fits = len(sizes) == 5 and _without_time(sizes) == _without_time(shape)
    if not fits or sizes[2] == 0 or sizes[2] % shape[2]:
        wanted = [*shape[:2], "frames", *shape[3:]]
        got = list(sizes) if isinstance(latent, Tensor) else type(latent).__name__
        raise ValueError(
            f"{INITIAL_LATENT} must be latents [{', '.join(map(str, wanted))}] of whole chunks, "
            f"{shape[2]} frames each; got {got}."
        )
    return latent


def load_initial_latent(path: Path, shape: Sequence[int], option: str, total_blocks: int) -> Tensor:
    """Clean latents from a file, such as ``--save-latents`` writes; its header is checked first.

    Args:
        path: a .safetensors file whose tensor ``latents`` is read.
        shape: ``(B, C, T, H, W)`` of an AR step's latents.
        option: the option that names the file, for messages.
        total_blocks: AR steps of the rollout, among which those of the latents count.

    Returns:
        ``[B, C, n * T, H, W]`` float32, on the CPU.

    Raises:
        ValueError: no such file, damaged, without that tensor, or latents that do not fit.
    """
    try:
        check_regular(path)
        path.open("rb").close()  # safetensors takes an unreadable file for a missing one
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            if "latents" not in names:
                listed = ", ".join(map(shown, sorted(names)[:5])) or "nothing"
                raise ValueError(
                    f"holds {listed}; a tensor named latents is wanted, as --save-latents True "
                    "writes it."
                )
            sizes = file.get_slice("latents").get_shape()
            check_initial_latent(torch.empty(sizes, dtype=torch.float32, device="meta"), shape)
            chunks = sizes[2] // shape[2]
            if chunks > total_blocks:
                raise ValueError(
                    f"holds {chunks} chunks, and --total-blocks {total_blocks} counts them too. "
                    f"Type --total-blocks {chunks + 1} or more."
                )
            latent = file.get_tensor("latents")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{option} {path}: cannot be read: {reason_of(error)}.") from error
    except (ValueError, RuntimeError) as error:  # RuntimeError: a shape that no tensor has
        raise ValueError(f"{option} {path}: {error}") from error
    wide = latent.float()
    if not latent.is_floating_point() or not wide.isfinite().all():
        raise ValueError(f"{option} {path}: latents must be floating point and finite throughout.")
    return wide


def _without_time(sizes: Sequence[int]) -> tuple[int, ...]:
    return (*sizes[:2], *sizes[3:])


def given_chunk(given: Tensor, index: int, len_t: int) -> Tensor:
    """The latents of AR step ``index`` among those of the first AR steps."""
    if given.shape[2] == len_t:
        return given
    return given[:, :, index * len_t : (index + 1) * len_t].contiguous()


def sample_rest(
    scheduler: Scheduler,
    flow: Callable[[Tensor, Tensor], Tensor],
    noise: Callable[[int], Tensor],
    given: Tensor,
) -> Tensor:
    """Denoise a chunk whose first latent frames are ``given``, ``[B, C, n, H, W]``.

    The network sees them unchanged, with timestep 0. The schedule's values at their places in
    between is never read: schedules compute element by element.
    """
    count = given.shape[2]

    def stamped(latent: Tensor) -> Tensor:
        return torch.cat([given, latent[:, :, count:]], dim=2)

    def flow_of_rest(latent: Tensor, timestep: Tensor) -> Tensor:
        timesteps = timestep.repeat(latent.shape[0], latent.shape[2])
        timesteps[:, :count] = 0
        return flow(stamped(latent), timesteps)

    return stamped(scheduler.sample(flow_of_rest, noise))
