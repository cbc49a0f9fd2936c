"""DeepSeek-V2 (arXiv:2405.04434): multi-head latent attention, and routed beside shared experts.

Also DeepSeek-V2-Lite, V2.5 and Coder-V2. Legend: docs/notation.md; Dn, Dr and Dv are the sizes of
a head's part without positions, of its rotated part and of its value.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

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
    NonNegative,
    NonNegativeFloat,
    Positive,
    Size,
    TokenId,
    known,
)
from quintet.layers.context import ForwardContext
from quintet.layers.mla import LatentAttention
from quintet.layers.mlp import GatedMLP
from quintet.layers.moe import Experts, run_mlp
from quintet.layers.norm import RMSNorm
from quintet.layers.rotary import RotaryEmbedding
from quintet.layers.routing import Router, SharedExpertsMoE, SoftmaxRouter
from quintet.layers.stack import FusedLayer, PartSpec, residuals
from quintet.modeling.base import PreTrainedModel
from quintet.modeling.classification import (
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from quintet.modeling.moe import EXPERT_STACKS, MoeCausalLMHead, MoeDecoderModel
from quintet.ops.activations import activation
from quintet.ops.rope import score_factor
from quintet.ops.routing import RoutingRules, balance_loss, softmax_routing
from quintet.sharding import Sharding

__all__ = [
    "DeepseekV2Config",
    "DeepseekV2ForCausalLM",
    "DeepseekV2ForQuestionAnswering",
    "DeepseekV2ForSequenceClassification",
    "DeepseekV2ForTokenClassification",
    "DeepseekV2Model",
    "DeepseekV2PreTrainedModel",
]

GREEDY, GROUPED = "greedy", "group_limited_greedy"


class DeepseekV2Config(PreTrainedConfig):
    """The configuration of a DeepSeek-V2 model.

    Layer i has experts if i >= `first_k_dense_replace` and i is a multiple of `moe_layer_freq`;
    none has where `num_experts_per_tok` or `n_routed_experts` is None. `n_shared_experts` None
    leaves the shared experts out.
    """

    model_type = "deepseek_v2"
    aliases = MappingProxyType({"num_experts": "n_routed_experts"})

    vocab_size: Size = 32000
    hidden_size: Size = 4096
    intermediate_size: Size = 11008
    num_hidden_layers: Layers = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = None
    hidden_act: str | Callable[[Any], Any] = "silu"
    max_position_embeddings: Length = 2048
    initializer_range: NonNegativeFloat = 0.02
    rms_norm_eps: Positive = 1e-6
    use_cache: bool = True
    pad_token_id: TokenId | None = None
    bos_token_id: TokenId | None = 1
    eos_token_id: TokenId | EndIds | None = 2
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_dropout: Fraction = 0.0
    mlp_bias: bool = False
    aux_loss_alpha: NonNegativeFloat = 0.001
    first_k_dense_replace: NonNegative = 0
    kv_lora_rank: Size = 512
    q_lora_rank: Size | None = 1536
    n_group: ExpertCount | None = None
    n_routed_experts: ExpertCount | None = 64
    n_shared_experts: AnyExperts | None = 2
    qk_nope_head_dim: HeadSize = 128
    qk_rope_head_dim: HeadSize = 64
    routed_scaling_factor: NonNegativeFloat = 1.0
    seq_aux: bool = True
    topk_group: ExpertCount | None = None
    topk_method: str = GREEDY
    v_head_dim: HeadSize = 128
    num_experts_per_tok: ExpertCount | None = None
    norm_topk_prob: bool = False
    moe_intermediate_size: Size = 1407
    moe_layer_freq: Count = 1
    scoring_func: str = "softmax"

    @property
    def qk_head_dim(self) -> int:
        """The size of a query's and a key's head, Dn + Dr."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def head_dim(self) -> int:
        """The size of the rotated part of a head, Dr, under the name that rotary code reads."""
        return self.qk_rope_head_dim

    def derive(self) -> None:
        """Set num_key_value_heads: latent attention has keys and values for every head."""
        if self.num_key_value_heads is None:
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
        self.require(self.scoring_func == "softmax", "scoring_func", "'softmax'")
        methods = (GREEDY, GROUPED)
        self.require(self.topk_method in methods, "topk_method", f"one of {methods}")
        if self.n_routed_experts is None or self.num_experts_per_tok is None:
            return
        reachable = self.n_routed_experts
        if self.topk_method == GROUPED:
            groups, chosen = self.n_group or 0, self.topk_group or 0
            self.require(
                groups > 0 and self.n_routed_experts % groups == 0,
                "n_group",
                f"a divisor of n_routed_experts={self.n_routed_experts}",
            )
            self.require(0 < chosen <= groups, "topk_group", f"from 1 to n_group={groups}")
            reachable = chosen * self.n_routed_experts // groups
        self.require(
            self.num_experts_per_tok <= reachable,
            "num_experts_per_tok",
            f"at most {reachable}, the experts that a token can be sent to",
        )

    def has_experts(self, layer_idx: int) -> bool:
        """Return whether a layer has experts instead of one MLP."""
        if self.n_routed_experts is None or self.num_experts_per_tok is None:
            return False
        return layer_idx >= self.first_k_dense_replace and layer_idx % self.moe_layer_freq == 0

    def routing(self) -> RoutingRules:
        """Return the settings of the routers."""
        grouped = self.topk_method == GROUPED
        return RoutingRules(
            active=known(self.num_experts_per_tok),
            groups=known(self.n_group) if grouped else 1,
            kept_groups=known(self.topk_group) if grouped else 1,
            normalise=self.norm_topk_prob,
            scaling=self.routed_scaling_factor,
        )


