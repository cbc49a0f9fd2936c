"""Qwen2-MoE (arXiv:2407.10671, §2.2.2): Qwen2 with many small experts and a shared one as MLP.

Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B. Legend: docs/notation.md.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quintet.configuration import PreTrainedConfig
from quintet.configuration.constraints import (
    AnyExperts,
    AnyLength,
    Count,
    ExpertCount,
    Fraction,
    HeadSize,
    LayerNumbers,
    Layers,
    LayerTypes,
    Length,
    NonNegative,
    NonNegativeFloat,
    Positive,
    Size,
    known,
)
from quintet.kernels import parts
from quintet.kernels.routing import Rules
from quintet.layers.attention import Attention
from quintet.layers.context import ForwardContext, Notes
from quintet.layers.linear import Linear
from quintet.layers.mlp import GatedMLP, silu_matrices
from quintet.layers.moe import ExpertBlock, Experts, run_mlp, silu_stacks
from quintet.layers.norm import RMSNorm
from quintet.layers.plain import untouched
from quintet.layers.rotary import RotaryEmbedding
from quintet.layers.router import ExpertRouter
from quintet.layers.stack import FusedLayer, PartSpec, residuals
from quintet.modeling.base import PreTrainedModel
from quintet.modeling.classification import (
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from quintet.modeling.moe import EXPERT_STACKS, MoeCausalLMHead, MoeDecoderModel
from quintet.ops.activations import activation, sigmoid
from quintet.ops.linear import linear
from quintet.ops.moe import expert_shares, switch_balance_loss, top_experts
from quintet.sharding import WHOLE, Sharding

__all__ = [
    "Qwen2MoeConfig",
    "Qwen2MoeForCausalLM",
    "Qwen2MoeForQuestionAnswering",
    "Qwen2MoeForSequenceClassification",
    "Qwen2MoeForTokenClassification",
    "Qwen2MoeModel",
    "Qwen2MoePreTrainedModel",
]

FULL, SLIDING = "full_attention", "sliding_attention"


class Qwen2MoeConfig(PreTrainedConfig):
    """The configuration of a Qwen2-MoE model; the defaults resemble Qwen1.5-MoE-A2.7B.

    Layer i has experts if i + 1 is a multiple of `decoder_sparse_step` and i is not among
    `mlp_only_layers`; the others have one MLP of `intermediate_size`. It sees a window of
    `sliding_window` tokens if `use_sliding_window` is set and i >= `max_window_layers`;
    `layer_types` spells that out and wins where a file gives it.
    """

    model_type = "qwen2_moe"
    # Not layer_types: a file says which layers slide, as Transformers works it out otherwise.
    derived = ("head_dim",)

    vocab_size: Size = 151936
    hidden_size: Size = 2048
    intermediate_size: Size = 5632
    num_hidden_layers: Layers = 24
    num_attention_heads: Size = 16
    num_key_value_heads: Size | None = 16
    head_dim: HeadSize | None = None
    hidden_act: str | Callable[[Any], Any] = "silu"
    max_position_embeddings: Length = 32768
    initializer_range: NonNegativeFloat = 0.02
    rms_norm_eps: Positive = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    use_sliding_window: bool = False
    sliding_window: AnyLength | None = 4096
    max_window_layers: NonNegative = 28
    layer_types: LayerTypes | None = None
    attention_dropout: Fraction = 0.0
    qkv_bias: bool = True
    decoder_sparse_step: Count = 1
    mlp_only_layers: LayerNumbers | None = None
    moe_intermediate_size: Size = 1408
    shared_expert_intermediate_size: Size = 5632
    num_experts: AnyExperts = 60
    num_experts_per_tok: ExpertCount = 4
    norm_topk_prob: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: NonNegativeFloat = 0.001

    def derive(self) -> None:
        """Set the head size, the key-value heads, the dense layers and each layer's type."""
        if self.head_dim is None:
            self.require(
                self.hidden_size % self.num_attention_heads == 0,
                "hidden_size",
                f"divisible by num_attention_heads={self.num_attention_heads}",
            )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.mlp_only_layers is None:
            self.mlp_only_layers = []
        # Transformers writes 0 for no window.
        if not self.use_sliding_window or self.sliding_window == 0:
            self.sliding_window = None
        if self.layer_types is None:
            slides = self.sliding_window is not None
            self.layer_types = [
                SLIDING if slides and i >= self.max_window_layers else FULL
                for i in range(self.num_hidden_layers)
            ]

    def cache_numbers(self) -> tuple[int, int]:
        """Return the numbers a cache holds per token, and per row beyond its tokens."""
        numbers = 2 * known(self.num_key_value_heads) * known(self.head_dim)
        return numbers * self.num_hidden_layers, 0

    def validate(self) -> None:
        """Check heads, experts, the window and the layers that are named."""
        super().validate()
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        layers, types = self.num_hidden_layers, self.layer_types or []
        activation(self.hidden_act)
        self.require(
            kv_heads is not None and heads % kv_heads == 0,
            "num_key_value_heads",
            f"a divisor of num_attention_heads={heads}",
        )
        self.require((self.head_dim or 1) % 2 == 0, "head_dim", "even, to be rotated in pairs")
        self.require(
            len(types) == layers and set(types) <= {FULL, SLIDING},
            "layer_types",
            f"{FULL!r} or {SLIDING!r} for each of num_hidden_layers={layers}",
        )
        self.require(
            SLIDING not in types or self.sliding_window is not None,
            "sliding_window",
            "set, with use_sliding_window, as layer_types has sliding layers",
        )
        self.require(
            all(index < layers for index in self.mlp_only_layers or []),
            "mlp_only_layers",
            f"indices below num_hidden_layers={layers}",
        )
        self.require(
            self.num_experts == 0 or self.num_experts_per_tok <= self.num_experts,
            "num_experts_per_tok",
            f"at most num_experts={self.num_experts}",
        )

    def windows(self) -> list[int | None]:
        """Return each layer's window, None for full attention."""
        return [self.sliding_window if t == SLIDING else None for t in self.layer_types or []]

    def has_experts(self, layer_idx: int) -> bool:
        """Return whether a layer has experts instead of one MLP."""
        on_step = (layer_idx + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and on_step and layer_idx not in known(self.mlp_only_layers)


class Qwen2MoeRouter(ExpertRouter):
    """Sends each token to the A most probable of E experts.

    It is no `nn.Linear`: what adapts or quantises all linear maps leaves the choice of experts
    as it is, here as in Transformers.
    """

    def __init__(self, config: Qwen2MoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.num_experts = config.num_experts
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    @property
    def active(self) -> int:
        """A, the number of experts per token."""
        return self.top_k

    def score(self, x: Tensor) -> Tensor:
        """Return the logits (N, E) of tokens (N, C)."""
        return linear(x, self.weight)

    def affinities(self, logits: Tensor) -> Tensor:
        """Return the probabilities (N, E) in float32, given the logits (N, E)."""
        return logits.softmax(dim=-1, dtype=torch.float32)

    def choice(self, scores: Tensor) -> Tensor:
        """Return the experts (N, A), given the probabilities (N, E)."""
        return scores.detach().topk(self.top_k, dim=-1).indices

    def weigh(self, scores: Tensor, indices: Tensor) -> Tensor:
        """Return the shares (N, A) of experts (N, A), given the probabilities (N, E)."""
        return expert_shares(scores, indices, normalise=self.norm_topk_prob)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts (N, A) and their shares, given the logits (N, E)."""
        return top_experts(logits, self.top_k, normalise=self.norm_topk_prob)


class Qwen2MoeSparseMoeBlock(ExpertBlock):
    """Routed experts, and a shared expert with a gate per token.

    y = Σ_a p_a · expert_a(x) + σ(g·x) · shared(x), with p the A largest of softmax(W x).
    """

    def __init__(self, config: Qwen2MoeConfig) -> None:
        super().__init__()
        C, act = config.hidden_size, config.hidden_act
        self.gate = Qwen2MoeRouter(config)
        self.experts = Experts(config.num_experts, C, config.moe_intermediate_size, act=act)
        self.shared_expert = GatedMLP(C, config.shared_expert_intermediate_size, act=act)
        self.shared_expert_gate = Linear(C, 1, bias=False)

    def forward(self, hidden_states: Tensor, notes: Notes | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C), and note the router's logits (B, T, E)."""
        B, T, _ = hidden_states.shape
        x = hidden_states.flatten(0, 1)
        logits, shares, indices = self.route(x, notes)
        y: Tensor = self.experts(x, indices, shares)
        y = y + sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        if notes is not None:
            notes.note_routing(torch.unflatten(logits, 0, (B, T)))
        return y.view(B, T, -1)

    def sharding(self) -> Sharding:
        """Sum the output of all experts once; the gate multiplies partial sums."""
        shared = self.shared_expert.sharding("shared_expert_intermediate_size")
        block = Sharding(
            {"shared_expert_gate.weight": WHOLE},
            copies=("experts", "shared_expert"),
            copies_output=("shared_expert_gate",),
            reduces=("",),
        )
        return block | shared.below("shared_expert.")

    def part(self, norm: parts.Norm) -> parts.Part | None:
        """Describe router, experts and gated shared expert to the fused CPU step."""
        router = untouched(self.gate, Qwen2MoeRouter)
        gate = untouched(self.shared_expert_gate, Linear)
        experts, shared = silu_stacks(self.experts), silu_matrices(self.shared_expert)
        if router is None or gate is None or experts is None or shared is None:
            return None
        rules = Rules(active=router.top_k, normalise=router.norm_topk_prob)
        return parts.Routed(
            norm, router.weight, False, rules, None, experts, shared, share=gate.weight
        )


class Qwen2MoeDecoderLayer(FusedLayer):
    """Attention, then experts or an MLP, each on normalised input and added to the residual."""

    def __init__(self, config: Qwen2MoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(
            config.hidden_size,
            config.num_attention_heads,
            known(config.num_key_value_heads),
            known(config.head_dim),
            layer_idx=layer_idx,
            qkv_bias=config.qkv_bias,
            dropout=config.attention_dropout,
            window=config.windows()[layer_idx],
        )
        self.has_experts = config.has_experts(layer_idx)
        self.mlp = (
            Qwen2MoeSparseMoeBlock(config)
            if self.has_experts
            else GatedMLP(config.hidden_size, config.intermediate_size, act=config.hidden_act)
        )
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


class Qwen2MoePreTrainedModel(PreTrainedModel):
    """Base of the Qwen2-MoE models."""

    config_class = Qwen2MoeConfig
    expert_stacks = EXPERT_STACKS
    keep_unquantized = (*PreTrainedModel.keep_unquantized, "mlp.gate", "shared_expert_gate")

    def init_module(self, module: nn.Module) -> None:
        """Initialise the weights of one module, routers included."""
        super().init_module(module)
        if isinstance(module, Qwen2MoeRouter):
            nn.init.normal_(module.weight, std=self.config.initializer_range)


class Qwen2MoeModel(Qwen2MoePreTrainedModel, MoeDecoderModel):
    """The decoder without a head; see `MoeDecoderModel.forward`."""

    def __init__(self, config: Qwen2MoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            Qwen2MoeDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(known(config.head_dim), config.rope())
        self.windows = config.windows()
        self.init_weights()


class Qwen2MoeForCausalLM(Qwen2MoePreTrainedModel, MoeCausalLMHead):
    """The decoder with a language-modelling head."""

    base_class = Qwen2MoeModel
    config: Qwen2MoeConfig

    def aux_loss_weight(self, labels: Tensor | None, output_router_logits: bool) -> float | None:
        """Return the weight of the balance loss if router logits are returned, else None."""
        return self.config.router_aux_loss_coef if output_router_logits else None

    def aux_loss(self, router_logits: tuple[Tensor, ...], mask: Tensor) -> Tensor:
        """Return the load-balancing loss of all layers; see `switch_balance_loss`."""
        return switch_balance_loss(router_logits, self.config.num_experts_per_tok, mask)


class Qwen2MoeForSequenceClassification(Qwen2MoePreTrainedModel, SequenceClassificationHead):
    """The decoder with a head that classifies a sequence by its last token."""

    base_class = Qwen2MoeModel


class Qwen2MoeForTokenClassification(Qwen2MoePreTrainedModel, TokenClassificationHead):
    """The decoder with a head that classifies each token."""

    base_class = Qwen2MoeModel


class Qwen2MoeForQuestionAnswering(Qwen2MoePreTrainedModel, QuestionAnsweringHead):
    """The decoder with a head that finds where an answer starts and ends."""

    base_class = Qwen2MoeModel
    base_model_prefix = "model"
