"""What may come next, wherever a text goes: on, back, and along a draft."""

import json
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grammar.checking import at_random, schemas, valid
from quintet import AutoTokenizer, demo_model, grammar
from quintet.errors import InputError
from quintet.grammar import GrammarProcessor, Grammars

tokenizer: Any = AutoTokenizer.from_pretrained(demo_model())
V, END = len(tokenizer), tokenizer.eos_token_id
GRAMMARS = Grammars(tokenizer, V)


def mask(processor: GrammarProcessor, ids: list[int]) -> torch.Tensor:
    return ~processor(torch.tensor([ids]), torch.zeros(1, V))[0].isneginf()


@settings(max_examples=60, deadline=None)
@given(schemas(), st.integers(0, 2**32))
def test_a_finished_text_is_valid(schema: dict[str, Any], seed: int) -> None:
    processor = GRAMMARS.compile(grammar.json_schema(schema))
    written = at_random(processor, V, END, seed)
    if written[-1] == END:
        assert valid(json.loads(tokenizer.decode(written[:-1])), schema)


@settings(max_examples=25, deadline=None)
@given(schemas(), st.integers(0, 2**32))
def test_a_text_may_go_back_and_on(schema: dict[str, Any], seed: int) -> None:
    made = GRAMMARS.compile(grammar.json_schema(schema))
    prompt = [5, 6]
    ids = [*prompt, *at_random(made.copy(), V, END, seed, prompt=(5, 6), most=30)]
    processor, dice = made.copy(), random.Random(seed)
    mask(processor, prompt)
    for _ in range(12):
        length = dice.randint(len(prompt), len(ids))
        fresh = made.copy()
        mask(fresh, prompt)
        assert torch.equal(mask(processor, ids[:length]), mask(fresh, ids[:length]))


@settings(max_examples=25, deadline=None)
@given(schemas(), st.integers(0, 2**32))
def test_a_draft_is_cut_where_a_mask_would_cut_it(schema: dict[str, Any], seed: int) -> None:
    made = GRAMMARS.compile(grammar.json_schema(schema))
    dice, prompt = random.Random(seed), [5, 6]
    written = at_random(made.copy(), V, END, seed, prompt=(5, 6), most=30)
    start = dice.randint(0, len(written) - 1)
    draft = [*written[start:][:5], dice.randrange(1, V), *written[:2]]
    processor, text = made.copy(), [*prompt, *written[:start]]
    mask(processor, prompt)
    count = processor.accepted(0, torch.tensor(text), draft)
    expected = 0
    for token in draft:
        if not mask(processor, [*text, *draft[:expected]])[token]:
            break
        expected += 1
        if token == END:
            break
    # Whether a text may end is left to the mask.
    assert count == expected or (count == expected + 1 and draft[expected] == END)


@settings(max_examples=25, deadline=None)
@given(schemas(), st.integers(0, 2**32))
def test_what_is_forced_comes(schema: dict[str, Any], seed: int) -> None:
    made = GRAMMARS.compile(grammar.json_schema(schema))
    written = at_random(made.copy(), V, END, seed, prompt=(5, 6), most=30)
    processor = made.copy()
    mask(processor, [5, 6])
    for length in range(len(written)):
        text = torch.tensor([5, 6, *written[:length]])
        forced = processor.forced(0, text)
        assert processor.accepted(0, text, forced) == len(forced)
        rest, said = tokenizer.decode(written[length:]), tokenizer.decode(forced)
        assert rest.startswith(said) or len(written) == 30


def test_what_left_the_grammar_has_no_way_on() -> None:
    processor = GRAMMARS.compile(grammar.choice(["abc"]))
    mask(processor, [1])
    ids = tokenizer.encode("xyz")
    assert not mask(processor, [1, *ids]).any()
    assert processor.accepted(0, torch.tensor([1, *ids]), tokenizer.encode("abc")) == 0
    assert mask(processor, [1]).any()


def test_a_text_that_has_ended_can_only_end() -> None:
    processor = GRAMMARS.compile(grammar.regex("a*"))
    mask(processor, [1])
    for ids in ([1, END], [1, END, END]):
        assert mask(processor, ids).nonzero().tolist() == [[END]]
    assert mask(processor, [1]).sum() > 1


