"""Rotary embedding: frequencies computed once, angles per forward."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from quintet.configuration.rope import RopeParameters
from quintet.kernels.calls import applies
from quintet.layers.plain import PlainModule, hooked
from quintet.ops.rope import inverse_frequencies, rotary_angles

# So many positions at once are a step; more are a prompt, for which nothing is kept.
FEW = 32


class RotaryEmbedding(PlainModule):
    """Cosine and sine of the rotary angles, from (B, T) to two of (B, T, D)."""

    inv_freq: Tensor
    # A step of decoding takes as many small operations for its angles as for its attention, so
    # those of all positions so far are kept, by dtype. They make no part of a checkpoint.
    _tables: dict[torch.dtype, tuple[Tensor, Tensor]]

    def __init__(self, head_dim: int, rope: RopeParameters) -> None:
        super().__init__()
        self.rope = rope
        self._tables = {}
        self.register_buffer("inv_freq", inverse_frequencies(rope, head_dim), persistent=False)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin in float32."""
        return rotary_angles(position_ids, self.inv_freq, self.rope)

    def following(self, start: int, T: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin of T positions from `start` on, (1, T, D), in a dtype."""
        end = start + T
        if not self._may_keep() or T > FEW or self.rope.rope_type == "dynamic":
            cos, sin = self(self._places(start, end))
            return cos.to(dtype), sin.to(dtype)
        table = self._tables.get(dtype)
        if table is None or len(table[0]) < end:
            cos, sin = self(self._places(0, max(256, 2 * end)))
            table = self._tables[dtype] = cos[0].to(dtype), sin[0].to(dtype)
        return table[0][None, start:end], table[1][None, start:end]

    def _places(self, start: int, end: int) -> Tensor:
        return torch.arange(start, end, dtype=torch.long, device=self.inv_freq.device)[None]

    def _may_keep(self) -> bool:
        # What is made while gradients are recorded, or by a tracer, is not for others.
        return not torch.is_grad_enabled() and applies(self.inv_freq) and not hooked(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # model.to(bfloat16) must not round the frequencies: at position 10,000 they would be
        # off by whole turns. They follow to other devices only.
        self.inv_freq = self.inv_freq.to(fn(self.inv_freq).device)
        self._tables = {}
        return self
