"""Operations of a training's token: what PyTorch counts, where it can."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conformance.families import FAMILIES
from quintet import LoraConfig
from quintet.measurement.floors import token_products
from quintet.measurement.flops import TrainingFlops

QWEN2, QWEN2_MOE, DEEPSEEK_V2, DEEPSEEK_V3, ZAMBA2 = FAMILIES


def counted(model: Any, tokens: int) -> tuple[float, float]:
    """Return what PyTorch counts, forward and backward; it knows no masks, so all see all."""
    ids = torch.arange(3, 3 + tokens)[None]
    with FlopCounterMode(display=False) as forward:
        logits = model.train()(ids, use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_a_dense_model_takes_what_pytorch_counts() -> None:
    model, T = QWEN2.model_of(attn_implementation="eager"), 12
    forward, backward = counted(model, T)
    own = TrainingFlops(model)
    # What T tokens see of each other if nothing is hidden: T where (T + 1) / 2 are needed.
    attention = own.of_token(2) - own.of_token(1)
    assert T * (own.of_token(1) + 2 * (T - 1) * attention) == forward + backward
    assert backward == 2 * forward


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_weights_that_stay_take_no_gradient(family: Any) -> None:
    model = family.model_of()
    products, full = token_products(model), TrainingFlops(model).of_token(8)
    model.requires_grad_(False)
    assert full - TrainingFlops(model).of_token(8) == pytest.approx(2 * products)


def test_adapters_add_six_a_weight() -> None:
    model = QWEN2.model_of()
    products, full = token_products(model), TrainingFlops(model).of_token(8)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    added = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert TrainingFlops(model).of_token(8) == full - 2 * products + 6 * added


def test_a_prediction_layer_is_a_layer_and_a_head() -> None:
    model = DEEPSEEK_V3.model_of(num_nextn_predict_layers=1, num_hidden_layers=2)
    plain, ahead = TrainingFlops(model), TrainingFlops(model, ahead=True)
    config, layer = model.config, model.model.layers[2]
    idle = 1 - config.num_experts_per_tok / config.n_routed_experts
    experts = sum(p.numel() for p in layer.mlp.experts.parameters())
    # Its embedding and head are the model's own.
    shared = {id(model.model.embed_tokens.weight), id(model.lm_head.weight)}
    own = [p for p in layer.parameters() if p.ndim > 1 and id(p) not in shared]
    matrices = sum(p.numel() for p in own) - idle * experts
    head = model.lm_head.weight.numel()
    attention = plain.of_token(3) - plain.of_token(1)
    assert ahead.of_token(1) - plain.of_token(1) == pytest.approx(
        6 * (matrices + head) + attention / 2, rel=1e-9
    )


def test_latent_attention_is_counted_expanded() -> None:
    model = DEEPSEEK_V3.model_of()
    config, own = model.config, TrainingFlops(model)
    size = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    each = 2 * config.num_hidden_layers * config.num_attention_heads * size
    assert own.of_token(9) - own.of_token(1) == 3 * each * 4


def test_a_window_is_all_that_a_token_sees() -> None:
    model = QWEN2_MOE.model_of(
        use_sliding_window=True, sliding_window=4, max_window_layers=0, layer_types=None
    )
    own = TrainingFlops(model)
    each = own.of_token(2) - own.of_token(1)
    # Rows of 8 see 1, 2, 3, 4, 4, 4, 4, 4.
    assert own.of_token(8) - own.of_token(1) == pytest.approx(2 * each * (26 / 8 - 1))


def test_the_recurrence_of_a_state_is_counted() -> None:
    model = ZAMBA2.model_of()
    config = model.config
    inner = config.n_mamba_heads * config.mamba_headdim
    recurrence = 12 * config.num_hidden_layers * inner * config.mamba_d_state
    attention = 6 * len(config.hybrid_layer_ids) * config.num_attention_heads * 2 * config.head_dim
    weights = 6 * token_products(model)
    assert TrainingFlops(model).of_token(1) == pytest.approx(weights + recurrence + attention)
