"""DeepSeek-V3 (arXiv:2412.19437): latent attention, balanced experts, multi-token prediction.

Also DeepSeek-R1 and Moonlight. Legend: docs/notation.md; Dn, Dr and Dv are the sizes of a head's
part without positions, of its rotated part and of its value.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from quintet.configuration import PreTrainedConfig
from quintet.configuration.constraints import (
    AnyExperts,
    Count,
    EndIds,
    ExpertCount,
    Fraction,
    HeadSize,
    Layers,
    Length,
    MoreLayers,
    NonNegative,
    NonNegativeFloat,
    Positive,
    Size,
    TokenId,
    known,
)
from quintet.layers.context import ForwardContext
from quintet.layers.linear import Linear
from quintet.layers.mla import LatentAttention
from quintet.layers.mlp import GatedMLP
from quintet.layers.moe import Experts, run_mlp
from quintet.layers.norm import RMSNorm
from quintet.layers.rotary import RotaryEmbedding
from quintet.layers.routing import Router, SharedExpertsMoE, SigmoidRouter
from quintet.layers.stack import FusedLayer, PartSpec, residuals
from quintet.modeling.base import PreTrainedModel
from quintet.modeling.classification import (
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from quintet.modeling.moe import EXPERT_STACKS
from quintet.modeling.mtp import MtpCausalLMHead, MtpDecoderModel, PredictionLayer
from quintet.ops.activations import activation
from quintet.ops.rope import score_factor
from quintet.ops.routing import RoutingRules
from quintet.sharding import WHOLE, Section, Sharding, rows

__all__ = [
    "DeepseekV3Config",
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForQuestionAnswering",
    "DeepseekV3ForSequenceClassification",
    "DeepseekV3ForTokenClassification",
    "DeepseekV3Model",
    "DeepseekV3PreTrainedModel",
]


class DeepseekV3Config(PreTrainedConfig):
    """The configuration of a DeepSeek-V3 model.

    Layer i has experts if i >= `first_k_dense_replace` and i is a multiple of `moe_layer_freq`;
    none has where `num_experts_per_tok` or `n_routed_experts` is None. `num_nextn_predict_layers`
    counts the multi-token-prediction layers, which come after the `num_hidden_layers`.
    """

    model_type = "deepseek_v3"
    aliases = MappingProxyType(
        {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}
    )

    vocab_size: Size = 129280
    hidden_size: Size = 7168
    intermediate_size: Size = 18432
    moe_intermediate_size: Size = 2048
    num_hidden_layers: Layers = 61
    num_attention_heads: Size = 128
    num_key_value_heads: Size | None = 128
    n_shared_experts: AnyExperts | None = 1
    n_routed_experts: ExpertCount | None = 256
    routed_scaling_factor: NonNegativeFloat = 2.5
    kv_lora_rank: Size = 512
    q_lora_rank: Size | None = 1536
    qk_rope_head_dim: HeadSize = 64
    v_head_dim: HeadSize = 128
    qk_nope_head_dim: HeadSize = 128
    n_group: ExpertCount | None = 8
    topk_group: ExpertCount | None = 4
    num_experts_per_tok: ExpertCount | None = 8
    first_k_dense_replace: NonNegative = 3
    norm_topk_prob: bool = True
    hidden_act: str | Callable[[Any], Any] = "silu"
    max_position_embeddings: Length = 4096
    initializer_range: NonNegativeFloat = 0.02
    rms_norm_eps: Positive = 1e-6
    use_cache: bool = True
    pad_token_id: TokenId | None = None
    bos_token_id: TokenId | None = 0
    eos_token_id: TokenId | EndIds | None = 1
    pretraining_tp: int = 1
    tie_word_embeddings: bool = False
    rope_interleave: bool = True
    attention_bias: bool = False
    attention_dropout: Fraction = 0.0
    moe_layer_freq: Count = 1
    num_nextn_predict_layers: MoreLayers = 0
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"

    @property
    def qk_head_dim(self) -> int:
        """The size of a query's and a key's head, Dn + Dr."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def head_dim(self) -> int:
        """The size of the rotated part of a head, Dr, under the name that rotary code reads."""
        return self.qk_rope_head_dim

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from the content of a file; with fewer layers, drop multi-token prediction."""
        if "num_hidden_layers" in overrides:
            # Prediction layers are named by the number of layers before them.
            overrides = {"num_nextn_predict_layers": 0, **cls._renamed(overrides)}
        return super().from_dict(values, **overrides)

    def derive(self) -> None:
        """Set num_key_value_heads: latent attention has keys and values for every head."""
        # The default is the released model's, and no reason to refuse a smaller one.
        if self.num_key_value_heads in (None, type(self).num_key_value_heads):
            self.num_key_value_heads = self.num_attention_heads

    def cache_numbers(self) -> tuple[int, int]:
        """Return the numbers a cache holds per token, and per row beyond its tokens."""
        return (self.kv_lora_rank + self.qk_rope_head_dim) * self.num_hidden_layers, 0

    def validate(self) -> None:
        """Check that Dr is even and that the groups kept hold enough experts for a token."""
        super().validate()
        activation(self.hidden_act)
        heads = self.num_attention_heads
        self.require(
            self.num_key_value_heads == heads,
            "num_key_value_heads",
            f"num_attention_heads={heads}: every head has keys and values made of the latent",
        )
        self.require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "even: pairs rotate")
        self.require(self.scoring_func == "sigmoid", "scoring_func", "'sigmoid'")
        self.require(self.topk_method == "noaux_tc", "topk_method", "'noaux_tc'")
        if self.n_routed_experts is None or self.num_experts_per_tok is None:
            return
        experts, groups = self.n_routed_experts, self.n_group or 1
        kept_groups = self.topk_group or groups
        self.require(experts % groups == 0, "n_group", f"a divisor of n_routed_experts={experts}")
        self.require(kept_groups <= groups, "topk_group", f"at most n_group={groups}")
        reachable = kept_groups * experts // groups
        self.require(
            self.num_experts_per_tok <= reachable,
            "num_experts_per_tok",
            f"at most {reachable}, the experts that a token can be sent to",
        )

    def has_experts(self, layer_idx: int) -> bool:
        """Return whether a layer has experts instead of one MLP; prediction layers do."""
        if self.n_routed_experts is None or self.num_experts_per_tok is None:
            return False
        if layer_idx >= self.num_hidden_layers:
            return True
        return layer_idx >= self.first_k_dense_replace and layer_idx % self.moe_layer_freq == 0

    def routing(self) -> RoutingRules:
        """Return the settings of the routers."""
        groups = self.n_group or 1
        return RoutingRules(
            active=known(self.num_experts_per_tok),
            groups=groups,
            kept_groups=self.topk_group or groups,
            normalise=self.norm_topk_prob,
            scaling=self.routed_scaling_factor,
        )


class DeepseekV3DecoderLayer(FusedLayer):
    """Attention, then experts or one MLP, each on normalised input and added to the residual."""

    def __init__(self, config: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LatentAttention(
            config.hidden_size,
            config.num_attention_heads,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            layer_idx=layer_idx,
            bias=config.attention_bias,
            dropout=config.attention_dropout,
            scaling=config.qk_head_dim**-0.5 * score_factor(config.rope()),
            interleaved=config.rope_interleave,
        )
        self.has_experts = config.has_experts(layer_idx)
        self.mlp = _experts(config) if self.has_experts else _mlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, context: ForwardContext) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        attended, weights = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), context=context
        )
        context.notes.note_weights(weights)
        hidden_states = hidden_states + attended
        x = self.post_attention_layernorm(hidden_states)
        return hidden_states + run_mlp(self.mlp, x, context.notes, routed=self.has_experts)

    def sharding(self) -> Sharding:
        """Sum a dense MLP's output over processes; experts have a table of their own."""
        return Sharding() if self.has_experts else Sharding(copies=("mlp",), reduces=("mlp",))

    def part_specs(self) -> list[PartSpec] | None:
        """Describe attention and the experts or MLP to the fused CPU step."""
        return residuals(
            (self.input_layernorm, self.self_attn), (self.post_attention_layernorm, self.mlp)
        )


