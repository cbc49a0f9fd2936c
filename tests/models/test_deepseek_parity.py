"""DeepSeek-V2 and -V3 compute what Transformers computes: forward, backward, with a cache."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.deepseek_support import GROUPS, YARN, absorb, batch, twins
from support import relative_error

TOLERANCE = 1e-5

BOTH: dict[str, dict[str, Any]] = {
    "plain": {},
    "q-direct": {"q_lora_rank": None},
    "biases": {"attention_bias": True},
    "eps": {"rms_norm_eps": 0.05},
    "yarn": {"rope_scaling": YARN},
    "yarn-mscale": {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "yarn-temperature": {"rope_scaling": {**YARN, "mscale": None, "mscale_all_dim": None}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "tied": {"tie_word_embeddings": True},
    "experts-all": {"first_k_dense_replace": 0},
    "experts-none": {"first_k_dense_replace": 3},
    "wide-values": {"v_head_dim": 32, "n_shared_experts": 2},
}
V2: dict[str, dict[str, Any]] = {
    "groups": GROUPS,
    "mlp-bias": {"mlp_bias": True, "n_shared_experts": 2},
    "gelu": {"hidden_act": "gelu"},
}
V3: dict[str, dict[str, Any]] = {
    "rotated-halves": {"rope_interleave": False},
    "unnormalised": {"norm_topk_prob": False},
    "one-group": {"n_group": 1, "topk_group": 1, "rope_theta": 5e4},
    "all-groups": {"n_group": 2, "topk_group": 2},
}
CASES = [
    *(("DeepseekV2", name, values) for name, values in {**BOTH, **V2}.items()),
    *(("DeepseekV3", name, values) for name, values in {**BOTH, **V3}.items()),
]
GRID = [
    pytest.param(family, values, padding, id=f"{family[-2:]}-{name}-{padding}")
    for family, name, values in CASES
    for padding in (("none", "left", "right") if name in ("plain", "groups", "yarn") else ("left",))
]
PADDING = ["none", "left", "right"]
KINDS = ["DeepseekV2", "DeepseekV3"]


def counted_labels(ids: Tensor, mask: Tensor) -> Tensor:
    """Labels of tokens that a token precedes: a prediction made from padding means nothing."""
    labels = ids.masked_fill(mask == 0, -100)
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return labels.masked_fill(before == 0, -100)


@pytest.mark.parametrize("way", ["eager", "sdpa", "absorbed"])
@pytest.mark.parametrize(("family", "changes", "padding"), GRID)
def test_forward_and_gradients_equal_transformers(
    family: str,
    changes: dict[str, Any],
    padding: str,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absorb(monkeypatch, way == "absorbed")
    ours, theirs = twins(family, "ForCausalLM", changes, "sdpa" if way == "absorbed" else way)
    ids, mask, extra = batch(padding)
    labels, kept = counted_labels(ids, mask), mask.bool()
    asked = {"output_hidden_states": True, "output_router_logits": True}

    told = theirs(ids, attention_mask=mask, labels=labels, **asked, **extra)
    made = ours(ids, attention_mask=mask, labels=labels, **asked)
    told.loss.backward()
    made.loss.backward()

    assert relative_error(made.logits[kept], told.logits[kept]) < TOLERANCE
    assert relative_error(made.loss, told.loss) < TOLERANCE
    for mine, other in zip(made.hidden_states, told.hidden_states, strict=True):
        assert relative_error(mine[kept], other[kept]) < TOLERANCE
    for mine, other in zip(made.router_logits, told.router_logits or (), strict=True):
        assert mine.shape == other.shape
        assert relative_error(mine[kept.flatten()], other[kept.flatten()]) < TOLERANCE
    assert_gradients_equal(ours, theirs)


def assert_gradients_equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    other = {name: p.grad for name, p in theirs.named_parameters()}
    scales: dict[str, float] = {}
    for name, grad in other.items():
        assert grad is not None
        part = name.rsplit(".", 2)[0]
        scales[part] = max(scales.get(part, 0.0), float(grad.abs().max()))
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        error = float((parameter.grad - other[name]).abs().max())
        assert error <= TOLERANCE * scales[name.rsplit(".", 2)[0]], name


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("family", KINDS)
def test_attentions_are_in_the_columns_of_the_mask(
    family: str, absorbed: bool, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    absorb(monkeypatch, absorbed)
    ours, theirs = twins(family, "ForCausalLM", {})
    ids, mask, extra = batch(padding)
    inputs = {"attention_mask": mask, "output_attentions": True}
    told, made = theirs(ids, **inputs, **extra).attentions, ours(ids, **inputs).attentions
    kept = mask.bool()
    assert len(made) == len(told) == 3
    for mine, other in zip(made, told, strict=True):
        assert mine.shape == other.shape
        assert relative_error(mine.transpose(1, 2)[kept], other.transpose(1, 2)[kept]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", KINDS)
def test_attentions_of_a_cached_step_equal_transformers(family: str) -> None:
    ours, theirs = twins(family, "ForCausalLM", {})
    ids, _, _ = batch("none")
    asked = {"output_attentions": True}
    told, made = (
        m(ids[:, -1:], past_key_values=m(ids[:, :-1]).past_key_values, **asked)
        for m in (theirs, ours)
    )
    for mine, other in zip(made.attentions, told.attentions, strict=True):
        assert mine.shape == other.shape == (3, 4, 1, 21)
        assert relative_error(mine, other) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("changes", [{}, {"rope_scaling": YARN}], ids=["plain", "yarn"])
@pytest.mark.parametrize("family", KINDS)
def test_greedy_text_equals_transformers(
    family: str, changes: dict[str, Any], padding: str
) -> None:
    changes = {**changes, "initializer_range": 0.2}
    ours, theirs = twins(family, "ForCausalLM", changes)
    ids, mask, _ = batch(padding)
    options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    told = theirs.generate(ids, attention_mask=mask, **options)
    made = ours.generate(ids, attention_mask=mask, **options)
    assert made.tolist() == told.tolist()
    assert len(set(made[0, 21:].tolist())) > 5


@torch.no_grad()
@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("family", KINDS)
def test_bfloat16_stays_within_its_rounding(
    family: str, absorbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    absorb(monkeypatch, absorbed)
    # All experts are active: a rounded score that changes the choice would be no rounding error.
    changes = {"num_experts_per_tok": 8, "topk_group": 4, "n_group": 4, "rope_scaling": YARN}
    ours, theirs = twins(family, "ForCausalLM", changes, "eager")
    ids, mask, _ = batch("none")
    exact = theirs(ids, attention_mask=mask).logits
    told = theirs.bfloat16()(ids, attention_mask=mask).logits.float()
    made = ours.bfloat16()(ids, attention_mask=mask).logits.float()
    assert relative_error(made, exact) < 1.5 * relative_error(told, exact) + 2**-8
    assert relative_error(made, told) < 0.05


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("family", KINDS)
def test_sequence_classification_equals_transformers(family: str, padding: str) -> None:
    ours, theirs = twins(family, "ForSequenceClassification", {"num_labels": 4, "pad_token_id": 0})
    ids, mask, extra = batch(padding)
    ids = ids.masked_fill(mask == 0, 0)
    labels = torch.tensor([3, 0, 1])
    told = theirs(ids, attention_mask=mask, labels=labels, **extra)
    made = ours(ids, attention_mask=mask, labels=labels)
    told.loss.backward()
    made.loss.backward()
    assert relative_error(made.logits, told.logits) < TOLERANCE
    assert relative_error(made.loss, told.loss) < TOLERANCE
    assert_gradients_equal(ours.model.layers, theirs.model.layers)


@pytest.mark.parametrize("padding", PADDING)
def test_token_classification_equals_transformers(padding: str) -> None:
    ours, theirs = twins("DeepseekV3", "ForTokenClassification", {"num_labels": 5})
    ids, mask, extra = batch(padding)
    labels = torch.randint(5, ids.shape).masked_fill(mask == 0, -100)
    told = theirs(ids, attention_mask=mask, labels=labels, **extra)
    made = ours(ids, attention_mask=mask, labels=labels)
    told.loss.backward()
    made.loss.backward()
    assert relative_error(made.logits[mask.bool()], told.logits[mask.bool()]) < TOLERANCE
    assert relative_error(made.loss, told.loss) < TOLERANCE
    assert_gradients_equal(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("family", KINDS)
def test_model_without_head_equals_transformers(family: str) -> None:
    ours, theirs = twins(family, "Model", {})
    ids, mask, _ = batch("none")
    told, made = theirs(ids, attention_mask=mask), ours(ids, attention_mask=mask)
    assert relative_error(made.last_hidden_state, told.last_hidden_state) < TOLERANCE
