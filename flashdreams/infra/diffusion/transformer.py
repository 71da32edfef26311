"""The transformer contract: a network and the rollout state that it reads and writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashdreams.attention.backends import resolve_backend
from flashdreams.attention.choose import AUTO, AttentionShape, KVSplitsOf
from flashdreams.attention.core import AttentionCore
from flashdreams.infra.component import Component, ComponentConfig
from flashdreams.infra.ranges import check_range
from flashdreams.runtime.checkpoint import parse_lora
from flashdreams.runtime.cuda_graph import GraphedCallable


@dataclass(kw_only=True)
class TransformerConfig(ComponentConfig):
    """The config fields of every diffusion transformer."""

    _target: type["Transformer"] = field(default_factory=lambda: Transformer)

    in_channels: int = 16
    """Channels C of the latent that is denoised."""

    len_t: int = 3
    """Latent frames T of one chunk."""

    latent_height: int = 60
    """Latent rows H; pixels divided by the decoder's spatial factor (8 for Wan)."""

    latent_width: int = 104
    """Latent columns W."""

    use_cuda_graph: bool = True
    """Replay the network call as CUDA graphs, all captured at warm-up. A network that cannot be
    captured runs eagerly, with a warning; on a CPU the call is always eager."""

    attention_backend: str = "auto"
    """Backend of the attention cores, by name. "auto" measures the candidates on a GPU at warm-up,
    on this rank's share of self-attention over the full window, and uses the fastest
    accurate one; on a CPU it is "sdpa", and under --parallel.strict on a GPU the first in order
    that gives the same bits for any number of heads and queries."""

    loras: tuple[str, ...] = ()
    """LoRAs to merge into the weights, in float32, while they are loaded: ``SOURCE`` or
    ``SOURCE:WEIGHT``, the source a file, or ``hf://org/repo/file`` (downloaded if
    ``checkpoint.download`` is on). Names of PEFT, diffusers, kohya and ComfyUI are known."""

    def __post_init__(self) -> None:
        for lora in self.loras:
            parse_lora(lora)
        if self.attention_backend != AUTO:
            resolve_backend(self.attention_backend)
        check_range(self, "in_channels", "len_t", "latent_height", "latent_width")


@dataclass(frozen=True, kw_only=True)
class ContextChunk:
    """Clean latent frames of one AR step that are still in the context."""

    frames: tuple[int, ...]
    """Their positions in the rollout, ascending; a chunk may have lost some."""
    kept: tuple[int, ...]
    """Their indices in the generated chunk."""
    latent: Tensor
    """``[B, C, len(frames), H, W]`` float32, clean."""
    control: Any
    """The control input of the whole AR step."""


