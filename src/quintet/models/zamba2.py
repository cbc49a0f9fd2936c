"""Zamba2 (arXiv:2411.15242): layers of Mamba-2, some with a transformer block that they share.

There are `num_mem_blocks` transformer blocks, and the k-th hybrid layer uses the k-th of them,
round and round. A shared block sees the hidden states beside the token embeddings, 2C wide, and
has small adapters of its own for each layer that uses it. Legend: docs/notation.md.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from quintet.cache import DynamicCache
from quintet.configuration import PreTrainedConfig
from quintet.configuration.rope import RopeParameters
from quintet.configuration.rules import Count, Fraction, NonNegativeFloat, Positive, known
from quintet.errors import ConfigError
from quintet.layers.mamba2 import Mamba2
from quintet.layers.norm import RMSNorm
from quintet.layers.rotary import RotaryEmbedding
from quintet.layers.step import LayerOutput, Step
from quintet.modeling.base import PreTrainedModel
from quintet.modeling.decoder import DecoderModel
from quintet.modeling.heads import (
    CausalLMHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from quintet.ops.activations import activation
from quintet.ops.rope import rotate

__all__ = [
    "Zamba2Config",
    "Zamba2ForCausalLM",
    "Zamba2ForQuestionAnswering",
    "Zamba2ForSequenceClassification",
    "Zamba2ForTokenClassification",
    "Zamba2HybridDynamicCache",
    "Zamba2Model",
    "Zamba2PreTrainedModel",
]

MAMBA, HYBRID = "mamba", "hybrid"
# Zamba2-2.7B's hybrid layers.
HYBRIDS = (6, 12, 18, 24, 30, 36, 42, 47, 51)
LONG_CONTEXT, LONGER = 16384, 8
# Keys that checkpoints in their authors' first format have in place of others.
FORMER_KEYS = {
    "state_size": "mamba_d_state",
    "conv_dimension": "mamba_d_conv",
    "lora_rank": "adapter_rank",
    "use_shared_block_lora": "use_shared_attention_adapter",
}
# Files state these too, and they follow from other keys.
FOLLOWING = (
    "attention_head_dim",
    "attention_hidden_size",
    "head_dim",
    "hybrid_layer_ids",
    "mamba_headdim",
)


class Zamba2Config(PreTrainedConfig):
    """The configuration of a Zamba2 model; the defaults resemble Zamba2-2.7B.

    `layers_block_type` says of each layer whether it is "mamba" (also called "linear_attention")
    or "hybrid". A step size is clamped to `time_step_limit`, by default at least `time_step_min`,
    at every token, in a prompt and one by one. `num_logits_to_keep` and `use_mem_eff_path` are
    kept for others: generation computes the logits it needs, on the one path there is.
    """

    model_type = "zamba2"
    aliases: ClassVar[Mapping[str, str]] = MappingProxyType({"layer_types": "layers_block_type"})

    vocab_size: Count = 32000
    max_position_embeddings: Count = 4096
    hidden_size: Count = 2560
    num_hidden_layers: Count = 54
    layers_block_type: list[str] | None = None
    mamba_d_state: Count = 64
    mamba_d_conv: Count = 4
    mamba_expand: Positive = 2
    mamba_ngroups: Count = 1
    time_step_min: Positive = 0.001
    time_step_max: Positive = 0.1
    time_step_floor: Positive = 1e-4
    time_step_limit: list[Any] | None = None
    n_mamba_heads: Count = 8
    use_conv_bias: bool = True
    chunk_size: Count = 256
    use_mem_eff_path: bool = False
    add_bias_linear: bool = False
    intermediate_size: Count | None = None
    hidden_act: str | Callable[[Any], Any] = "gelu"
    num_attention_heads: Count = 32
    num_key_value_heads: Count | None = None
    attention_dropout: Fraction = 0.0
    num_mem_blocks: Count = 1
    use_shared_attention_adapter: bool = False
    adapter_rank: Count = 128
    use_mem_rope: bool = False
    initializer_range: NonNegativeFloat = 0.02
    rms_norm_eps: Positive = 1e-5
    use_cache: bool = True
    num_logits_to_keep: Count | None = 1
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    use_long_context: bool = False
    tie_word_embeddings: bool = True

    def __init__(self, **values: Any) -> None:
        former = [old for old, new in FORMER_KEYS.items() if old in values and new not in values]
        kinds = values.get("layers_block_type")
        if former or (isinstance(kinds, list | tuple) and {"m", "g"} & {*map(str, kinds)}):
            raise ConfigError(
                f"this config.json of Zamba2 is in its authors' first format "
                f"({', '.join(former) or 'layers_block_type of m and g'}); use a later revision of "
                "the checkpoint, with layers_block_type of 'mamba' and 'hybrid'"
            )
        super().__init__(**values)
        for key in FOLLOWING:
            if key in values and values[key] != (follows := getattr(self, key)):
                raise ConfigError(
                    f"Zamba2Config: {key}={values[key]!r} follows from other keys, which make it "
                    f"{follows!r}; change those"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> Self:
        """Build a configuration from the content of a file; fewer layers are the first ones."""
        values = {key: value for key, value in values.items() if key not in FOLLOWING}
        for key in ("layers_block_type", "layer_types"):
            if isinstance(values.get(key), list) and "num_hidden_layers" in overrides:
                values[key] = values[key][: overrides["num_hidden_layers"]]
        return super().from_dict(values, **overrides)

    def derive(self) -> None:
        """Fill in the layers, the heads and the width of the MLP."""
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        if self.time_step_limit is not None:
            self.time_step_limit = list(self.time_step_limit)
        if self.use_long_context:
            self.max_position_embeddings = LONG_CONTEXT
        if self.layers_block_type is None:
            self.require(
                self.num_hidden_layers <= 54,
                "num_hidden_layers",
                "at most 54, or layers_block_type set",
            )
            self.layers_block_type = [
                HYBRID if i in HYBRIDS else MAMBA for i in range(self.num_hidden_layers)
            ]
        self.layers_block_type = [
            MAMBA if kind == "linear_attention" else kind for kind in self.layers_block_type
        ]

    def validate(self) -> None:
        """Check that heads and groups divide what they share, and that each layer has a type."""
        super().validate()
        types = self.layers_block_type or []
        inner = int(self.mamba_expand * self.hidden_size)
        activation(self.hidden_act)
        self.require(
            len(types) == self.num_hidden_layers and set(types) <= {MAMBA, HYBRID},
            "layers_block_type",
            f"{MAMBA!r} or {HYBRID!r} for each of num_hidden_layers={self.num_hidden_layers}",
        )
        for key, whole, name in (
            ("num_attention_heads", 2 * self.hidden_size, "2 · hidden_size"),
            ("num_key_value_heads", self.num_attention_heads, "num_attention_heads"),
            ("n_mamba_heads", inner, "mamba_expand · hidden_size"),
            ("mamba_ngroups", self.n_mamba_heads, "n_mamba_heads"),
        ):
            part: int = getattr(self, key)
            self.require(whole % part == 0, key, f"a divisor of {name}={whole}")
        self.require(
            not self.use_mem_rope or self.head_dim % 2 == 0,
            "use_mem_rope",
            f"false, as head_dim={self.head_dim} is odd and cannot be rotated in pairs",
        )
        self.require(
            self.time_step_min <= self.time_step_max,
            "time_step_min",
            f"at most time_step_max={self.time_step_max}",
        )
        limit = self.time_step_limit
        numbers = limit is not None and all(isinstance(x, int | float) for x in limit)
        self.require(
            limit is None or (numbers and len(limit) == 2 and 0 <= limit[0] <= limit[1]),
            "time_step_limit",
            "null, or the least and the largest step size, 0 <= least <= largest",
        )

    @property
    def attention_hidden_size(self) -> int:
        """The width of a shared block's input."""
        return 2 * self.hidden_size

    @property
    def head_dim(self) -> int:
        """The size of an attention head."""
        return 2 * self.hidden_size // self.num_attention_heads

    attention_head_dim = head_dim

    @property
    def mamba_headdim(self) -> int:
        """The size of a Mamba-2 head."""
        return int(self.mamba_expand * self.hidden_size) // self.n_mamba_heads

    @property
    def hybrid_layer_ids(self) -> list[int]:
        """The layers with a shared block."""
        return [i for i, kind in enumerate(self.layers_block_type or []) if kind == HYBRID]

    def rope(self) -> RopeParameters:
        """Return the rotary parameters; a long context has a larger base, but the same key."""
        rope, D = super().rope(), self.head_dim
        if not (self.use_long_context and self.use_mem_rope) or D == 2:
            return rope
        return replace(rope, rope_theta=rope.rope_theta * LONGER ** (D / (D - 2)))

    def attention_layers(self) -> Sequence[int]:
        """Return the layers that keep keys and values between steps."""
        return self.hybrid_layer_ids

    def recurrent_layers(self) -> Sequence[int]:
        """Return the layers that keep a recurrent state between steps: all."""
        return range(self.num_hidden_layers)


