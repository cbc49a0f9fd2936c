"""Zamba2 (arXiv:2411.15242): layers of Mamba-2, some with a transformer block they share.

There are `num_mem_blocks` transformer blocks, and the k-th hybrid layer uses the k-th of them,
round and round. A shared block sees the hidden states beside the token embeddings, 2C wide, and
has small adapters of its own for each layer that uses it. Legend: docs/notation.md.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from quintet.cache import DynamicCache
from quintet.configuration import PreTrainedConfig
from quintet.configuration.constraints import (
    AnyId,
    AnyIds,
    Bounds,
    Fraction,
    Layers,
    LayerTypes,
    Length,
    NonNegative,
    NonNegativeFloat,
    Positive,
    Size,
    known,
)
from quintet.configuration.rope import RopeParameters
from quintet.errors import ConfigError, shown
from quintet.kernels import parts
from quintet.layers.context import ForwardContext
from quintet.layers.linear import Linear
from quintet.layers.mamba2 import Mamba2
from quintet.layers.norm import RMSNorm
from quintet.layers.plain import untouched
from quintet.layers.rotary import RotaryEmbedding
from quintet.layers.shared_transformer import SharedAttention, SharedMLP, SharedTransformer
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
from quintet.sharding import WHOLE, Sharding

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
HYBRIDS = (6, 12, 18, 24, 30, 36, 42, 47, 51)  # of Zamba2-2.7B
LONG_CONTEXT, LONGER = 16384, 8
# Keys that checkpoints in their authors' first format have in place of others.
FORMER_KEYS = {
    "state_size": "mamba_d_state",
    "conv_dimension": "mamba_d_conv",
    "lora_rank": "adapter_rank",
    "use_shared_block_lora": "use_shared_attention_adapter",
}
# Files state these too, and they follow from other keys.
FOLLOWING = ("head_dim", "mamba_headdim", "hybrid_layer_ids", "attention_hidden_size")


class Zamba2Config(PreTrainedConfig):
    """The configuration of a Zamba2 model; the defaults resemble Zamba2-2.7B.

    `layers_block_type` says of each layer whether it is "mamba" (also called "linear_attention")
    or "hybrid". A step size is clamped to `time_step_limit`, by default at least `time_step_min`,
    at every token, in a prompt and one by one. `num_logits_to_keep` and `use_mem_eff_path` are
    kept for others: generation computes the logits it needs, on the one path there is.
    """

    model_type = "zamba2"
    aliases: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"layer_types": "layers_block_type", "attention_head_dim": "head_dim"}
    )

    vocab_size: Size = 32000
    max_position_embeddings: Length = 4096
    hidden_size: Size = 2560
    num_hidden_layers: Layers = 54
    layers_block_type: LayerTypes | None = None
    mamba_d_state: Size = 64
    mamba_d_conv: Size = 4
    mamba_expand: Annotated[float, Bounds(0, 1024, open_below=True)] = 2
    mamba_ngroups: Size = 1
    time_step_min: Positive = 0.001
    time_step_max: Positive = 0.1
    time_step_floor: Positive = 1e-4
    time_step_limit: list[Any] | None = None
    n_mamba_heads: Size = 8
    use_conv_bias: bool = True
    chunk_size: Length = 256
    use_mem_eff_path: bool = False
    add_bias_linear: bool = False
    intermediate_size: Size | None = None
    hidden_act: str | Callable[[Any], Any] = "gelu"
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = None
    attention_dropout: Fraction = 0.0
    num_mem_blocks: Size = 1
    use_shared_attention_adapter: bool = False
    adapter_rank: Size = 128
    use_mem_rope: bool = False
    initializer_range: NonNegativeFloat = 0.02
    rms_norm_eps: Positive = 1e-5
    use_cache: bool = True
    num_logits_to_keep: NonNegative | None = 1
    pad_token_id: AnyId | None = 0
    bos_token_id: AnyId | None = 1
    eos_token_id: AnyId | AnyIds | None = 2
    use_long_context: bool = False
    tie_word_embeddings: bool = True

    def __init__(self, **values: Any) -> None:
        values = self._renamed(values)
        former = [old for old, new in FORMER_KEYS.items() if old in values and new not in values]
        kinds = values.get("layers_block_type")
        if former or (isinstance(kinds, list | tuple) and {"m", "g"} & {*map(str, kinds)}):
            raise ConfigError(
                f"this config.json of Zamba2 is in its authors' first format "
                f"({', '.join(former) or 'layers_block_type of m and g'}); use a later revision of "
                "the checkpoint, with layers_block_type of 'mamba' and 'hybrid'"
            )
        stated = {key: values.pop(key) for key in FOLLOWING if key in values}
        super().__init__(**values)
        for key, value in stated.items():
            if value != (follows := getattr(self, key)):
                raise ConfigError(
                    f"Zamba2Config: {key}={shown(value)} follows from other keys, which make it "
                    f"{follows!r}; change those"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from the content of a file; with fewer layers, keep the first ones."""
        values = {k: v for k, v in cls._renamed(values).items() if k not in FOLLOWING}
        if isinstance(kinds := values.get("layers_block_type"), list):
            values["layers_block_type"] = kinds[: overrides.get("num_hidden_layers")]
        return super().from_dict(values, **overrides)

    def derive(self) -> None:
        """Set the type of each layer, the key-value heads and the width of the MLP."""
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

    def cache_numbers(self) -> tuple[int, int]:
        """Return the numbers a cache holds per token, and per row beyond its tokens."""
        inner, N = int(self.mamba_expand * self.hidden_size), self.mamba_d_state
        window = (inner + 2 * self.mamba_ngroups * N) * (self.mamba_d_conv - 1)
        keys = 2 * known(self.num_key_value_heads) * self.head_dim * len(self.hybrid_layer_ids)
        return keys, (window + inner * N) * self.num_hidden_layers

    def validate(self) -> None:
        """Check divisibility of heads and groups, and the type of each layer."""
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
            self.head_dim <= 2**16,
            "num_attention_heads",
            f"such that the size of a head, {self.head_dim}, is at most {2**16}",
        )
        self.require(
            not self.use_mem_rope or self.head_dim % 2 == 0,
            "use_mem_rope",
            f"false, as head_dim={self.head_dim} is odd and cannot be rotated in pairs",
        )
        most = self.time_step_max
        self.require(self.time_step_min <= most, "time_step_min", f"at most time_step_max={most}")
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

    @property
    def mamba_headdim(self) -> int:
        """The size of a Mamba-2 head."""
        return int(self.mamba_expand * self.hidden_size) // self.n_mamba_heads

    @property
    def hybrid_layer_ids(self) -> list[int]:
        """The layers with a shared block."""
        return [i for i, kind in enumerate(self.layers_block_type or []) if kind == HYBRID]

    def rope(self) -> RopeParameters:
        """Return the rotary parameters; `use_long_context` raises the base."""
        rope, D = super().rope(), self.head_dim
        if not (self.use_long_context and self.use_mem_rope) or D == 2:
            return rope
        return replace(rope, rope_theta=rope.rope_theta * LONGER ** (D / (D - 2)))

    def attention_layers(self) -> Sequence[int]:
        """Return the layers that keep keys and values between steps."""
        return self.hybrid_layer_ids

    def recurrent_layers(self) -> Sequence[int]:
        """Return the layers with a recurrent state: all."""
        return range(self.num_hidden_layers)


