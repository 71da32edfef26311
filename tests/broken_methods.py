"""Variants of the example with a KV cache that break one rule each."""

import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from flashdreams.infra.config import derive_config
from flashdreams.infra.decoder.base import (
    Decoder,
    DecoderConfig,
    StreamingDecoder,
    StreamingDecoderConfig,
)
from flashdreams.infra.encoder.base import Encoder
from flashdreams.parallel.plan import state
from flashdreams.runtime.actions import parse_actions
from tests.architecture.sources import EXAMPLES

if str(EXAMPLES / "streaming_method") not in sys.path:
    sys.path.insert(0, str(EXAMPLES / "streaming_method"))

from streaming_method.config import RUNNER_CONFIGS
from streaming_method.encoder import PlaceEncoderConfig
from streaming_method.network import (
    Prompt,
    StreamingNetwork,
    StreamingNetworkConfig,
)
from streaming_method.runner import StreamingMethodRunnerConfig

(WHOLE,) = RUNNER_CONFIGS.values()
"""The runner of the example, which passes all checks."""

__all__ = ["PlaceEncoderConfig"]


def with_network(network: type) -> Any:
    """The example with another transformer class."""
    changes = {"transformer": {"_target": network}}
    return derive_config(WHOLE, pipeline={"diffusion_model": changes})


def with_decoder(decoder: Any) -> Any:
    """The example with another decoder."""
    return derive_config(WHOLE, pipeline={"decoder": decoder})


@dataclass(kw_only=True)
class OtherKeysConfig(StreamingMethodRunnerConfig):
    """A method with one key of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_actions(self.actions, {"u": "up"})


@dataclass(kw_only=True)
class GrowingConfig(StreamingNetworkConfig):
    grown: int = 1
    """Larger every time that a variant is made."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.grown += 1


class KeepsTable(StreamingNetwork):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.table = torch.arange(4)


class ForgetsBuffer(StreamingNetwork):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("table", torch.arange(4), persistent=False)


class OnTheHost(StreamingNetwork):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(3, device="cpu"))


class NotFinite(StreamingNetwork):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs) / 0