class DeepseekV2DecoderLayer(FusedLayer):
    """Attention, then experts or one MLP, each on normalised input and added to the residual."""

    def __init__(self, config: DeepseekV2Config, layer_idx: int) -> None:
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
            interleaved=True,
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


def _mlp(config: DeepseekV2Config, intermediate_size: int | None = None) -> GatedMLP:
    return GatedMLP(
        config.hidden_size,
        intermediate_size or config.intermediate_size,
        act=config.hidden_act,
        bias=config.mlp_bias,
    )


def _experts(config: DeepseekV2Config) -> SharedExpertsMoE:
    E, C, F = known(config.n_routed_experts), config.hidden_size, config.moe_intermediate_size
    shared = config.n_shared_experts
    return SharedExpertsMoE(
        SoftmaxRouter(C, E, config.routing()),
        Experts(E, C, F, act=config.hidden_act),
        _mlp(config, F * shared) if shared else None,
    )


class DeepseekV2PreTrainedModel(PreTrainedModel):
    """Base of the DeepSeek-V2 models."""

    config_class = DeepseekV2Config
    expert_stacks = EXPERT_STACKS
    # Absorbed attention multiplies with parts of its weight.
    keep_unquantized = (*PreTrainedModel.keep_unquantized, "kv_b_proj")

    def init_module(self, module: nn.Module) -> None:
        """Initialise the weights of one module, routers included."""
        super().init_module(module)
        if isinstance(module, Router):
            nn.init.normal_(module.weight, std=self.config.initializer_range)


class DeepseekV2Model(DeepseekV2PreTrainedModel, MoeDecoderModel):
    """The decoder without a head; see `MoeDecoderModel.forward`."""

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DeepseekV2DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.qk_rope_head_dim, config.rope())
        self.init_weights()


class DeepseekV2ForCausalLM(DeepseekV2PreTrainedModel, MoeCausalLMHead):
    """The decoder with a language-modelling head."""

    base_class = DeepseekV2Model
    config: DeepseekV2Config

    def aux_loss_weight(self, labels: Tensor | None, output_router_logits: bool) -> float | None:
        """Return `aux_loss_alpha` in training, 0 if the loss is only reported, else None."""
        if self.training and labels is not None and self.config.aux_loss_alpha > 0:
            return self.config.aux_loss_alpha
        return 0.0 if output_router_logits else None

    def aux_loss(self, router_logits: tuple[Tensor, ...], mask: Tensor) -> Tensor:
        """Sum the layers' balance losses, computed per row (`seq_aux`) or per batch."""
        rules, losses = self.config.routing(), []
        for logits in router_logits:
            indices, _ = softmax_routing(logits, rules)
            scores = logits.softmax(dim=-1)
            losses.append(
                balance_loss(
                    scores.view(*mask.shape, -1),
                    indices.view(*mask.shape, -1),
                    mask,
                    per_row=self.config.seq_aux,
                )
            )
        return torch.stack(losses).sum()


class DeepseekV2ForSequenceClassification(DeepseekV2PreTrainedModel, SequenceClassificationHead):
    """The decoder with a head that classifies a sequence by its last token."""

    base_class = DeepseekV2Model


class DeepseekV2ForTokenClassification(DeepseekV2PreTrainedModel, TokenClassificationHead):
    """The decoder with a head that classifies each token."""

    base_class = DeepseekV2Model


class DeepseekV2ForQuestionAnswering(DeepseekV2PreTrainedModel, QuestionAnsweringHead):
    """The decoder with a head that finds where an answer starts and ends."""

    base_class = DeepseekV2Model
