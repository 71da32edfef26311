"""Whether the blocks of a network run as Triton kernels."""

from collections.abc import Mapping
from typing import Any

import torch

from flashdreams.attention.backends import why_unusable
from flashdreams.infra.diffusion.causal import CausalTransformer
from flashdreams.models.wan.fused import can_fuse_kernels, check_fused_kernels


class FusesKernels(CausalTransformer):
    """A causal transformer whose blocks have fused forms; its config has ``fused_kernels``."""

    config: Any
    blocks: Any
    stored_fused_kernels: bool | None = None
    """Whether the run whose choices are used again had fused kernels."""

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

    def after_load(self) -> None:
        """Choose how the blocks compute, too; see the contract."""
        super().after_load()
        fused_kernels = self.uses_fused_kernels
        for block in self.blocks:
            block.select_implementations(fused_kernels)

    def resolved_choices(self) -> dict[str, Any]:
        """See the contract."""
        return {**super().resolved_choices(), "fused_kernels": self.uses_fused_kernels}

    def apply_choices(self, stored: Mapping[str, Any], device: torch.device) -> list[str]:
        """Use fused kernels or not as the earlier run did; see the contract."""
        lines, wanted = super().apply_choices(stored, device), stored.get("fused_kernels")
        asked = self.config.fused_kernels
        if not isinstance(wanted, bool) or wanted == asked:
            return lines
        if asked is not None:
            reason: str | None = f"the config asks for {asked}"
        else:
            reason = why_unusable("triton", device, self.dtype) if wanted else None
        if reason is not None:
            return [*lines, f"fused_kernels {wanted} is not used: {reason}"]
        self.stored_fused_kernels = wanted
        return lines
