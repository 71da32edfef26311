"""Checks of the conditions of a rollout."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from flashdreams.infra.config import did_you_mean
from flashdreams.infra.finite import tensors_in

PIXEL_LIMIT = 2.0
"""Largest absolute pixel value: [-1, 1] with room for bicubic interpolation, which reaches 1.9."""


def refuse_unknown(names: Iterable[str], known: Collection[str], method: str) -> None:
    """Refuse context that no component declares.

    Args:
        names: keywords that were given.
        known: keywords that some component declares.
        method: name of the called function in the message.

    Raises:
        TypeError: names the nearest and all that are known.
    """
    for name in names:
        if name in known:
            continue
        raise TypeError(
            f"No component of {method} takes the context {name!r}.{did_you_mean(name, known)} "
            f"Known: {', '.join(sorted(known))}."
        )


def refuse_non_finite(name: str, value: Any) -> None:
    """Refuse conditions of a rollout that contain NaN or infinity.

    Args:
        name: what the message calls it.
        value: a tensor, or tensors in mappings, sequences and dataclasses; other values pass.

    Raises:
        ValueError: says how many values are wrong; or a tensor without plain values (on the meta
            device, or sparse).
    """
    for tensor in tensors_in(value):
        if not tensor.is_floating_point():
            continue
        if tensor.is_meta or tensor.layout is not torch.strided:
            kind = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
            raise ValueError(f"{name} is a {kind} tensor; give a dense one that holds values.")
        plain = tensor.float() if tensor.itemsize == 1 else tensor  # FP8 has no isfinite
        wrong = int((~torch.isfinite(plain)).sum())
        if wrong:
            raise ValueError(
                f"{name}: {wrong} of {tensor.numel()} values in {list(tensor.shape)} are NaN or "
                "infinite."
            )


def refuse_other_pixels(name: str, image: Any) -> None:
    """Refuse pixels that are not in [-1, 1], such as those of 0 to 255.

    Args:
        name: what the message calls them.
        image: a tensor of any shape; anything else is left to the encoder.

    Raises:
        ValueError: states their range and how to convert them.
    """
    refuse_non_finite(name, image)
    if not isinstance(image, Tensor) or not image.is_floating_point() or not image.numel():
        return
    least, most = (float(x) for x in image.aminmax())
    if max(-least, most) > PIXEL_LIMIT:
        raise ValueError(
            f"{name}: pixels go from {least:g} to {most:g}; they must be in [-1, 1]. Give "
            f"pixels.float() / 127.5 - 1 for pixels of 0 to 255."
        )
