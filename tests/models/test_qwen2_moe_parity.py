"""Qwen2-MoE computes what Transformers computes; tolerances: docs/numerics.md."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.qwen2_moe_support import SLIDING, VARIANTS, twins
from support import relative_error

TOLERANCE = 1e-5
B, T, V = 3, 21, 101
CASES = [pytest.param({**changes}, id=name) for name, changes in VARIANTS.items()]
PADDING = ["none", "left", "right"]
CAUSAL = "Qwen2MoeForCausalLM"


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


def assert_gradients_equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Compare by the scale of each part of a layer (docs/numerics.md)."""
    other = dict(theirs.named_parameters())

    def part(name: str) -> str:
        return name.split(".experts.")[0] if ".experts." in name else name.rsplit(".", 2)[0]

    scales: dict[str, float] = {}
    for name, parameter in other.items():
        assert parameter.grad is not None, name
        scales[part(name)] = max(scales.get(part(name), 0.0), float(parameter.grad.abs().max()))
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        expected = other[name].grad
        assert expected is not None
        error = float((parameter.grad - expected).abs().max())
        assert error < TOLERANCE * scales[part(name)], name


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("changes", CASES)
def test_forward_and_gradients_equal_transformers(
    changes: dict[str, Any], padding: str, backend: str
) -> None:
    ours, theirs = twins(CAUSAL, changes, backend)
    ids, mask, extra = batch(padding)
    inputs: dict[str, Any] = {"attention_mask": mask, "labels": counted_labels(ids, mask)}
    inputs["output_hidden_states"] = True
    # Without any layer that has experts Transformers fails on this one.
    inputs["output_router_logits"] = changes.get("num_experts") != 0
    kept = mask.bool()

    told = theirs(ids, **inputs, **extra)
    made = ours(ids, **inputs)
    told.loss.backward()
    made.loss.backward()

    assert relative_error(made.logits[kept], told.logits[kept]) < TOLERANCE
    assert relative_error(made.loss, told.loss) < TOLERANCE
    assert len(made.hidden_states) == len(told.hidden_states)
    for mine, other in zip(made.hidden_states, told.hidden_states, strict=True):
        assert relative_error(mine[kept], other[kept]) < TOLERANCE
    if inputs["output_router_logits"]:
        assert relative_error(made.aux_loss, told.aux_loss) < TOLERANCE
        for mine, other in zip(made.router_logits, told.router_logits, strict=True):
            assert mine.shape == other.shape == (B * T, 6)
            assert relative_error(mine[kept.flatten()], other[kept.flatten()]) < TOLERANCE
    assert_gradients_equal(ours, theirs)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("use_cache", [True, False])
def test_attentions_equal_transformers(padding: str, use_cache: bool) -> None:
    ours, theirs = twins(CAUSAL, SLIDING)
    ids, mask, extra = batch(padding)
    inputs = {"attention_mask": mask, "output_attentions": True, "use_cache": use_cache}
    told, made = theirs(ids, **inputs, **extra).attentions, ours(ids, **inputs).attentions
    kept = mask.bool()
    assert len(made) == len(told) == 3
    for mine, other in zip(made, told, strict=True):
        assert mine.shape == other.shape
        assert relative_error(mine.transpose(1, 2)[kept], other.transpose(1, 2)[kept]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("changes", CASES)
def test_bfloat16_stays_within_its_rounding(changes: dict[str, Any]) -> None:
    ours, theirs = twins(CAUSAL, changes, "eager")
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


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="full"),
        pytest.param({**SLIDING, "norm_topk_prob": True}, id="sliding"),
        pytest.param({"decoder_sparse_step": 2, "tie_word_embeddings": True}, id="every-second"),
    ],
)
def test_greedy_tokens_are_those_of_transformers(changes: dict[str, Any], padding: str) -> None:
    ours, theirs = twins(CAUSAL, {**changes, "initializer_range": 0.2, "pad_token_id": 0})
    ids, mask, _ = batch(padding)
    told = theirs.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False)
    made = ours.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False)
    assert made.shape == (B, T + 64)
    assert len(set(made[0, T:].tolist())) > 5
    assert made.tolist() == told.tolist()


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        pytest.param("regression", torch.tensor([0.5, -1.0, 2.0]), id="regression"),
        pytest.param("single_label_classification", torch.tensor([3, 0, 1]), id="single"),
        pytest.param(None, torch.rand(B, 4).round(), id="multi-inferred"),
    ],
)
@pytest.mark.parametrize("padding", PADDING)
def test_sequence_classification_equals_transformers(
    kind: str | None, labels: Tensor, padding: str
) -> None:
    changes = {"num_labels": 1 if kind == "regression" else 4, "pad_token_id": 0}
    ours, theirs = twins("Qwen2MoeForSequenceClassification", {**changes, "problem_type": kind})
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
    ours, theirs = twins("Qwen2MoeForTokenClassification", {"num_labels": 5})
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
    ours, theirs = twins("Qwen2MoeForQuestionAnswering", {})
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
        told.loss.backward()
        made.loss.backward()
        assert relative_error(made.loss, told.loss) < TOLERANCE
        assert_gradients_equal(ours, theirs)


@torch.no_grad()
def test_model_without_head_equals_transformers() -> None:
    ours, theirs = twins("Qwen2MoeModel", {})
    ids, mask, _ = batch("none")
    told = theirs(ids, attention_mask=mask, output_router_logits=True)
    made = ours(ids, attention_mask=mask, output_router_logits=True)
    assert list(made) == list(told)
    assert relative_error(made.last_hidden_state, told.last_hidden_state) < TOLERANCE
    for mine, other in zip(made.router_logits, told.router_logits, strict=True):
        assert relative_error(mine, other) < TOLERANCE
