"""What is Qwen2-MoE's alone: config, windows in every backend, the balance of the experts."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from comparisons import batch
from families.qwen2_moe import SLIDING, VARIANTS, model_of, small_config, twins
from quintet import Cache, DynamicCache, StaticCache
from quintet.errors import ConfigError
from quintet.layers.mlp import GatedMLP
from quintet.models.qwen2_moe import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen2MoeModel
from quintet.ops.attention import eager
from quintet.ops.masks import AttentionMask, causal_mask
from quintet.ops.moe import switch_balance_loss
from support import relative_error

TOLERANCE = 1e-5
FULL, SLIDES = "full_attention", "sliding_attention"


# -- configuration ---------------------------------------------------------------------------


def test_defaults_are_those_of_the_documentation() -> None:
    config = Qwen2MoeConfig()
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (151936, 2048, 5632)
    assert (config.num_hidden_layers, config.num_attention_heads) == (24, 16)
    assert (config.num_key_value_heads, config.hidden_act) == (16, "silu")
    assert (config.max_position_embeddings, config.rms_norm_eps) == (32768, 1e-6)
    assert (config.initializer_range, config.attention_dropout) == (0.02, 0.0)
    assert (config.use_cache, config.tie_word_embeddings) == (True, False)
    assert (config.use_sliding_window, config.max_window_layers) == (False, 28)
    assert Qwen2MoeConfig.default("sliding_window") == 4096
    assert (config.decoder_sparse_step, config.mlp_only_layers) == (1, [])
    assert (config.moe_intermediate_size, config.shared_expert_intermediate_size) == (1408, 5632)
    assert (config.num_experts_per_tok, config.num_experts, config.norm_topk_prob) == (4, 60, False)
    assert (config.output_router_logits, config.router_aux_loss_coef) == (False, 0.001)
    assert config.qkv_bias is True
    assert config.rope_theta == 10_000
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (None, None, None)


PUBLISHED = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "qwen2_moe",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
    "architectures": ["Qwen2MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
A2_7B = {
    **PUBLISHED,
    "transformers_version": "4.39.0.dev0",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
}
A14B = {
    **PUBLISHED,
    "transformers_version": "4.40.1",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "mlp_only_layers": [],
    "moe_intermediate_size": 2560,
    "num_attention_heads": 28,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "shared_expert_intermediate_size": 20480,
    "sliding_window": 65536,
}


@pytest.mark.parametrize(
    ("values", "total", "active"),
    [
        pytest.param(A2_7B, 14.3e9, 2.7e9, id="Qwen1.5-MoE-A2.7B"),
        pytest.param(A14B, 57.4e9, 14.2e9, id="Qwen2-57B-A14B"),
    ],
)
def test_published_models_have_their_published_sizes(
    values: dict[str, Any], total: float, active: float
) -> None:
    config = Qwen2MoeConfig.from_dict(values)
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(config)
    assert model.num_parameters() == pytest.approx(total, rel=0.01)
    idle = 1 - config.num_experts_per_tok / config.num_experts
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert model.num_parameters() - idle * experts == pytest.approx(active, rel=0.02)
    assert config.torch_dtype == torch.bfloat16
    assert config.layer_types == [FULL] * config.num_hidden_layers


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, [True] * 4, id="all"),
        pytest.param({"decoder_sparse_step": 2}, [False, True, False, True], id="step"),
        pytest.param({"mlp_only_layers": [0, 3]}, [False, True, True, False], id="named"),
        pytest.param(
            {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
            [False, False, False, True],
            id="both",
        ),
        pytest.param({"num_experts": 0}, [False] * 4, id="none"),
    ],
)
def test_which_layers_have_experts(changes: dict[str, Any], expected: list[bool]) -> None:
    config = small_config(num_hidden_layers=4, **changes)
    model = Qwen2MoeModel(config)
    assert [not isinstance(layer.mlp, GatedMLP) for layer in model.layers] == expected


def test_the_first_layers_see_all_and_the_rest_slides() -> None:
    config = small_config(use_sliding_window=True, sliding_window=8, max_window_layers=2)
    assert config.layer_types == [FULL, FULL, SLIDES]
    assert config.windows() == [None, None, 8]
    given = small_config(use_sliding_window=True, layer_types=[SLIDES, FULL, FULL])
    assert given.windows() == [4096, None, None]
    # Transformers writes 0 for no window.
    assert small_config(sliding_window=0).windows() == [None] * 3
    assert small_config(use_sliding_window=True, sliding_window=0).windows() == [None] * 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        pytest.param(
            {"num_experts_per_tok": 7}, ["num_experts_per_tok=7", "num_experts=6"], id="A"
        ),
        pytest.param({"num_experts": -1}, ["num_experts=-1"], id="E"),
        pytest.param({"mlp_only_layers": [3]}, ["mlp_only_layers=[3]", "below"], id="layer"),
        pytest.param({"mlp_only_layers": True}, ["mlp_only_layers=True", "list"], id="flag"),
        pytest.param({"decoder_sparse_step": 0}, ["decoder_sparse_step=0"], id="step"),
        pytest.param({"layer_types": [FULL]}, ["layer_types", "num_hidden_layers=3"], id="types"),
        pytest.param({"layer_types": [SLIDES] * 3}, ["sliding_window"], id="window"),
        pytest.param({"num_key_value_heads": 3}, ["num_key_value_heads=3"], id="kv"),
        pytest.param({"hidden_act": "swosh"}, ["swosh", "silu"], id="act"),
    ],
)
def test_a_config_that_breaks_a_rule_is_named(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        small_config(**values)
    for word in words:
        assert word in str(caught.value)


# -- caches ----------------------------------------------------------------------------------


def caches(model: Qwen2MoeForCausalLM) -> dict[str, Cache]:
    return {
        "growing": DynamicCache(model.config),
        "preallocated": StaticCache(model.config, max_cache_len=40),
    }


def stand_in_for_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a slow flash_attn in place: the arguments of the real one, in the formula of `eager`."""

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
    ) -> Tensor:
        assert causal
        assert dropout_p == 0
        T, S = q.shape[1], k.shape[1]
        window = None if window_size == (-1, -1) else window_size[0] + 1
        mask = causal_mask(torch.arange(S - T, S)[None], S, window)
        seen = AttentionMask(mask, False, S - T, window)
        out, _ = eager(
            *(x.transpose(1, 2) for x in (q, k, v)), seen, scale=softmax_scale, dropout=0
        )
        return out.transpose(1, 2)

    package = ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None)
    monkeypatch.setattr(package, "flash_attn_func", flash_attn_func, raising=False)
    monkeypatch.setitem(sys.modules, "flash_attn", package)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash_attention_2"])
