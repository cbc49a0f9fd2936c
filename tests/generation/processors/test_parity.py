"""Every processor gives what that of Transformers gives, on logits and options drawn at random."""

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process

import quintet
from quintet.generation import processors as ours

V = 37
QUICK = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)


def shares(least: float, most: float) -> st.SearchStrategy[float]:
    return st.floats(least, most, allow_nan=False)


def logits_of(seed: int, rows: int = 4) -> Tensor:
    """Logits of many kinds: spread, flat, with tokens already forbidden."""
    torch.manual_seed(seed)
    scale = torch.tensor([0.01, 1.0, 5.0, 20.0])[torch.randint(0, 4, (rows, 1))]
    logits = torch.randn(rows, V) * scale
    banned = (torch.rand(rows, V) < 0.3) & (torch.rand(rows, 1) < 0.5)
    return logits.masked_fill(banned, -torch.inf)


def assert_same(mine: Any, other: Any, ids: Tensor, logits: Tensor) -> None:
    before = logits.clone()
    made = mine(ids, logits)
    assert torch.equal(logits, before), "what is given is changed"
    told = other(ids, logits.clone())
    torch.testing.assert_close(made, told, rtol=1e-6, atol=1e-6)
    assert torch.equal(made.isneginf(), told.isneginf())


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return getattr(ours, name)(*args, **kwargs), getattr(logits_process, name)(*args, **kwargs)


# -- warpers ---------------------------------------------------------------------------------

WARPERS: dict[str, st.SearchStrategy[Any]] = {
    "TemperatureLogitsWarper": shares(0.05, 5.0),
    "TopKLogitsWarper": st.integers(1, 2 * V),
    "TopPLogitsWarper": shares(0.01, 1.0),
    "MinPLogitsWarper": shares(0.0, 1.0),
    "TypicalLogitsWarper": shares(0.01, 0.99),
    "EpsilonLogitsWarper": shares(0.001, 0.5),
    "EtaLogitsWarper": shares(0.001, 0.5),
    "TopHLogitsWarper": shares(0.01, 0.9),
}


@pytest.mark.parametrize("name", WARPERS)
@QUICK
@given(data=st.data())
def test_warpers(name: str, data: st.DataObject) -> None:
    further = {}
    if name not in ("TemperatureLogitsWarper", "TopHLogitsWarper"):
        further["min_tokens_to_keep"] = data.draw(st.integers(1, 5))
    mine, other = pair(name, data.draw(WARPERS[name]), **further)
    logits = logits_of(data.draw(seeds))
    if name == "TopHLogitsWarper":
        # The entropy of a distribution that is nearly one token is all rounding.
        logits = logits / 6
    assert_same(mine, other, torch.zeros(4, 1).long(), logits)


@QUICK
@given(seed=seeds)
def test_what_takes_no_options(seed: int) -> None:
    ids, logits = torch.zeros(4, 1).long(), logits_of(seed)
    assert_same(*pair("LogitNormalization"), ids, logits)
    logits[0, 3], logits[1, 2] = torch.nan, torch.inf
    mine, other = pair("InfNanRemoveLogitsProcessor")
    assert torch.equal(mine(ids, logits), other(ids, logits))


# -- what reads the text ---------------------------------------------------------------------


def texts(seed: int, length: int) -> Tensor:
    """Few different tokens, so that they repeat."""
    torch.manual_seed(seed)
    return torch.randint(0, 6, (4, length))


lengths = st.integers(1, 12)


@QUICK
@given(seed=seeds, length=lengths, penalty=shares(0.1, 3.0), ignored=st.none() | st.integers(0, 9))
def test_repetition_penalty(seed: int, length: int, penalty: float, ignored: int | None) -> None:
    ids = texts(seed, length)
    mine, other = pair("RepetitionPenaltyLogitsProcessor", penalty, ignored)
    assert_same(mine, other, ids, logits_of(seed))
    rows = torch.randint(0, length + 1, (4,))
    mine, other = pair("RepetitionPenaltyLogitsProcessor", penalty, rows)
    assert_same(mine, other, ids, logits_of(seed))
    # Padding is what they call ignored.
    padded = ours.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits_of(seed), padding=rows)
    assert torch.equal(padded, mine(ids, logits_of(seed)))


