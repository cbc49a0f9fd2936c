"""What `return_dict_in_generate` returns, against Transformers on the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import FAMILIES, Family
from quintet import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from quintet.errors import InputError

NEW = 5
EVERYTHING = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
}
# Rows of 7 and 4 tokens; the first is the longest, so that columns are slots in it.
MASK = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any, Tensor]:
    family: Family = request.param
    torch.manual_seed(1)
    changes = {"initializer_range": 0.2, "eos_token_id": None, "pad_token_id": 0}
    ours, theirs = family.twins(
        "ForCausalLM", {**family.variants[family.thorough[0]], **changes}, "eager"
    )
    torch.manual_seed(0)
    return ours, theirs, torch.randint(1, 101, (2, 7))


def close(mine: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_greedy_outputs(pair: tuple[Any, Any, Tensor], padded: bool) -> None:
    ours, theirs, ids = pair
    options = {
        "attention_mask": MASK if padded else torch.ones_like(ids),
        "max_new_tokens": NEW,
        "repetition_penalty": 1.3,
        "do_sample": False,
        **EVERYTHING,
    }
    made, told = ours.generate(ids, **options), theirs.generate(ids, **options)
    assert isinstance(made, GenerateDecoderOnlyOutput)
    assert list(made) == list(told)
    assert made.sequences.tolist() == told.sequences.tolist()
    assert made[0] is made["sequences"]
    for name in ("scores", "logits"):
        assert len(made[name]) == NEW
        for mine, other in zip(made[name], told[name], strict=True):
            close(mine, other)
    assert not torch.equal(made.scores[0], made.logits[0])
    for step in range(NEW):
        assert len(made.hidden_states[step]) == len(told.hidden_states[step])
        for mine, other in zip(made.hidden_states[step], told.hidden_states[step], strict=True):
            assert mine.shape == other.shape
            # What there is at padding means nothing.
            kept = MASK.bool() if padded and step == 0 else slice(None)
            close(mine[kept], other[kept])
        for mine, other in zip(made.attentions[step], told.attentions[step], strict=True):
            assert mine.shape == other.shape
            if padded and step == 0:
                close(mine[0], other[0])
                close(mine[1, :, 3:], other[1, :, 3:])
            else:
                close(mine, other)
    assert made.past_key_values.get_seq_length() == ids.shape[1] + NEW - 1
    for normalize in (False, True):
        close(
            ours.compute_transition_scores(made.sequences, made.scores, normalize_logits=normalize),
            theirs.compute_transition_scores(
                told.sequences, told.scores, normalize_logits=normalize
            ),
        )


def test_outputs_of_beams_have_the_shapes_of_transformers(pair: tuple[Any, Any, Tensor]) -> None:
    ours, theirs, ids = pair
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": NEW,
        "num_beams": 3,
        "do_sample": False,
        **EVERYTHING,
    }
    made, told = ours.generate(ids, **options), theirs.generate(ids, **options)
    assert isinstance(made, GenerateBeamDecoderOnlyOutput)
    assert list(made) == list(told)
    for name in ("attentions", "hidden_states"):
        for mine, other in zip(made[name], told[name], strict=True):
            for layer, expected in zip(mine, other, strict=True):
                close(layer, expected)


@pytest.mark.parametrize("asked", ["scores", "logits", "attentions", "hidden_states", ""])
def test_only_what_is_asked_for_is_there(pair: tuple[Any, Any, Tensor], asked: str) -> None:
    ours, _, ids = pair
    options = {f"output_{asked}": True} if asked else {}
    out = ours.generate(ids, max_new_tokens=2, return_dict_in_generate=True, **options)
    assert set(out) == {"sequences", "past_key_values", *([asked] if asked else [])}
    without = ours.generate(ids, max_new_tokens=2, return_dict_in_generate=True, use_cache=False)
    assert set(without) == {"sequences"}
    assert torch.equal(without.sequences, out.sequences)


def test_logits_are_those_before_a_processor_that_writes_into_them(
    pair: tuple[Any, Any, Tensor],
) -> None:
    def forbidding(ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, :50] = -torch.inf
        return scores

    ours, _, ids = pair
    out = ours.generate(ids, max_new_tokens=2, logits_processor=[forbidding], **EVERYTHING)
    assert bool(out.sequences[:, 7:].ge(50).all())
    plain = ours.generate(ids, max_new_tokens=1, **EVERYTHING)
    assert torch.equal(out.logits[0], plain.logits[0])
    assert bool(out.scores[0][:, :50].isneginf().all())


def test_outputs_that_nobody_gets_are_told(pair: tuple[Any, Any, Tensor]) -> None:
    ours, _, ids = pair
    with pytest.warns(UserWarning, match="output_scores=True has no effect without return_dict"):
        ours.generate(ids, max_new_tokens=1, output_scores=True)
    with pytest.raises(InputError, match="there are no scores; call generate"):
        ours.compute_transition_scores(ids, ())


@pytest.mark.parametrize("wrong", [None, 3, "x", [3], ["x"]])
def test_scores_are_of_what_was_generated(pair: tuple[Any, Any, Tensor], wrong: Any) -> None:
    ours, _, ids = pair
    for given in ((ids, wrong), (wrong, (torch.zeros(1, 3),))):
        with pytest.raises(InputError, match="generate"):
            ours.compute_transition_scores(*given)
