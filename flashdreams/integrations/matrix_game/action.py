"""The action module of a Matrix-Game block, which adds mouse and keyboard to the tokens.

Shape letters: B batch, T latent frames of the chunk, F latent frames in a window, P tokens of a
latent frame, L = T * P query tokens, N heads, D head dim, K keyboard columns.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdreams.attention.cache import KVCache
from flashdreams.attention.core import AttentionCore
from flashdreams.attention.rope import apply_rope

NORM_EPS = 1e-6
"""Added to the mean square of queries and keys."""


class ActionControl(NamedTuple):
    """Inputs of one action module besides the tokens."""

    keys: tuple[Tensor, Tensor]
    """Keys and values ``[B, T, N, D]`` of the keyboard, from ``ActionModule.read_keyboard``."""
    mouse: Tensor | None
    """``[B, L, window * mouse_dim]``, the mouse as each token sees it; None without a mouse."""
    rotation: Tensor
    """``[L, D/2, 2]``, from `time_rotations`."""
    keyboard_cache: KVCache | None = None
    mouse_cache: KVCache | None = None


def time_rotations(frames: Tensor, head_dim: int, turned: int, theta: float) -> Tensor:
    """Rotations of the action paths by latent frame.

    Args:
        frames: ``[T]``, positions.
        head_dim: D.
        turned: first channels of a head, which rotate; the others are for rows and columns,
            whose only position is 0.
        theta: base of the frequencies.

    Returns:
        ``[T, D/2, 2]`` float32 on the CPU: cosine and sine of every pair's angle.

    Source: SkyworkAI/Matrix-Game, Matrix-Game-2/wan/modules/posemb_layers.py.
    """
    exponents = torch.arange(0, turned, 2, dtype=torch.float64, device="cpu") / turned
    angles = torch.zeros(len(frames), head_dim // 2, dtype=torch.float64, device="cpu")
    angles[:, : turned // 2] = frames.to("cpu", torch.float64)[:, None] * theta**-exponents
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


class TimeAttentionCore(AttentionCore):
    """Attention over latent frames, separately at each position.

    Three queries over a few keys at each of hundreds of positions: matmuls of small
    matrices, since a flash kernel would pad each position to a tile.
    """

    def __init__(self, head_dim: int, tokens_per_frame: int) -> None:
        super().__init__(head_dim)
        self.tokens_per_frame = tokens_per_frame

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None = None) -> Tensor:
        """See `AttentionCore.forward`: tokens are those of whole latent frames."""
        if cache is not None:
            k, v = cache.update(k, v)
        q, k, v = (x.unflatten(1, (-1, self.tokens_per_frame)) for x in (q, k, v))
        if self.strict:  # matmuls of a fixed size have the same bits on any number of ranks
            heads = zip(*(x.split(1, dim=3) for x in (q, k, v)), strict=True)
            return torch.cat([self._attend(*head) for head in heads], dim=3).flatten(1, 2)
        return self._attend(q, k, v).flatten(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[B, T, P, N, D]`` over ``[B, F, P, N, D]``; scores and weights are float32."""
        q, k, v = (x.permute(0, 2, 3, 1, 4) for x in (q, k, v))
        scores = q.float() @ k.float().transpose(-1, -2) * self.scale
        return (scores.softmax(-1).to(v.dtype) @ v).permute(0, 3, 1, 2, 4)