@QUICK
@given(seed=seeds, length=lengths, penalty=shares(0.1, 3.0), n=st.integers(1, 4))
def test_of_the_prompt(seed: int, length: int, penalty: float, n: int) -> None:
    ids, prompt = texts(seed, length), texts(seed + 1, 8)
    assert_same(
        *pair("EncoderRepetitionPenaltyLogitsProcessor", penalty, prompt), ids, logits_of(seed)
    )
    assert_same(*pair("EncoderNoRepeatNGramLogitsProcessor", n, prompt), ids, logits_of(seed))
    # Two rows belong to each prompt.
    assert_same(*pair("EncoderNoRepeatNGramLogitsProcessor", n, prompt[:2]), ids, logits_of(seed))


@QUICK
@given(seed=seeds, length=lengths, n=st.integers(1, 5))
def test_no_repeated_ngrams(seed: int, length: int, n: int) -> None:
    assert_same(*pair("NoRepeatNGramLogitsProcessor", n), texts(seed, length), logits_of(seed))


sequences = st.lists(st.integers(0, 5), min_size=1, max_size=3)


@QUICK
@given(
    seed=seeds,
    length=lengths,
    biases=st.lists(
        st.tuples(sequences, st.floats(-5, 5)),
        min_size=1,
        max_size=5,
        unique_by=lambda x: str(x[0]),
    ),
)
def test_sequence_bias(seed: int, length: int, biases: list[tuple[list[int], float]]) -> None:
    ids, logits = texts(seed, length), logits_of(seed)
    as_list = [[tokens, bias] for tokens, bias in biases]
    assert_same(*pair("SequenceBiasLogitsProcessor", as_list), ids, logits)
    as_dict = {tuple(tokens): bias for tokens, bias in biases}
    assert_same(*pair("SequenceBiasLogitsProcessor", as_dict), ids, logits)


@QUICK
@given(
    seed=seeds,
    length=lengths,
    words=st.lists(sequences, min_size=1, max_size=5),
    ends=st.sampled_from([6, [6, 7]]),
)
def test_bad_words(seed: int, length: int, words: list[list[int]], ends: Any) -> None:
    words = [*words, [6]]
    mine, other = pair("NoBadWordsLogitsProcessor", words, ends)
    assert_same(mine, other, texts(seed, length), logits_of(seed))


@QUICK
@given(
    seed=seeds,
    length=lengths,
    at=st.integers(0, 14),
    ends=st.sampled_from([3, [3], [3, 30]]),
    factor=shares(0.5, 2.0),
)
def test_lengths(seed: int, length: int, at: int, ends: Any, factor: float) -> None:
    ids, logits = texts(seed, length), logits_of(seed)
    for mine, other in (
        pair("MinLengthLogitsProcessor", at, ends),
        pair("MinNewTokensLengthLogitsProcessor", 2, at, ends),
        pair("ForcedBOSTokenLogitsProcessor", 5),
        pair("ForcedEOSTokenLogitsProcessor", at, ends),
        pair("ExponentialDecayLengthPenalty", (at, factor), ends, 1),
        pair("SuppressTokensAtBeginLogitsProcessor", [1, 5], at),
        pair("SuppressTokensLogitsProcessor", [1, 5]),
    ):
        assert_same(mine, other, ids, logits)
        rows = torch.tensor([0, 1, 0, 2]).clamp(max=length - 1)
        if "padding" in mine.__call__.__code__.co_varnames:
            # A padded row is as the text alone.
            together = mine(ids, logits, padding=rows)
            for row, empty in enumerate(rows.tolist()):
                alone = mine(ids[row : row + 1, empty:], logits[row : row + 1])
                assert torch.equal(together[row], alone[0])


@QUICK
@given(seed=seeds, length=lengths, beams=st.sampled_from([1, 2, 4]))
def test_prefixes(seed: int, length: int, beams: int) -> None:
    def allowed(row: int, ids: Tensor) -> list[int]:
        return [row, int(ids[-1]), 7 + len(ids) % 3]

    mine, other = pair("PrefixConstrainedLogitsProcessor", allowed, beams)
    logits = logits_of(seed)
    assert_same(mine, other, texts(seed, length), logits)
    assert_same(mine, other, texts(seed, length), torch.full_like(logits, -torch.inf))


