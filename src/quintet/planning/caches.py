"""The cache of a model on one device of a split."""

from collections.abc import Sequence
from dataclasses import dataclass

from quintet.configuration import PreTrainedConfig
from quintet.errors import InputError, shown
from quintet.models.deepseek_v2 import DeepseekV2Config
from quintet.models.deepseek_v3 import DeepseekV3Config
from quintet.models.zamba2 import Zamba2Config
from quintet.ops.vector_codes import BITS

_PLAIN = {"float32": 4, "bfloat16": 2, "float16": 2}
CACHE_DTYPES = (*_PLAIN, *(f"int{bits}" for bits in BITS))


@dataclass(frozen=True, slots=True)
class LayerCache:
    """The cache of one layer on one device.

    Attributes:
        numbers: of each token.
        vectors: that these are of, each with a scale where it is kept in few bits.
        state: numbers of each row besides, in float32.
    """

    numbers: int
    vectors: int
    state: int


def cache_layers(config: PreTrainedConfig, tp: int) -> Sequence[LayerCache]:
    """Return each layer's cache on one of `tp` devices.

    Latents are whole on every device; of fewer heads or groups than devices, each device has one.
    """
    attending, recurring = set(config.attention_layers()), set(config.recurrent_layers())
    numbers, vectors = _of_token(config, tp)
    state = _of_row(config, tp) if isinstance(config, Zamba2Config) else 0
    return [
        LayerCache(
            numbers if layer in attending else 0,
            vectors if layer in attending else 0,
            state if layer in recurring else 0,
        )
        for layer in range(config.num_hidden_layers)
    ]


def token_bytes(layer: LayerCache, cache_dtype: str) -> float:
    """Return the bytes a layer keeps of a token.

    Raises:
        InputError: no cache keeps numbers so.
    """
    if cache_dtype in _PLAIN:
        return layer.numbers * _PLAIN[cache_dtype]
    if cache_dtype not in CACHE_DTYPES:
        raise InputError(f"cache dtype {shown(cache_dtype)} has to be one of {CACHE_DTYPES}")
    return layer.numbers * int(cache_dtype.removeprefix("int")) / 8 + 2 * layer.vectors


def draft_bytes(config: PreTrainedConfig, itemsize: int) -> int:
    """Return the bytes of a token that prediction layers keep where they draft for a row.

    They keep what other layers do, never in fewer bits, and read a state and an embedding of each
    token of a prompt once it is done.

    Raises:
        InputError: the model has no prediction layers.
    """
    depth = int(vars(config).get("num_nextn_predict_layers") or 0)
    if not depth:
        raise InputError(
            f"a {config.model_type} without layers of multi-token prediction cannot draft by them; "
            "take speculate='lookup', or 'off'"
        )
    return itemsize * (depth * _of_token(config, 1)[0] + 2 * config.hidden_size)


def _of_token(config: PreTrainedConfig, tp: int) -> tuple[int, int]:
    if isinstance(config, DeepseekV2Config | DeepseekV3Config):
        return config.kv_lora_rank + config.qk_rope_head_dim, 2
    layers = len(config.attention_layers())
    if not layers:
        return 0, 0
    numbers, heads = config.cache_numbers()[0] // layers, int(vars(config)["num_key_value_heads"])
    local_heads = max(heads // tp, 1)
    return numbers // heads * local_heads, 2 * local_heads


def _of_row(config: Zamba2Config, tp: int) -> int:
    inner = config.n_mamba_heads * config.mamba_headdim // tp
    groups = max(config.mamba_ngroups // tp, 1)
    window = (inner + 2 * groups * config.mamba_d_state) * (config.mamba_d_conv - 1)
    return window + inner * config.mamba_d_state
