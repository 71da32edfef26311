"""Quantized weights that need a tensor of scales."""

import math
import re
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from flashdreams.runtime.checkpoint.config import CheckpointConfig, CheckpointError
from flashdreams.runtime.checkpoint.read import TensorInfo, TensorSlice

_SCALES = (".scale_weight", ".weight_scale")
_OF_INPUTS = (".scale_input", ".input_scale", ".comfy_quant")
_OTHER_KINDS = {
    ".weight_scale_inv": "FP8 with one scale per block of a weight",
    ".weight_scale_2": "4-bit weights with two levels of scales (NVFP4)",
}
_MARKER = "scaled_fp8"
_LISTED = 5
_SCALE = re.compile(r"scale(?!_shift)|absmax|quant_map|quant_state|zero_point|qzeros")
"""What names the second part of a quantized weight: torchao, GPTQ, AWQ and bitsandbytes. What
`find_scales` knows by name is not asked for here."""


def find_scales(infos: Mapping[str, TensorInfo]) -> tuple[dict[str, str], set[str]]:
    """The scales of the quantized tensors in a file.

    A weight is ``weight * scale``, one scale for all of it or one per row. Scales of inputs and
    markers are for 8-bit matmuls with these weights, which are not used here.

    Args:
        infos: all tensors of the file, by the file's names.

    Returns:
        Weight -> its scale, and all names that are not weights themselves, scales included.

    Raises:
        CheckpointError: quantization of another kind.

    Source: ComfyUI, ``comfy/ops.py`` (``scale_weight``) and its later ``weight_scale``.
    """
    scales: dict[str, str] = {}
    aside: set[str] = set()
    for name, info in infos.items():
        for suffix, kind in _OTHER_KINDS.items():
            if name.endswith(suffix):
                raise _refusal(info, f"{kind}, such as {name.removesuffix(suffix)}.weight")
        owner = next((name.removesuffix(s) for s in _SCALES if name.endswith(s)), None)
        weight = infos.get(f"{owner}.weight")
        if owner is not None and weight is not None:
            _check_scale(name, info, f"{owner}.weight", weight)
            scales[f"{owner}.weight"] = name
            aside.add(name)
        elif name.endswith(_OF_INPUTS) or name.rpartition(".")[2] == _MARKER:
            aside.add(name)
    return scales, aside


def refuse_missing_scales(
    infos: Mapping[str, TensorInfo],
    scales: Mapping[str, str],
    aside: Collection[str],
    wanted: Iterable[str],
) -> None:
    """Refuse 8-bit weights without scales in a file with scales.

    Args:
        infos: all tensors of the file.
        scales: from `find_scales`.
        aside: from `find_scales`.
        wanted: the file's names of the tensors that will be read.

    Raises:
        CheckpointError: names the first ones.
    """
    if not aside:
        return
    bare = [name for name in wanted if infos[name].dtype.itemsize == 1 and name not in scales]
    bare = [name for name in bare if infos[name].dtype.is_floating_point]
    if bare:
        shown = ", ".join(bare[:_LISTED]) + (", ..." if len(bare) > _LISTED else "")
        raise _refusal(
            infos[bare[0]],
            f"FP8 with scales, but {len(bare)} of its FP8 tensors have none: {shown}",
        )


def refuse_scaled(
    infos: Mapping[str, TensorInfo], config: CheckpointConfig, read: Collection[str] = ()
) -> None:
    """Refuse 8-bit weights with scales that are not applied, which would be wrong weights.

    ``ignore`` has no effect, because the weights would still be read. 8-bit weights without
    scales are plain numbers and pass.

    Args:
        infos: all tensors of the file, by the file's names.
        config: where the file is, for the message.
        read: weights that are read with their scales, and these scales.

    Raises:
        CheckpointError: names a weight and its scale.
    """
    infos = {name: info for name, info in infos.items() if name not in read}
    narrow = {name: info for name, info in infos.items() if info.dtype.itemsize == 1}
    # A scale is named after the layer, or after the weight.
    owners = {name.rpartition(".")[0]: name for name in narrow} | {name: name for name in narrow}
    for name in infos:
        owner, _, leaf = name.rpartition(".")
        if name in narrow or owner not in owners or not _SCALE.search(leaf):
            continue
        weight = owners[owner]
        kind = str(infos[weight].dtype).removeprefix("torch.")
        raise CheckpointError(
            f"checkpoint {config.source}: {weight} is {kind} with a scale ({name}), "
            "which is not supported, and without it the weights are wrong. Use the file of the "
            "same model in bfloat16, float16 or float32."
        )


def dequantize(value: Tensor, scale: Tensor, part: TensorSlice | None) -> Tensor:
    """``value * scale`` in float32.

    Args:
        value: a weight, or the slice of it that ``part`` names.
        scale: one number, or one per row of the whole weight.
        part: the slice.
    """
    factor = scale.float()
    if factor.numel() > 1 and part is not None and part.dim == 0:
        factor = part.of(factor.flatten())
    return value.float() * factor.reshape(-1, *[1] * (value.ndim - 1))


def _check_scale(name: str, scale: TensorInfo, weight_name: str, weight: TensorInfo) -> None:
    if not weight.dtype.is_floating_point:
        raise _refusal(
            scale, f"integers with scales: {weight_name} {weight.dtype} {list(weight.shape)}"
        )
    rows = weight.shape[0] if weight.shape else 1
    per_row = math.prod(scale.shape) == rows and scale.shape[:1] == (rows,)
    if scale.refused or not scale.dtype.is_floating_point:
        raise _refusal(scale, f"FP8 with scales that are not numbers: {name} {scale.dtype}")
    if math.prod(scale.shape) != 1 and not per_row:
        raise _refusal(
            scale,
            f"FP8 with scales of an unknown shape: {name} {list(scale.shape)} for "
            f"{weight_name} {list(weight.shape)}",
        )


def _refusal(info: TensorInfo, kind: str) -> CheckpointError:
    return CheckpointError(
        f"{info.file} holds {kind}. FP8 weights need one scale each or one per row; use "
        "such a version of these weights, or one in bfloat16"
    )
