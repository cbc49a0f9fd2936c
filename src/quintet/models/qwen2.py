"""Qwen2 (arXiv:2407.10671): grouped-query attention with biased q, k, v, and a gated MLP.

Also Qwen1.5 (dense), Qwen2.5 and the Qwen distillations of DeepSeek-R1. Legend: docs/notation.md.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from quintet.configuration import PreTrainedConfig
from quintet.configuration.constraints import (
    Fraction,
    HeadSize,
    Layers,
    LayerTypes,
    Length,
    NonNegative,
    NonNegativeFloat,
    Positive,
    Size,
    known,
)
from quintet.layers.attention import Attention
from quintet.layers.context import ForwardContext
from quintet.layers.mlp import GatedMLP
from quintet.layers.norm import RMSNorm
from quintet.layers.rotary import RotaryEmbedding
from quintet.layers.stack import FusedLayer, PartSpec, residuals
from quintet.modeling.base import PreTrainedModel
from quintet.modeling.classification import (
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from quintet.modeling.decoder import DecoderModel
from quintet.modeling.heads import CausalLMHead
from quintet.ops.activations import activation
from quintet.sharding import Sharding

__all__ = [
    "Qwen2Config",
    "Qwen2ForCausalLM",
    "Qwen2ForQuestionAnswering",
    "Qwen2ForSequenceClassification",
    "Qwen2ForTokenClassification",
    "Qwen2Model",
    "Qwen2PreTrainedModel",
]

FULL, SLIDING = "full_attention", "sliding_attention"


class Qwen2Config(PreTrainedConfig):
    """The configuration of a Qwen2 model; the defaults resemble Qwen2-7B-beta.

    Layer i sees a window of `sliding_window` tokens if `use_sliding_window` is set and
    i >= `max_window_layers`; `layer_types` spells that out and wins where a file gives it.
    """

    model_type = "qwen2"
    derived = ("head_dim", "layer_types")
    decides_layer_types = ("max_window_layers", "sliding_window", "use_sliding_window")

    vocab_size: Size = 151936
    hidden_size: Size = 4096
    intermediate_size: Size = 22016
    num_hidden_layers: Layers = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = 32
    head_dim: HeadSize | None = None
    hidden_act: str | Callable[[Any], Any] = "silu"
    max_position_embeddings: Length = 32768
    initializer_range: NonNegativeFloat = 0.02
    rms_norm_eps: Positive = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    use_sliding_window: bool = False
    sliding_window: Length | None = 4096
    max_window_layers: NonNegative = 28
    layer_types: LayerTypes | None = None
    attention_dropout: Fraction = 0.0

    def derive(self) -> None:
        """Set the head size, the key-value heads and the type of each layer."""
        if self.head_dim is None:
            self.require(
                self.hidden_size % self.num_attention_heads == 0,
                "hidden_size",
                f"divisible by num_attention_heads={self.num_attention_heads}",
            )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if not self.use_sliding_window:
            self.sliding_window = None
        elif self.layer_types is None:
            self.require(
                self.sliding_window is not None,
                "sliding_window",
                "a number of tokens, as use_sliding_window is true",
            )
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
        """Check heads, the window and the type of each layer."""
        super().validate()
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        types = self.layer_types or []
        activation(self.hidden_act)
        self.require(
            kv_heads is not None and heads % kv_heads == 0,
            "num_key_value_heads",
            f"a divisor of num_attention_heads={heads}",
        )
        self.require((self.head_dim or 1) % 2 == 0, "head_dim", "even, to be rotated in pairs")
        self.require(
            len(types) == self.num_hidden_layers and set(types) <= {FULL, SLIDING},
            "layer_types",
            f"{FULL!r} or {SLIDING!r} for each of num_hidden_layers={self.num_hidden_layers}",
        )
        self.require(
            SLIDING not in types or self.sliding_window is not None,
            "sliding_window",
            "set, with use_sliding_window, as layer_types has sliding layers",
        )

    def windows(self) -> list[int | None]:
        """Return each layer's window, None for full attention."""
        return [self.sliding_window if t == SLIDING else None for t in self.layer_types or []]


class Qwen2DecoderLayer(FusedLayer):
    """Attention, then the MLP, each on normalised input and added to the residual."""

    def __init__(self, config: Qwen2Config, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(
            config.hidden_size,
            config.num_attention_heads,
            known(config.num_key_value_heads),
            known(config.head_dim),
            layer_idx=layer_idx,
            qkv_bias=True,
            dropout=config.attention_dropout,
            window=config.windows()[layer_idx],
        )
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, act=config.hidden_act)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, context: ForwardContext) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        attended, weights = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), context=context
        )
        context.notes.note_weights(weights)
        hidden_states = hidden_states + attended
        output: Tensor = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + output

    def sharding(self) -> Sharding:
        """Sum the MLP's output over processes."""
        return Sharding(copies=("mlp",), reduces=("mlp",))

    def part_specs(self) -> list[PartSpec] | None:
        """Describe attention and MLP to the fused CPU step."""
        return residuals(
            (self.input_layernorm, self.self_attn), (self.post_attention_layernorm, self.mlp)
        )


class Qwen2PreTrainedModel(PreTrainedModel):
    """Base of the Qwen2 models."""

    config_class = Qwen2Config


class Qwen2Model(Qwen2PreTrainedModel, DecoderModel):
    """The decoder without a head; see `DecoderModel.forward`."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            Qwen2DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(known(config.head_dim), config.rope())
        self.windows = config.windows()
        self.init_weights()


class Qwen2ForCausalLM(Qwen2PreTrainedModel, CausalLMHead):
    """The decoder with a language-modelling head."""

    base_class = Qwen2Model


class Qwen2ForSequenceClassification(Qwen2PreTrainedModel, SequenceClassificationHead):
    """The decoder with a head that classifies a sequence by its last token."""

    base_class = Qwen2Model


class Qwen2ForTokenClassification(Qwen2PreTrainedModel, TokenClassificationHead):
    """The decoder with a head that classifies each token."""

    base_class = Qwen2Model


class Qwen2ForQuestionAnswering(Qwen2PreTrainedModel, QuestionAnsweringHead):
    """The decoder with a head that finds where an answer starts and ends."""

    base_class = Qwen2Model