def test_the_window_holds_in_every_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers does not tell the flash kernel of it."""
    stand_in_for_flash(monkeypatch)
    model = model_of(
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=0,
        num_hidden_layers=1,
        attn_implementation=backend,
    ).bfloat16()
    ids = torch.randint(101, (1, 10))
    other = ids.clone()
    other[0, 5] = (other[0, 5] + 1) % 101
    changed = (model(ids).logits != model(other).logits).any(-1)[0]
    assert changed.tolist() == [False] * 5 + [True] * 4 + [False]
    past = model(ids[:, :9]).past_key_values
    beyond = model(other[:, :9]).past_key_values
    steps = [model(ids[:, 9:], past_key_values=cache).logits for cache in (past, beyond)]
    assert torch.equal(*steps)


# -- the balance of the experts --------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["growing", "preallocated"])
@pytest.mark.parametrize("whole_mask", [True, False])
def test_balance_of_a_cached_step_is_of_its_own_tokens(kind: str, whole_mask: bool) -> None:
    """Transformers weighs the step's tokens by the mask of all tokens so far, and fails."""
    model = model_of(output_router_logits=True)
    ids = torch.randint(101, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3], mask[1, 10] = 0, 0
    cache = caches(model)[kind]
    first = model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
    told = mask if whole_mask else mask[:, 8:]
    made = model(ids[:, 8:], attention_mask=told, past_key_values=cache)
    together = model(ids, attention_mask=mask, use_cache=False)
    for out, part in ((first, slice(0, 8)), (made, slice(8, 12))):
        expected = [x.unflatten(0, (2, 12))[:, part].flatten(0, 1) for x in together.router_logits]
        kept = mask[:, part].bool().flatten()
        for mine, other in zip(out.router_logits, expected, strict=True):
            assert relative_error(mine[kept], other[kept]) < TOLERANCE
        loss = switch_balance_loss(expected, 2, mask[:, part])
        assert relative_error(out.aux_loss, loss) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_generation_goes_on_with_router_logits_in_the_config(implementation: str) -> None:
    plain, routed = model_of(), model_of(output_router_logits=True)
    ids = torch.randint(101, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    inputs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    made = routed.generate(ids, cache_implementation=implementation, **inputs)
    assert torch.equal(made, plain.generate(ids, **inputs))


def test_balance_joins_the_loss_with_its_weight() -> None:
    model = model_of(router_aux_loss_coef=0.5)
    ids = torch.randint(101, (2, 9))
    plain = model(ids, labels=ids)
    assert plain.aux_loss is None
    assert plain.router_logits is None
    routed = model(ids, labels=ids, output_router_logits=True)
    assert list(routed)[:3] == ["loss", "aux_loss", "logits"]
    assert relative_error(routed.loss, plain.loss + 0.5 * routed.aux_loss) < 1e-6
    model.zero_grad()
    routed.aux_loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().max() > 0
    without = model(ids, output_router_logits=True)
    assert without.loss is None
    assert relative_error(without.aux_loss, routed.aux_loss) == 0


def test_training_on_the_balance_alone_balances() -> None:
    model = model_of(output_router_logits=True, initializer_range=0.02)
    ids = torch.randint(101, (4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = model(ids).aux_loss.item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(ids).aux_loss
        loss.backward()
        optimizer.step()
    assert before > 2.2
    assert loss.item() < 2.05  # 2 experts a token is the least for equal probabilities


@torch.no_grad()
def test_a_model_without_experts_has_nothing_to_balance() -> None:
    out = model_of(num_experts=0)(torch.tensor([[1, 2]]), output_router_logits=True)
    assert out.aux_loss is None
    assert out.router_logits == ()


@torch.no_grad()
def test_a_4d_mask_counts_every_token_in_the_balance() -> None:
    model = model_of()
    ids = torch.randint(101, (2, 6))
    seen = torch.ones(1, 1, 6, 6).tril().bool()
    made = model(ids, attention_mask=seen, output_router_logits=True).aux_loss
    assert relative_error(made, model(ids, output_router_logits=True).aux_loss) < TOLERANCE


# -- inputs, outputs, training ---------------------------------------------------------------


def test_the_live_state_dict_holds_experts_stacked() -> None:
    model = model_of(num_hidden_layers=1)
    mlp = {name: tuple(t.shape) for name, t in model.model.layers[0].mlp.state_dict().items()}
    assert mlp == {
        "gate.weight": (6, 48),
        "experts.gate_up_proj": (6, 40, 48),
        "experts.down_proj": (6, 48, 20),
        "shared_expert.gate_proj.weight": (28, 48),
        "shared_expert.up_proj.weight": (28, 48),
        "shared_expert.down_proj.weight": (48, 28),
        "shared_expert_gate.weight": (1, 48),
    }
    other = Qwen2MoeForCausalLM(model.config)
    other.load_state_dict(model.state_dict())
    ids = torch.randint(101, (1, 5))
    assert torch.equal(other.eval()(ids).logits, model(ids).logits)


@torch.no_grad()
def test_our_default_of_which_layers_slide_differs_and_is_told_to_transformers() -> None:
    """A saved config says it, so that both compute the same from one file."""
    import json

    config = small_config(**SLIDING)
    written = json.loads(config.to_json_string())
    assert written["layer_types"] == [FULL, SLIDES, SLIDES]
    ours, theirs = twins("Qwen2MoeForCausalLM", SLIDING)
    assert theirs.config.layer_types == ours.config.layer_types
    assert Qwen2MoeConfig.from_dict(written) == config
    again = Qwen2MoeConfig.from_dict(json.loads(theirs.config.to_json_string()))
    assert again.windows() == config.windows()


# -- rounding --------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_bfloat16_stays_within_its_rounding(changes: dict[str, Any]) -> None:
    """With few of the experts active, as models are used."""
    ours, theirs = twins("Qwen2MoeForCausalLM", changes, "eager")
    ids, mask, _ = batch("none")
    exact = theirs(ids, attention_mask=mask).logits
    told = theirs.bfloat16()(ids, attention_mask=mask).logits.float()
    made = ours.bfloat16()(ids, attention_mask=mask).logits.float()
    # A token near the boundary between two experts may take the other one when rounded, here or
    # there or both: what is compared is the typical error, not the largest.
    assert typical(made - exact) < 1.5 * typical(told - exact) + 2**-8 * typical(exact)
    assert typical(made - told) < 0.05 * typical(exact)


def typical(x: Tensor) -> float:
    return float(x.abs().flatten().median())
