"""Grouped-query attention."""

from torch import Tensor, nn

from quintet.kernels import parts
from quintet.layers.context import ForwardContext
from quintet.layers.linear import Linear, matrices, project
from quintet.layers.stack import FusedPart
from quintet.ops.rope import rotate_both
from quintet.sharding import Section, Sharding, columns, rows


class Attention(FusedPart):
    """Attention with H query heads over K shared key-value heads (arXiv:2305.13245).

    Args:
        window: how many keys a query sees at the most, its own included; None for all.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        layer_idx: int,
        qkv_bias: bool,
        dropout: float,
        window: int | None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.layer_idx = layer_idx
        self.scaling = head_dim**-0.5
        self.attention_dropout = dropout
        self.window = window
        self.q_proj = Linear(hidden_size, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(
        self, hidden_states: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, C) to (B, T, C), and return the weights (B, H, T, S) or None."""
        q, k, v = project(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        q = self._heads(q)  # (B, H, T, D)
        k, v = self._heads(k), self._heads(v)  # (B, K, T, D)
        dropout = self.attention_dropout if self.training else 0.0
        rotated = context.rotate_and_keep(q, k, v, self.layer_idx)
        if rotated is None:
            q, k = rotate_both(q, k, context.cos, context.sin)
        else:
            q, k, v = rotated
        out, weights = context.attention(
            q,
            k,
            v,
            self.layer_idx,
            window=self.window,
            scale=self.scaling,
            dropout=dropout,
            stored=rotated is not None,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), weights

    def sharding(self) -> Sharding:
        """Split the heads over processes."""
        D = self.head_dim
        H, K = self.q_proj.out_features // D, self.k_proj.out_features // D
        heads, kv_heads = (
            Section(H, D, "num_attention_heads"),
            Section(K, D, "num_key_value_heads", shared=True),
        )
        own = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
        maps = {f"{name}.{leaf}": rows(s) for name, s in own.items() for leaf in ("weight", "bias")}
        return Sharding(
            {**maps, "o_proj.weight": columns(heads)}, copies=("",), reduces=("o_proj",)
        )

    def part(self, norm: parts.Norm) -> parts.Part | None:
        maps = self.q_proj, self.k_proj, self.v_proj, self.o_proj
        weights = matrices(*maps, summed=self.o_proj)
        if weights is None or (self.training and self.attention_dropout):
            return None
        q, k, v = (parts.Adapted(matrix) for matrix in weights[:3])
        return parts.Attention(
            norm, (q, k, v), weights[3], self.head_dim, self.window, self.scaling
        )

    def output_module(self) -> nn.Module:
        return self.o_proj

    def cache_buffers(self, context: ForwardContext) -> tuple[Tensor, ...] | None:
        """Return this layer's key and value buffers, with space for the new tokens."""
        return (
            None if context.cache is None else context.cache.buffers(self.layer_idx, context.whole)
        )

    def _heads(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        return x.view(B, T, -1, self.head_dim).transpose(1, 2)
