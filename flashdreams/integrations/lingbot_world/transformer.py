"""The Wan transformer with a camera branch in every block."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.infra.diffusion.causal_state import CausalState, StepInputs
from flashdreams.infra.diffusion.experts import NoiseExpertsConfig
from flashdreams.infra.ranges import check_range
from flashdreams.models.wan import fused
from flashdreams.models.wan.blocks import BlockConfig, WanBlock
from flashdreams.models.wan.plan import wan_plan
from flashdreams.models.wan.transformer import WanTransformer, WanTransformerConfig
from flashdreams.parallel.plan import ParallelPlan
from flashdreams.runtime.transfer import to_device

from .camera import SPATIAL_FACTOR


@dataclass(kw_only=True)
class LingBotTransformerConfig(WanTransformerConfig):
    """Config of a LingBot-World transformer."""

    _target: type["LingBotTransformer"] = field(default_factory=lambda: LingBotTransformer)

    camera_channels: int = 6
    """Camera values per pixel: 6 for ray origins and directions, 7 for directions and four keys."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "camera_channels")
        if self.control_dim is not None:
            raise ValueError(
                f"control_dim={self.control_dim}: the camera branch replaces Wan's own "
                "control embedding; leave it None and set camera_channels."
            )

    @property
    def camera_dim(self) -> int:
        """Camera values of one token."""
        _, rows, columns = self.patch_size
        return self.camera_channels * SPATIAL_FACTOR**2 * rows * columns


@dataclass(kw_only=True)
class LingBotExpertsConfig(NoiseExpertsConfig, LingBotTransformerConfig):
    """Config of two LingBot-World transformers, for high and for low noise."""

    expert_config = LingBotTransformerConfig


class LingBotBlock(WanBlock):
    """A Wan block whose tokens the camera scales and shifts before cross-attention."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config)
        dim = config.dim
        self.cam_injector_layer1 = nn.Linear(dim, dim)
        self.cam_injector_layer2 = nn.Linear(dim, dim)
        self.cam_scale_layer = nn.Linear(dim, dim)
        self.cam_shift_layer = nn.Linear(dim, dim)

    def read_camera(self, camera: Tensor) -> tuple[Tensor, Tensor]:
        """The camera's modulation of this block's tokens, ``x * scale + shift``.

        It depends only on the camera, so it is computed once per chunk if memory allows.

        Args:
            camera: ``[B or 1, L, dim]``, the embedded camera tokens.

        Returns:
            scale, the 1 of ``1 + scale`` included, and shift, both ``[B or 1, L, dim]``.
        """
        hidden = self.cam_injector_layer2(F.silu(self.cam_injector_layer1(camera))) + camera
        return 1 + self.cam_scale_layer(hidden), self.cam_shift_layer(hidden)

    def sum_and_inject(
        self, x: Tensor, y: Tensor, gate: Tensor, control: Sequence[Tensor] | Tensor | None
    ) -> Tensor:
        """In one kernel where fused kernels run; ``control`` as for ``inject``."""
        if control is None or self.gated_sum is not fused.gated_sum:
            return super().sum_and_inject(x, y, gate, control)
        scale, shift = self.read_camera(control) if isinstance(control, Tensor) else control
        return fused.gated_sum_affine(x, y, gate, scale, shift)

    def inject(self, x: Tensor, control: Sequence[Tensor] | Tensor | None) -> Tensor:
        """Scale and shift the tokens.

        Args:
            x: ``[B, L, dim]``.
            control: output or input of ``read_camera``; None leaves the tokens unchanged.
        """
        if control is None:
            return x
        scale, shift = self.read_camera(control) if isinstance(control, Tensor) else control
        return torch.addcmul(shift, x, scale)


class CameraTokens(nn.Module):
    """Casts ray tokens to the dtype and device of the network; a module that a plan can split."""

    def forward(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Cast ``[B or 1, L, camera_dim]``."""
        return to_device(tokens, like.device).to(like.dtype)