class Random(StreamingNetwork):
    def forward(self, latent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(latent + 0.1 * torch.randn_like(latent), *args, **kwargs)


class Remembers(StreamingNetwork):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.seen: list[Tensor] = []

    def forward(self, latent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = [*self.seen, latent.mean()][-5:]
        return super().forward(latent + self.seen[0], *args, **kwargs)


class CountsCalls(StreamingNetwork):
    """Changes a module and no number: only a look at the modules finds it."""

    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return super().forward(*args, **kwargs)


class DefaultType(StreamingNetwork):
    def embed_control(self, control: Any) -> Tensor:
        embedded = super().embed_control(control)
        weights = torch.linspace(0, 1, embedded.shape[1], device=embedded.device)
        return (embedded * weights[:, None]).float()


class HostTensor(StreamingNetwork):
    def forward(self, latent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = torch.zeros(latent.shape[-1])
        return super().forward(latent + rows, *args, **kwargs)


class SaysCpu(StreamingNetwork):
    def forward(self, latent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = torch.zeros(latent.shape[-1], dtype=torch.float32, device="cpu")
        return super().forward(latent + rows, *args, **kwargs)


class SeedsTheProgram(StreamingNetwork):
    """Always the same numbers, and the program around loses its own."""

    def forward(self, latent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        torch.manual_seed(7)
        return super().forward(latent + 0.1 * torch.randn_like(latent), *args, **kwargs)


class InPlace(StreamingNetwork):
    def forward(self, latent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(latent.mul_(0.5), *args, **kwargs)


class AssumesFloat32(StreamingNetwork):
    def forward(self, latent: Tensor, modulation: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(latent, modulation.float(), *args, **kwargs)


class Overflows(StreamingNetwork):
    def forward(self, latent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(latent.exp().log(), *args, **kwargs)


class Waits(StreamingNetwork):
    def forward(self, latent: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if latent.abs().max() > 100:
            latent = latent / 2
        return super().forward(latent, *args, **kwargs)


class ReadsThePosition(StreamingNetwork):
    def forward(self, latent: Tensor, modulation: Tensor, inputs: Any, state: Any, *a: Any) -> Any:
        latent = latent + 0.001 * state.cursor.start
        return super().forward(latent, modulation, inputs, state, *a)


class IgnoresPrompt(StreamingNetwork):
    def project_context(self, text: Any, image_tokens: Any) -> Prompt:
        return super().project_context(torch.zeros_like(text), image_tokens)


class IgnoresKeys(StreamingNetwork):
    def embed_control(self, control: Any) -> Tensor:
        return super().embed_control(torch.zeros_like(control))


class Reallocates(StreamingNetwork):
    def begin_step(self, autoregressive_index: int, cache: Any, control: Any = None) -> None:
        super().begin_step(autoregressive_index, cache, control)
        cache.context.shift = cache.context.shift.clone()


class ExampleWithoutText(StreamingNetwork):
    def example_context(self, batch_size: int) -> dict[str, Any]:
        return {}


class ExampleOfOneToken(StreamingNetwork):
    def example_control(self, batch_size: int) -> Tensor:
        return super().example_control(batch_size)[:, :1]


class ForgetsSplit(StreamingNetwork):
    def parallel_plan(self) -> Any:
        plan = super().parallel_plan()
        return replace(plan, split={"embed": 1, "control": 1})


class ForgetsGather(StreamingNetwork):
    def parallel_plan(self) -> Any:
        return replace(super().parallel_plan(), gather={})


class ForgetsCore(StreamingNetwork):
    def parallel_plan(self) -> Any:
        return replace(super().parallel_plan(), attention=("blocks.0.attention.core",))


class GathersHeads(StreamingNetwork):
    """A core of another kind whose heads the plan does not give."""

    def parallel_plan(self) -> Any:
        cores = {"blocks.1.attention.core": "all_tokens"}
        return replace(super().parallel_plan(), attention=("blocks.0.attention.core",), cores=cores)


class SharesHeads(GathersHeads):
    def parallel_plan(self) -> Any:
        return replace(super().parallel_plan(), units={"blocks.*.attention": 4})


class SeesPart(StreamingNetwork):
    """The mean over a rank's own tokens is not that over all: no plan can mend it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.blocks[0].mlp.register_forward_hook(lambda m, a, out: out - out.mean(1, keepdim=True))


@dataclass
class WrongPrompt(Prompt):
    extra: Tensor = state("host", default_factory=lambda: torch.zeros(2))


class WrongStyle(StreamingNetwork):
    def project_context(self, text: Any, image_tokens: Any) -> Prompt:
        return WrongPrompt(super().project_context(text, image_tokens).shift)


@dataclass
class PlainPrompt(Prompt):
    extra: Any = None


class NoStyle(StreamingNetwork):
    def project_context(self, text: Any, image_tokens: Any) -> Prompt:
        shift = super().project_context(text, image_tokens).shift
        return PlainPrompt(shift, torch.zeros(2))


@dataclass
class LostPrompt(Prompt):
    steps: Tensor = state("rebuilt", default_factory=lambda: torch.zeros(()))


class LosesState(StreamingNetwork):
    def project_context(self, text: Any, image_tokens: Any) -> Prompt:
        return LostPrompt(super().project_context(text, image_tokens).shift)

    def begin_step(self, autoregressive_index: int, cache: Any, control: Any = None) -> None:
        super().begin_step(autoregressive_index, cache, control)
        cache.context.steps += 1
        cache.inputs.control += cache.context.steps


class AcceptsAnything(Encoder):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        c = config
        self.size = (1, 2 * c.token_rows * c.token_columns, 8)

    def forward(self, input: Any) -> Tensor:
        return torch.zeros(self.size)


@dataclass(kw_only=True)
class BrokenDecoderConfig(DecoderConfig):
    _target: type["Doubles"] = field(default_factory=lambda: Doubles)


class Doubles(Decoder):
    def forward(self, latent: Tensor) -> Tensor:
        return latent[:, :3].transpose(1, 2).clamp(-1, 1).repeat_interleave(2, dim=1)


@dataclass(kw_only=True)
class BytesDecoderConfig(DecoderConfig):
    _target: type["Bytes"] = field(default_factory=lambda: Bytes)


class Bytes(Decoder):
    def forward(self, latent: Tensor) -> Tensor:
        return latent[:, :3].transpose(1, 2).clamp(-1, 1) * 127.5 + 127.5


@dataclass(kw_only=True)
class ChannelsFirstConfig(DecoderConfig):
    _target: type["ChannelsFirst"] = field(default_factory=lambda: ChannelsFirst)


class ChannelsFirst(Decoder):
    def forward(self, latent: Tensor) -> Tensor:
        return latent[:, :3].clamp(-1, 1)


@dataclass(kw_only=True)
class SeamsConfig(StreamingDecoderConfig):
    _target: type["Seams"] = field(default_factory=lambda: Seams)


class Seams(StreamingDecoder):
    """Smooths in time within a chunk alone."""

    def forward(self, latent: Tensor, autoregressive_index: int = 0, cache: Any = None) -> Tensor:
        smooth = latent.cumsum(2) / torch.arange(1, latent.shape[2] + 1).view(-1, 1, 1)
        return smooth[:, :3].transpose(1, 2).clamp(-1, 1)


@dataclass(kw_only=True)
class AveragesConfig(DecoderConfig):
    _target: type["Averages"] = field(default_factory=lambda: Averages)


class Averages(Decoder):
    """Follows the mean brightness over all rollouts."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, latent: Tensor) -> Tensor:
        self.mean.lerp_(latent.mean(), 0.1)
        return (latent[:, :3] - self.mean).transpose(1, 2).clamp(-1, 1)