def _mlp(config: DeepseekV3Config, intermediate_size: int | None = None) -> GatedMLP:
    size = intermediate_size or config.intermediate_size
    return GatedMLP(config.hidden_size, size, act=config.hidden_act)


def _experts(config: DeepseekV3Config) -> SharedExpertsMoE:
    E, C, size = known(config.n_routed_experts), config.hidden_size, config.moe_intermediate_size
    shared = config.n_shared_experts
    return SharedExpertsMoE(
        SigmoidRouter(C, E, config.routing()),
        Experts(E, C, size, act=config.hidden_act),
        _mlp(config, size * shared) if shared else None,
    )


class DeepseekV3PredictionLayer(DeepseekV3DecoderLayer, PredictionLayer):
    """A decoder layer that predicts one token further than the layer before it (§2.2).

    Embedding and output head are the main model's own.
    """

    def __init__(
        self, config: DeepseekV3Config, layer_idx: int, embed_tokens: nn.Module, head: nn.Module
    ) -> None:
        super().__init__(config, layer_idx)
        C, eps = config.hidden_size, config.rms_norm_eps
        self.vocab_size = config.vocab_size
        self.embed_tokens = embed_tokens
        self.enorm = RMSNorm(C, eps)
        self.hnorm = RMSNorm(C, eps)
        self.eh_proj = Linear(2 * C, C, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(C, eps), "head": head})

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, context: ForwardContext, ahead: Tensor
    ) -> Tensor:
        """Combine states and embeddings of later tokens, (B, T, C) each; return (B, T, C)."""
        # The paper writes the state first; the released weights have the embedding first.
        both = torch.cat((self.enorm(ahead), self.hnorm(hidden_states)), dim=-1)
        return super().forward(self.eh_proj(both), context)

    def sharding(self) -> Sharding:
        """Cut it like any decoder layer, and the shared embedding and head by vocabulary."""
        ids = rows(Section(self.vocab_size, 1, "vocab_size", uneven=True))
        names = ("embed_tokens.weight", "shared_head.head.weight")
        own = Sharding({"eh_proj.weight": WHOLE, **dict.fromkeys(names, ids)})
        return own | super().sharding()


