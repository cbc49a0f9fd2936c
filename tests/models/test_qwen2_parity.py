"""Qwen2 computes what Transformers computes: forward, backward, with and without a cache.

Tolerances: docs/numerics.md. Eager against eager is exact to the last bit in most cases; what is
asserted is the promise, 1e-5 relative in float32.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from support import relative_error, twins

TOLERANCE = 1e-5
B, T, V = 3, 21, 101

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "dynamic": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 12,
    },
    "yarn": {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    },
    "yarn-mscale": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
            "beta_fast": 16,
        }
    },
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "sliding": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "sliding-all": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
    "gelu": {"hidden_act": "gelu"},
    "theta": {"rope_theta": 1e6},
}
CASES = [
    *(pytest.param({**rope}, id=f"rope-{name}") for name, rope in ROPES.items()),
    *(pytest.param({**shape}, id=name) for name, shape in SHAPES.items()),
    pytest.param({**ROPES["yarn"], **SHAPES["sliding"]}, id="yarn-sliding"),
]
PADDING = ["none", "left", "right"]
# Not dynamic RoPE with left padding: here a row's base follows its own length and there the
# batch's longest (docs/compatibility.md); tests/ops/test_rope.py has our side.
GRID = [
    pytest.param(case.values[0], padding, id=f"{case.id}-{padding}")
    for case in CASES
    for padding in PADDING
    if not (case.id == "rope-dynamic" and padding == "left")
]


def batch(padding: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Ids, mask and, where Transformers needs them to count from the first token, positions."""
    ids = torch.randint(1, V, (B, T))
    mask = torch.ones(B, T, dtype=torch.long)
    extra = {}
    if padding == "left":
        mask[1, :7], mask[2, :2] = 0, 0
        extra = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    if padding == "right":
        mask[1, -7:], mask[2, -2:] = 0, 0
    return ids, mask, extra


def counted_labels(ids: Tensor, mask: Tensor) -> Tensor:
    """Labels of tokens that a token precedes: a prediction made from padding means nothing."""
    labels = ids.masked_fill(mask == 0, -100)
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return labels.masked_fill(before == 0, -100)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(("changes", "padding"), GRID)
def test_forward_and_gradients_equal_transformers(
    changes: dict[str, Any], padding: str, backend: str
) -> None:
    ours, theirs = twins("Qwen2ForCausalLM", changes, backend)
    ids, mask, extra = batch(padding)
    labels = counted_labels(ids, mask)
    kept = mask.bool()

    told = theirs(ids, attention_mask=mask, labels=labels, output_hidden_states=True, **extra)
    made = ours(ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    told.loss.backward()
    made.loss.backward()

    assert relative_error(made.logits[kept], told.logits[kept]) < TOLERANCE
    assert relative_error(made.loss, told.loss) < TOLERANCE
    assert len(made.hidden_states) == len(told.hidden_states)
    for mine, other in zip(made.hidden_states, told.hidden_states, strict=True):
        assert relative_error(mine[kept], other[kept]) < TOLERANCE
    assert_gradients_equal(ours, theirs)


def assert_gradients_equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    other = dict(theirs.named_parameters())
    # A key's bias cancels in the softmax, so its gradient is rounding alone: the scale is that of
    # all the gradients of a layer's part.
    scales: dict[str, float] = {}
    for name, parameter in other.items():
        part = name.rsplit(".", 2)[0]
        assert parameter.grad is not None
        scales[part] = max(scales.get(part, 0.0), float(parameter.grad.abs().max()))
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        expected = other[name].grad
        assert expected is not None
        error = float((parameter.grad - expected).abs().max())
        assert error < TOLERANCE * scales[name.rsplit(".", 2)[0]], name


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("use_cache", [True, False])
def test_attentions_are_in_the_columns_of_the_mask(padding: str, use_cache: bool) -> None:
    ours, theirs = twins("Qwen2ForCausalLM", SHAPES["sliding"])
    ids, mask, extra = batch(padding)
    inputs = {"attention_mask": mask, "output_attentions": True, "use_cache": use_cache}
    told, made = theirs(ids, **inputs, **extra).attentions, ours(ids, **inputs).attentions
    kept = mask.bool()
    assert len(made) == len(told) == 3
    for mine, other in zip(made, told, strict=True):
        assert mine.shape == other.shape
        assert relative_error(mine.transpose(1, 2)[kept], other.transpose(1, 2)[kept]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left"])
def test_attentions_of_a_cached_step_are_in_columns_too(padding: str) -> None:
    ours, theirs = twins("Qwen2ForCausalLM", {})
    ids, mask, extra = batch(padding)
    positions = extra.get("position_ids")
    first = {} if positions is None else {"position_ids": positions[:, :-1]}
    last = {} if positions is None else {"position_ids": positions[:, -1:]}
    told = theirs(ids[:, :-1], attention_mask=mask[:, :-1], **first)
    told = theirs(
        ids[:, -1:],
        attention_mask=mask,
        past_key_values=told.past_key_values,
        output_attentions=True,
        **last,
    )
    made = ours(ids[:, :-1], attention_mask=mask[:, :-1])
    made = ours(
        ids[:, -1:],
        attention_mask=mask,
        past_key_values=made.past_key_values,
        output_attentions=True,
    )
    for mine, other in zip(made.attentions, told.attentions, strict=True):
        assert mine.shape == other.shape == (B, 4, 1, T)
        assert relative_error(mine, other) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("changes", CASES)
def test_bfloat16_stays_within_its_rounding(changes: dict[str, Any]) -> None:
    ours, theirs = twins("Qwen2ForCausalLM", changes, "eager")
    ids, mask, _ = batch("none")
    exact = theirs(ids, attention_mask=mask).logits
    told = theirs.bfloat16()(ids, attention_mask=mask).logits.float()
    made = ours.bfloat16()(ids, attention_mask=mask).logits.float()
    # Both round at every operation; ours may be no farther from the truth than theirs is.
    assert relative_error(made, exact) < 1.5 * relative_error(told, exact) + 2**-8
    assert relative_error(made, told) < 0.05


REGRESSION, SINGLE, MULTI = (
    "regression",
    "single_label_classification",
    "multi_label_classification",
)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        pytest.param(REGRESSION, torch.tensor([0.5, -1.0, 2.0]), id="regression-1"),
        pytest.param(None, torch.tensor([0.5, -1.0, 2.0]), id="regression-inferred"),
        pytest.param(REGRESSION, torch.randn(B, 4), id="regression-4"),
        pytest.param(SINGLE, torch.tensor([3, 0, 1]), id="single"),
        pytest.param(None, torch.tensor([3, 0, 1]), id="single-inferred"),
        pytest.param(MULTI, torch.rand(B, 4).round(), id="multi"),
        pytest.param(None, torch.rand(B, 4).round(), id="multi-inferred"),
    ],
)
@pytest.mark.parametrize("padding", PADDING)
def test_sequence_classification_equals_transformers(
    name: str | None, labels: Tensor, padding: str
) -> None:
    changes = {"num_labels": 1 if labels.is_floating_point() and labels.ndim == 1 else 4}
    changes |= {"pad_token_id": 0, **({} if name is None else {"problem_type": name})}
    ours, theirs = twins("Qwen2ForSequenceClassification", changes)
    ids, mask, extra = batch(padding)
    ids = ids.masked_fill(mask == 0, 0)
    told = theirs(ids, attention_mask=mask, labels=labels, **extra)
    made = ours(ids, attention_mask=mask, labels=labels)
    told.loss.backward()
    made.loss.backward()
    assert relative_error(made.logits, told.logits) < TOLERANCE
    assert relative_error(made.loss, told.loss) < TOLERANCE
    assert_gradients_equal(ours.model.layers, theirs.model.layers)


