"""Whether the blocks of a network run as Triton kernels."""

from collections.abc import Mapping
from typing import Any

import torch

from flashdreams.attention.backends import why_unusable
from flashdreams.infra.diffusion.causal import CausalTransformer
from flashdreams.models.wan.fused import can_fuse_kernels, check_fused_kernels
from flashdreams.models.wan.matmuls import quantize_linears


class FusesKernels(CausalTransformer):
    """A causal transformer whose blocks have fused forms; its config has ``fused_kernels``."""

    config: Any
    blocks: Any
    stored_fused_kernels: bool | None = None
    """Whether the run whose choices are used again had fused kernels."""
    fp8_layers: frozenset[str] = frozenset()
    """Names of the layers that ``quantize_weights`` has replaced."""

    @property
    def uses_fused_kernels(self) -> bool:
        """Whether the blocks run as Triton kernels on the device of the weights."""
        asked = self.config.fused_kernels
        if asked is None:
            asked = self.stored_fused_kernels
        return can_fuse_kernels(self.device, self.dtype) if asked is None else asked

    def check_device(self, device: torch.device) -> None:
        """See the contract."""
        super().check_device(device)
        if self.config.fused_kernels:
            check_fused_kernels(device, self.dtype)
        if self.config.precision == "fp8_gemm" and device.type != "cpu":
            self._check_fp8_gemm(device)

    def _check_fp8_gemm(self, device: torch.device) -> None:
        """Refuse FP8 matmuls on a GPU where what comes before them cannot quantize."""
        reason = why_unusable("triton", device, self.dtype)
        if self.config.fused_kernels is False:
            reason = "its inputs are quantized in fused kernels, and fused_kernels is False"
        elif self.dtype != torch.bfloat16:
            reason = f"its matmuls put out bfloat16, and dtype is {self.config.dtype!r}"
        if reason is not None:
            raise ValueError(
                f"precision='fp8_gemm' cannot be used here: {reason}. precision='fp8' runs."
            )

    def quantize_weights(self) -> None:
        """Replace the wide layers of the blocks by FP8 ones; see the contract."""
        if self.config.precision != "fp8_gemm" or self.fp8_layers:
            return
        width = self.config.fp8_gemm_min_width
        self.fp8_layers = frozenset(
            f"blocks.{index}.{name}"
            for index, block in enumerate(self.blocks)
            for name in quantize_linears(block, width)
        )

    def after_load(self) -> None:
        """Also select how the blocks compute; see the contract."""
        super().after_load()
        self.quantize_weights()
        fused_kernels = self.uses_fused_kernels
        for block in self.blocks:
            block.select_implementations(fused_kernels)

    def resolved_choices(self) -> dict[str, Any]:
        """See the contract."""
        choices = {**super().resolved_choices(), "fused_kernels": self.uses_fused_kernels}
        if self.config.precision == "fp8_gemm":
            choices["fp8_layers"] = sorted({name.split(".", 2)[2] for name in self.fp8_layers})
        return choices

    def apply_choices(self, stored: Mapping[str, Any], device: torch.device) -> list[str]:
        """Use fused kernels or not as the earlier run did; see the contract."""
        lines, wanted = super().apply_choices(stored, device), stored.get("fused_kernels")
        asked = self.config.fused_kernels
        if not isinstance(wanted, bool) or wanted == asked:
            return lines
        if asked is not None:
            reason: str | None = f"the config sets {asked}"
        else:
            reason = why_unusable("triton", device, self.dtype) if wanted else None
        if reason is not None:
            return [*lines, f"fused_kernels {wanted} is not used: {reason}"]
        self.stored_fused_kernels = wanted
        return lines
