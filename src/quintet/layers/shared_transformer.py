"""A transformer block that several layers share, each with low-rank adapters of its own.

It reads hidden states beside token embeddings, 2C wide, and has no residual connections
(Zamba2, arXiv:2411.15242, §2). A `use` is a layer that uses the block.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from quintet.kernels import parts
from quintet.layers.context import ForwardContext
from quintet.layers.linear import Linear, matrices, project
from quintet.layers.norm import RMSNorm
from quintet.layers.plain import PlainModule, hooked, untouched
from quintet.layers.stack import PartSpec, norm_of
from quintet.ops.activations import Activation, activation, gate_by
from quintet.ops.rope import rotate_both
from quintet.sharding import WHOLE, Section, Sharding, columns, rows


class Adapter(nn.Sequential, PlainModule):
    """A low-rank addition to a linear map."""

    def __init__(self, in_size: int, rank: int, out_size: int) -> None:
        super().__init__(Linear(in_size, rank, bias=False), Linear(rank, out_size, bias=False))


class AdapterMaps(nn.ModuleDict):
    """Low-rank additions to one shared map, one per use."""

    def __init__(self, uses: Sequence[int], in_size: int, rank: int, out_size: int) -> None:
        super().__init__()
        for use in uses:
            self[str(use)] = Adapter(in_size, rank, out_size)

    def cut_like(self, *sections: Section) -> Sharding:
        """Cut the output maps like the map they add to; every process has the input maps."""
        first, second = ([f"{use}.{i}.weight" for use in self] for i in (0, 1))
        cuts = {**dict.fromkeys(first, WHOLE), **dict.fromkeys(second, rows(*sections))}
        # Their inputs passed f with those of the maps, so that each process finds what its own
        # outputs ask of the ranks. Once a step, that costs less than passing f in each use.
        return Sharding(cuts, partial=tuple(first))


def adapted(
    x: Tensor, maps: Sequence[nn.Module], adapters: Sequence[AdapterMaps], use: int
) -> list[Tensor]:
    """Return map(x) + adapter(x) of each map and adapter, in one pass over x."""
    pairs = _pairs(adapters, use)
    if pairs is None:
        added = [adapter[str(use)](x) for adapter in adapters]
        return [y + addition for y, addition in zip(project(x, *maps), added, strict=True)]
    downs, ups = pairs
    output = project(x, *maps, *downs)
    n = len(maps)
    return [y + up(low) for y, low, up in zip(output[:n], output[n:], ups, strict=True)]


def adapted_matrices(
    maps: Sequence[nn.Module], adapters: Sequence[AdapterMaps], use: int
) -> list[parts.Adapted] | None:
    """Return the operands of each map and its adapter, or None if one must be called."""
    pairs = _pairs(adapters, use)
    weights = None if pairs is None else matrices(*maps, *pairs[0], *pairs[1])
    if weights is None:
        return None
    n = len(maps)
    return [parts.Adapted(*weights[i::n]) for i in range(n)]


def _pairs(
    adapters: Sequence[AdapterMaps], use: int
) -> tuple[list[nn.Module], list[nn.Module]] | None:
    """Return the two low-rank maps of a use, or None if an adapter must be called."""
    plain = [untouched(adapter[str(use)], Adapter) for adapter in adapters]
    known = [adapter for adapter in plain if adapter is not None and len(adapter) == 2]
    if len(known) < len(plain):
        return None
    return [adapter[0] for adapter in known], [adapter[1] for adapter in known]


class SharedAttention(PlainModule):
    """Attention over hidden states concatenated with embeddings, (B, T, 2C) -> (B, T, C).

    Args:
        adapter_rank: of the adapters of q, k and v; None for none.
        rotates: whether positions turn q and k.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        uses: Sequence[int],
        adapter_rank: int | None,
        rotates: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        inputs, width, kv_width = 2 * hidden_size, num_heads * head_dim, num_kv_heads * head_dim
        self.head_dim = head_dim
        # The heads are twice as wide as those of a block without the embeddings beside.
        self.scaling = (head_dim / 2) ** -0.5
        self.dropout = dropout
        self.rotates = rotates
        self.adapts = adapter_rank is not None
        self.q_proj = Linear(inputs, width, bias=False)
        self.k_proj = Linear(inputs, kv_width, bias=False)
        self.v_proj = Linear(inputs, kv_width, bias=False)
        self.o_proj = Linear(width, hidden_size, bias=False)
        if adapter_rank is not None:
            self.linear_q_adapter_list = AdapterMaps(uses, inputs, adapter_rank, width)
            self.linear_k_adapter_list = AdapterMaps(uses, inputs, adapter_rank, kv_width)
            self.linear_v_adapter_list = AdapterMaps(uses, inputs, adapter_rank, kv_width)

    def forward(
        self, hidden_states: Tensor, context: ForwardContext, *, layer_idx: int, use: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, and the weights (B, H, T, S) if the backend has them."""
        x, maps = hidden_states, (self.q_proj, self.k_proj, self.v_proj)
        if self.adapts:
            q, k, v = adapted(x, maps, self._adapters(), use)
        else:
            q, k, v = project(x, *maps)
        q, k, v = (y.view(*y.shape[:2], -1, self.head_dim).transpose(1, 2) for y in (q, k, v))
        rotated = context.rotate_and_keep(q, k, v, layer_idx) if self.rotates else None
        if rotated is not None:
            q, k, v = rotated
        elif self.rotates:
            q, k = rotate_both(q, k, context.cos, context.sin)
        dropout = self.dropout if self.training else 0.0
        out, weights = context.attention(
            q,
            k,
            v,
            layer_idx,
            window=None,
            scale=self.scaling,
            dropout=dropout,
            stored=rotated is not None,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), weights

    def sharding(self) -> Sharding:
        """Split the heads over processes."""
        D = self.head_dim
        heads = Section(self.q_proj.out_features // D, D, "num_attention_heads")
        K = self.k_proj.out_features // D
        kv_heads = Section(K, D, "num_key_value_heads", shared=True)
        own = {"q": heads, "k": kv_heads, "v": kv_heads}
        maps = {f"{name}_proj.weight": rows(section) for name, section in own.items()}
        table = Sharding(
            {**maps, "o_proj.weight": columns(heads)}, copies=("",), reduces=("o_proj",)
        )
        if self.adapts:
            for (name, section), adapters in zip(own.items(), self._adapters(), strict=True):
                table |= adapters.cut_like(section).below(f"linear_{name}_adapter_list.")
        return table

    def part_spec(self, norm: parts.Norm, *, layer_idx: int, use: int) -> PartSpec | None:
        """Describe one use, behind a norm, to the fused CPU step; None if it must be called."""
        maps = (self.q_proj, self.k_proj, self.v_proj)
        o = matrices(self.o_proj)
        adapted: list[parts.Adapted] | None
        if self.adapts:
            adapted = adapted_matrices(maps, self._adapters(), use)
        else:
            plain = matrices(*maps)
            adapted = None if plain is None else [parts.Adapted(matrix) for matrix in plain]
        if o is None or adapted is None or hooked(self) or (self.training and self.dropout):
            return None
        q, k, v = adapted
        part = parts.Attention(
            norm,
            (q, k, v),
            o[0],
            self.head_dim,
            None,
            self.scaling,
            rotates=self.rotates,
            beside=True,
        )

        def cache_buffers(context: ForwardContext) -> tuple[Tensor, ...] | None:
            return (
                None if context.cache is None else context.cache.buffers(layer_idx, context.whole)
            )

        return PartSpec(part, cache_buffers)

    def _adapters(self) -> tuple[AdapterMaps, AdapterMaps, AdapterMaps]:
        return (
            self.linear_q_adapter_list,
            self.linear_k_adapter_list,
            self.linear_v_adapter_list,
        )


class SharedMLP(PlainModule):
    """down(act(gate(x)) · up(x)), with adapters per use on gate and up."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        uses: Sequence[int],
        adapter_rank: int,
        act: str | Activation,
        bias: bool,
    ) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)
        self.gate_up_proj_adapter_list = AdapterMaps(
            uses, hidden_size, adapter_rank, 2 * intermediate_size
        )
        self.act_fn = activation(act)

    def forward(self, x: Tensor, *, use: int) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        maps, adapters = (self.gate_up_proj,), (self.gate_up_proj_adapter_list,)
        gate, up = adapted(x, maps, adapters, use)[0].chunk(2, dim=-1)
        return self.down_proj(gate_by(self.act_fn, gate, up))  # type: ignore[no-any-return]

    def sharding(self) -> Sharding:
        """Split the inner channels over processes."""
        inner = Section(self.down_proj.in_features, 1, "intermediate_size")
        table = Sharding(
            {
                "gate_up_proj.weight": rows(inner, inner),
                "gate_up_proj.bias": rows(inner, inner),
                "down_proj.weight": columns(inner),
                "down_proj.bias": WHOLE,
            },
            copies=("",),
            reduces=("down_proj",),
            first_only=("down_proj.bias",),
        )
        adapters = self.gate_up_proj_adapter_list.cut_like(inner, inner)
        return table | adapters.below("gate_up_proj_adapter_list.")

    def part_spec(self, norm: parts.Norm, linear: nn.Module, *, use: int) -> PartSpec | None:
        """Describe one use, between norm and projection; None if they must be called."""
        adapted = adapted_matrices((self.gate_up_proj,), (self.gate_up_proj_adapter_list,), use)
        maps = matrices(self.down_proj, linear)
        if adapted is None or maps is None or hooked(self) or self.act_fn is not F.gelu:
            return None
        return PartSpec(parts.SharedMLP(norm, adapted[0], *maps), lambda context: ())