@pytest.mark.parametrize("padding", PADDING)
def test_token_classification_equals_transformers(padding: str) -> None:
    ours, theirs = twins("Qwen2ForTokenClassification", {"num_labels": 5})
    ids, mask, extra = batch(padding)
    labels = torch.randint(5, (B, T)).masked_fill(mask == 0, -100)
    told = theirs(ids, attention_mask=mask, labels=labels, **extra)
    made = ours(ids, attention_mask=mask, labels=labels)
    told.loss.backward()
    made.loss.backward()
    assert relative_error(made.logits[mask.bool()], told.logits[mask.bool()]) < TOLERANCE
    assert relative_error(made.loss, told.loss) < TOLERANCE
    assert_gradients_equal(ours, theirs)


@pytest.mark.parametrize("padding", PADDING)
def test_question_answering_equals_transformers(padding: str) -> None:
    ours, theirs = twins("Qwen2ForQuestionAnswering", {})
    ids, mask, extra = batch(padding)
    starts, ends = torch.tensor([8, 7, 900]), torch.tensor([9, 9, 900])
    told = theirs(ids, attention_mask=mask, **extra)
    made = ours(ids, attention_mask=mask)
    kept = mask.bool()
    for field in ("start_logits", "end_logits"):
        assert relative_error(made[field][kept], told[field][kept]) < TOLERANCE
    if padding == "none":
        told = theirs(ids, start_positions=starts.clone(), end_positions=ends.clone())
        made = ours(ids, start_positions=starts, end_positions=ends)
        assert relative_error(made.loss, told.loss) < TOLERANCE


@torch.no_grad()
def test_model_without_head_equals_transformers() -> None:
    ours, theirs = twins("Qwen2Model", {})
    ids, mask, _ = batch("none")
    told, made = theirs(ids, attention_mask=mask), ours(ids, attention_mask=mask)
    assert relative_error(made.last_hidden_state, told.last_hidden_state) < TOLERANCE