class DeepseekV3PreTrainedModel(PreTrainedModel):
    """Base of the DeepSeek-V3 models."""

    config_class = DeepseekV3Config
    expert_stacks = EXPERT_STACKS
    # Absorbed attention multiplies with parts of its weight.
    keep_unquantized = (*PreTrainedModel.keep_unquantized, "kv_b_proj")
    keep_in_fp32 = ("e_score_correction_bias",)

    def init_module(self, module: nn.Module) -> None:
        """Initialise the weights of one module, routers included."""
        super().init_module(module)
        if isinstance(module, Router):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, SigmoidRouter):
            nn.init.zeros_(module.e_score_correction_bias)


class DeepseekV3Model(DeepseekV3PreTrainedModel, MtpDecoderModel):
    """The decoder without a head; see `MoeDecoderModel.forward`."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DeepseekV3DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.qk_rope_head_dim, config.rope())
        self.init_weights()


class DeepseekV3ForCausalLM(DeepseekV3PreTrainedModel, MtpCausalLMHead):
    """The decoder with a language-modelling head and its layers of multi-token prediction."""

    base_class = DeepseekV3Model
    config: DeepseekV3Config

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        for k in range(config.num_nextn_predict_layers):
            index = config.num_hidden_layers + k
            layer = DeepseekV3PredictionLayer(config, index, self.model.embed_tokens, self.lm_head)
            for module in layer.modules():
                self.init_module(module)
            self.model.layers.append(layer)

    def aux_loss_weight(self, labels: Tensor | None, output_router_logits: bool) -> float | None:
        """Return None: the routers' bias balances the experts, not a loss (§2.1.2)."""
        return None

    def drop(self, prefixes: tuple[str, ...]) -> None:
        """Remove the prediction layers that a checkpoint lacks."""
        super().drop(prefixes)
        self.config.num_nextn_predict_layers = len(self.model.prediction_layers())


class DeepseekV3ForSequenceClassification(DeepseekV3PreTrainedModel, SequenceClassificationHead):
    """The decoder with a head that classifies a sequence by its last token."""

    base_class = DeepseekV3Model


class DeepseekV3ForTokenClassification(DeepseekV3PreTrainedModel, TokenClassificationHead):
    """The decoder with a head that classifies each token."""

    base_class = DeepseekV3Model


class DeepseekV3ForQuestionAnswering(DeepseekV3PreTrainedModel, QuestionAnsweringHead):
    """The decoder with a head that finds where an answer starts and ends."""

    base_class = DeepseekV3Model
