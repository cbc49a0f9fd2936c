"""The losses are Transformers', and labels that fit nothing are named."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

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
        with pytest.warns(UserWarning, match="no label counts"):
            assert next_token_loss(logits, labels, ahead) == 0
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
            "single_label_classification",
            torch.zeros(B + 1).long(),
            r"\(4,\) for 3 sequences",
            id="rows",
        ),
        pytest.param(
            "single_label_classification", torch.zeros(B), "float32; classes", id="float-classes"
        ),
        pytest.param("single_label_classification", [0] * B, "labels is a list", id="list"),
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


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_targets_that_are_no_numbers_are_named(kind: str, bad: float) -> None:
    labels = torch.rand(B, 4)
    labels[1, 2] = bad
    with pytest.raises(InputError, match=f"labels hold {bad}"):
        sequence_loss(torch.randn(B, 4), labels, kind)


@pytest.mark.parametrize("bad", [-0.5, 1.5, -100], ids=str)
def test_a_label_that_holds_more_or_less_than_wholly_is_named(bad: float) -> None:
    labels = torch.rand(B, 4)
    labels[1, 2] = bad
    with pytest.raises(InputError, match=f"labels hold {bad:g}; they are 0 to 1"):
        sequence_loss(torch.randn(B, 4), labels, "multi_label_classification")


@pytest.mark.parametrize(
    ("places", "named"),
    [
        pytest.param(torch.tensor([0, -1, 2]), "_positions hold -1", id="negative"),
        pytest.param(torch.tensor([0.0, 1, 2]), "_positions have dtype torch.float32", id="float"),
        pytest.param(torch.zeros(B + 1).long(), r"_positions have shape \(4,\)", id="rows"),
        pytest.param([0, 1, 2], "_positions is a list", id="list"),
    ],
)
def test_places_that_cannot_be_are_named(places: Any, named: str) -> None:
    good, logits = torch.zeros(B).long(), torch.randn(B, T)
    with pytest.raises(InputError, match=f"start{named}"):
        span_loss(logits, logits, places, good)
    with pytest.raises(InputError, match=f"end{named}"):
        span_loss(logits, logits, good, places)


# -- parts of a batch ------------------------------------------------------------------------

Loss = Callable[..., Tensor]
classes, sequences, numbers = some_labels(), torch.tensor([3, 0, 1]), torch.rand(B, 4)
LOSSES: dict[str, tuple[Loss, Callable[[int], dict[str, Any]], int]] = {
    "tokens": (token_loss, lambda b: {"labels": classes[:b]}, int((classes != -100).sum())),
    "next": (
        next_token_loss,
        lambda b: {"labels": classes[:b]},
        int((classes[:, 1:] != -100).sum()),
    ),
    "single": (
        sequence_loss,
        lambda b: {"labels": sequences[:b], "problem_type": "single_label_classification"},
        B,
    ),
    "regression": (
        sequence_loss,
        lambda b: {"labels": numbers[:b], "problem_type": "regression"},
        4 * B,
    ),
    "multi": (
        sequence_loss,
        lambda b: {"labels": numbers[:b], "problem_type": "multi_label_classification"},
        4 * B,
    ),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def logits_of(name: str) -> Tensor:
    shape = (B, T, V) if name in ("tokens", "next") else (B, 4)
    return torch.randn(shape, requires_grad=True)


@each_loss
def test_the_sum_is_divided_by_what_the_whole_batch_has(name: str) -> None:
    loss, labels, count = LOSSES[name]
    logits = logits_of(name)
    whole = loss(logits, **labels(B))
    for items in (count, torch.tensor(count), torch.tensor([float(count)])):
        told = loss(logits, **labels(B), items=items)
        assert told.shape == ()
        torch.testing.assert_close(told, whole)
    torch.testing.assert_close(loss(logits, **labels(B), items=2 * count), whole / 2)


@each_loss
@pytest.mark.parametrize(
    "items",
    [
        *(0, -3, torch.nan, torch.inf, 10**400, -(2**63), 1e308),
        *(torch.tensor([4, 5]), True, torch.tensor(0), "4", [4]),
    ],
    ids=str,
)
def test_a_count_that_cannot_be_is_named(name: str, items: Any) -> None:
    loss, labels, _ = LOSSES[name]
    with pytest.raises(InputError, match="num_items_in_batch="):
        loss(logits_of(name), **labels(B), items=items)


@pytest.mark.parametrize("items", [None, 0, 12, torch.tensor(0)], ids=str)
def test_a_loss_of_nothing_is_zero_with_a_warning(items: Any) -> None:
    logits = torch.randn(B, T, V, requires_grad=True)
    none = torch.full((B, T), -100)
    cut = torch.full((B,), T)
    for loss, given in (
        (token_loss, (logits, none)),
        (next_token_loss, (logits, none)),
        (next_token_loss, (logits[:, :1], classes[:, :1])),
        (sequence_loss, (logits[:, 0], none[:, 0], "single_label_classification")),
        (span_loss, (logits[..., 0], logits[..., 1], cut, cut)),
    ):
        with pytest.warns(UserWarning, match="no label counts"):
            told = loss(*given, items=items)
        assert told.item() == 0
        (gradient,) = torch.autograd.grad(told, logits)
        assert not gradient.any()


def test_no_answer_is_looked_for_in_padding() -> None:
    starts, ends = torch.randn(2, B, T)
    first, last = torch.tensor([4, 1, 2]), torch.tensor([6, 3, 2])
    mask = torch.ones(B, T).long()
    mask[0, :3], mask[1, 5:], mask[2] = 0, 0, 0  # the third has no token, and no answer
    alone = [
        span_loss(starts[:1, 3:], ends[:1, 3:], first[:1] - 3, last[:1] - 3),
        span_loss(starts[1:2, :5], ends[1:2, :5], first[1:2], last[1:2]),
    ]
    told = span_loss(starts, ends, first, last, mask)
    torch.testing.assert_close(told, (alone[0] + alone[1]) / 2)
