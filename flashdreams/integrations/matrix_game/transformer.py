"""The Wan transformer with action modules in its first blocks, and no prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from flashdreams.attention.cache import KVCache, KVCacheSpec
from flashdreams.infra.diffusion.causal_state import CausalState, StepInputs
from flashdreams.infra.ranges import check_range
from flashdreams.models.wan.blocks import BlockConfig, WanBlock
from flashdreams.models.wan.plan import wan_plan
from flashdreams.models.wan.transformer import WanTransformer, WanTransformerConfig
from flashdreams.parallel.plan import ParallelPlan, TensorStyle
from flashdreams.runtime.transfer import to_device

from .action import ActionControl, ActionModule, time_rotations

ACTION = "blocks.*.action_model"
MOUSE_CACHE = f"{ACTION}.mouse_core"
KEYBOARD_CACHE = f"{ACTION}.keyboard_core"


@dataclass(kw_only=True)
class MatrixGameTransformerConfig(WanTransformerConfig):
    """Config of a Matrix-Game 2.0 transformer; the defaults are those of the universal variant."""

    _target: type["MatrixGameTransformer"] = field(default_factory=lambda: MatrixGameTransformer)

    text_dim: int = 0
    """There is no prompt."""
    image_dim: int | None = 1280
    """Width of the image tokens, the only input of cross-attention."""
    condition_channels: int = 20
    """4 of the mask and 16 of the image latent."""
    latent_height: int = 44
    """Latent rows."""
    latent_width: int = 80
    """Latent columns."""
    window_size_t: int = 6
    """Latent frames in all three caches, the current chunk included."""
    keyboard_dim: int = 4
    """Keyboard columns."""
    mouse_dim: int | None = 2
    """Mouse columns, pitch and yaw; None for a variant without a mouse."""
    action_blocks: int = 15
    """Number of first blocks that have an action module."""
    action_heads: int = 16
    """Heads of both action paths."""
    action_dim: int = 1024
    """Width of both action paths; ``action_heads`` must divide it."""
    keyboard_embed_dim: int = 128
    """Width of one embedded keyboard action."""
    actions_per_latent: int = 12
    """Actions that one latent frame sees: three latent frames of four pixel frames."""
    action_rope_dim: int = 8
    """Channels of an action head that turn with time."""
    action_rope_theta: float = 256.0
    """Base of the action paths' rotary frequencies."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "keyboard_dim", "mouse_dim", "action_heads", "action_dim")
        check_range(self, "keyboard_embed_dim", "actions_per_latent", "action_rope_theta")
        check_range(self, "action_blocks", most=self.num_layers)
        check_range(self, "action_rope_dim", least=2)
        if self.action_dim % self.action_heads or self.action_head_dim % 2:
            raise ValueError(
                f"action_dim={self.action_dim} over action_heads={self.action_heads} must give an "
                f"even head size; got {self.action_dim / self.action_heads:g}."
            )
        if self.action_rope_dim % 2 or self.action_rope_dim > self.action_head_dim:
            raise ValueError(
                f"action_rope_dim={self.action_rope_dim} must be even and at most the head size "
                f"{self.action_head_dim}."
            )
        if self.sink_size_t:
            raise ValueError(f"sink_size_t={self.sink_size_t}: Matrix-Game has no sink; give 0.")

    @property
    def action_head_dim(self) -> int:
        """Channels of one head of the action paths."""
        return self.action_dim // self.action_heads