@pytest.mark.parametrize("scheme", ["lefthash", "selfhash"])
@pytest.mark.parametrize("width", [1, 3])
def test_watermarks(scheme: str, width: int) -> None:
    options = {"seeding_scheme": scheme, "context_width": width, "bias": 1.5}
    mine, other = pair("WatermarkLogitsProcessor", 101, "cpu", 0.3, **options)
    for length in (1, 2, 5):
        logits = torch.randn(4, 101)
        assert_same(mine, other, texts(length, length), logits)


# -- penalties that Transformers does not have -------------------------------------------------


def test_presence_and_frequency_count_what_was_generated() -> None:
    ids = torch.tensor([[9, 1, 1, 2], [0, 3, 3, 3]])
    logits, padding = torch.zeros(2, 10), torch.tensor([0, 1])
    presence = ours.PresencePenaltyLogitsProcessor(0.5, torch.tensor([1, 1]))
    frequency = ours.FrequencyPenaltyLogitsProcessor(0.5, torch.tensor([1, 1]))
    once = presence(ids, logits, padding=padding)
    assert {tuple(x): float(once[tuple(x)]) for x in once.nonzero().tolist()} == {
        (0, 1): -0.5,
        (0, 2): -0.5,
        (1, 3): -0.5,
    }
    often = frequency(ids, logits, padding=padding)
    assert {tuple(x): float(often[tuple(x)]) for x in often.nonzero().tolist()} == {
        (0, 1): -1.0,
        (0, 2): -0.5,
        (1, 3): -1.0,
    }


# -- what they refuse, and names ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("TemperatureLogitsWarper", (0.0,)),
        ("TopKLogitsWarper", (0,)),
        ("TopPLogitsWarper", (1.5,)),
        ("MinPLogitsWarper", (-0.1,)),
        ("TypicalLogitsWarper", (1.0,)),
        ("EpsilonLogitsWarper", (0.0,)),
        ("EtaLogitsWarper", (1.0,)),
        ("TopHLogitsWarper", (0.0,)),
        ("TopPLogitsWarper", (0.5, -torch.inf, 0)),
        ("RepetitionPenaltyLogitsProcessor", (0.0,)),
        ("RepetitionPenaltyLogitsProcessor", (1.0, -1)),
        ("NoRepeatNGramLogitsProcessor", (0,)),
        ("EncoderNoRepeatNGramLogitsProcessor", (0, torch.zeros(1, 2).long())),
        ("MinLengthLogitsProcessor", (-1, 3)),
        ("ForcedEOSTokenLogitsProcessor", (3, -1)),
        ("NoBadWordsLogitsProcessor", ([],)),
        ("NoBadWordsLogitsProcessor", ([[-1]],)),
        ("SequenceBiasLogitsProcessor", ({3: 1.0},)),
        ("SequenceBiasLogitsProcessor", ([[[-1], 1.0]],)),
        ("WatermarkLogitsProcessor", (9, "cpu", 1.0)),
    ],
)
def test_both_refuse(name: str, args: Any) -> None:
    with pytest.raises(ValueError, match="has to "):
        getattr(ours, name)(*args)
    with pytest.raises((ValueError, TypeError)):
        getattr(logits_process, name)(*args)


def test_every_processor_of_decoders_is_there() -> None:
    elsewhere = {
        "AlternatingCodebooksLogitsProcessor",  # sound
        "ClassifierFreeGuidanceLogitsProcessor",  # sound
        "WhisperTimeStampLogitsProcessor",  # speech
        "LinearTemperatureScheduleLogitsProcessor",  # diffusion
        "SynthIDTextWatermarkLogitsProcessor",
    }
    theirs = {
        name
        for name in dir(transformers)
        if name.endswith(("LogitsProcessor", "LogitsWarper", "LogitsProcessorList"))
    }
    theirs |= {"ExponentialDecayLengthPenalty", "LogitNormalization"}
    assert theirs - elsewhere <= set(quintet.__all__)