class Transformer(Component):
    """Predicts the flow of a chunk, given the rollout so far.

    One AR step is ``begin_step``, then ``predict_flow`` once per denoising step, then
    ``update_cache`` on the clean latent. All state is in the cache that ``initialize_cache``
    returns; its parameters name the context that the component needs (``text``, ``image``, ...).
    """

    config: TransformerConfig

    def latent_shape(self, batch_size: int) -> tuple[int, int, int, int, int]:
        """Shape ``(B, C, T, H, W)`` of one chunk of ``batch_size`` rollouts."""
        c = self.config
        return (batch_size, c.in_channels, c.len_t, c.latent_height, c.latent_width)

    def initialize_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Fresh state for one rollout; subclasses declare the context that they need."""
        return None

    def reuse_cache(self, cache: Any, *args: Any, **kwargs: Any) -> bool:
        """Start a rollout in the state of an earlier one, whose tensors keep their storage.

        Subclasses whose calls are captured as graphs name the context as in ``initialize_cache``.

        Args:
            cache: of a finished rollout.
            args: the context.
            kwargs: the context.

        Returns:
            Whether it worked; False if the context does not fit the state.
        """
        return False

    def begin_shot(self, cache: Any) -> None:
        """Make the next chunk begin a shot; called between AR steps.

        The default does nothing: a shot is then a prompt like any other.
        """

    def begin_step(self, autoregressive_index: int, cache: Any, control: Any = None) -> None:
        """Prepare what stays the same over all denoising steps of an AR step.

        Args:
            autoregressive_index: number of the AR step, from 0.
            cache: this rollout's state.
            control: output of the pipeline's encoder for this step.
        """

    def predict_flow(self, latent: Tensor, timestep: Tensor, cache: Any) -> Tensor:
        """Predict ``noise - x0``.

        Args:
            latent: ``[B, C, T, H, W]`` float32, the noisy chunk.
            timestep: 0-dim, on the CPU, sigma times 1000, float32 or int64; ``[B, T]``, one per
                latent frame, in an AR step with ``first_frames_from_image``.
            cache: this rollout's state; the chunk's keys and values are overwritten.

        Returns:
            Like ``latent``.

        Raises:
            TypeError: the subclass does not define it.
        """
        raise TypeError(
            f"{type(self).__name__} does not define predict_flow(latent, timestep, cache)."
        )

    def update_cache(self, latent: Tensor, timestep: Tensor, cache: Any) -> None:
        """The clean pass: make the finished chunk part of the context of later chunks.

        The default runs the network once more and drops its output.

        Args:
            latent: ``[B, C, T, H, W]`` float32, the clean chunk.
            timestep: 0-dim, the context noise level, usually 0.
            cache: this rollout's state.
        """
        self.predict_flow(latent, timestep, cache)

    def context_frames(self, cache: Any) -> Sequence[int]:
        """Positions of the clean latent frames that the cache holds, oldest first.

        The diffusion model keeps the latents of these frames, and no others, for
        ``rewrite_context``; the default asks for none.
        """
        return ()

    def update_context(self, cache: Any, *args: Any, **kwargs: Any) -> None:
        """Change the prompt mid-rollout; subclasses declare the context that they need.

        Only what depends directly on the prompt is recomputed, in place.

        Args:
            cache: this rollout's state.
            args: the context, encoded.
            kwargs: the context, encoded.

        Raises:
            TypeError: the subclass does not define it.
        """
        raise TypeError(
            f"{type(self).__name__} cannot change its prompt mid-rollout: it does not define "
            "update_context(cache, text)."
        )

    def check_rewrite(self, cache: Any, mode: Any) -> None:
        """Refuse an unsupported mode of ``rewrite_context``, before anything is changed.

        Args:
            cache: this rollout's state.
            mode: as for ``rewrite_context``.

        Raises:
            ValueError: says what cannot be done.
        """

    def rewrite_context(self, cache: Any, chunks: Sequence[ContextChunk], timestep: Tensor) -> None:
        """Run the clean pass again over the frames in the context.

        Args:
            cache: this rollout's state; afterwards as before, except for the values.
            chunks: the frames of ``context_frames``, oldest first.
            timestep: 0-dim, the context noise level.

        Raises:
            TypeError: the subclass does not define it.
        """
        raise TypeError(
            f"{type(self).__name__} cannot encode its context again: it does not define "
            "rewrite_context(cache, chunks, timestep)."
        )

    def attention_shape(self, batch_size: int) -> AttentionShape | None:
        """Self-attention of the whole model once the window is full; None without cores."""
        return None

    def set_attention_backend(self, name: str) -> None:
        """Set the backend of all attention cores, including wrapped ones.

        Args:
            name: a key of `flashdreams.attention.backends.BACKENDS`.

        Raises:
            ValueError: an unknown name.
        """
        backend = resolve_backend(name)
        for core in self.modules():
            if isinstance(core, AttentionCore):
                core.backend = backend

    def bind_kv_splits(self, name: str, splits_of: KVSplitsOf) -> None:
        """Set the KV splits of cores that run a backend by name; others are not changed.

        The default leaves all cores at one split.

        Args:
            name: the backend that was chosen.
            splits_of: KV splits of a backend, by name, for a call of the whole model; None where it
                has none.
        """

    def check_device(self, device: torch.device) -> None:
        """Refuse an ``attention_backend`` that cannot run on a device.

        Raises:
            ValueError: states what is missing and what would run.
        """
        name, shape = self.config.attention_backend, self.attention_shape(1)
        if name == AUTO:
            return
        if shape is None:
            raise ValueError(
                f"{type(self).__name__} names no attention cores (attention_shape), so "
                f"attention_backend must stay {AUTO!r}; got {name!r}."
            )
        resolve_backend(name, device, self.dtype, shape.head_dim)

    def quantize_weights(self) -> None:
        """Replace weights by quantized ones, as far as ``precision`` asks for it.

        Called once they are loaded, merged with LoRAs and cut; also on the meta device, to count.
        """

    def resolved_choices(self) -> dict[str, Any]:
        """Choices that the config left to the device, for the numerics fingerprint.

        Returns:
            JSON values by the name of the config's field.
        """
        return {}

    def apply_choices(self, stored: Mapping[str, Any], device: torch.device) -> list[str]:
        """Use an earlier run's choices that the config leaves open; before weights are loaded.

        The inverse of ``resolved_choices``. Attention is not among them.

        Args:
            stored: numerics fingerprint of that run.
            device: where this one runs.

        Returns:
            A line for each choice that cannot be used, with the reason.
        """
        return []

    @property
    def needs_warm_up(self) -> bool:
        """Whether first calls build something: CUDA handles, graphs."""
        return self.device.type == "cuda" or any(c.can_capture for c in self.graphed_calls())

    def graphed_calls(self) -> Sequence[GraphedCallable]:
        """The calls that are replayed as CUDA graphs on CUDA; their first argument
        after the tensors is the rollout's state."""
        return ()

    def replay_is_exact(self, cache: Any, control: Any = None) -> bool:
        """Whether replays of captured calls give the bits of eager calls on this state.

        Called after warm-up has captured them; the default checks nothing.

        Args:
            cache: a state that calls were captured for, between AR steps.
            control: as for ``begin_step``.
        """
        return True

    @property
    def warm_up_steps(self) -> int:
        """AR steps after which network calls take no new shapes."""
        return 1

    def example_context(self, batch_size: int) -> dict[str, Any] | None:
        """Dummy context for ``initialize_cache``, with the shapes of rollouts.

        None: the transformer is not warmed up.
        """
        return None

    def example_control(self, batch_size: int) -> Any:
        """A dummy control input for ``begin_step``; None for a transformer without control."""
        return None

    def cache_nbytes(self, batch_size: int) -> int:
        """Bytes of one rollout's largest state, for estimates of memory; 0 if there is none."""
        return 0