class ActionBlock(WanBlock):
    """A Wan block with an action module between cross-attention and feed-forward."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config)
        self.action_model = ActionModule(config)

    def inject_late(self, x: Tensor, control: ActionControl) -> Tensor:
        """Add mouse and keyboard to the tokens ``[B, L, dim]``."""
        return self.action_model(x, control)

    def write(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: Tensor,
        context: Sequence[tuple[Tensor, Tensor]],
        cache: KVCache,
        control: ActionControl,
    ) -> None:
        """Write all three caches; the mouse path needs the output of cross-attention."""
        shift, scale, gate = modulation[:, :, :3].unbind(2)
        y = self.modulated_norm(x, shift, scale, self.eps, self.branch_dtype)
        x = self.gated_sum(x, self.self_attn(y, rope, cache), gate)
        y = self.affine_norm(x, self.norm3, self.branch_dtype)
        x = self.branch_sum(x, self.cross_attn(y, context))
        self.action_model.write(x, control)


class MatrixGameTransformer(WanTransformer):
    """Wan image-to-video without text, controlled by keys and mouse; official parameter names.

    Source: SkyworkAI/Matrix-Game, Matrix-Game-2/wan/modules/causal_model.py.
    """

    config: MatrixGameTransformerConfig
    streams_condition = True

    def new_block(self, index: int) -> WanBlock:
        """The first blocks have an action module."""
        kind = ActionBlock if index < self.config.action_blocks else WanBlock
        return kind(self.config)

    def parallel_plan(self) -> ParallelPlan:
        """Wan's plan and the action modules, on any number of ranks.

        The mouse path needs all frames of a position. The keyboard's keys are the same on all
        ranks, so that its queries are split without communication.
        """
        c = self.config
        plan = wan_plan(image=False, control=False)
        tensor: dict[str, TensorStyle] = {
            "keyboard_embed.0": "replicated",
            "keyboard_embed.2": "replicated",
            "mouse_attn_q": "colwise",
            "keyboard_attn_kv": "colwise_kv",
            "proj_keyboard": "rowwise",
        }
        cores = {KEYBOARD_CACHE: "split_queries"}
        if c.mouse_dim is not None:
            tensor |= {"mouse_mlp.0": "colwise", "mouse_mlp.2": "rowwise"}
            tensor |= {"t_qkv": "colwise_qkv", "proj_mouse": "rowwise"}
            cores[MOUSE_CACHE] = "all_tokens"
        trunk = dict.fromkeys(("blocks.*.self_attn", "blocks.*.cross_attn"), c.num_heads)
        return replace(
            plan,
            tensor=plan.tensor | {f"{ACTION}.{name}": style for name, style in tensor.items()},
            cores=cast(Any, cores),
            units=trunk | {ACTION: c.action_heads, "blocks.*.ffn": c.ffn_dim},
        )

    def cache_specs(self, batch_size: int) -> dict[str, KVCacheSpec]:
        """Self-attention; mouse, per position over time; keyboard, one key per frame.

        All evict together.
        """
        c, specs = self.config, super().cache_specs(batch_size)
        sizes: dict[str, Any] = {"num_heads": c.action_heads, "head_dim": c.action_head_dim}
        sizes["storage"] = c.kv_cache_dtype  # precision is for the large cache
        if c.mouse_dim is not None:
            specs[MOUSE_CACHE] = self.cache_spec(batch_size, **sizes)
        specs[KEYBOARD_CACHE] = self.cache_spec(batch_size, tokens_per_frame=1, **sizes)
        return specs

    def example_context(self, batch_size: int) -> dict[str, Any]:
        """Zeros for ``initialize_cache``; the condition comes with the control."""
        context = super().example_context(batch_size)
        del context["condition"]
        return context

    def example_control(self, batch_size: int) -> dict[str, Tensor]:
        """Zeros, as the action encoder gives them."""
        c = self.config
        size = (1, c.len_t, c.actions_per_latent)
        on_host: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        control = {"keyboard": torch.zeros(*size, c.keyboard_dim, **on_host)}
        if c.mouse_dim is not None:
            control["mouse"] = torch.zeros(*size, c.mouse_dim, **on_host)
        condition = (batch_size, c.condition_channels, c.len_t, c.latent_height, c.latent_width)
        return control | {"condition": torch.zeros(condition, **on_host)}

    def step_condition(self, control: Any) -> Tensor | None:
        """The condition of the chunk, where the encoder streams it."""
        return control.get("condition") if isinstance(control, Mapping) else None

    def embed_control(self, control: Any) -> dict[str, Tensor]:
        """Bring actions to the device and type of the network.

        Args:
            control: ``keyboard`` ``[B or 1, T, actions_per_latent, keyboard_dim]`` and, with a
                mouse, ``mouse`` likewise, as the action encoder gives them.

        Raises:
            ValueError: no actions, or of another shape.
        """
        c = self.config
        widths = {"keyboard": c.keyboard_dim} | ({"mouse": c.mouse_dim} if c.mouse_dim else {})
        given = control if isinstance(control, Mapping) else {}
        for name, width in widths.items():
            shape = list(given[name].shape) if name in given else None
            if shape is None or len(shape) != 4 or shape[2:] != [c.actions_per_latent, width]:
                raise ValueError(
                    f"This transformer needs control: {name!r} must be [B or 1, latent frames, "
                    f"{c.actions_per_latent}, {width}]; got {shape}."
                )
        return {name: to_device(given[name], self.device).to(self.dtype) for name in widths}

    def inputs_at(self, cache: CausalState, frames: Tensor, control: Any) -> StepInputs:
        """See `CausalTransformer.inputs_at`; assigns actions to latent frames, once per chunk.

        It is done here because keys of the keyboard are rotated by position.
        """
        c = self.config
        inputs = super().inputs_at(cache, frames, control)
        rotation = time_rotations(frames, c.action_head_dim, c.action_rope_dim, c.action_rope_theta)
        rotation = to_device(rotation, self.device)
        keyboard = inputs.control["keyboard"].expand(cache.batch_size, -1, -1, -1)
        mouse = inputs.control.get("mouse")
        inputs.control = {
            "keys": [
                cast(ActionBlock, block).action_model.read_keyboard(keyboard, rotation)
                for block in self.blocks[: c.action_blocks]
            ],
            "mouse": None if mouse is None else self._per_token_of(mouse.flatten(2)),
            "rotation": self._per_token_of(rotation[None])[0],
        }
        return inputs

    def add_control(self, x: Tensor, control: Any) -> Tensor:
        """Actions act only in the blocks."""
        return x

    def block_controls(self, inputs: StepInputs, state: CausalState) -> Sequence[Any]:
        """An `ActionControl` for each block with an action module, None for the others."""
        c, control = self.config, inputs.control
        none = [None] * c.action_blocks
        controls = [
            ActionControl(keys, control["mouse"], control["rotation"], keyboard_cache, mouse_cache)
            for keys, keyboard_cache, mouse_cache in zip(
                control["keys"],
                state.caches.get(KEYBOARD_CACHE, none),
                state.caches.get(MOUSE_CACHE, none),
                strict=True,
            )
        ]
        return [*controls, *[None] * (c.num_layers - c.action_blocks)]

    def _per_token_of(self, x: Tensor) -> Tensor:
        """Values per latent frame ``[B, T, ...]`` for the tokens of this rank."""
        places = self.token_places(x.shape[1], self.config.tokens_per_frame, x.device)
        return x.index_select(1, places)
