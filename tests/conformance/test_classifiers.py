"""Where a sequence ends for its classifier, and what its labels make of the config."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from comparisons import TOLERANCE
from conformance.families import Family, each
from conformance.heads import ids_of
from quintet.errors import InputError
from support import relative_error

B, T = 3, 9
MASKS = {
    "none": [[1] * 9] * 3,
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [0, 0, 1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 1, 0, 0, 0], [1] * 9, [1, 1, 1, 1, 1, 1, 1, 1, 0]],
    "anywhere": [[1, 1, 0, 1, 0, 1, 1, 0, 0], [1] * 9, [0, 1, 1, 1, 0, 1, 1, 1, 0]],
}
PAD = 7
# Whether padding has a token of its own, one that ends a text, or none at all.
PADDING_IDS: dict[str, dict[str, Any]] = {
    "own": {"pad_token_id": PAD, "eos_token_id": None},
    "end": {"pad_token_id": PAD, "eos_token_id": PAD},
    "none": {"pad_token_id": None},
}


def classifier(family: Family, **changes: Any) -> Any:
    variant = {**family.variants[family.thorough[0]], **family.shallow}
    return family.model_of("ForSequenceClassification", **{**variant, "num_labels": 3, **changes})


def rows_alone(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    model.config.pad_token_id, pad = None, model.config.pad_token_id
    rows = [model(row[kept.bool()][None]).logits for row, kept in zip(ids, mask, strict=True)]
    model.config.pad_token_id = pad
    return torch.cat(rows)


@torch.no_grad()
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("token", PADDING_IDS)
@each
def test_the_mask_tells_where_a_row_ends(family: Family, token: str, padding: str) -> None:
    model = classifier(family, **PADDING_IDS[token])
    mask = torch.tensor(MASKS[padding])
    ids = ids_of(B, T).masked_fill(mask == 0, PAD)
    ids[1, -1] = PAD  # the end of a text
    told = rows_alone(model, ids, mask)
    embeds = model.get_input_embeddings()(ids)
    for given in ({"input_ids": ids}, {"inputs_embeds": embeds}):
        for kind in (mask, mask.bool(), mask.float()):
            made = model(**given, attention_mask=kind).logits
            assert relative_error(made, told) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("token", PADDING_IDS)
@each
def test_a_row_ends_where_it_does_without_a_cache(family: Family, token: str, padding: str) -> None:
    model = classifier(family, **PADDING_IDS[token])
    mask = torch.tensor(MASKS[padding])
    ids = ids_of(B, T).masked_fill(mask == 0, PAD)
    told = rows_alone(model, ids, mask)
    for cut in (3, 5):
        rest = ids[:, cut:]
        for given in ({"input_ids": rest}, {"inputs_embeds": model.get_input_embeddings()(rest)}):
            for seen in (mask, mask[:, cut:]):
                held = model(ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True)
                made = model(**given, attention_mask=seen, past_key_values=held.past_key_values)
                assert relative_error(made.logits, told) < TOLERANCE


@torch.no_grad()
@each
def test_without_a_mask_the_padding_token_tells(family: Family) -> None:
    model = classifier(family, pad_token_id=PAD)
    ids = ids_of(B, T).masked_fill(torch.tensor(MASKS["right"]) == 0, PAD)
    told = model(ids).logits
    assert relative_error(told, rows_alone(model, ids, torch.tensor(MASKS["right"]))) < TOLERANCE
    custom = torch.ones(B, 1, T, T).tril().bool()
    assert relative_error(model(ids, attention_mask=custom).logits, told) < TOLERANCE
    model.config.pad_token_id = None
    with pytest.raises(InputError, match=r"a batch of 3 rows needs config\.pad"):
        model(ids)
    assert model(ids[1:2]).logits.shape == (1, 3)


# -- what the labels say ---------------------------------------------------------------------

KINDS = {
    "regression": (1, torch.tensor([5.0, -1.0, 2.0])),
    "single_label_classification": (3, torch.tensor([2, 0, 1])),
    "multi_label_classification": (3, torch.tensor([[1.0, 0, 1], [0, 0, 1], [0, 0, 0]])),
}


@pytest.mark.parametrize("kind", KINDS)
@each
def test_the_first_loss_notes_the_problem(family: Family, kind: str, tmp_path: Path) -> None:
    count, labels = KINDS[kind]
    config = family.config(**family.alone, num_labels=count, pad_token_id=0)
    before = config.to_dict()
    cls = family.cls("ForSequenceClassification")
    model, other = cls(config), cls(config)
    ids = ids_of(B, T)
    model(ids)
    assert model.config.problem_type is None
    with pytest.raises(InputError):
        model(ids, labels=labels[:2])
    assert model.config.problem_type is None
    model(ids, labels=labels)
    assert model.config.problem_type == model.base_model.config.problem_type == kind
    assert config.to_dict() == other.config.to_dict() == before
    model.save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).config.problem_type == kind
    if kind == "single_label_classification":
        with pytest.raises(InputError, match=r"labels have dtype torch\.float32"):
            model(ids, labels=labels.float())


@each
def test_a_problem_that_is_named_stays(family: Family) -> None:
    model = classifier(family, pad_token_id=0, problem_type="regression")
    made = model(ids_of(B, T), labels=torch.rand(B, 3))
    assert model.config.problem_type == "regression"
    assert made.loss.isfinite()


@each
def test_booleans_are_several_labels_at_once(family: Family) -> None:
    model = classifier(family, pad_token_id=0)
    labels, ids = torch.tensor([[True, False, True]] * B), ids_of(B, T)
    told = model(ids, labels=labels).loss
    assert model.config.problem_type == "multi_label_classification"
    assert torch.equal(model(ids, labels=labels.float()).loss, told)
