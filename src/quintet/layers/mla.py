"""Multi-head latent attention."""

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from quintet.kernels import latent, parts
from quintet.layers.adapted import matrix_in_use
from quintet.layers.context import ForwardContext
from quintet.layers.linear import Linear, matrices, project
from quintet.layers.norm import RMSNorm
from quintet.layers.plain import PlainModule, hooked, untouched
from quintet.layers.stack import FusedPart, norm_of
from quintet.ops.masks import AttentionMask
from quintet.ops.mla import latent_attention, separate_texts
from quintet.ops.rope import rotate_both
from quintet.sharding import WHOLE, Section, Sharding, columns, rows


class Latents(PlainModule):
    """Passes on the values that all heads share, where tensors split into heads."""

    def forward(self, c_kv: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent (B, 1, T, R) and the rotated key (B, 1, T, Dr) unchanged."""
        return c_kv, k_pe


class LatentAttention(FusedPart):
    """Attention with keys and values from one latent per token (arXiv:2405.04434, §2.1).

    A cache holds the normalised latent c_kv and the rotated key k_pe that all heads share,
    R + Dr numbers a token.

    Args:
        q_lora_rank: the rank of the queries' own latent; None for queries without one.
        bias: whether the maps to the latents and the output have one.
        scaling: what the scores are multiplied by.
        interleaved: whether neighbours are rotated together, or i and i + Dr/2.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        layer_idx: int,
        bias: bool,
        dropout: float,
        scaling: float,
        interleaved: bool,
    ) -> None:
        super().__init__()
        self.q_lora_rank = q_lora_rank
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.layer_idx = layer_idx
        self.attention_dropout = dropout
        self.scaling = scaling
        self.interleaved = interleaved
        q_size = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank is None:
            self.q_proj = Linear(hidden_size, q_size, bias=False)
        else:
            # The norms of latents keep their own epsilon, 1e-6, whatever the model's is.
            self.q_a_proj = Linear(hidden_size, q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(q_lora_rank)
            self.q_b_proj = Linear(q_lora_rank, q_size, bias=False)
        self.kv_a_proj_with_mqa = Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(kv_lora_rank)
        self.kv_b_proj = Linear(
            kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False
        )
        self.o_proj = Linear(num_heads * v_head_dim, hidden_size, bias=bias)
        self.latents = Latents()

    def forward(
        self, hidden_states: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, C) to (B, T, C), and return the weights (B, H, T, S) or None."""
        B, T, _ = hidden_states.shape
        Dn, R = self.qk_nope_head_dim, self.kv_lora_rank
        q, latent = self._queries_and_latents(hidden_states)
        q = q.view(B, T, -1, Dn + self.qk_rope_head_dim).transpose(1, 2)
        latent = latent[:, None]  # (B, 1, T, R + Dr)
        q_nope, q_pe, c_kv, k_pe = q[..., :Dn], q[..., Dn:], latent[..., :R], latent[..., R:]
        rotated = self._rotate_and_keep(q_pe, k_pe, c_kv, context)
        if rotated is None:
            c_kv = self.kv_a_layernorm(c_kv)
            q_pe, k_pe = rotate_both(
                q_pe, k_pe, context.cos, context.sin, interleaved=self.interleaved
            )
            c_kv, k_pe = self.latents(c_kv, k_pe)
        else:
            q_pe, c_kv, k_pe = rotated
        out, weights = self._attend(q_nope, q_pe, c_kv, k_pe, context, stored=rotated is not None)
        return self.o_proj(out.transpose(1, 2).flatten(2)), weights

    def _rotate_and_keep(
        self, q_pe: Tensor, k_pe: Tensor, c_kv: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return rotated queries, and the latents and keys of all rows with these; None if not."""
        norm = norm_of(self.kv_a_layernorm)
        if norm is None or hooked(self.latents):
            return None
        return context.rotate_and_keep(
            q_pe,
            k_pe,
            c_kv,
            self.layer_idx,
            norm=(norm.weight, norm.eps),
            interleaved=self.interleaved,
        )

    def sharding(self) -> Sharding:
        """Split the heads over processes; the maps before them are whole everywhere."""
        Dn, Dr, Dv = self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim
        H, key = self.o_proj.in_features // Dv, "num_attention_heads"
        queries = "q_proj" if self.q_lora_rank is None else "q_b_proj"
        sizes = {queries: Dn + Dr, "kv_b_proj": Dn + Dv}
        whole = ("q_a_proj", "kv_a_proj_with_mqa")
        return Sharding(
            {
                **{f"{name}.weight": rows(Section(H, size, key)) for name, size in sizes.items()},
                **{f"{name}.{leaf}": WHOLE for name in whole for leaf in ("weight", "bias")},
                "o_proj.weight": columns(Section(H, Dv, key)),
                "o_proj.bias": WHOLE,
            },
            # What is made of latents is by heads: f is passed here, R + Dr numbers a token wide,
            # and all that makes the latents learns from all heads.
            copies=(queries, "latents"),
            reduces=("o_proj",),
            first_only=("o_proj.bias",),
        )

    def part(self, norm: parts.Norm) -> parts.Part | None:
        kv_norm = norm_of(self.kv_a_layernorm)
        w_kv = self._w_kv()
        if w_kv is None or kv_norm is None or hooked(self.latents):
            return None
        if self.training and self.attention_dropout:
            return None
        direct = self.q_lora_rank is None
        queries = (self.q_proj,) if direct else (self.q_b_proj, self.q_a_proj)
        maps = self.kv_a_proj_with_mqa, self.o_proj, *queries
        weights = matrices(*maps, summed=self.o_proj)
        q_norm = None if direct else norm_of(self.q_a_layernorm)
        if weights is None or (q_norm is None) != direct:
            return None
        kv, o, q = weights[:3]
        return latent.LatentAttention(
            norm,
            None if q_norm is None else (weights[3], q_norm),
            q,
            kv,
            kv_norm,
            o,
            w_kv,
            self.v_head_dim,
            self.scaling,
            self.interleaved,
        )

    def output_module(self) -> nn.Module:
        return self.o_proj

    def cache_buffers(self, context: ForwardContext) -> tuple[Tensor, ...] | None:
        """Return this layer's latent and key buffers, with space for the new tokens."""
        if context.cache is None:
            return None
        return context.cache.buffers(self.layer_idx, context.whole)

    def _w_kv(self) -> Tensor | None:
        """Return kv_b_proj as (H, Dn + Dv, R), keys first, or None if it is more than a matrix."""
        plain = untouched(self.kv_b_proj, Linear)
        if plain is None or plain.matrix().bias is not None:
            return None
        # What stands for a weight, as formats of other packages do, may know products alone.
        weight: object = plain.weight
        if is_traceable_wrapper_subclass(weight):
            return None
        return self._by_head(plain.weight)

    def _by_head(self, weight: Tensor) -> Tensor:
        return weight.view(-1, self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank)

    def _queries_and_latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.kv_a_proj_with_mqa
        if self.q_lora_rank is None:
            q, latent = project(hidden_states, self.q_proj, latents)
            return q, latent
        c_q, latent = project(hidden_states, self.q_a_proj, latents)
        return self.q_b_proj(self.q_a_layernorm(c_q)), latent

    def _attend(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        c_kv: Tensor,
        k_pe: Tensor,
        context: ForwardContext,
        *,
        stored: bool,
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.attention_dropout if self.training else 0.0
        texts = context.separate_texts(None, dropout)
        if texts is not None:
            own = q_nope, q_pe, c_kv[:, 0], k_pe[:, 0]
            output = separate_texts(*own, self.kv_b_proj, texts, scale=self.scaling)
            if output is not None:
                return output, None
        w_kv = self._w_kv()
        if w_kv is None:
            adapted = matrix_in_use(self.kv_b_proj)
            w_kv = None if adapted is None else self._by_head(adapted)

        def attend(
            mask: AttentionMask, q_nope: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor
        ) -> tuple[Tensor, Tensor | None]:
            return latent_attention(
                q_nope,
                q_pe,
                c_kv[:, 0],
                k_pe[:, 0],
                self.kv_b_proj,
                w_kv,
                mask,
                attend=context.attend,
                scale=self.scaling,
                dropout=dropout,
            )

        return context.by_segment(
            attend, (q_nope, q_pe), c_kv, k_pe, self.layer_idx, window=None, stored=stored
        )