class Adapters(nn.ModuleDict):
    """Low-rank additions to one shared projection, one for each hybrid layer that uses it."""

    def __init__(self, uses: Sequence[int], in_size: int, rank: int, out_size: int) -> None:
        super().__init__()
        for use in uses:
            self[str(use)] = nn.Sequential(
                nn.Linear(in_size, rank, bias=False), nn.Linear(rank, out_size, bias=False)
            )

    def forward(self, x: Tensor, use: int) -> Tensor:
        """Map (B, T, in) to (B, T, out) as the hybrid layer `use` does."""
        return self[str(use)](x)  # type: ignore[no-any-return]


class Zamba2Attention(nn.Module):
    """Attention over hidden states beside embeddings, (B, T, 2C) -> (B, T, C)."""

    def __init__(self, config: Zamba2Config, uses: Sequence[int]) -> None:
        super().__init__()
        D, rank = config.head_dim, config.adapter_rank
        inputs, width = config.attention_hidden_size, config.num_attention_heads * D
        kv_width = known(config.num_key_value_heads) * D
        self.head_dim = D
        # The heads are twice as wide as those of a block without the embeddings beside.
        self.scaling = (D / 2) ** -0.5
        self.dropout = config.attention_dropout
        self.rotates = config.use_mem_rope
        self.adapts = config.use_shared_attention_adapter
        self.q_proj = nn.Linear(inputs, width, bias=False)
        self.k_proj = nn.Linear(inputs, kv_width, bias=False)
        self.v_proj = nn.Linear(inputs, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        if self.adapts:
            self.linear_q_adapter_list = Adapters(uses, inputs, rank, width)
            self.linear_k_adapter_list = Adapters(uses, inputs, rank, kv_width)
            self.linear_v_adapter_list = Adapters(uses, inputs, rank, kv_width)

    def forward(
        self, x: Tensor, step: Step, *, layer_idx: int, use: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return also the weights (B, H, T, S), where the backend has them."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.adapts:
            q = q + self.linear_q_adapter_list(x, use)
            k = k + self.linear_k_adapter_list(x, use)
            v = v + self.linear_v_adapter_list(x, use)
        q, k, v = (y.view(*y.shape[:2], -1, self.head_dim).transpose(1, 2) for y in (q, k, v))
        if self.rotates:
            q, k = rotate(q, step.cos, step.sin), rotate(k, step.cos, step.sin)
        if step.cache is not None:
            k, v = step.cache.update(k, v, layer_idx, step.span)
        dropout = self.dropout if self.training else 0.0
        out, weights = step.attend(q, k, v, step.seen[None], scale=self.scaling, dropout=dropout)
        return self.o_proj(out.transpose(1, 2).flatten(2)), weights


class Zamba2MLP(nn.Module):
    """down(act(gate(x)) · up(x)), with gate and up adapted to the layer."""

    def __init__(self, config: Zamba2Config, uses: Sequence[int]) -> None:
        super().__init__()
        C, F, bias = config.hidden_size, known(config.intermediate_size), config.add_bias_linear
        self.gate_up_proj = nn.Linear(C, 2 * F, bias=bias)
        self.down_proj = nn.Linear(F, C, bias=bias)
        self.gate_up_proj_adapter_list = Adapters(uses, C, config.adapter_rank, 2 * F)
        self.act_fn = activation(config.hidden_act)

    def forward(self, x: Tensor, *, use: int) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        gate, up = (self.gate_up_proj(x) + self.gate_up_proj_adapter_list(x, use)).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)  # type: ignore[no-any-return]


class Zamba2SharedTransformer(nn.Module):
    """A transformer block for the hybrid layers `uses`; it has no residual connections."""

    def __init__(self, config: Zamba2Config, uses: Sequence[int]) -> None:
        super().__init__()
        self.self_attn = Zamba2Attention(config, uses)
        self.feed_forward = Zamba2MLP(config, uses)
        self.input_layernorm = RMSNorm(config.attention_hidden_size, config.rms_norm_eps)
        self.pre_ff_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_states: Tensor, step: Step, *, layer_idx: int, use: int
    ) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, C) to (B, T, C), and return the attention's weights."""
        beside = self.input_layernorm(torch.cat((hidden_states, step.embeds), dim=-1))
        attended, weights = self.self_attn(beside, step, layer_idx=layer_idx, use=use)
        return self.feed_forward(self.pre_ff_layernorm(attended), use=use), weights