def test_another_text_needs_a_copy() -> None:
    processor = GRAMMARS.compile(grammar.regex("a*"))
    mask(processor, [1, 2, 3])
    with pytest.raises(InputError, match="copy"):
        mask(processor, [1, 4, 3])
    with pytest.raises(InputError, match="copy"):
        processor(torch.ones(2, 3, dtype=torch.long), torch.zeros(2, V))
    mask(processor.copy(), [1, 4, 3])


# -- rows, padding, and what only pads ----------------------------------------------------------


def test_each_row_has_a_text_of_its_own() -> None:
    processor = GRAMMARS.compile(grammar.choice(["ab", "cd"]))
    padding = torch.tensor([0, 2])
    prompts = torch.tensor([[7, 8, 9], [0, 0, 9]])
    processor(prompts, torch.zeros(2, V), padding=padding)
    (a,), (c,) = (tokenizer.encode(letter) for letter in "ac")
    ids = torch.cat((prompts, torch.tensor([[a], [c]])), dim=1)
    allowed = ~processor(ids, torch.zeros(2, V), padding=padding).isneginf()
    found = [tokenizer.decode(row.nonzero()[:, 0]) for row in allowed]
    assert found == ["b", "d"]


def test_beams_go_on_with_each_others_texts() -> None:
    processor = GRAMMARS.compile(grammar.choice(["ab", "cd"]))
    prompts = torch.tensor([[7, 8], [7, 8]])
    processor(prompts, torch.zeros(2, V))
    letters = torch.tensor([tokenizer.encode(letter) for letter in "ac"])
    for beams, behind in ((letters, ["b", "d"]), (letters.flip(0), ["d", "b"])):
        allowed = ~processor(torch.cat((prompts, beams), dim=1), torch.zeros(2, V)).isneginf()
        assert [tokenizer.decode(row.nonzero()[:, 0]) for row in allowed] == behind


def test_rows_that_have_ended_are_left_alone() -> None:
    processor = GRAMMARS.compile(grammar.choice(["ab"]))
    going = torch.tensor([True, False])
    result = processor(torch.tensor([[1], [2]]), torch.zeros(2, V), unfinished=going)
    assert result[0].isneginf().sum() > V - 3
    assert not result[1].isneginf().any()


@pytest.mark.parametrize("extra", [1, 31, 300])
def test_what_pads_the_embeddings_never_comes(extra: int) -> None:
    processor = Grammars(tokenizer, V + extra).compile(grammar.regex("(?s:.)*"))
    scores = processor(torch.tensor([[1, 2]]), torch.zeros(1, V + extra))
    assert scores[0, V:].isneginf().all()
    assert not scores[0, END].isneginf()


def test_a_model_that_knows_fewer_tokens_is_offered_no_others() -> None:
    few = 600
    processor = Grammars(tokenizer, few).compile(grammar.regex("[a-z]*"))
    assert processor(torch.tensor([[1, 2]]), torch.zeros(1, few)).shape == (1, few)
    draft = [tokenizer.encode("a")[0], few + 1]
    assert processor.accepted(0, torch.tensor([1, 2]), draft) == 1


# -- behind thoughts ----------------------------------------------------------------------------


def test_what_comes_before_is_free_and_does_not_end() -> None:
    (mark,) = tokenizer.encode("|")
    for after in (mark, "|"):
        processor = GRAMMARS.compile(grammar.choice(["yes"]), after=after)
        prompt = [1, mark, 2]
        free = mask(processor, prompt)
        assert free.sum() == V - 1
        assert not free[END]
        behind = mask(processor, [*prompt, 9, mark])
        assert {tokenizer.decode([i]) for i in behind.nonzero()[:, 0]} >= {"y", "\n"}
        assert not behind[9]
        answer = tokenizer.encode("\n\nyes")
        assert mask(processor, [*prompt, 9, mark, *answer]).nonzero().tolist() == [[END]]
        # The mark is taken back, and with it the grammar.
        assert mask(processor, [*prompt, 9, 9]).sum() == V - 1


def test_a_draft_ends_with_what_begins_the_grammar() -> None:
    (mark,) = tokenizer.encode("|")
    processor = GRAMMARS.compile(grammar.choice(["yes"]), after=mark)
    text = torch.tensor([1, 2])
    mask(processor, [1, 2])
    assert processor.accepted(0, text, [9, mark, 9, 9]) == 2
    assert processor.accepted(0, text, [9, 9, END, 9]) == 2
    assert processor.forced(0, text) == []
