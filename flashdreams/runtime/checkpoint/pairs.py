"""Tensors of a file that mean something only together, such as quantized weights and scales."""

import re
from collections.abc import Collection, Mapping

from flashdreams.runtime.checkpoint.config import CheckpointConfig, CheckpointError
from flashdreams.runtime.checkpoint.read import TensorInfo

_SCALE = re.compile(r"scale(?!_shift)|absmax|quant_map|quant_state|zero_point|qzeros|scaled_fp8")
"""What names the second part of a quantized weight: ComfyUI's ``scale_weight`` and ``scaled_fp8``,
DeepSeek's ``weight_scale_inv``, torchao, GPTQ, AWQ and bitsandbytes."""


def refuse_scaled(
    infos: Mapping[str, TensorInfo], config: CheckpointConfig, read: Collection[str] = ()
) -> None:
    """Refuse 8-bit weights that have scales beside them: without these they are other weights.

    ``ignore`` does not help, since the weights would be read all the same. 8-bit weights without
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
    owners = {name.rpartition(".")[0]: name for name in narrow}
    for name in infos:
        owner, _, leaf = name.rpartition(".")
        if name in narrow or not _SCALE.search(leaf) or not (owner in owners or not owner):
            continue
        weight = owners.get(owner, next(iter(owners.values()), None))
        if weight is None:
            return
        kind = str(infos[weight].dtype).removeprefix("torch.")
        raise CheckpointError(
            f"checkpoint {config.source}: {weight} is {kind} with a scale of its own ({name}), "
            "which is not applied here: the values alone are other weights. Use the file of the "
            "same model in bfloat16, float16 or float32."
        )
