"""Beam search and beam sampling, against Transformers on the same weights."""

import itertools
from typing import Any

import pytest
import torch

from conformance.families import FAMILIES, Family
from quintet import QuantizedCache
from quintet.errors import InputError
from support import twins

PAD = 100
# Rows of 9, 5 and 7 tokens.
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] * 2 + [1] * 7])
SEARCHES = [
    {},
    {"length_penalty": -0.5, "early_stopping": True},
    {"length_penalty": 2.0, "early_stopping": "never"},
    {"length_penalty": 0.0, "early_stopping": "never", "num_beams": 2, "num_return_sequences": 2},
]
CACHES: list[dict[str, Any]] = [
    {},
    {"cache_implementation": "static"},
    {"cache_implementation": "offloaded"},
    {"use_cache": False},
]


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any, torch.Tensor, list[int]]:
    """A model of each, ids, and end tokens that greedy decoding meets."""
    family: Family = request.param
    torch.manual_seed(1)
    changes = {"initializer_range": 0.2, "eos_token_id": None, "pad_token_id": 0}
    variant = family.variants[family.thorough[0]]
    ours, theirs = family.twins("ForCausalLM", {**variant, **changes}, "sdpa")
    torch.manual_seed(0)
    ids = torch.randint(1, 101, (3, 9))
    free = theirs.generate(
        ids, attention_mask=MASK, max_new_tokens=12, do_sample=False, pad_token_id=1
    )
    return ours, theirs, ids, sorted({int(free[0, 12]), int(free[1, 14]), int(free[2, 11])})