def shared_transformer(config: Zamba2Config, uses: Sequence[int]) -> SharedTransformer:
    """Make the transformer block of the hybrid layers `uses`."""
    C, rank = config.hidden_size, config.adapter_rank
    attention = SharedAttention(
        C,
        config.num_attention_heads,
        known(config.num_key_value_heads),
        config.head_dim,
        uses=uses,
        adapter_rank=rank if config.use_shared_attention_adapter else None,
        rotates=config.use_mem_rope,
        dropout=config.attention_dropout,
    )
    mlp = SharedMLP(
        C,
        known(config.intermediate_size),
        uses=uses,
        adapter_rank=rank,
        act=config.hidden_act,
        bias=config.add_bias_linear,
    )
    return SharedTransformer(attention, mlp, C, config.rms_norm_eps)


class Zamba2MambaDecoderLayer(FusedLayer):
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
        self, hidden_states: Tensor, context: ForwardContext, extra: Tensor | None = None
    ) -> Tensor:
        """Map (B, T, C) to (B, T, C); `extra` joins the input, and not the residual."""
        x = hidden_states if extra is None else hidden_states + extra
        output: Tensor = self.mamba(hidden_states=self.input_layernorm(x), context=context)
        return hidden_states + output

    def part_specs(self, *, after_transformer: bool = False) -> list[PartSpec] | None:
        """Describe the mixer to the fused CPU step."""
        source = parts.Source.SUM if after_transformer else parts.Source.HIDDEN
        return residuals((self.input_layernorm, self.mamba), source=source)