class LingBotTransformer(WanTransformer):
    """Wan image-to-video with the camera as per-block control; official parameter names.

    Source: Robbyant/lingbot-world, wan/modules/model_fast.py.
    """

    config: LingBotTransformerConfig
    block_class = LingBotBlock

    def __init__(self, config: LingBotTransformerConfig) -> None:
        super().__init__(config)
        self.camera_tokens = CameraTokens()
        self.patch_embedding_wancamctrl = nn.Linear(config.camera_dim, config.dim)
        self.c2ws_hidden_states_layer1 = nn.Linear(config.dim, config.dim)
        self.c2ws_hidden_states_layer2 = nn.Linear(config.dim, config.dim)

    def parallel_plan(self) -> ParallelPlan:
        """Wan's plan and the camera branch.

        A block's scale and shift apply to tokens that every rank holds in full width, so the layers
        that make them are split and their outputs gathered: twice per block and AR step, whatever
        the number of denoising steps. Over 4 denoising steps and a clean pass that is
        1/16 more bytes; it saves ``1 - 1/P`` of 4.2 GB at 14B in bfloat16, and the same share of
        these layers' work.
        """
        plan = wan_plan(image=self.config.image_dim is not None, control=False)
        return replace(
            plan,
            tensor=plan.tensor
            | {
                "c2ws_hidden_states_layer1": "colwise",
                "c2ws_hidden_states_layer2": "rowwise",
                "blocks.*.cam_injector_layer1": "colwise",
                "blocks.*.cam_injector_layer2": "rowwise",
                "blocks.*.cam_scale_layer": "colwise_gathered",
                "blocks.*.cam_shift_layer": "colwise_gathered",
            },
            split=plan.split | {"camera_tokens": 1},
        )

    def example_control(self, batch_size: int) -> Tensor:
        """Zeros ``[1, L, camera_dim]``: one camera for the whole batch."""
        c = self.config
        return torch.zeros(
            1, c.len_t * c.tokens_per_frame, c.camera_dim, dtype=torch.float32, device="cpu"
        )

    def embed_control(self, control: Any) -> Any:
        """Embed the camera, once per chunk.

        Args:
            control: ``[B or 1, L, camera_dim]``, as the camera encoder gives it; None for a clip
                without a camera, which a bidirectional model also supports.

        Returns:
            What every block reads, a scale and a shift for each. For a bidirectional model the
            embedded tokens ``[B or 1, L, dim]``: all scales and shifts of 161 frames at 14B would
            be 51 GB, so each block makes its own in every pass. None without a camera.

        Raises:
            ValueError: no camera for a streaming model, or one of another shape.

        Source: Robbyant/lingbot-world, wan/modules/model.py: without a camera blocks skip it.
        """
        c = self.config
        if control is None and not c.streaming:
            return None
        fits = isinstance(control, Tensor) and control.ndim == 3
        if not fits or control.shape[2] != c.camera_dim or control.shape[1] % c.tokens_per_frame:
            got = list(control.shape) if isinstance(control, Tensor) else type(control).__name__
            raise ValueError(
                f"The camera must be [B, latent frames * {c.tokens_per_frame}, {c.camera_dim}] "
                f"(camera_channels={c.camera_channels}); got {got}."
            )
        tokens = self.camera_tokens(control, self.patch_embedding_wancamctrl.weight)
        embedded = self.patch_embedding_wancamctrl(tokens)
        hidden = self.c2ws_hidden_states_layer1(embedded)
        camera = embedded + self.c2ws_hidden_states_layer2(F.silu(hidden))
        if not c.streaming:
            return camera
        return [cast(LingBotBlock, block).read_camera(camera) for block in self.blocks]

    def block_controls(self, inputs: StepInputs, state: CausalState) -> Sequence[Any]:
        """Camera control of each block."""
        return inputs.control if self.config.streaming else [inputs.control] * len(self.blocks)

    def add_control(self, x: Tensor, control: Any) -> Tensor:
        """The camera acts only in the blocks."""
        return x
