"""The rotary embedding of a model: frequencies made once, angles for each forward."""

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn

from quintet.configuration.rope import RopeParameters
from quintet.ops.rope import inverse_frequencies, rotary_angles

__all__ = ["RotaryEmbedding"]


class RotaryEmbedding(nn.Module):
    """Cos and sin of the angles of positions, (B, T) -> two of (B, T, D)."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, rope: RopeParameters) -> None:
        super().__init__()
        self.rope = rope
        self.register_buffer("inv_freq", inverse_frequencies(rope, head_dim), persistent=False)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin in float32."""
        return rotary_angles(position_ids, self.inv_freq, self.rope)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # model.to(bfloat16) must not round the frequencies: at position 10,000 they would be
        # off by whole turns. They follow to other devices only.
        self.inv_freq = self.inv_freq.to(fn(self.inv_freq).device)
        return self