def searched(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    usual = {
        "attention_mask": MASK,
        "max_new_tokens": 12,
        "num_beams": 4,
        "num_return_sequences": 3,
        "pad_token_id": PAD,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    return model.generate(ids, **{**usual, **options})


@pytest.mark.parametrize("options", SEARCHES, ids=str)
@pytest.mark.parametrize("ends", [False, True], ids=["endless", "ending"])
def test_the_sequences_are_those_of_transformers(
    pair: tuple[Any, ...], options: dict[str, Any], ends: bool
) -> None:
    ours, theirs, ids, eos = pair
    told = searched(theirs, ids, eos_token_id=eos if ends else None, **options)
    for kind in CACHES if ends else CACHES[:1]:
        made = searched(ours, ids, eos_token_id=eos if ends else [], **options, **kind)
        assert made.sequences.tolist() == told.sequences.tolist(), kind
        assert made.beam_indices.tolist() == told.beam_indices.tolist(), kind
        torch.testing.assert_close(
            made.sequences_scores, told.sequences_scores, rtol=1e-4, atol=1e-4
        )
        assert len(made.scores) == len(made.logits) == len(told.scores)
        for mine, other in itertools.chain(
            zip(made.scores, told.scores, strict=True), zip(made.logits, told.logits, strict=True)
        ):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
        scores = ours.compute_transition_scores(made.sequences, made.scores, made.beam_indices)
        expected = theirs.compute_transition_scores(told.sequences, told.scores, told.beam_indices)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_a_search_on_a_quantised_cache(pair: tuple[Any, ...]) -> None:
    """Beams change places in it, and their scores are those of their texts in one pass."""
    ours, _, ids, _ = pair
    options = {"cache_dtype": "int8", "eos_token_id": [], "length_penalty": 0.0}
    made = searched(ours, ids, **options)
    for row, score in enumerate(made.sequences_scores):
        kept = made.sequences[row][torch.cat((MASK[row // 3].bool(), torch.ones(12) > 0))][None]
        with torch.no_grad():
            logits = ours(kept, past_key_values=QuantizedCache(ours.config, 8)).logits
            logs = logits[0, -13:-1].log_softmax(dim=-1)
        total = logs[torch.arange(12), kept[0, -12:]].sum()
        assert float(score) == pytest.approx(float(total), rel=1e-3)


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    torch.manual_seed(1)
    return twins("Qwen2ForCausalLM", {"vocab_size": 23, "initializer_range": 0.3})


PROMPT = torch.tensor([[5, 17, 3, 8], [4, 4, 9, 2]])


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 4},
        {"bad_words_ids": [[1], [2, 3]], "sequence_bias": [[[4, 5], 2.0]]},
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(row, 20 - len(ids) % 3))},
        {"forced_eos_token_id": 7, "renormalize_logits": True},
        {"exponential_decay_length_penalty": (3, 1.2), "suppress_tokens": [3, 4]},
        {"begin_suppress_tokens": [1, 2, 3, 4, 5], "encoder_no_repeat_ngram_size": 2},
        {"max_length": 9},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_in_a_search(small: tuple[Any, Any], options: dict[str, Any]) -> None:
    usual = {"attention_mask": torch.ones_like(PROMPT), "num_beams": 3, "num_return_sequences": 2}
    usual |= {"eos_token_id": [0, 6], "pad_token_id": 22}
    usual |= {} if "max_length" in options else {"max_new_tokens": 10}
    made, told = (model.generate(PROMPT, **usual, **options) for model in small)
    assert made.tolist() == told.tolist()
    plain = small[0].generate(PROMPT, **{"max_new_tokens": 10, **usual})
    assert made.tolist() != plain.tolist()


def test_criteria_of_the_callers_end_beams(small: tuple[Any, Any]) -> None:
    def twice(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return ids[:, -1] % 5 == 0

    usual = {"attention_mask": torch.ones_like(PROMPT), "num_beams": 3, "max_new_tokens": 8}
    usual |= {"eos_token_id": 6, "pad_token_id": 22, "stopping_criteria": [twice]}
    made, told = (model.generate(PROMPT, **usual) for model in small)
    assert made.tolist() == told.tolist()


def test_sampled_beams_follow_transformers_distribution(small: tuple[Any, Any]) -> None:
    options = {"num_beams": 2, "do_sample": True, "top_k": 6, "max_new_tokens": 2}
    options |= {"temperature": 6.0, "eos_token_id": 6, "pad_token_id": 22}
    options |= {"num_return_sequences": 1}
    ids = PROMPT[:1].expand(4000, -1)
    counts = []
    for model in small:
        torch.manual_seed(3)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 4:]
        counts.append(torch.bincount(out[:, 0] * 23 + out[:, 1], minlength=23 * 23).float())
    both = counts[0] + counts[1]
    likely = both >= 10
    assert int(likely.sum()) > 10
    chi = float(((counts[0] - counts[1]) ** 2 / both)[likely].sum())
    freedom = int(likely.sum())
    assert chi < freedom + 4 * (2 * freedom) ** 0.5


def test_sampled_beams_of_a_row_depend_on_its_generator_alone(small: tuple[Any, Any]) -> None:
    def drawn(ids: torch.Tensor, seeds: list[int]) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        out = small[0].generate(
            ids, do_sample=True, num_beams=3, max_new_tokens=6, generator=generators
        )
        return [row[4:].tolist() for row in out]

    together = drawn(PROMPT, [3, 4])
    assert drawn(PROMPT[1:], [4]) == together[1:]
    assert drawn(PROMPT, [5, 4])[1] == together[1]
    assert drawn(PROMPT[1:], [5]) != together[1:]


def test_a_search_goes_on_from_a_cache(small: tuple[Any, Any]) -> None:
    model = small[0]
    cache = model(PROMPT[:, :3], use_cache=True).past_key_values
    options = {"num_beams": 3, "max_new_tokens": 6}
    again = model.generate(PROMPT, past_key_values=cache, **options)
    assert again.tolist() == model.generate(PROMPT, **options).tolist()


def test_more_candidates_than_there_are_tokens(small: tuple[Any, Any]) -> None:
    out = small[0].generate(PROMPT, num_beams=20, max_new_tokens=3, num_return_sequences=20)
    assert out.shape == (40, 7)
    assert len({tuple(row) for row in out[:20].tolist()}) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2, "num_return_sequences": 3}, "=3 is more than the num_beams=2"),
        ({"num_beams": 2, "streamer": object()}, "with num_beams=2 none is before the end"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping='soon' has to be True or"),
        ({"num_beams": 0}, "num_beams=0"),
    ],
)
def test_what_does_not_go_together(
    small: tuple[Any, Any], options: dict[str, Any], message: str
) -> None:
    class Streamer:
        def put(self, value: torch.Tensor) -> None: ...

        def end(self) -> None: ...

    if "streamer" in options:
        options = {**options, "streamer": Streamer()}
    with pytest.raises(InputError, match=message):
        small[0].generate(PROMPT, **options)


def test_beam_options_without_beams_are_told(small: tuple[Any, Any]) -> None:
    with pytest.warns(UserWarning, match="length_penalty=2.0 has no effect without num_beams"):
        small[0].generate(PROMPT, length_penalty=2.0, max_new_tokens=1)