class UnusedNorm(nn.Module):
    """The gain of a norm that is in the checkpoints and that the official code does not apply."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class ActionModule(nn.Module):
    """Adds mouse control, then keyboard control, to the tokens.

    The mouse path attends over time at every position, from tokens and mouse together. The
    keyboard path lets every token attend to one key per latent frame.

    Source: SkyworkAI/Matrix-Game, Matrix-Game-2/wan/modules/action_module.py.
    """

    def __init__(self, config: Any) -> None:
        """Build for a `MatrixGameTransformerConfig`."""
        super().__init__()
        c = config
        self.head_dim = c.action_head_dim
        width, window = c.action_dim, c.actions_per_latent
        if c.mouse_dim is not None:
            self.mouse_mlp = nn.Sequential(
                nn.Linear(c.dim + window * c.mouse_dim, width),
                nn.GELU(approximate="tanh"),
                nn.Linear(width, width),
                nn.LayerNorm(width),
            )
            self.t_qkv = nn.Linear(width, 3 * width, bias=False)
            self.img_attn_q_norm = UnusedNorm(self.head_dim)
            self.img_attn_k_norm = UnusedNorm(self.head_dim)
            self.proj_mouse = nn.Linear(width, c.dim, bias=False)
            self.mouse_core = TimeAttentionCore(self.head_dim, c.tokens_per_frame)
        embed = c.keyboard_embed_dim
        self.keyboard_embed = nn.Sequential(
            nn.Linear(c.keyboard_dim, embed), nn.SiLU(), nn.Linear(embed, embed)
        )
        self.mouse_attn_q = nn.Linear(c.dim, width, bias=False)
        self.keyboard_attn_kv = nn.Linear(window * embed, 2 * width, bias=False)
        self.key_attn_q_norm = UnusedNorm(self.head_dim)
        self.key_attn_k_norm = UnusedNorm(self.head_dim)
        self.proj_keyboard = nn.Linear(width, c.dim, bias=False)
        self.keyboard_core = AttentionCore(self.head_dim)

    def read_keyboard(self, keyboard: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the keyboard, computed once per chunk.

        Args:
            keyboard: ``[B, T, window, K]``, the keys that each latent frame sees.
            rotation: ``[T, D/2, 2]``.

        Returns:
            ``[B, T, N, D]`` twice; keys are normalised and rotated.
        """
        embedded = self.keyboard_embed(keyboard.flatten(1, 2)).unflatten(1, keyboard.shape[1:3])
        k, v = self._heads(self.keyboard_attn_kv(embedded.flatten(2)), 2)
        return self._normed(k, rotation), v

    def forward(self, x: Tensor, control: ActionControl) -> Tensor:
        """Add both paths to the tokens.

        Args:
            x: ``[B, L, dim]``.
            control: of this module.
        """
        x = self.mouse_path(x, control)
        (q,) = self._heads(self.mouse_attn_q(self._narrow(x)), 1)  # keyboard's, despite the name
        q = self._normed(q, control.rotation)
        attended = self.keyboard_core(q, *control.keys, control.keyboard_cache)
        return x + self.proj_keyboard(attended.flatten(2))

    def mouse_path(self, x: Tensor, control: ActionControl) -> Tensor:
        """Add the mouse to the tokens; without one they are unchanged."""
        if control.mouse is None:
            return x
        attended = self.mouse_core(*self._mouse_heads(x, control), control.mouse_cache)
        return x + self.proj_mouse(attended.flatten(2))

    def write(self, x: Tensor, control: ActionControl) -> None:
        """Write to the caches what ``forward`` writes."""
        if control.mouse is not None and control.mouse_cache is not None:
            _, k, v = self._mouse_heads(x, control)
            self.mouse_core.write(k, v, control.mouse_cache)
        if control.keyboard_cache is not None:
            self.keyboard_core.write(*control.keys, control.keyboard_cache)

    def _mouse_heads(self, x: Tensor, control: ActionControl) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[B, L, N, D]`` of tokens and mouse."""
        assert control.mouse is not None
        x = self._narrow(x)
        mouse = control.mouse.to(x.dtype).expand(len(x), -1, -1)
        q, k, v = self._heads(self.t_qkv(self.mouse_mlp(torch.cat([x, mouse], dim=-1))), 3)
        return self._normed(q, control.rotation), self._normed(k, control.rotation), v

    def _narrow(self, x: Tensor) -> Tensor:
        """The tokens in the dtype of the weights; the residual may have a wider one."""
        return x.to(self.mouse_attn_q.weight.dtype)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """``[..., parts * N * D]`` to as many ``[..., N, D]``, of this rank's heads."""
        return x.unflatten(-1, (parts, -1, self.head_dim)).unbind(-3)

    def _normed(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Divide every head by its root mean square and rotate it."""
        return apply_rope(F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS), rotation).to(x.dtype)
