"""What the losses of all heads count: every row as if alone, of parts of a batch, of nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from comparisons import TOLERANCE
from conformance.families import HEADS, Family, each, each_head
from conformance.heads import ids_of, labels_of, made
from quintet.errors import InputError
from support import relative_error

B, T = 3, 8
PADDED = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8, [0, 1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 0, 0, 0], [1] * 8, [1, 1, 1, 1, 1, 1, 1, 0]],
    "anywhere": [[1, 0, 1, 1, 0, 0, 1, 1], [1] * 8, [0, 1, 1, 0, 1, 1, 0, 0]],
}
LEARNING = [head for head in HEADS if head != "Model"]
each_learning = pytest.mark.parametrize("head", LEARNING)


def learned(head: str, mask: Tensor) -> dict[str, Tensor]:
    """Labels of every column, of padding as well, or places that are tokens."""
    if head == "ForQuestionAnswering":
        places = torch.stack([torch.nonzero(row)[1, 0] for row in mask])
        return {"start_positions": places, "end_positions": places + 0}
    return {"labels": torch.randint(3, (B,) if head.startswith("ForSeq") else (B, T))}


def alone(head: str, labels: dict[str, Tensor], row: int, kept: Tensor) -> dict[str, Tensor]:
    """The labels of one row without its padding."""
    if head == "ForQuestionAnswering":
        return {name: kept[: places[row]].sum()[None] for name, places in labels.items()}
    one = labels["labels"][row : row + 1]
    return {"labels": one if head.startswith("ForSeq") else one[:, kept]}


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDED)
@each_learning
@each
def test_a_row_has_the_loss_it_has_alone(family: Family, head: str, padding: str) -> None:
    model = made(family, head)
    options: dict[str, Any] = {"num_items_in_batch": 1}
    if family.name == "deepseek-v3" and head == "ForCausalLM":
        model = made(family, head, num_nextn_predict_layers=2)
        options |= {"mtp_loss_weight": 0.5}
    ids, mask = ids_of(B, T), torch.tensor(PADDED[padding])
    labels = learned(head, mask)
    total = torch.tensor(0.0)
    for row in range(B):
        kept = mask[row].bool()
        total += model(ids[row, kept][None], **alone(head, labels, row, kept), **options).loss
    told = model(ids, attention_mask=mask, **labels, **options).loss
    assert relative_error(told, total) < TOLERANCE
    if head == "ForCausalLM":
        shifted = {"shift_labels": torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)}
        plain = model(ids, labels=ids, **options).loss
        assert relative_error(model(ids, **shifted, **options).loss, plain) < TOLERANCE


@each_learning
@each
def test_parts_add_up_to_the_whole(family: Family, head: str) -> None:
    model = made(family, head)
    ids, mask = ids_of(B, T), torch.tensor(PADDED["right"])
    labels = learned(head, mask)
    counts = {"ForCausalLM": int(mask[:, 1:].sum()), "ForTokenClassification": int(mask.sum())}
    count = counts.get(head, B)
    whole = model(ids, attention_mask=mask, **labels).loss
    for items in (count, torch.tensor(count), torch.tensor([count])):
        parts = [
            model(
                ids[row : row + 1],
                attention_mask=mask[row : row + 1],
                **{name: value[row : row + 1] for name, value in labels.items()},
                num_items_in_batch=items,
            ).loss
            for row in range(B)
        ]
        assert relative_error(torch.stack(parts).sum(), whole) < TOLERANCE


@pytest.mark.parametrize("moved", [False, True], ids=["labels", "shift_labels"])
@pytest.mark.parametrize("items", [None, 10, torch.tensor(7)], ids=str)
@each
def test_a_language_model_has_the_loss_of_transformers(
    family: Family, items: Any, moved: bool
) -> None:
    ours, theirs = family.twins("ForCausalLM", dict(family.alone), "eager")
    ids, mask = ids_of(B, T), torch.tensor(PADDED["right"])
    labels = ids.masked_fill(mask == 0, -100)
    given: dict[str, Any] = {"labels": labels, "attention_mask": mask}
    if moved:
        given["shift_labels"] = torch.nn.functional.pad(labels[:, 2:], (0, 2), value=-100)
    if items is not None:
        given["num_items_in_batch"] = items
    if family.name == "qwen2-moe":
        given["output_router_logits"] = True
    made, told = ours(ids, **given), theirs(ids, **given)
    assert relative_error(made.loss, told.loss) < TOLERANCE
    if moved:
        del given["labels"]
        assert torch.equal(ours(ids, **given).loss, made.loss)


@torch.no_grad()
@each
def test_labels_that_are_shifted_stay_in_their_text(family: Family) -> None:
    changes, options = {}, {}
    if family.name == "deepseek-v3":
        changes, options = {"num_nextn_predict_layers": 1}, {"mtp_loss_weight": 0.5}
    model, ids = made(family, "ForCausalLM", **changes), ids_of(B, T)
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]).expand(B, T)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    options |= {"position_ids": places, "use_cache": False}
    told = model(ids, labels=ids, **options).loss
    assert relative_error(model(ids, shift_labels=shifted, **options).loss, told) < TOLERANCE


@torch.no_grad()
@each
def test_a_loss_can_be_replaced_as_in_transformers(family: Family) -> None:
    ids = ids_of(B, T)
    for head in LEARNING:
        model = made(family, head)
        assert (model.loss_type, model.accepts_loss_kwargs) == (head, True)
        model.loss_function = lambda *args, **options: torch.tensor(5.0)
        assert model(ids, **learned(head, torch.ones(B, T))).loss == 5


# -- nothing to learn from -------------------------------------------------------------------


@pytest.mark.parametrize("items", [None, 0, 9], ids=str)
@each_head
def test_a_loss_of_nothing_is_zero_with_a_warning(family: Family, head: str, items: Any) -> None:
    if head == "Model":
        assert "num_items_in_batch" not in model_arguments(family)
        return
    model = made(family, head, aux_loss_alpha=0.0).train()
    labels = {name: torch.full_like(label, -100) for name, label in labels_of(head).items()}
    if head == "ForQuestionAnswering":
        labels = {name: label + 1000 for name, label in labels.items()}
    with pytest.warns(UserWarning, match="no label counts"):
        loss = model(ids_of(), **labels, num_items_in_batch=items).loss
    assert str(loss.item()) == "0.0"
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


def model_arguments(family: Family) -> list[str]:
    return list(family.cls("Model").forward.__annotations__)


@each
def test_a_text_of_one_token_teaches_nothing(family: Family) -> None:
    model, ids = made(family, "ForCausalLM"), torch.tensor([[5]])
    with pytest.warns(UserWarning, match="no label counts"):
        assert model(ids, labels=ids).loss.item() == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x: x.float(), "labels have dtype torch.float32"),
        (lambda x: x.bool(), "labels have dtype torch.bool"),
        (lambda x: x + 1000, "labels hold 1"),
        (lambda x: -x - 1, "labels hold -"),
        (lambda x: x[:, 1:], "labels have shape"),
        (lambda x: x[0], "labels have shape"),
        (lambda x: x.tolist(), "list"),
        (lambda x: x.float() * torch.nan, "labels have dtype torch.float32"),
    ],
    ids=["float", "bool", "large", "negative", "short", "flat", "list", "nan"],
)
@pytest.mark.parametrize("head", ["ForCausalLM", "ForTokenClassification"])
@each
def test_labels_that_fit_nothing_are_named(
    family: Family, head: str, change: Any, named: str
) -> None:
    model, ids = made(family, head), ids_of()
    with pytest.raises(InputError, match=named):
        model(ids, labels=change(labels_of(head)["labels"]))


@pytest.mark.parametrize("side", ["left", "right"])
@each
def test_gradients_in_float16_are_finite_beside_padding(family: Family, side: str) -> None:
    torch.manual_seed(1)
    model = family.cls("ForCausalLM")(
        family.config(**family.alone, initializer_range=0.3, pad_token_id=0)
    )
    model.half().train()
    mask = torch.tensor(PADDED[side])
    ids = ids_of(B, T).masked_fill(mask == 0, 0)
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
