"""Operations per token of training, the basis of MFU.

Two for each multiplication by a weight forward, and two each for the gradients of its input and of
itself: 6N of N active weights (PaLM, arXiv:2204.02311, appendix B), 4N where these stay as they
are. Beside the weights, forward and twice that backward:

- attention, 2 · heads · (d_qk + d_v) for each token that is seen: (T + 1) / 2 of T on average, in
  a window fewer. Of latent attention d_qk = nope + rope, for it is trained with keys and values
  expanded;
- Mamba-2's recurrence, 4 · heads · head_dim · state.

Of experts the chosen ones count, of prediction layers all where they are trained. Norms,
activations, the optimiser, and what recomputation does once more are not counted.
"""

import torch

from quintet.auto import AutoModelForCausalLM
from quintet.configuration import PreTrainedConfig
from quintet.measurement.floors import learned_products, token_products
from quintet.modeling.heads import CausalLMHead
from quintet.models.deepseek_v2 import DeepseekV2Config
from quintet.models.deepseek_v3 import DeepseekV3Config
from quintet.models.qwen2 import Qwen2Config
from quintet.models.qwen2_moe import Qwen2MoeConfig
from quintet.models.zamba2 import Zamba2Config


class TrainingFlops:
    """The operations of one token of a training, whatever its rows are.

    Args:
        model: what is trained, as it is trained: with its adapters, and what is frozen frozen.
        ahead: whether the prediction layers are trained, too.
    """

    def __init__(self, model: CausalLMHead, ahead: bool = False) -> None:
        # Quantised weights do not have their numbers' count; those of the config do.
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(model.config)
        assert isinstance(plain, CausalLMHead)
        # Of a model whose layers are in several processes, those of all count.
        learned = learned_products(model if model.stage is None else plain, ahead)
        added = learned if model.adapters is not None else 0.0
        self._weights = 4 * token_products(plain, ahead) + 2 * learned + 4 * added
        self._config, self._ahead = model.config, ahead

    def of_token(self, context: int) -> float:
        """Return the operations of a token in rows of `context` tokens, on average."""
        attention, recurrence = _beside(self._config, context, self._ahead)
        return self._weights + 3 * (attention + recurrence)


def attention_flops(config: PreTrainedConfig, seen: float) -> float:
    """Return the attention operations of a token that sees this many, forward."""
    # A row of 2n - 1 tokens has its tokens see n on average.
    return sum(_beside(config, max(1, round(2 * seen - 1)), False))


def _beside(config: PreTrainedConfig, context: int, ahead: bool) -> tuple[float, float]:
    """Return the operations of a token's attention, and of its recurrence, forward."""
    if isinstance(config, DeepseekV2Config | DeepseekV3Config):
        layers = config.num_hidden_layers
        if ahead and isinstance(config, DeepseekV3Config):
            layers += config.num_nextn_predict_layers
        size = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
        return 2 * layers * size * _seen(context, None), 0.0
    if isinstance(config, Zamba2Config):
        inner = config.n_mamba_heads * config.mamba_headdim
        size = config.num_attention_heads * 2 * config.head_dim
        attention = 2 * len(config.hybrid_layer_ids) * size * _seen(context, None)
        return attention, 4.0 * config.num_hidden_layers * inner * config.mamba_d_state
    assert isinstance(config, Qwen2Config | Qwen2MoeConfig)
    size = 2 * config.num_attention_heads * (config.head_dim or 0)
    return 2 * size * sum(_seen(context, window) for window in config.windows()), 0.0


def _seen(context: int, window: int | None) -> float:
    """Return the mean number of tokens that one of `context` attends to."""
    width = min(window or context, context)
    return width - width * (width - 1) / (2 * context)
