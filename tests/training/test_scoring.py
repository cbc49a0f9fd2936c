"""Bits of texts: the sum that the definition says, whatever the windows are."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conformance.families import FAMILIES
from quintet.errors import InputError
from quintet.training.data import Document
from quintet.training.scoring import predictions, score, text_document, windows
from tiny import trained_tokenizer


def whole(ids: torch.Tensor, size: int = 1) -> Document:
    labels = ids.clone()
    labels[0] = -100
    return Document(input_ids=ids, labels=labels, bytes=size, name="")


@given(st.integers(0, 60), st.integers(2, 20))
def test_every_token_but_the_first_is_in_one_window_with_half_a_context_before_it(
    length: int, context: int
) -> None:
    found = []
    for start, first, stop in windows(length, context):
        assert stop - start <= context
        assert start == 0 or first - start == context // 2
        found += range(first, stop)
    assert found == list(range(1, length))


def test_a_context_of_one_token_is_refused() -> None:
    with pytest.raises(InputError, match="context=1"):
        next(windows(5, 1))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_bits_are_those_of_one_token_after_the_other(family: Any) -> None:
    model = family.model_of()
    ids = torch.randint(
        3, model.config.vocab_size, (23,), generator=torch.Generator().manual_seed(4)
    )
    context, bits = 8, 0.0
    for start, first, stop in windows(len(ids), context):
        for at in range(first, stop):
            logits = model(ids[None, start:at], use_cache=False).logits[0, -1].double()
            bits -= float(logits.log_softmax(-1)[ids[at]]) / math.log(2)
    found = score(model, [whole(ids, 5), whole(ids, 6)], context)
    assert found.bits == pytest.approx(2 * bits, rel=1e-6)
    assert (found.scored, found.bytes) == (44, 11)
    assert found.bits_per_byte == pytest.approx(2 * bits / 11, rel=1e-6)
    assert found.agreement is None


def test_only_what_has_a_label_counts_and_then_there_are_no_bytes() -> None:
    model = FAMILIES[0].model_of()
    ids = torch.arange(3, 23)
    labels = torch.where(torch.arange(20) % 3 == 0, ids, -100)
    part = Document(input_ids=ids, labels=labels, bytes=0, name="")
    found = score(model, [part], 8)
    each = torch.cat([piece.bits() for piece in predictions(model, ids, 8)])
    assert found.scored == 6
    assert found.bits == pytest.approx(float(each[2::3].sum()), rel=1e-9)
    assert found.bits_per_byte is None
    assert score(model, [part, whole(ids)], 8).bits_per_byte is None


def test_agreement_is_that_of_the_likeliest_tokens_of_both(predicting: Any) -> None:
    ids = torch.randint(12, (30,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = predicting(ids[None, :-1], use_cache=False, output_mtp_logits=True)
    ahead, own = out.mtp_logits[0][0, :-1].argmax(-1), out.logits[0, 1:].argmax(-1)
    found = score(predicting, [whole(ids)])
    assert found.compared == 28
    assert found.agreed == int((ahead == own).sum())
    assert 0 < found.agreed < 28


def test_a_text_begins_as_a_new_one_does_and_pays_for_every_byte() -> None:
    tokenizer = trained_tokenizer()
    document = text_document(tokenizer, "naïve " * 300, "a file")
    assert document.bytes == 2100
    assert document.input_ids[0] == tokenizer.eos_token_id
    assert tokenizer.decode(document.input_ids[1:]) == "naïve " * 300
    assert (document.labels == -100).tolist() == [True] + [False] * (len(document.labels) - 1)
    tokenizer.eos_token = tokenizer.bos_token = None
    with pytest.raises(InputError, match="neither a bos_token nor an eos_token"):
        text_document(tokenizer, "text")


def test_more_context_than_there_are_positions_is_refused() -> None:
    model = FAMILIES[0].model_of()
    with pytest.raises(InputError, match="max_position_embeddings"):
        score(model, [], 10**6)
