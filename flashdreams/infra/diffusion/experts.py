"""Two networks of one class that share the denoising steps: one for high noise, one for low."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashdreams.attention.cursor import Cursor
from flashdreams.infra.config import config_fields
from flashdreams.infra.diffusion.causal import CausalTransformer
from flashdreams.infra.diffusion.causal_config import CausalTransformerConfig
from flashdreams.infra.diffusion.causal_state import CausalState
from flashdreams.infra.diffusion.transformer import Transformer
from flashdreams.infra.ranges import check_range
from flashdreams.parallel.plan import ParallelPlan
from flashdreams.runtime.checkpoint import CheckpointConfig, LoRA, parse_lora

EXPERTS = ("high_noise", "low_noise")
"""Names of the two networks, and prefixes of their parameters."""


@dataclass(kw_only=True)
class NoiseExpertsConfig(CausalTransformerConfig):
    """Fields of two networks in addition to the config of one of them.

    A family names itself as the second base, and its config for one network::

        @dataclass(kw_only=True)
        class MyExpertsConfig(NoiseExpertsConfig, MyTransformerConfig):
            expert_config = MyTransformerConfig
    """

    _target: type[Any] = field(default_factory=lambda: NoiseExperts)

    expert_config: ClassVar[type[CausalTransformerConfig]]
    """Config class of one network."""

    boundary: float
    """Noise level, above 0 and below 1, from which on the high-noise network predicts the flow: for
    timesteps of at least 1000 times as much. Below it, the low-noise network does."""

    low_noise_checkpoint: CheckpointConfig | None = None
    """Weights of the low-noise network; ``checkpoint`` is then the other's. None: ``checkpoint``
    holds both, under ``high_noise.`` and ``low_noise.``."""

    low_noise_loras: tuple[str, ...] = ()
    """LoRAs of the low-noise network; those of the high-noise network are ``loras``."""

    use_cuda_graph: bool = False
    """Always False: both networks run eagerly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "boundary", least=0, most=1)
        if self.boundary in (0, 1):
            raise ValueError(
                f"boundary={self.boundary:g} leaves one of the two networks without timesteps; it "
                "must be above 0 and below 1."
            )
        if self.checkpoint is None and self.low_noise_checkpoint is not None:
            raise ValueError(
                "low_noise_checkpoint is given without checkpoint, the weights of the high-noise "
                "network. Give both, or neither for random weights."
            )
        if self.use_cuda_graph:
            raise ValueError("use_cuda_graph=True: two networks run eagerly; it must be False.")
        for lora in self.low_noise_loras:
            parse_lora(lora)

    @property
    def is_one_file(self) -> bool:
        """Whether ``checkpoint`` holds both networks."""
        return self.checkpoint is not None and self.low_noise_checkpoint is None

    def expert(self, name: str) -> CausalTransformerConfig:
        """Config of one of the networks; it names files where the networks have their own.

        Args:
            name: one of ``EXPERTS``.
        """
        values = {field: getattr(self, field) for field in config_fields(self.expert_config)}
        if name == EXPERTS[1]:
            values |= {"checkpoint": self.low_noise_checkpoint, "loras": self.low_noise_loras}
        if self.is_one_file:
            values |= {"checkpoint": None, "loras": ()}
        return self.expert_config(**values)


@dataclass
class ExpertsState:
    """State of both networks in one rollout."""

    high_noise: CausalState
    low_noise: CausalState

    @property
    def cursors(self) -> list[Cursor]:
        """Those of both."""
        return [*self.high_noise.cursors, *self.low_noise.cursors]

    @property
    def caches(self) -> list[Any]:
        """KV caches of both."""
        return [self.high_noise.caches, self.low_noise.caches]


def _of_both(name: str) -> Any:
    """The method of this name of both networks, with the state of each for that of both."""

    def call(self: "NoiseExperts", *args: Any, **kwargs: Any) -> None:
        for expert in EXPERTS:
            self.call_one(expert, name, args, kwargs)

    return call


def _of_either(name: str) -> Any:
    """The method of this name of one network, which gives the same as that of the other."""

    def call(self: "NoiseExperts", *args: Any, **kwargs: Any) -> Any:
        return self.call_one(EXPERTS[0], name, args, kwargs)

    return call


