"""A module whose weights stay in host memory while it runs on another device."""

from typing import Any

import torch
from torch import Tensor, nn


def offload(module: nn.Module, device: torch.device) -> None:
    """Let a module run on ``device`` with its weights left where they are.

    While a layer runs, it has copies of its weights on the device, so these take the memory of one
    layer. Only an embedding whose indices are where its table is looks them up there, as its table
    would be the largest copy. The results are those of a module whose weights are on the device.

    Args:
        module: its layers are called as modules, by one thread at a time; a function that reads
            the weights of a layer without calling it finds them where they were.
        device: of all other inputs and of the outputs.
    """
    for layer in module.modules():
        if layer._parameters or layer._buffers:
            _Copies(layer, device)
        if isinstance(layer, nn.Embedding):
            layer.register_forward_hook(lambda layer, ids, rows: rows.to(device))


class _Copies:
    """The weights of one layer, on the device while it runs."""

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self._device = device
        self._left: list[tuple[dict[str, Any], dict[str, Any]]] = []
        layer.register_forward_pre_hook(self._fetch)
        layer.register_forward_hook(self._put_back, always_call=True)

    def _fetch(self, layer: nn.Module, args: Any) -> None:
        self._left.append((dict(layer._parameters), dict(layer._buffers)))
        if isinstance(layer, nn.Embedding) and args[0].device == layer.weight.device:
            return
        for name, weights in layer.named_parameters(recurse=False):
            layer._parameters[name] = nn.Parameter(self._copy(weights), requires_grad=False)
        for name, tensor in layer.named_buffers(recurse=False):
            layer._buffers[name] = self._copy(tensor)

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._device, non_blocking=True)

    def _put_back(self, layer: nn.Module, args: Any, result: Any) -> None:
        parameters, buffers = self._left.pop()
        layer._parameters.update(parameters)
        layer._buffers.update(buffers)
