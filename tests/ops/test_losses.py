"""The losses are Transformers', and labels that fit nothing are named."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.loss.loss_utils import (
    ForCausalLMLoss,
    ForQuestionAnsweringLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
)

from quintet.errors import InputError
from quintet.ops.losses import next_token_loss, sequence_loss, span_loss, token_loss

B, T, V = 3, 7, 11


def some_labels(classes: int = V) -> Tensor:
    labels = torch.randint(0, classes, (B, T))
    labels[0, 2:5] = -100
    labels[1, -1] = -100
    return labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_next_token_loss_and_its_gradient(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(B, T, V, dtype=dtype, requires_grad=True), some_labels()
    ours = next_token_loss(logits, labels)
    (gradient,) = torch.autograd.grad(ours, logits)
    theirs = ForCausalLMLoss(logits, labels, V)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, logits)[0])
    assert ours.dtype == torch.float32
    assert not gradient[:, -1].any()


@pytest.mark.parametrize("ahead", [1, 2, 3, T, T + 2])
def test_a_loss_may_look_further_ahead(ahead: int) -> None:
    logits, labels = torch.randn(B, T, V), some_labels()
    if ahead >= T:
        assert torch.isnan(next_token_loss(logits, labels, ahead))
        return
    told = token_loss(logits[:, :-ahead], labels[:, ahead:])
    torch.testing.assert_close(next_token_loss(logits, labels, ahead), told)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_token_loss(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(B, T, 5), some_labels(5)
    theirs = ForTokenClassification(logits, labels, SimpleNamespace(num_labels=5))
    torch.testing.assert_close(token_loss(logits, labels.to(dtype)), theirs)


@pytest.mark.parametrize(
    ("problem_type", "logits", "labels"),
    [
        pytest.param("regression", (B, 1), torch.rand(B), id="regression-1"),
        pytest.param("regression", (B, 1), torch.rand(B, 1), id="regression-1-column"),
        pytest.param("regression", (1, 1), torch.rand(1), id="regression-1-row-1"),
        pytest.param("regression", (B, 4), torch.rand(B, 4), id="regression-4"),
        pytest.param(
            "single_label_classification", (B, 4), torch.tensor([0, 3, 1]), id="single-label"
        ),
        pytest.param(
            "single_label_classification", (B, 4), torch.tensor([[0], [-100], [1]]), id="column"
        ),
        pytest.param(
            "multi_label_classification", (B, 4), torch.randint(0, 2, (B, 4)).float(), id="multi"
        ),
    ],
)
def test_sequence_loss(problem_type: str, logits: tuple[int, int], labels: Tensor) -> None:
    scores = torch.randn(logits)
    config = SimpleNamespace(num_labels=logits[1], problem_type=problem_type)
    theirs = ForSequenceClassificationLoss(labels, scores, config)
    torch.testing.assert_close(sequence_loss(scores, labels, problem_type), theirs)


@pytest.mark.parametrize("shape", [(B,), (B, 1)], ids=["flat", "column"])
def test_span_loss(shape: tuple[int, ...]) -> None:
    starts, ends = torch.randn(B, T), torch.randn(B, T)
    first = torch.tensor([0, 3, T]).reshape(shape)  # the last one was cut off
    last = torch.tensor([2, 6, T + 50]).reshape(shape)
    torch.testing.assert_close(
        span_loss(starts, ends, first, last), ForQuestionAnsweringLoss(starts, ends, first, last)
    )


@pytest.mark.parametrize(
    ("label", "named"),
    [
        pytest.param(V, f"labels hold {V}; a label is 0 to {V - 1}, or -100", id="too-large"),
        pytest.param(-1, "labels hold -1; a label is 0 to", id="negative"),
    ],
)
def test_a_label_out_of_range_is_named(label: int, named: str) -> None:
    labels = some_labels()
    labels[2, 3] = label
    for loss in (next_token_loss, token_loss):
        with pytest.raises(InputError, match=named):
            loss(torch.randn(B, T, V), labels)
    with pytest.raises(InputError, match=named):
        sequence_loss(torch.randn(B, V), labels[2, 2:5], "single_label_classification")


@pytest.mark.parametrize(
    ("problem_type", "labels", "named"),
    [
        pytest.param("regression", torch.rand(B, 2), r"\(3, 2\) do not fit .*\(3, 4\)", id="shape"),
        pytest.param("multi_label_classification", torch.ones(B), r"\(3,\) do not fit", id="flat"),
        pytest.param(
            "single_label_classification", torch.zeros(B + 1).long(), "4 labels and 3", id="rows"
        ),
        pytest.param(
            "single_label_classification", torch.zeros(B), "float32; classes", id="float-classes"
        ),
    ],
)
def test_labels_of_another_shape_or_kind_are_named(
    problem_type: str, labels: Tensor, named: str
) -> None:
    with pytest.raises(InputError, match=named):
        sequence_loss(torch.randn(B, 4), labels, problem_type)


def test_labels_for_other_tokens_are_named() -> None:
    with pytest.raises(InputError, match=r"labels have shape \(3, 5\) .* \(3, 7\) tokens"):
        token_loss(torch.randn(B, T, V), torch.zeros(B, 5).long())