class Zamba2MambaDecoderLayer(nn.Module):
    """Mamba-2 on normalised input, added to the residual."""

    def __init__(self, config: Zamba2Config, layer_idx: int) -> None:
        super().__init__()
        least, most = config.time_step_limit or (config.time_step_min, math.inf)
        self.mamba = Mamba2(
            config.hidden_size,
            config.n_mamba_heads,
            config.mamba_headdim,
            state_size=config.mamba_d_state,
            num_groups=config.mamba_ngroups,
            conv_kernel=config.mamba_d_conv,
            conv_bias=config.use_conv_bias,
            bias=config.add_bias_linear,
            chunk_size=config.chunk_size,
            dt_limits=(least, most),
            layer_idx=layer_idx,
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_states: Tensor, step: Step, beside: Tensor | None = None
    ) -> LayerOutput:
        """Map (B, T, C) to (B, T, C); `beside` is added to the input but not to the residual."""
        x = hidden_states if beside is None else hidden_states + beside
        return LayerOutput(hidden_states + self.mamba(self.input_layernorm(x), step))


class Zamba2HybridLayer(nn.Module):
    """A shared block, its output projected for this layer, then Mamba-2 on top of both."""

    def __init__(
        self, config: Zamba2Config, layer_idx: int, shared: Zamba2SharedTransformer, use: int
    ) -> None:
        super().__init__()
        self.layer_idx, self.use = layer_idx, use
        self.shared_transformer = shared
        self.linear = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.mamba_decoder = Zamba2MambaDecoderLayer(config, layer_idx)

    def forward(self, hidden_states: Tensor, step: Step) -> LayerOutput:
        """Map (B, T, C) to (B, T, C)."""
        made, weights = self.shared_transformer(
            hidden_states, step, layer_idx=self.layer_idx, use=self.use
        )
        out = self.mamba_decoder(hidden_states, step, self.linear(made))
        return LayerOutput(out.hidden_states, weights)


