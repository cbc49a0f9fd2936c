"""Greedy generation and what goes into it, against Transformers on the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quintet import BatchEncoding, GenerationConfig, Qwen2ForCausalLM
from quintet.errors import ContextLengthError, InputError
from support import small_config, twins

PROMPT = torch.tensor([[5, 17, 3, 99, 41, 5, 8]])
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
# Two rows of 4 and 7 tokens, 0 for padding.
LEFT = torch.tensor([[0, 0, 0, 11, 12, 13, 14], [21, 22, 23, 24, 25, 26, 27]])
RIGHT = torch.tensor([[11, 12, 13, 14, 0, 0, 0], [21, 22, 23, 24, 25, 26, 27]])


def lively(changes: dict[str, Any] | None = None, backend: str = "sdpa") -> tuple[Any, Any]:
    """Twins with weights so large that their text does not settle on one token."""
    torch.manual_seed(1)
    return twins("Qwen2ForCausalLM", {"initializer_range": 0.3, **(changes or {})}, backend)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return lively()


@pytest.fixture
def model(pair: tuple[Any, Any]) -> Qwen2ForCausalLM:
    ours: Qwen2ForCausalLM = pair[0]
    return ours


def greedy(model: Any, ids: Tensor, **options: Any) -> list[list[int]]:
    """Continue without ever ending, and return the new tokens alone."""
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **options}
    rows: Tensor = model.generate(ids, **options)
    assert torch.equal(rows[:, : ids.shape[1]], ids)
    return rows[:, ids.shape[1] :].tolist()


def first_seen(tokens: list[int], at_least: int) -> int:
    """Return the index of a token that did not occur before it, at or after a given one."""
    return next(i for i in range(at_least, len(tokens)) if tokens[i] not in tokens[:i])


# -- the same text as Transformers -----------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="gqa"),
        pytest.param({"num_key_value_heads": 4}, id="mha"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param(SLIDING, id="sliding"),
    ],
)
def test_64_greedy_tokens_are_those_of_transformers(changes: dict[str, Any], backend: str) -> None:
    ours, theirs = lively(changes, backend)
    mask = torch.ones_like(PROMPT)
    expected = greedy(theirs, PROMPT, max_new_tokens=64, attention_mask=mask)
    assert greedy(ours, PROMPT, max_new_tokens=64) == expected
    assert len(set(expected[0])) > 8


@pytest.mark.parametrize("changes", [{}, SLIDING], ids=["full", "sliding"])
def test_a_left_padded_batch_is_as_in_transformers(changes: dict[str, Any]) -> None:
    ours, theirs = lively(changes)
    mask = (LEFT != 0).long()
    expected = greedy(theirs, LEFT, attention_mask=mask)
    assert greedy(ours, LEFT, attention_mask=mask) == expected


@pytest.mark.parametrize("padded", [LEFT, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_padded_rows_are_as_alone(model: Any, padded: Tensor, cache: str | None) -> None:
    alone = [greedy(model, row[row != 0][None])[0] for row in padded]
    kind = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    assert greedy(model, padded, attention_mask=padded != 0, **kind) == alone


@pytest.mark.parametrize("changes", [{}, SLIDING], ids=["full", "sliding"])
def test_every_cache_gives_the_text_without_one(changes: dict[str, Any]) -> None:
    ours, _ = lively(changes)
    without = greedy(ours, PROMPT, use_cache=False)
    assert greedy(ours, PROMPT) == without
    assert greedy(ours, PROMPT, cache_implementation="static") == without


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_is_that_of_transformers(pair: tuple[Any, Any], penalty: float) -> None:
    ours, theirs = pair
    mask = torch.ones_like(PROMPT)
    expected = greedy(theirs, PROMPT, attention_mask=mask, repetition_penalty=penalty)
    assert greedy(ours, PROMPT, repetition_penalty=penalty) == expected
    assert expected != greedy(ours, PROMPT)


def test_padding_is_not_penalised_as_repeated(model: Any) -> None:
    alone = greedy(model, LEFT[:1, 3:], repetition_penalty=1.3)
    assert greedy(model, LEFT[:1], attention_mask=LEFT[:1] != 0, repetition_penalty=1.3) == alone


# -- where it ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("as_list", [False, True], ids=["int", "list"])
def test_the_end_token_ends_and_is_kept(model: Any, as_list: bool) -> None:
    free = greedy(model, PROMPT)[0]
    last = first_seen(free, 3)
    eos = [100, free[last]] if as_list else free[last]
    if as_list:
        assert 100 not in free
    assert greedy(model, PROMPT, eos_token_id=eos) == [free[: last + 1]]


def test_a_row_that_ends_early_is_padded_and_disturbs_no_other(model: Any) -> None:
    mask = LEFT != 0
    free = greedy(model, LEFT, attention_mask=mask)
    last = next(i for i, token in enumerate(free[0]) if i > 1 and token not in free[1])
    last = free[0].index(free[0][last])
    rows = greedy(model, LEFT, attention_mask=mask, eos_token_id=free[0][last], pad_token_id=77)
    assert rows[0] == free[0][: last + 1] + [77] * (24 - last - 1)
    assert rows[1] == free[1]


def test_without_a_pad_token_rows_are_filled_with_the_end_token(model: Any) -> None:
    free = greedy(model, LEFT, attention_mask=LEFT != 0)
    eos = next(token for token in free[0] if token not in free[1])
    rows = model.generate(LEFT, attention_mask=LEFT != 0, max_new_tokens=24, eos_token_id=eos)
    assert set(rows[0, 7 + free[0].index(eos) :].tolist()) == {eos}


def test_no_end_before_min_new_tokens(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    free = greedy(ours, PROMPT)[0]
    options = {"eos_token_id": free[2], "min_new_tokens": 10}
    expected = greedy(theirs, PROMPT, attention_mask=torch.ones_like(PROMPT), **options)
    rows = greedy(ours, PROMPT, **options)
    assert rows == expected
    assert len(rows[0]) >= 10
    assert free[2] not in rows[0][:10]


@pytest.mark.parametrize(
    ("options", "new"),
    [
        pytest.param({"max_new_tokens": 5}, 5, id="max_new_tokens"),
        pytest.param({"max_length": 16}, 9, id="max_length"),
        pytest.param({"max_length": 8, "max_new_tokens": 5}, 5, id="both"),
        pytest.param({}, 20, id="neither"),
        pytest.param({"max_new_tokens": None}, 20, id="none"),
    ],
)
def test_the_length_that_is_asked_for(model: Any, options: dict[str, Any], new: int) -> None:
    assert model.generate(PROMPT, **options).shape == (1, 7 + new)


def test_a_length_in_the_call_goes_before_the_other_in_the_checkpoint(model: Any) -> None:
    config = GenerationConfig(max_new_tokens=30)
    assert model.generate(PROMPT, config, max_length=12).shape == (1, 12)
    config = GenerationConfig(max_length=30)
    assert model.generate(PROMPT, config, max_new_tokens=2).shape == (1, 9)


def test_arguments_go_before_the_config_and_that_before_the_checkpoint() -> None:
    model, _ = lively()
    free = greedy(model, PROMPT)[0]
    last = first_seen(free, 3)
    model.generation_config = GenerationConfig(max_new_tokens=12, eos_token_id=free[last])
    assert model.generate(PROMPT).shape == (1, 7 + last + 1)
    # What the given config leaves open is as in the checkpoint.
    assert model.generate(PROMPT, GenerationConfig(max_new_tokens=20)).shape == (1, 7 + last + 1)
    longer = GenerationConfig(max_new_tokens=20, eos_token_id=[])
    assert model.generate(PROMPT, longer).shape == (1, 27)
    assert model.generate(PROMPT, generation_config=longer, max_new_tokens=4).shape == (1, 11)


def test_a_default_that_is_spelt_out_goes_before_the_checkpoint() -> None:
    model, _ = lively()
    expected = greedy(model, PROMPT)
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, top_k=0)
    given = GenerationConfig(do_sample=False, max_new_tokens=24)
    assert model.generate(PROMPT, given)[:, 7:].tolist() == expected
    assigned = GenerationConfig(do_sample=False)
    assigned.max_new_tokens = 3
    assert model.generate(PROMPT, assigned)[:, 7:].tolist() == [expected[0][:3]]


# -- what goes in ----------------------------------------------------------------------------


def test_a_batch_encoding_goes_in_whole_or_unpacked(model: Any) -> None:
    batch = BatchEncoding({"input_ids": RIGHT, "attention_mask": (RIGHT != 0).long()})
    expected = model.generate(RIGHT, attention_mask=RIGHT != 0)
    assert torch.equal(model.generate(batch), expected)
    assert torch.equal(model.generate(**batch), expected)
    assert not torch.equal(model.generate(RIGHT), expected)


def test_any_integer_dtype_goes_in(model: Any) -> None:
    expected = model.generate(PROMPT, repetition_penalty=1.2)
    assert torch.equal(model.generate(PROMPT.int(), repetition_penalty=1.2), expected)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        pytest.param([], {}, "no prompt; give inputs", id="nothing"),
        pytest.param([[1, 2]], {}, "input_ids is a list.*return_tensors='pt'", id="list"),
        pytest.param([{"input_ids": [[1]]}], {}, "input_ids is a list", id="batch-of-lists"),
        pytest.param([PROMPT[0]], {}, r"shape \(7,\).*\(batch, tokens\)", id="one-axis"),
        pytest.param([PROMPT[:, :0]], {}, r"shape \(1, 0\).*empty", id="empty"),
        pytest.param([PROMPT], {"input_ids": PROMPT}, "two names", id="twice"),
        pytest.param([{"ids": PROMPT}], {}, "it has to have input_ids", id="other-key"),
        pytest.param([PROMPT.float()], {}, "of integers", id="float"),
        pytest.param([PROMPT + 2], {}, r"input_ids\[0, 3\] is 101.*ids 0 to 100", id="too-large"),
        pytest.param([PROMPT - 4], {}, r"input_ids\[0, 2\] is -1", id="negative"),
        pytest.param([PROMPT], {"attention_mask": PROMPT[:, :2]}, "the same", id="mask-shape"),
        pytest.param([PROMPT], {"attention_mask": [[1] * 7]}, "is a list", id="mask-list"),
        pytest.param(
            [PROMPT], {"attention_mask": PROMPT * 0}, "without a single token", id="mask-empty"
        ),
        pytest.param([PROMPT], {"max_length": 7}, "max_length=7 counts", id="max-length"),
        pytest.param([PROMPT], {"num_return_sequences": 2}, "set do_sample=True", id="copies"),
        pytest.param([PROMPT], {"max_tokens": 3}, "did you mean 'max_", id="unknown"),
        pytest.param([PROMPT], {"temprature": 3}, "did you mean 'temperature'", id="misspelt"),
        pytest.param([PROMPT], {"num_beam_groups": 4}, "=4: group beam search is not", id="groups"),
        pytest.param([PROMPT], {"max_new_tokens": 0}, "max_new_tokens=0 has to be", id="zero"),
        pytest.param([PROMPT], {"top_p": 2.0}, "top_p=2.0 has to be", id="top-p"),
    ],
)
def test_bad_input_is_named(model: Any, arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(*arguments, **options)


def test_a_prompt_as_long_as_the_context_is_refused_with_both_numbers() -> None:
    model, _ = lively({"max_position_embeddings": 16})
    for length in (16, 40):
        with pytest.raises(ContextLengthError, match=rf"{length} tokens.*context is 16"):
            model.generate(torch.ones(1, length, dtype=torch.long), max_new_tokens=1)
    assert model.generate(torch.ones(1, 15, dtype=torch.long), max_new_tokens=1).shape == (1, 16)


def test_more_than_the_context_holds_is_cut_with_a_warning() -> None:
    model, _ = lively({"max_position_embeddings": 16})
    with pytest.warns(UserWarning, match="7 and 50 new tokens do not fit.* 16; at most 9") as told:
        assert model.generate(PROMPT, max_new_tokens=50).shape == (1, 16)
    assert told[0].filename == __file__


def test_a_sampling_option_without_sampling_is_told(model: Any) -> None:
    with pytest.warns(UserWarning, match="temperature=0.7 has no effect") as told:
        model.generate(PROMPT, temperature=0.7, max_new_tokens=1)
    assert told[0].filename == __file__
    model.generate(PROMPT, temperature=1.0, top_p=1.0, max_new_tokens=1)


def test_no_graph_is_kept(model: Any) -> None:
    assert not model.generate(PROMPT, max_new_tokens=2).requires_grad
    assert torch.is_grad_enabled()


def test_more_tokens_at_least_than_there_is_room_for() -> None:
    model = Qwen2ForCausalLM(small_config()).eval()
    with pytest.raises(InputError, match="min_new_tokens=9 and there is room for 4"):
        model.generate(torch.tensor([[1]]), max_new_tokens=4, min_new_tokens=9)
    with pytest.raises(InputError, match=r"eos_token_id=101 is outside .* 0 to 100"):
        model.generate(torch.tensor([[1]]), min_new_tokens=2, eos_token_id=101)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"penalty_alpha": 0.6}, "penalty_alpha=0.6: contrastive search is not in this version"),
        ({"dola_layers": "high"}, "dola_layers='high': contrasting layers is not in this version"),
        ({"generation_config": {"top_k": 3}}, "a dict; it has to be quintet's"),
    ],
    ids=["contrastive", "dola", "config"],
)
def test_what_is_not_here_yet_is_said(options: dict[str, Any], words: str) -> None:
    model = Qwen2ForCausalLM(small_config()).eval()
    with pytest.raises(InputError, match=words):
        model.generate(torch.tensor([[1]]), **options)


def test_asking_for_nothing_of_what_is_not_here_is_fine() -> None:
    model = Qwen2ForCausalLM(small_config()).eval()
    plain = model.generate(torch.tensor([[1]]), max_new_tokens=3)
    idle = {"num_beam_groups": 1, "custom_generate": None, "diversity_penalty": 0.0}
    assert torch.equal(model.generate(torch.tensor([[1]]), max_new_tokens=3, **idle), plain)
