"""What is DeepSeek-V2's alone: its router's normalisation, balance loss, dense models, configs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from comparisons import batch
from families.deepseek import GROUPS, config_of, model_of
from quintet.models.deepseek_v2 import DeepseekV2Config, DeepseekV2ForCausalLM
from support import relative_error

LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V2: dict[str, Any] = {
    **LITE,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}


@pytest.mark.parametrize(
    ("values", "parameters"),
    [pytest.param(LITE, 15.7e9, id="V2-Lite"), pytest.param(V2, 235.7e9, id="V2")],
)
def test_published_configs_give_models_of_the_published_size(
    values: dict[str, Any], parameters: float, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = DeepseekV2Config.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(config)
    assert model.num_parameters() == pytest.approx(parameters, rel=0.002)
    attention = model.model.layers[0].self_attn
    assert attention.scaling == pytest.approx(192**-0.5 * 1.5896, rel=1e-4)
    assert config.ep_size == 1
    config.save_pretrained(tmp_path / "again")
    again = DeepseekV2Config.from_pretrained(tmp_path / "again")
    assert again.to_dict() == config.to_dict()
    assert again.name_or_path == str(tmp_path / "again")


def test_defaults_are_those_of_the_documentation() -> None:
    config = DeepseekV2Config()
    assert (config.vocab_size, config.max_position_embeddings) == (32000, 2048)
    assert (config.moe_intermediate_size, config.aux_loss_alpha) == (1407, 0.001)
    assert (config.n_routed_experts, config.num_experts, config.num_experts_per_tok) == (
        64,
        64,
        None,
    )
    assert (config.num_key_value_heads, config.qk_head_dim, config.head_dim) == (32, 192, 64)
    assert DeepseekV2Config(num_experts=8).n_routed_experts == 8


@torch.no_grad()
@pytest.mark.parametrize("absent", ["num_experts_per_tok", "n_routed_experts"])
def test_no_experts_per_token_is_a_dense_model(absent: str) -> None:
    model = model_of("DeepseekV2", **{absent: None})
    assert not [name for name in model.state_dict() if "experts" in name or "mlp.gate." in name]
    # Transformers documents this and fails; its model with all layers dense is the same one.
    values = {**config_of("DeepseekV2").to_dict(), "first_k_dense_replace": 3}
    theirs = transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**values)).eval()
    theirs.load_state_dict(model.state_dict())
    ids, mask, _ = batch("none")
    assert relative_error(model(ids).logits, theirs(ids, attention_mask=mask).logits) < 1e-5
    assert "router_logits" not in model(ids)


@torch.no_grad()
@pytest.mark.parametrize("groups", [{}, GROUPS], ids=["greedy", "groups"])
def test_normalised_weights_are_not_scaled(groups: dict[str, Any]) -> None:
    """Transformers ignores `norm_topk_prob`; DeepSeek's own code normalises in place of scaling."""
    model = model_of("DeepseekV2", norm_topk_prob=True, routed_scaling_factor=16.0, **groups)
    gate = model.model.layers[1].mlp.gate
    logits, weights, indices = gate(torch.randn(7, 48))
    expected = logits.softmax(-1).gather(1, indices)
    assert torch.allclose(weights, expected / expected.sum(-1, keepdim=True))
    assert torch.allclose(weights.sum(-1), torch.ones(7))


def test_moe_layer_freq_leaves_layers_dense_in_between() -> None:
    model = model_of("DeepseekV2", moe_layer_freq=2, first_k_dense_replace=0)
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [True, False, True]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("seq_aux", [True, False])
def test_training_adds_the_balance_of_each_layer(seq_aux: bool, padding: str) -> None:
    changes = {"seq_aux": seq_aux, "aux_loss_alpha": 0.5, **GROUPS}
    model = model_of("DeepseekV2", **changes).train()
    ids, mask, _ = batch(padding)
    out = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    without = model.eval()(ids, attention_mask=mask, labels=ids)
    assert without.aux_loss is None

    expected = 0.0
    routed = [logits.detach() for logits in out.router_logits]
    for layer, logits in zip(model.model.layers[1:], routed, strict=True):
        chosen = torch.zeros_like(logits).scatter(1, layer.mlp.gate.choose(logits)[0], 1.0)
        scores, chosen = (x.view(3, 21, 8) for x in (logits.softmax(-1), chosen))
        rows = [(scores[b][mask[b] == 1], chosen[b][mask[b] == 1]) for b in range(3)]
        if not seq_aux:
            rows = [tuple(torch.cat(parts) for parts in zip(*rows, strict=True))]
        # f_i = E / (A·T) Σ_t 1, P_i = 1/T Σ_t s, the loss Σ_i f_i P_i (§2.2.3).
        losses = [((c.sum(0) * 8 / (3 * len(c))) * s.mean(0)).sum() for s, c in rows]
        expected += float(sum(losses)) / len(losses)
    assert out.aux_loss.item() == pytest.approx(expected, rel=1e-5)
    assert out.loss.item() == pytest.approx(without.loss.item() + 0.5 * expected, rel=1e-5)

    out.aux_loss.backward()
    gate = model.model.layers[1].mlp.gate.weight
    assert gate.grad is not None
    assert float(gate.grad.abs().max()) > 0


def test_the_balance_is_shown_when_asked_for_and_adds_nothing_outside_training() -> None:
    model = model_of("DeepseekV2")
    ids, _, _ = batch("none")
    shown = model(ids, labels=ids, output_router_logits=True)
    assert shown.aux_loss is not None
    assert torch.equal(shown.loss, model(ids, labels=ids).loss)
    still = model_of("DeepseekV2", aux_loss_alpha=0.0).train()
    assert still(ids, labels=ids).aux_loss is None
    # A cached step has fewer router logits than its mask has columns.
    past = model(ids[:, :-1]).past_key_values
    step = model(
        ids[:, -1:],
        attention_mask=torch.ones(3, 21),
        past_key_values=past,
        output_router_logits=True,
    )
    assert bool(step.aux_loss.isfinite())
