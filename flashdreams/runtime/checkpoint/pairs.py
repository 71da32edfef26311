"""Quantized weights with unsupported scales."""

import re
from collections.abc import Collection, Mapping

from flashdreams.runtime.checkpoint.config import CheckpointConfig, CheckpointError
from flashdreams.runtime.checkpoint.read import TensorInfo

_SCALE = re.compile(r"scale(?!_shift)|absmax|quant_map|quant_state|zero_point|qzeros")
"""What names the second part of a quantized weight: torchao, GPTQ, AWQ and bitsandbytes. What
`flashdreams.runtime.checkpoint.scaled.find_scales` knows by name is not asked for here."""


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