class SharedTransformer(PlainModule):
    """Attention over hidden states beside embeddings, then an MLP; no residuals."""

    def __init__(self, attention: SharedAttention, mlp: SharedMLP, C: int, eps: float) -> None:
        super().__init__()
        self.self_attn = attention
        self.feed_forward = mlp
        self.input_layernorm = RMSNorm(2 * C, eps)
        self.pre_ff_layernorm = RMSNorm(C, eps)

    def forward(
        self, hidden_states: Tensor, context: ForwardContext, *, layer_idx: int, use: int
    ) -> Tensor:
        """Map (B, T, C) to (B, T, C), and note the attention weights."""
        normalized = self.input_layernorm(torch.cat((hidden_states, context.embeds), dim=-1))
        attended, weights = self.self_attn(
            hidden_states=normalized, context=context, layer_idx=layer_idx, use=use
        )
        context.notes.note_weights(weights)
        output: Tensor = self.feed_forward(self.pre_ff_layernorm(attended), use=use)
        return output

    def part_specs(self, linear: nn.Module, *, layer_idx: int, use: int) -> list[PartSpec] | None:
        """Describe one use before a projection, or return None if it must be called."""
        if untouched(self, SharedTransformer) is None:
            return None
        norms = (
            norm_of(self.input_layernorm, parts.Source.WITH_EMBEDS),
            norm_of(self.pre_ff_layernorm, parts.Source.BESIDE),
        )
        attention = untouched(self.self_attn, SharedAttention)
        mlp = untouched(self.feed_forward, SharedMLP)
        if norms[0] is None or norms[1] is None or attention is None or mlp is None:
            return None
        first = attention.part_spec(norms[0], layer_idx=layer_idx, use=use)
        second = mlp.part_spec(norms[1], linear, use=use)
        return None if first is None or second is None else [first, second]
