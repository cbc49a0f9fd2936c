"""What is DeepSeek-V3's alone: multi-token prediction, the router's bias, configs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from comparisons import batch
from families.deepseek import YARN, model_of, mtp_twins, theirs_ahead
from quintet import StaticCache
from quintet.errors import InputError
from quintet.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from support import relative_error

TOLERANCE = 1e-5

V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
MOONLIGHT: dict[str, Any] = {
    **{k: v for k, v in V3.items() if k not in ("quantization_config", "num_nextn_predict_layers")},
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}


@pytest.mark.parametrize(
    ("values", "parameters", "factor"),
    [
        # 671 B, and 11.5 B of the prediction layer beside the shared embedding and head.
        pytest.param(V3, 671.0e9 + 11.5e9, 1.8739, id="V3"),
        pytest.param(MOONLIGHT, 15.96e9, 1.0, id="Moonlight"),
    ],
)
def test_published_configs_give_models_of_the_published_size(
    values: dict[str, Any], parameters: float, factor: float, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = DeepseekV3Config.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    assert model.num_parameters() == pytest.approx(parameters, rel=0.002)
    assert model.model.layers[0].self_attn.scaling == pytest.approx(192**-0.5 * factor, rel=1e-4)
    config.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved.get("quantization_config") == values.get("quantization_config")
    assert saved["ep_size"] == 1


def test_defaults_are_those_of_the_documentation() -> None:
    config = DeepseekV3Config()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (129280, 7168, 61)
    assert (config.n_group, config.topk_group, config.num_experts_per_tok) == (8, 4, 8)
    assert (config.bos_token_id, config.eos_token_id, config.pretraining_tp) == (0, 1, 1)
    assert (config.num_key_value_heads, config.rope_interleave) == (128, True)
    assert (config.num_mtp_layers, config.num_local_experts) == (0, 256)
    assert DeepseekV3Config(num_attention_heads=4).num_key_value_heads == 4
    assert DeepseekV3Config(num_mtp_layers=2).num_nextn_predict_layers == 2


# -- multi-token prediction ------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"rope_scaling": YARN}], ids=["plain", "yarn"])
def test_mtp_logits_equal_transformers(changes: dict[str, Any], depth: int, backend: str) -> None:
    ours, main, ahead = mtp_twins(depth, **changes)
    ours.set_attn_implementation(backend)
    ids, _, _ = batch("none")
    made = ours(ids, output_mtp_logits=True)
    told = theirs_ahead(main, ahead, ids, depth)
    assert len(made.mtp_logits) == depth
    assert relative_error(made.logits, main(ids).logits) < TOLERANCE
    for k, (mine, other) in enumerate(zip(made.mtp_logits, told, strict=True), start=1):
        assert mine.shape == (3, 21, 101)
        assert relative_error(mine[:, : 21 - k], other) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_mtp_logits_of_padded_rows_are_those_of_rows_alone(padding: str) -> None:
    model = model_of("DeepseekV3", num_nextn_predict_layers=2)
    ids, mask, _ = batch(padding)
    mask[0, 4] = 0
    made = model(ids, attention_mask=mask, output_mtp_logits=True).mtp_logits
    for row in range(3):
        kept = mask[row].bool()
        alone = model(ids[row : row + 1, kept], output_mtp_logits=True).mtp_logits
        for k in (1, 2):
            mine, other = made[k - 1][row, kept], alone[k - 1][0]
            assert relative_error(mine[:-k], other[:-k]) < TOLERANCE


@torch.no_grad()
def test_position_t_of_depth_k_reads_tokens_up_to_t_plus_k() -> None:
    model = model_of("DeepseekV3", num_nextn_predict_layers=2)
    ids, _, _ = batch("none")
    changed = ids.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 101
    before = model(ids, output_mtp_logits=True).mtp_logits
    after = model(changed, output_mtp_logits=True).mtp_logits
    for k in (1, 2):
        same = (before[k - 1] == after[k - 1]).all(dim=-1)[0]
        assert bool(same[: 10 - k].all())
        assert not bool(same[10 - k])


def test_every_prediction_layer_learns_and_shares_embedding_and_head() -> None:
    model = model_of("DeepseekV3", num_nextn_predict_layers=2).train()
    ids, _, _ = batch("none")
    out = model(ids, output_mtp_logits=True, labels=ids)
    sum(logits[:, :-2].square().mean() for logits in out.mtp_logits).backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("model.layers.3.", "model.layers.4.")):
            assert parameter.grad is not None, name
    for index in (3, 4):
        layer = model.model.layers[index]
        assert layer.embed_tokens.weight is model.model.embed_tokens.weight
        assert layer.shared_head["head"].weight is model.lm_head.weight
    model.resize_token_embeddings(110)
    assert model(ids, output_mtp_logits=True).mtp_logits[1].shape[-1] == 110
    replaced = torch.nn.Embedding(110, 48)
    model.set_input_embeddings(replaced)
    assert model.model.layers[3].embed_tokens.weight is replaced.weight


@torch.no_grad()
def test_mtp_is_asked_for_and_costs_nothing_otherwise() -> None:
    with_mtp = model_of("DeepseekV3", num_nextn_predict_layers=1)
    ids, _, _ = batch("none")
    assert "mtp_logits" not in with_mtp(ids)
    out = with_mtp(ids, output_mtp_logits=True, logits_to_keep=3, return_dict=False)
    assert out[-1][0].shape == out[0].shape == (3, 3, 101)
    assert len(out) == 3
    cache = StaticCache(with_mtp.config, max_cache_len=40)
    with_mtp(ids, past_key_values=cache, output_mtp_logits=True)
    assert len(cache) == 3
    with pytest.raises(InputError, match="without a past"):
        with_mtp(ids[:, :1], past_key_values=cache, output_mtp_logits=True)
    with pytest.raises(InputError, match="num_nextn_predict_layers=0"):
        model_of("DeepseekV3")(ids, output_mtp_logits=True)


def test_gradient_checkpointing_reaches_prediction_layers() -> None:
    grads = []
    for frugal in (False, True):
        model = model_of("DeepseekV3", num_nextn_predict_layers=1).train()
        if frugal:
            model.gradient_checkpointing_enable()
        ids = torch.arange(1, 10)[None]
        model(ids, output_mtp_logits=True).mtp_logits[0].square().mean().backward()
        grads.append(model.model.layers[3].eh_proj.weight.grad)
    assert torch.allclose(*grads)


# -- the router's bias ---------------------------------------------------------------------------


def test_the_bias_stays_in_float32_whatever_the_model_is_cast_to() -> None:
    model = model_of("DeepseekV3")
    gate = model.model.layers[1].mlp.gate
    before = gate.e_score_correction_bias.clone()
    model.bfloat16()
    assert gate.weight.dtype == torch.bfloat16
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(gate.e_score_correction_bias, before)
    model.to("meta")
    assert gate.e_score_correction_bias.is_meta


def test_the_bias_steers_the_choice_and_not_the_weights() -> None:
    model = model_of("DeepseekV3", n_group=1, topk_group=1, norm_topk_prob=False)
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias.zero_()[5] = 10.0
    logits, weights, indices = gate(torch.randn(9, 48))
    assert bool((indices == 5).any(dim=1).all())
    assert torch.allclose(weights, logits.sigmoid().gather(1, indices) * 1.7)


def test_a_checkpoint_cut_to_fewer_layers_comes_without_prediction_layers(tmp_path: Path) -> None:
    whole = model_of("DeepseekV3", num_nextn_predict_layers=1)
    whole.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has no place for"):
        cut = DeepseekV3ForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    assert cut.config.num_nextn_predict_layers == 0
    assert len(cut.model.layers) == 2
    kept = cut.model.layers[1].self_attn.o_proj.weight
    assert torch.equal(kept, whole.model.layers[1].self_attn.o_proj.weight)


# -- the loss of multi-token prediction ------------------------------------------------------


@torch.no_grad()
def test_the_loss_is_the_papers() -> None:
    model, weight = model_of("DeepseekV3", num_nextn_predict_layers=2), 0.3
    ids, T = torch.randint(0, 101, (3, 9)), 9
    out = model(ids, labels=ids, mtp_loss_weight=weight, output_mtp_logits=True)
    depths = []
    for k, logits in enumerate(out.mtp_logits, start=1):
        log_p = logits.float().log_softmax(-1)
        # P[t_i] is of token t_i, at the place that knows the tokens up to i - 1 (eq. 24).
        taken = [log_p[b, i - k - 1, ids[b, i]] for b in range(3) for i in range(k + 1, T)]
        depths.append(-sum(taken) / len(taken))
    assert out.mtp_loss == pytest.approx(float(sum(depths) / 2), rel=1e-5)
    plain = model(ids, labels=ids)
    assert plain.mtp_loss is None
    assert out.loss == pytest.approx(float(plain.loss + weight * out.mtp_loss), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_loss_of_padded_rows_is_that_of_rows_alone(padding: str) -> None:
    model = model_of("DeepseekV3", num_nextn_predict_layers=2)
    ids, mask, _ = batch(padding)
    labels = ids.masked_fill(mask == 0, -100)
    made = model(ids, attention_mask=mask, labels=labels, mtp_loss_weight=1.0).mtp_loss
    alone = [
        model(row[kept][None], output_mtp_logits=True).mtp_logits
        for row, kept in zip(ids, mask.bool(), strict=True)
    ]
    depths = []
    for k in range(2):
        taken = [
            torch.nn.functional.cross_entropy(
                logits[k][0, : -(k + 2)], row[kept][k + 2 :], reduction="none"
            )
            for logits, row, kept in zip(alone, ids, mask.bool(), strict=True)
        ]
        depths.append(torch.cat(taken).mean())
    assert made == pytest.approx(float(sum(depths) / 2), rel=1e-5)


def test_the_loss_reaches_every_parameter_of_the_prediction_layers() -> None:
    model = model_of("DeepseekV3", num_nextn_predict_layers=2)
    ids = torch.randint(0, 101, (4, 12))
    model(ids, labels=ids, mtp_loss_weight=0.1).loss.backward()
    behind = model.model.prediction_layers()
    assert all(p.grad is not None and p.grad.any() for p in behind[0].eh_proj.parameters())
    assert all(p.grad is not None for layer in behind for p in layer.parameters())


def test_a_weight_without_labels_or_below_zero_is_an_error() -> None:
    model, ids = model_of("DeepseekV3", num_nextn_predict_layers=1), torch.tensor([[1, 2, 3]])
    with pytest.raises(InputError, match="needs labels"):
        model(ids, mtp_loss_weight=0.3)
    with pytest.raises(InputError, match="at least 0"):
        model(ids, labels=ids, mtp_loss_weight=-0.3)
    with pytest.raises(InputError, match="num_nextn_predict_layers=0"):
        model_of("DeepseekV3")(ids, labels=ids, mtp_loss_weight=0.3)