class NoiseExperts(Transformer):
    """Chooses one of two networks to predict the flow, by noise level.

    Both have the same sizes, see the same context and control, and keep KV caches of their own:
    if they do, a clean pass writes those of both.
    """

    config: NoiseExpertsConfig

    def __init__(self, config: NoiseExpertsConfig) -> None:
        super().__init__(config)
        self.high_noise: CausalTransformer = config.expert("high_noise").setup()
        self.low_noise: CausalTransformer = config.expert("low_noise").setup()
        self.checkpoint_key_maps = getattr(self.high_noise, "checkpoint_key_maps", ())

    @property
    def experts(self) -> tuple[CausalTransformer, CausalTransformer]:
        """High noise, low noise."""
        return self.high_noise, self.low_noise

    def pairs(self, cache: ExpertsState) -> Sequence[tuple[CausalTransformer, CausalState]]:
        """Each network and its state."""
        return (self.high_noise, cache.high_noise), (self.low_noise, cache.low_noise)

    def chosen(
        self, timestep: Tensor, cache: ExpertsState
    ) -> tuple[CausalTransformer, CausalState]:
        """The network for a timestep, and its state.

        Args:
            timestep: 0-dim, on the CPU; or ``[B, T]``, whose largest value counts: given frames
                have timestep 0.
            cache: of the rollout.
        """
        largest = float(timestep if timestep.ndim == 0 else timestep.max())
        return self.pairs(cache)[0 if largest >= 1000 * self.config.boundary else 1]

    def call_one(
        self, expert: str, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """A method of one network, with its state for that of both.

        Args:
            expert: one of ``EXPERTS``.
            name: of the method.
            args: its arguments.
            kwargs: its keyword arguments.
        """

        def own(value: Any) -> Any:
            return getattr(value, expert) if isinstance(value, ExpertsState) else value

        method = getattr(getattr(self, expert), name)
        return method(*map(own, args), **{key: own(value) for key, value in kwargs.items()})

    # The contract, as far as each network does it for itself.

    check_device = _of_both("check_device")
    init_buffers = _of_both("init_buffers")
    quantize_weights = _of_both("quantize_weights")
    bind_kv_splits = _of_both("bind_kv_splits")
    begin_step = _of_both("begin_step")
    update_cache = _of_both("update_cache")
    begin_shot = _of_both("begin_shot")
    check_rewrite = _of_both("check_rewrite")
    rewrite_context = _of_both("rewrite_context")
    resolved_choices = _of_either("resolved_choices")
    attention_shape = _of_either("attention_shape")
    example_context = _of_either("example_context")
    example_control = _of_either("example_control")
    context_frames = _of_either("context_frames")

    # Building and loading.

    @property
    def loads_parts(self) -> bool:
        """Whether each network has a file of its own, or none; see the contract."""
        return not self.config.is_one_file

    def loras(self) -> list[LoRA]:
        """Those of both networks where one file holds them; else they load their own."""
        checkpoint = self.config.checkpoint
        if checkpoint is None or self.loads_parts:
            return []
        texts = (self.config.loras, self.config.low_noise_loras)
        return [
            parse_lora(text, download=checkpoint.download, part=f"{name}.")
            for name, several in zip(EXPERTS, texts, strict=True)
            for text in several
        ]

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that the parameter's network gives; see the contract."""
        expert, _, rest = name.partition(".")
        return getattr(self, expert).dtype_of(rest)

    def after_load(self) -> None:
        """See the contract; networks with files of their own have done it."""
        if not self.loads_parts:
            for expert in self.experts:
                expert.after_load()

    def apply_choices(self, stored: Mapping[str, Any], device: torch.device) -> list[str]:
        """To both networks; see the contract."""
        lines = [line for expert in self.experts for line in expert.apply_choices(stored, device)]
        return list(dict.fromkeys(lines))

    def parallel_plan(self) -> ParallelPlan | None:
        """The plan of one network, for both."""
        plan = self.high_noise.parallel_plan()
        return None if plan is None else plan_of_parts(plan, EXPERTS)

    @property
    def warm_up_steps(self) -> int:
        """That of either network; see the contract."""
        return self.high_noise.warm_up_steps

    def cache_nbytes(self, batch_size: int) -> int:
        """Bytes of the KV caches of both networks."""
        return sum(expert.cache_nbytes(batch_size) for expert in self.experts)

    # A rollout.

    def initialize_cache(
        self,
        text: Tensor | None = None,
        image_tokens: Tensor | None = None,
        condition: Tensor | None = None,
        batch_size: int | None = None,
    ) -> ExpertsState:
        """Fresh state of both networks; arguments as for `CausalTransformer`."""
        context = (text, image_tokens, condition, batch_size)
        return ExpertsState(*(expert.initialize_cache(*context) for expert in self.experts))

    def update_context(
        self, cache: ExpertsState, text: Tensor, image_tokens: Tensor | None = None
    ) -> None:
        """Change the prompt; see `CausalTransformer`."""
        for expert, state in self.pairs(cache):
            expert.update_context(state, text, image_tokens)

    def predict_flow(self, latent: Tensor, timestep: Tensor, cache: ExpertsState) -> Tensor:
        """Predict ``noise - x0`` with the network of this noise level; see the contract."""
        expert, state = self.chosen(timestep, cache)
        return expert.predict_flow(latent, timestep, state)

    def modulation_of(self, timestep: Tensor, cache: ExpertsState) -> Tensor:
        """Modulation of a timestep in the network of this noise level; see `CausalTransformer`."""
        expert, state = self.chosen(timestep, cache)
        return expert.modulation_of(timestep, state)


def plan_of_parts(plan: ParallelPlan, names: Sequence[str]) -> ParallelPlan:
    """The plan of a module whose parts, of these names, are all split according to ``plan``."""
    changed: dict[str, Any] = {}
    for part in fields(plan):
        value = getattr(plan, part.name)
        if part.name == "rollout":  # deprecated, of fields that this state does not have
            continue
        if isinstance(value, dict):
            changed[part.name] = {f"{n}.{glob}": x for n in names for glob, x in value.items()}
        else:
            changed[part.name] = tuple(f"{n}.{glob}" for n in names for glob in value)
    return ParallelPlan(**changed)