class Zamba2HybridLayer(FusedLayer):
    """A shared block and its output projection, then Mamba-2 on the sum with the input."""

    def __init__(
        self, config: Zamba2Config, layer_idx: int, shared: SharedTransformer, use: int
    ) -> None:
        super().__init__()
        self.layer_idx, self.use = layer_idx, use
        self.shared_transformer = shared
        self.linear = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.mamba_decoder = Zamba2MambaDecoderLayer(config, layer_idx)

    def forward(self, hidden_states: Tensor, context: ForwardContext) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        output = self.shared_transformer(
            hidden_states, context=context, layer_idx=self.layer_idx, use=self.use
        )
        out: Tensor = self.mamba_decoder(hidden_states, context=context, extra=self.linear(output))
        return out

    def sharding(self) -> Sharding:
        """Keep the projection whole: its input is a complete sum."""
        return Sharding({"linear.weight": WHOLE})

    def part_specs(self) -> list[PartSpec] | None:
        """Describe the shared block and the mixer to the fused CPU step."""
        decoder = untouched(self.mamba_decoder, Zamba2MambaDecoderLayer)
        shared = self.shared_transformer.part_specs(
            self.linear, layer_idx=self.layer_idx, use=self.use
        )
        mixer = None if decoder is None else decoder.part_specs(after_transformer=True)
        return None if shared is None or mixer is None else [*shared, *mixer]


class Zamba2PreTrainedModel(PreTrainedModel):
    """Base of the Zamba2 models."""

    config_class = Zamba2Config
    keep_in_fp32 = (".A_log", ".D", ".dt_bias")

    def tied_names(self) -> dict[str, str]:
        """Also return the further names of a shared block's parameters."""
        names = super().tied_names()
        prefix = "" if self.base_model is self else f"{self.base_model_prefix}."
        config = cast("Zamba2Config", self.config)
        hybrids, blocks = config.hybrid_layer_ids, config.num_mem_blocks
        for use in range(blocks, len(hybrids)):
            first, second = (
                f"{prefix}layers.{hybrids[i]}.shared_transformer" for i in (use % blocks, use)
            )
            for leaf in self.get_submodule(first).state_dict():
                names[f"{second}.{leaf}"] = f"{first}.{leaf}"
        return names

    def init_module(self, module: nn.Module) -> None:
        """Initialise one module; step sizes of Mamba-2 are drawn log-uniformly."""
        super().init_module(module)
        if isinstance(module, Mamba2):
            config = cast("Zamba2Config", self.config)
            module.fill_scalars()
            module.draw_step_sizes(
                config.time_step_min, config.time_step_max, config.time_step_floor
            )


class Zamba2Model(Zamba2PreTrainedModel, DecoderModel):
    """The decoder without a head; see `DecoderModel.forward`."""

    def __init__(self, config: Zamba2Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        hybrids, blocks = config.hybrid_layer_ids, config.num_mem_blocks
        shared = [
            shared_transformer(config, range(first, len(hybrids), blocks))
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

    @property
    def final_norm(self) -> nn.Module:
        """The norm behind the last layer."""
        return self.final_layernorm


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
    """`DynamicCache` under the constructor that older code calls.

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