class Zamba2PreTrainedModel(PreTrainedModel):
    """What all Zamba2 models share."""

    config_class = Zamba2Config
    keep_in_fp32 = (".A_log", ".D", ".dt_bias")

    def tied_names(self) -> dict[str, str]:
        """Return also every further name of a shared block's parameters."""
        names = super().tied_names()
        prefix = "" if self.base_model is self else f"{self.base_model_prefix}."
        config = cast("Zamba2Config", self.config)
        hybrids, blocks = config.hybrid_layer_ids, config.num_mem_blocks
        for use in range(blocks, len(hybrids)):
            first, again = (
                f"{prefix}layers.{hybrids[i]}.shared_transformer" for i in (use % blocks, use)
            )
            for leaf, _ in self.get_submodule(first).named_parameters():
                names[f"{again}.{leaf}"] = f"{first}.{leaf}"
        return names

    def init_module(self, module: nn.Module) -> None:
        """Draw the weights of one module, a Mamba-2 mixer's step sizes log-uniformly."""
        super().init_module(module)
        if isinstance(module, Mamba2):
            config = cast("Zamba2Config", self.config)
            low, high = math.log(config.time_step_min), math.log(config.time_step_max)
            with torch.no_grad():
                dt = torch.empty_like(module.dt_bias).uniform_(low, high).exp()
                dt = dt.clamp(min=config.time_step_floor)
                # The inverse of softplus.
                module.dt_bias.copy_(dt + (-torch.expm1(-dt)).log())


class Zamba2Model(Zamba2PreTrainedModel, DecoderModel):
    """The decoder without a head; see `DecoderModel.forward`."""

    def __init__(self, config: Zamba2Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        hybrids, blocks = config.hybrid_layer_ids, config.num_mem_blocks
        shared = [
            Zamba2SharedTransformer(config, range(first, len(hybrids), blocks))
            for first in range(min(blocks, len(hybrids)))
        ]
        self.layers = nn.ModuleList(
            Zamba2HybridLayer(config, i, shared[hybrids.index(i) % blocks], hybrids.index(i))
            if i in hybrids
            else Zamba2MambaDecoderLayer(config, i)
            for i in range(config.num_hidden_layers)
        )
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope())
        self.init_weights()

    def final_norm(self, hidden_states: Tensor) -> Tensor:
        """Normalise what the last layer made."""
        return self.final_layernorm(hidden_states)  # type: ignore[no-any-return]


class Zamba2ForCausalLM(Zamba2PreTrainedModel, CausalLMHead):
    """The decoder with a language-modelling head."""

    base_class = Zamba2Model


class Zamba2ForSequenceClassification(Zamba2PreTrainedModel, SequenceClassificationHead):
    """The decoder with a head that classifies a sequence by its last token."""

    base_class = Zamba2Model


class Zamba2ForTokenClassification(Zamba2PreTrainedModel, TokenClassificationHead):
    """The decoder with a head that classifies each token."""

    base_class = Zamba2Model


class Zamba2ForQuestionAnswering(Zamba2PreTrainedModel, QuestionAnsweringHead):
    """The decoder with a head that finds where an answer starts and ends."""

    base_class = Zamba2Model


class Zamba2HybridDynamicCache(DynamicCache):
    """`DynamicCache` under the name that older code makes it by.

    `batch_size`, `dtype` and `device` are accepted without effect: the first forward decides them.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        batch_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config)
